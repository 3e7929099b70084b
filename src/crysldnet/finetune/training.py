"""Train one network, select its best epoch on validation, and evaluate the test split once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from torch import Tensor

from crysldnet.artifacts import model_file
from crysldnet.artifacts.provenance import encoder_file, seen_crystals
from crysldnet.build import build
from crysldnet.console import note
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.split import Rows
from crysldnet.errors import ConfigError
from crysldnet.finetune.module import FinetuneModule
from crysldnet.finetune.settings import (
    TrainingConfig,
    class_entropies,
    make_data,
    make_descriptors,
    make_encoder,
    make_types,
)
from crysldnet.io import write_atomically
from crysldnet.models.head import PropertyModel, build_network
from crysldnet.models.predictor import Prediction, TargetModel, predict
from crysldnet.models.targets import TargetType
from crysldnet.training.calibrate import calibrate
from crysldnet.training.checkpoint_file import BEST, LAST, check_best
from crysldnet.training.fit import fit_and_export, unlogged
from crysldnet.training.inputs import hashes_of
from crysldnet.training.loggers import describe_data
from crysldnet.training.metrics import TargetMetrics
from crysldnet.training.run_folder import code_version
from crysldnet.training.trainer import TrainerSettings, make_trainer
from crysldnet.training.wandb_run import publish

PARTS = ("member_", "network_", "fold_")
"""Prefixes of the folders of a run's parts."""
Predictions = dict[int, list[list[float]]]
"""Test predictions: row in the store to value, standard deviation and probability of the predicted class per target,
NaN if unavailable.
"""


@dataclass(frozen=True)
class Finetuned:
    """A trained property model and its results."""

    model: TargetModel
    info: dict[str, Any]
    metrics: dict[str, float]
    data: CrystalDataModule
    predictions: Predictions


def make_model(config: TrainingConfig, encoder: Any, data: CrystalDataModule, types: list[TargetType]) -> PropertyModel:
    """Return the untrained model with normalization fitted to the training rows.

    Raises:
        ConfigError: head and targets are incompatible.
    """
    try:
        model = build_network(
            encoder,
            config.head,
            data.targets,
            data.units,
            types,
            referenced=config.atomic_references,
            descriptors=make_descriptors(data),
            per=config.target_per,
        )
    except ValueError as error:
        raise ConfigError(str(error), "head") from error
    for name, unit in zip(data.targets, data.units, strict=True):
        if model.head.readout == "sum" and unit.endswith("/atom"):
            note(f"{name} is a value of an atom ({unit}), but head=sum grows with the cell; head=atoms suits it")
    crystals = data.store.crystals.take(data.rows["train"])
    model.fit_normalisation(data.train_targets(), crystals.sizes, crystals)
    return model


def train_network(
    config: TrainingConfig,
    values: dict[str, Any],
    folder: Path,
    data: CrystalDataModule | None = None,
    loggers: list | None = None,
) -> Finetuned:
    """Train a network; arguments as in :func:`crysldnet.finetune.ensemble.train`."""
    pl.seed_everything(config.seed, workers=True, verbose=False)
    settings: TrainerSettings = build(config.trainer, "trainer")
    encoder, encoder_config, provenance = make_encoder(config)
    settings.prepare(encoder)
    values = {**values, "encoder": encoder_config}
    if data is None:
        data = make_data(config, encoder)
    data.setup()
    types = make_types(config, data)
    model = make_model(config, encoder, data, types)
    module = FinetuneModule(
        model=model,
        optimizer=build(config.optimizer, "optimizer"),
        loss=config.loss,
        mode=config.mode,
        layer_decay=config.layer_decay,
        entropies=class_entropies(types, data),
        fresh=not provenance,
    )
    has_validation = len(data.rows["val"]) > 0
    if config.patience is not None and not has_validation:
        rank_zero_only(note)(f"patience={config.patience} isn't used: there are no validation crystals to stop by")
    passes = config.passes(data.steps_per_epoch(settings.world_size, settings.accumulate_grad_batches))
    trainer = make_trainer(
        settings,
        build(config.strategy, "strategy"),
        folder=folder,
        epochs=config.epochs * passes,
        seed=config.seed,
        gradient_clip_val=config.gradient_clip_val,
        owner=_owner(config, encoder_config, data, types),
        resume=config.resume is not None,
        loggers=loggers or [],
        monitor=module.monitor if has_validation else None,
        validate_every=passes,
        patience=config.patience,
        stage=folder.name.replace("_", " ") if folder.name.startswith(PARTS) else "finetuning",
    )
    info = describe_model(model, data, config, values, provenance)

    def export(metrics: dict[str, float], weights: dict[str, Tensor]) -> None:
        model.cached = None
        info["metrics"] = metrics
        write_model(folder / "model.safetensors", weights, info, config, data, settings.device)

    metrics = fit_and_export(
        "finetune", trainer, module, data, partial(_evaluated, trainer, module, data, folder), export
    )
    predictions = _gather([rows_of(rows.cpu().numpy(), predicted) for rows, predicted in module.predictions])
    model.cached = None
    return Finetuned(model.cpu().eval(), info | {"metrics": metrics}, metrics, data, predictions)


def _owner(
    config: TrainingConfig, encoder: dict[str, Any], data: CrystalDataModule, types: list[TargetType]
) -> dict[str, Any]:
    """Return the settings that a checkpoint must match to be resumed."""
    return {
        "command": "finetune",
        "model": {
            "encoder": encoder,
            "head": config.head,
            "targets": data.targets,
            **({"descriptors": data.descriptors} if data.descriptors else {}),
            **({"target_per": config.target_per} if config.target_per else {}),
            "target_types": [kind.describe() for kind in types],
        },
        "inputs": {"data_sha256": data.store.hash, **hashes_of(pretrained=config.pretrained)},
    }


