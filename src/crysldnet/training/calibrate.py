"""After training: measure what predictions are worth, and keep it with the model.

Shapes: ``B`` crystals, ``T`` targets, ``M`` members of an ensemble.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crysldnet.artifacts import model_file
from crysldnet.artifacts.calibration import Calibration, TargetCalibration, check
from crysldnet.artifacts.ood import REMEMBERED, TrainingSet, catch_features
from crysldnet.console import SHOWN
from crysldnet.errors import CheckpointError
from crysldnet.models.ensemble import predict
from crysldnet.models.predictor import TargetModel
from crysldnet.models.targets import TargetType
from crysldnet.training import plots

if TYPE_CHECKING:
    from crysldnet.data.datamodule import CrystalDataModule


@dataclass(frozen=True)
class UncertaintyInfo:
    """What a model's file says beside its weights.

    Attributes:
        calibration: of its errors.
        training_set: what it was trained on.
    """

    calibration: Calibration
    training_set: TrainingSet

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file keeps, each with its prefix."""
        parts = {"calibration.": self.calibration.tensors(), "training_set.": self.training_set.tensors()}
        return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


@dataclass(frozen=True)
class HeldOut:
    """Errors on crystals that weren't trained on.

    Attributes:
        errors: [n, T] prediction less truth, of ``log`` targets of their logarithms; NaN where it isn't known and for
            classes.
        std: [n, T] likewise, as the model gave them, NaN for targets without; None where no target has one.
    """

    errors: NDArray[np.float64]
    std: NDArray[np.float64] | None

    def of_target(self, place: int) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Return errors [n] and standard deviations [n] of one target, None where it has none."""
        std = None if self.std is None else self.std[:, place]
        return self.errors[:, place], None if std is None or np.isnan(std).all() else std


def calibrate(
    files: Sequence[Path],
    out: Path,
    data: CrystalDataModule,
    *,
    held_out: Sequence[NDArray[np.int64]] | None = None,
    drawn: Path | None = None,
    device: str = "cpu",
) -> dict[str, dict[str, float]]:
    """Calibrate a model that is written, or an ensemble, and keep the outcome in a file.

    Args:
        files: ``model.safetensors`` of the M members, one for a single model.
        out: the file to write: the single model with all that is known of it, in the same folder, or
            ``calibration.safetensors`` for an ensemble.
        data: what it was trained on. Its calibration rows serve, and the training rows are remembered.
        held_out: [M] the rows that each member wasn't trained on, where these aren't the same for all. Each of those
            rows is then predicted by its member alone, so the spread between the members isn't calibrated.
        drawn: the folder of plots, None for none.
        device: to compute on.

    Returns:
        For each regression what :func:`crysldnet.artifacts.calibration.check` finds.
    """
    models = [model_file.load_property_model(file)[0].to(device) for file in files]
    if held_out is None:
        found = held_out_errors(models, data, data.calibration_rows)
    else:
        parts = [held_out_errors([model], data, rows) for model, rows in zip(models, held_out, strict=True)]
        found = HeldOut(np.concatenate([part.errors for part in parts]), None)
    known, checks = learn(models[0], data, found, drawn)
    state: dict[str, Tensor] = {}
    seen = None
    info: dict[str, Any] = {"members": [file.parent.name for file in files], "targets": data.targets}
    if out.parent == files[0].parent:
        info, state = model_file.read(files[0], "property_model")
        seen = model_file.read_pretraining_set(files[0], "property_model")
        info = {key: value for key, value in info.items() if key not in ("format_version", "kind")}
    info["calibration"] = checks
    model_file.write(out, "property_model" if state else "calibration", {**state, **known.tensors()}, info, seen)
    return checks


def learn(
    model: TargetModel, data: CrystalDataModule, found: HeldOut, drawn: Path | None = None
) -> tuple[UncertaintyInfo, dict[str, dict[str, float]]]:
    """Return what is known of a model's errors and training set, and how well it is calibrated.

    Args:
        model: the model, or a member of the ensemble.
        data: what it was trained on.
        found: its errors on crystals that it wasn't trained on.
        drawn: the folder of plots, None for none.
    """
    known = Calibration(
        [
            TargetCalibration.of(*found.of_target(place), relative=kind.relative)
            for place, kind in enumerate(model.types)
        ]
    )
    numbers = [place for place, kind in enumerate(model.kinds) if kind == "regression"]
    if drawn is not None:
        for place in numbers[:SHOWN]:
            plots.reliability(*found.of_target(place), drawn, data.targets[place])
    checks = {data.targets[place]: check(*found.of_target(place)) for place in numbers}
    return UncertaintyInfo(known, _remember(model, data)), checks


def read_uncertainty_info(path: Path) -> UncertaintyInfo | None:
    """Read what the file of a model or the folder of a run keeps; None where that is of an earlier version."""
    kind: model_file.Kind = "property_model"
    if path.is_dir():
        own = path / "calibration.safetensors"
        path, kind = (own, "calibration") if own.exists() else (path / "model.safetensors", kind)
    if not path.exists():  # an ensemble that was never calibrated
        return None
    calibration = model_file.read_extra(path, kind, "calibration.")
    if not calibration:
        return None
    training_set = model_file.read_extra(path, kind, "training_set.")
    try:
        return UncertaintyInfo(Calibration.from_tensors(calibration), TrainingSet.from_tensors(training_set))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def held_out_errors(models: Sequence[TargetModel], data: CrystalDataModule, rows: NDArray[np.int64]) -> HeldOut:
    """Return the errors of models that predict together on crystals that they weren't trained on."""
    assert data.target_values is not None
    value, std, _ = predict(models, data.batches(rows, models[0].encoder.graph)).to(torch.float64)
    return errors_of(models[0].types, value.numpy(), None if std is None else std.numpy(), data.target_values[rows])


def errors_of(
    types: Sequence[TargetType], value: NDArray[np.float64], std: NDArray[np.float64] | None, true: NDArray[np.float64]
) -> HeldOut:
    """Return the errors of predictions [n, T] whose true values are NaN where unknown."""
    errors, std = value - true, None if std is None else std.copy()
    for place, kind in enumerate(types):
        if kind.kind != "regression":
            errors[:, place] = np.nan
        elif kind.relative:
            errors[:, place] = np.log(value[:, place] / true[:, place])
            if std is not None:
                std[:, place] /= value[:, place]
    return HeldOut(errors, std)


@torch.inference_mode()
def _remember(model: TargetModel, data: CrystalDataModule) -> TrainingSet:
    rows = data.rows["train"]
    some = np.sort(np.random.default_rng(0).permutation(rows)[:REMEMBERED])
    features = []
    with catch_features(model.encoder) as caught:
        for batch in data.batches(some, model.encoder.graph):
            batch = batch.to(model.std.device)
            model.encoder(batch)
            features.append(caught.of_crystals(batch).cpu())
    return TrainingSet.of(data.store.crystals.take(rows), torch.cat(features))
