"""After training: measure what predictions are worth, and keep it with the model.

Shapes: ``B`` crystals, ``T`` targets, ``M`` members of an ensemble.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crysldnet.data.batch import CrystalBatch, make_batch
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.stream import cut
from crysldnet.models.ensemble import combine
from crysldnet.models.head import Prediction, PropertyModel
from crysldnet.models.target import Log
from crysldnet.training import checkpoint, plots
from crysldnet.training.calibration import Calibration, TargetCalibration, check
from crysldnet.training.training_set import REMEMBERED, TrainingSet, catch_features

BATCH = (64, 4096)
"""Crystals and atoms of a batch."""


@dataclass(frozen=True)
class Knowledge:
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
        For each regression what :func:`crysldnet.training.calibration.check` finds.
    """
    models = [checkpoint.load_property_model(file)[0].to(device) for file in files]
    if held_out is None:
        found = _held_out(models, data, data.calibration_rows)
    else:
        parts = [_held_out([model], data, rows) for model, rows in zip(models, held_out, strict=True)]
        found = HeldOut(np.concatenate([part.errors for part in parts]), None)
    targets = range(len(data.targets))
    known = Knowledge(
        Calibration(
            [
                TargetCalibration.of(*found.of_target(place), relative=isinstance(kind, Log))
                for place, kind in enumerate(models[0].types)
            ]
        ),
        _remember(models[0], data),
    )
    state: dict[str, Tensor] = {}
    seen = None
    info: dict[str, Any] = {"members": [file.parent.name for file in files], "targets": data.targets}
    numbers = [place for place in targets if models[0].kinds[place] == "regression"]
    checks = {data.targets[place]: check(*found.of_target(place)) for place in numbers}
    if out.parent == files[0].parent:
        info, state = checkpoint.read(files[0], "property_model")
        seen = checkpoint.read_pretraining_set(files[0], "property_model")
        info = {key: value for key, value in info.items() if key not in ("format_version", "kind")}
    info["calibration"] = checks
    checkpoint.write(out, "property_model" if state else "calibration", {**state, **known.tensors()}, info, seen)
    if drawn is not None:
        for place in numbers:
            plots.reliability(*found.of_target(place), drawn, data.targets[place])
    return checks


def knowledge_of(path: Path) -> Knowledge | None:
    """Read what the file of a model or the folder of a run keeps; None where that is of an earlier version."""
    kind: checkpoint.Kind = "property_model"
    if path.is_dir():
        own = path / "calibration.safetensors"
        path, kind = (own, "calibration") if own.exists() else (path / "model.safetensors", kind)
    if not path.exists():  # an ensemble that was never calibrated
        return None
    calibration = checkpoint.read_extra(path, kind, "calibration.")
    if not calibration:
        return None
    training_set = checkpoint.read_extra(path, kind, "training_set.")
    return Knowledge(Calibration.from_tensors(calibration), TrainingSet.from_tensors(training_set))


def _batches(
    model: PropertyModel, data: CrystalDataModule, rows: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], CrystalBatch]]:
    for start, stop in cut(data.store.crystals.sizes[rows], *BATCH):
        part = rows[start:stop]
        batch = make_batch(data.store.crystals.take(part), model.encoder.graph)
        yield part, batch.to(next(model.parameters()).device)


@torch.inference_mode()
def _held_out(models: list[PropertyModel], data: CrystalDataModule, rows: NDArray[np.int64]) -> HeldOut:
    assert data.target_values is not None
    values, stds = [np.empty((0, len(data.targets)))], []
    for _, batch in _batches(models[0], data, rows):
        found = together(models, [model.predict(batch) for model in models])
        values.append(found.value.double().cpu().numpy())
        if found.std is not None:
            stds.append(found.std.double().cpu().numpy())
    value, true = np.concatenate(values), data.target_values[rows]
    errors, std = value - true, np.concatenate(stds) if stds else None
    for place, kind in enumerate(models[0].types):
        if kind.kind != "regression":
            errors[:, place] = np.nan
        elif isinstance(kind, Log):
            errors[:, place] = np.log(value[:, place] / true[:, place])
            if std is not None:
                std[:, place] /= value[:, place]
    return HeldOut(errors, std)


def together(models: Sequence[PropertyModel], predictions: Sequence[Prediction]) -> Prediction:
    """Return the prediction of an ensemble, or of the one model that there is."""
    return combine(predictions, models[0].types) if len(predictions) > 1 else predictions[0]


@torch.inference_mode()
def _remember(model: PropertyModel, data: CrystalDataModule) -> TrainingSet:
    rows = data.rows["train"]
    some = np.sort(np.random.default_rng(0).permutation(rows)[:REMEMBERED])
    features = []
    with catch_features(model.encoder) as caught:
        for _, batch in _batches(model, data, some):
            model.predict(batch)
            features.append(caught.of_crystals(batch).cpu())
    return TrainingSet.of(data.store.crystals.take(rows), torch.cat(features))