def _evaluated(
    trainer: pl.Trainer, module: FinetuneModule, data: CrystalDataModule, folder: Path, trained: dict[str, float]
) -> dict[str, float]:
    """Return the training loss, and validation and test metrics of the best epoch."""
    has_validation = len(data.rows["val"]) > 0
    best = _best(folder / "checkpoints", has_validation)
    metrics = {name: value for name, value in trained.items() if name == "train/loss"}
    # The validation of the best weights was already logged at the end of its epoch.
    for loop, rows, logged in (
        (trainer.validate, data.rows["val"], unlogged(trainer)),
        (trainer.test, data.rows["test"], contextlib.nullcontext()),
    ):
        if len(rows):
            with logged:
                found = loop(module, datamodule=data, ckpt_path=str(best), verbose=False, weights_only=True)
            metrics |= {name: float(value) for name, value in found[0].items()}
    return metrics


def train_part(
    train: Callable[..., Finetuned],
    config: TrainingConfig,
    values: dict[str, Any],
    path: Path,
    data: CrystalDataModule,
    rows: Rows,
    name: str,
) -> None:
    """Train one part of a run in its own folder.

    Args:
        train: training function such as :func:`train_network`.
        config, values: settings.
        path: folder of the part.
        data: the crystals of the run.
        rows: training, validation and test rows.
        name: name for loggers.
    """
    encoder, _, _ = make_encoder(config)
    own = make_data(config, encoder, store=data.store, rows=rows)
    path.mkdir(parents=True, exist_ok=True)
    rank_zero_only(write_atomically)(path / "split.json", own.split_text())
    loggers = build(config.logger, "logger", folder=path, name=name, config=values | describe_data(own))
    train(config, values, path, data=own, loggers=loggers)
    publish(loggers, path, encoder_file(config.pretrained))


def describe_model(
    model: TargetModel,
    data: CrystalDataModule,
    config: TrainingConfig,
    values: dict[str, Any],
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Return the metadata of a model's file, except its metrics."""
    return {
        **model_file.encoder_info(model.encoder, values["encoder"], provenance, (*model.modules(), *model.types)),
        "head": config.head,
        "targets": data.targets,
        "units": data.units,
        "target_types": [kind.describe() for kind in model.types],
        "atomic_references": config.atomic_references,
        "target_per": config.target_per,
        "descriptors": data.descriptors,
        "descriptor_units": data.descriptor_units,
        "data_sha256": data.store.hash,
        "pretrained_sha256": hashes_of(pretrained=config.pretrained).get("pretrained"),
        "train_crystals": len(data.rows["train"]),
        "labelled_crystals": len(data.rows["train"]) + len(data.rows["val"]),
        "code_version": code_version(),
        "config": values,
    }


def write_model(
    file: Path,
    weights: dict[str, Tensor],
    info: dict[str, Any],
    config: TrainingConfig,
    data: CrystalDataModule,
    device: str,
) -> None:
    """Write and calibrate a trained model; add the calibration results to ``info``."""
    chosen_on = np.concatenate([data.rows["train"], data.rows["val"]])
    seen = seen_crystals(config.pretrained, data.store, chosen_on)
    partial_file = file.with_name("uncalibrated.safetensors")  # only complete files get the final name
    model_file.write(partial_file, "property_model", weights, info, seen)
    info["calibration"] = calibrate([partial_file], file, data, drawn=file.parent / "plots", device=device)
    partial_file.unlink()


def _best(checkpoints: Path, has_validation: bool) -> Path:
    best = check_best(checkpoints) if has_validation else None
    if best is None and has_validation:
        note(f"{checkpoints / BEST} is missing; using the weights of the last epoch")
    return best or checkpoints / LAST


def rows_of(rows: NDArray[np.int64], predicted: Prediction) -> Predictions:
    """Return predictions [B] by row."""
    value = predicted.value.float().cpu()
    unknown = torch.full_like(value, torch.nan)
    std = unknown if predicted.std is None else predicted.std.float().cpu()
    likeliest = unknown if predicted.probability is None else predicted.probability.float().cpu().amax(-1)
    return dict(zip(rows.tolist(), torch.stack([value, std, likeliest], dim=-1).tolist(), strict=True))


def evaluate(
    models: Sequence[TargetModel], data: CrystalDataModule, rows: NDArray[np.int64], scores: Sequence[TargetMetrics]
) -> Predictions:
    """Predict rows of the store with one model or an ensemble, and add the errors to the scores."""
    if not len(rows):
        return {}
    assert data.target_values is not None
    predicted = predict(models, data.batches(rows, models[0].encoder.graph))
    for own in scores:
        add_errors(own, predicted, data.target_values[rows], models[0])
    return dict(sorted(rows_of(rows, predicted).items()))


def add_errors(scores: TargetMetrics, predicted: Prediction, true: NDArray[np.float64], model: TargetModel) -> None:
    """Add the errors of predictions on the CPU to the scores; ``true`` is [n, T]."""
    wanted = torch.from_numpy(true).float()
    scores.update(predicted, wanted, torch.zeros_like(wanted), model.std.cpu())


def reported(scores: TargetMetrics, split: str) -> dict[str, float]:
    """Return the human-readable metrics of a split, without those only used to select the epoch."""
    found = {k: v for k, v in scores.compute().items() if k != "nll" and not k.startswith("normalised")}
    return {f"{split}/{name}": float(value) for name, value in found.items()}


def _gather(predictions: list[Predictions]) -> Predictions:
    pairs = [pair for part in predictions for pair in part.items()]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shares: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, pairs)
        pairs = [pair for share in shares for pair in share]
    return dict(sorted(pairs))
