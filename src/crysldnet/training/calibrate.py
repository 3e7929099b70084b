"""Calibrate uncertainties after training and store the result with the model.

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
from crysldnet.models.predictor import TargetModel, predict
from crysldnet.models.targets import TargetType
from crysldnet.training import plots

if TYPE_CHECKING:
    from crysldnet.data.datamodule import CrystalDataModule


@dataclass(frozen=True)
class UncertaintyInfo:
    """Uncertainty data in a model file.

    Attributes:
        calibration: calibration of the errors.
        training_set: statistics of the training set.
    """

    calibration: Calibration
    training_set: TrainingSet

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store, with their prefixes."""
        parts = {"calibration.": self.calibration.tensors(), "training_set.": self.training_set.tensors()}
        return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


@dataclass(frozen=True)
class HeldOut:
    """Errors on held-out crystals.

    Attributes:
        errors: [n, T] prediction minus truth, for ``log`` targets of the logarithms; NaN if unknown and for classes.
        std: [n, T] raw standard deviations, NaN for targets without; None if no target has one.
    """

    errors: NDArray[np.float64]
    std: NDArray[np.float64] | None

    def of_target(self, place: int) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Return errors [n] and standard deviations [n] of one target, None if it has none."""
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
    """Calibrate a saved model or ensemble and store the result in a file.

    Args:
        files: ``model.safetensors`` of the M members, one for a single model.
        out: output file: the single model with its calibration, in the same folder, or ``calibration.safetensors`` for
            an ensemble.
        data: training data. Its calibration rows are used, and statistics of the training rows are stored.
        held_out: [M] held-out rows of each member, if they differ. Each row is then predicted only by its member, so
            the spread between members isn't calibrated.
        drawn: folder for plots; None for none.
        device: device for predicting.

    Returns:
        Results of :func:`crysldnet.artifacts.calibration.check` for each regression target.
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
    """Return a model's uncertainty data and calibration results.

    Args:
        model: the model, or a member of the ensemble.
        data: training data.
        found: errors on held-out crystals.
        drawn: folder for plots; None for none.
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
    """Read the uncertainty data of a model file or run folder; None for earlier versions."""
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
    """Return the joint errors of models on held-out crystals."""
    assert data.target_values is not None
    value, std, _ = predict(models, data.batches(rows, models[0].encoder.graph)).to(torch.float64)
    return errors_of(models[0].types, value.numpy(), None if std is None else std.numpy(), data.target_values[rows])


def errors_of(
    types: Sequence[TargetType], value: NDArray[np.float64], std: NDArray[np.float64] | None, true: NDArray[np.float64]
) -> HeldOut:
    """Return the errors of predictions [n, T], NaN if the true value is unknown."""
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
