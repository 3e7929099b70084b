"""Train one property model, choose its best epoch on validation, and read the test split once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from crysldnet.build import build
from crysldnet.console import note
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.errors import ConfigError
from crysldnet.finetune.module import FinetuneModule
from crysldnet.finetune.settings import TrainingConfig, make_data, make_encoder, make_types
from crysldnet.models.head import Prediction, PropertyModel
from crysldnet.models.target import Classes, TargetType
from crysldnet.training import checkpoint
from crysldnet.training.calibrate import calibrate
from crysldnet.training.checkpoint_file import BEST, LAST, check_best
from crysldnet.training.pretraining_set import seen_crystals
from crysldnet.training.run_folder import code_version
from crysldnet.training.trainer import TrainerSettings, announce, fit, make_trainer

Predictions = dict[int, list[list[float]]]
"""Row in the store to value, standard deviation and probability of the predicted class of each target, NaN where there
is none, for the test split."""


@dataclass(frozen=True)
class Finetuned:
    """A trained property model and how it did."""

    model: PropertyModel
    info: dict[str, Any]
    metrics: dict[str, float]
    data: CrystalDataModule
    predictions: Predictions


def make_model(config: TrainingConfig, encoder: Any, data: CrystalDataModule, types: list[TargetType]) -> PropertyModel:
    """Return the model before training, its normalisation fitted to the training rows.

    Raises:
        ConfigError: head and targets don't go together.
    """
    head = build(config.head, "head", width=encoder.width, outputs=sum(kind.outputs for kind in types))
    try:
        model = PropertyModel(
            encoder=encoder,
            head=head,
            targets=data.targets,
            units=data.units,
            types=types,
            referenced=config.element_references,
        )
    except ValueError as error:
        raise ConfigError(str(error), "head") from error
    for name, unit in zip(data.targets, data.units, strict=True):
        if head.readout == "sum" and unit.endswith("/atom"):
            note(f"{name} is a value of an atom ({unit}), but head=sum grows with the cell; head=atoms suits it")
    crystals = data.store.crystals.take(data.rows["train"])
    model.fit_normalisation(data.train_targets(), crystals.sizes, crystals)
    return model


def train(
    config: TrainingConfig,
    values: dict[str, Any],
    folder: Path,
    data: CrystalDataModule | None = None,
    loggers: list | None = None,
) -> Finetuned:
    """Train a property model; write ``model.safetensors`` into the folder.

    Args:
        config: the settings.
        values: the same as plain values.
        folder: of the run.
        data: the crystals, by default those of the configuration.
        loggers: besides the CSV.
    """
    pl.seed_everything(config.seed, workers=True, verbose=False)
    settings: TrainerSettings = build(config.trainer, "trainer")
    encoder, encoder_config, provenance = make_encoder(config)
    if settings.compile:
        encoder.compile_layers()
    if settings.activation_checkpointing:
        encoder.checkpoint_layers()
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
        entropies=[
            kind.entropy(data.train_targets()[:, place]) if isinstance(kind, Classes) else 1.0
            for place, kind in enumerate(types)
        ],
    )
    has_validation = len(data.rows["val"]) > 0
    passes = config.passes(data.steps_per_epoch(settings.world_size, settings.accumulate))
    trainer = make_trainer(
        settings,
        build(config.strategy, "strategy"),
        folder=folder,
        epochs=config.epochs * passes,
        seed=config.seed,
        gradient_clip=config.gradient_clip,
        owner={
            "command": "finetune",
            "model": {
                "encoder": encoder_config,
                "head": config.head,
                "targets": data.targets,
                "target_types": [kind.describe() for kind in types],
            },
        },
        resume=config.resume is not None,
        loggers=loggers or [],
        monitor=module.monitor if has_validation else None,
        validate_every=passes,
        patience=config.patience,
    )
    announce("finetune", trainer, model, data)
    if config.patience is not None and not has_validation:
        rank_zero_only(note)(f"patience={config.patience} isn't used: there are no validation crystals to stop by")
    metrics = {name: value for name, value in fit(trainer, module, data).items() if name == "train/loss"}
    best = _best(folder / "checkpoints", has_validation)
    if has_validation:
        metrics |= _evaluate(trainer.validate, module, data, best)
    predictions: Predictions = {}
    if len(data.rows["test"]):
        metrics |= _evaluate(trainer.test, module, data, best)
        predictions = _gather([rows_of(rows.cpu().numpy(), predicted) for rows, predicted in module.predictions])
    model.cached = None
    info = describe_model(model, data, config, values, provenance) | {"metrics": metrics}
    device = "cuda" if settings.resolve_accelerator() == "gpu" else "cpu"
    export(trainer, info, config, data, folder / "model.safetensors", device)
    return Finetuned(model.cpu().eval(), info, metrics, data, predictions)


def describe_model(
    model: PropertyModel,
    data: CrystalDataModule,
    config: TrainingConfig,
    values: dict[str, Any],
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Return what a model's file says of it, but for its metrics."""
    return {
        **checkpoint.encoder_info(model.encoder, values["encoder"], provenance),
        "head": config.head,
        "targets": data.targets,
        "units": data.units,
        "target_types": [kind.describe() for kind in model.types],
        "element_references": config.element_references,
        "data_sha256": data.store.hash,
        "train_crystals": len(data.rows["train"]),
        "code_version": code_version(),
        "config": values,
    }


def export(
    trainer: pl.Trainer,
    info: dict[str, Any],
    config: TrainingConfig,
    data: CrystalDataModule,
    file: Path,
    device: str,
) -> None:
    """Write and calibrate the trained model; add to ``info`` how well it is calibrated.

    Raises:
        CheckpointError: a weight isn't finite.
    """
    whole = trainer.strategy.lightning_module_state_dict()
    checkpoint.refuse_diverged(whole, "finetuning")
    if trainer.is_global_zero:
        state = {k.removeprefix("model."): v for k, v in whole.items() if k.startswith("model.")}
        chosen_on = np.concatenate([data.rows["train"], data.rows["val"]])
        seen = seen_crystals(config.pretrained, data.store, chosen_on)
        partial = file.with_name("uncalibrated.safetensors")  # under its own name a file is whole
        checkpoint.write(partial, "property_model", state, info, seen)
        info["calibration"] = calibrate([partial], file, data, drawn=file.parent / "plots", device=device)
        partial.unlink()
    trainer.strategy.barrier("export")


def _best(checkpoints: Path, has_validation: bool) -> Path:
    best = check_best(checkpoints) if has_validation else None
    if best is None and has_validation:
        note(f"{checkpoints / BEST} isn't there: the weights of the last epoch are taken")
    return best or checkpoints / LAST


def _evaluate(loop: Any, module: FinetuneModule, data: CrystalDataModule, best: Path) -> dict[str, float]:
    results = loop(module, datamodule=data, ckpt_path=str(best), verbose=False, weights_only=True)
    return {name: float(value) for name, value in results[0].items()}


def rows_of(rows: NDArray[np.int64], predicted: Prediction) -> Predictions:
    """Return predictions [B] by row."""
    value = predicted.value.float().cpu()
    unknown = torch.full_like(value, torch.nan)
    std = unknown if predicted.std is None else predicted.std.float().cpu()
    likeliest = unknown if predicted.probability is None else predicted.probability.float().cpu().amax(-1)
    return dict(zip(rows.tolist(), torch.stack([value, std, likeliest], dim=-1).tolist(), strict=True))


def _gather(predictions: list[Predictions]) -> Predictions:
    pairs = [pair for part in predictions for pair in part.items()]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shares: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, pairs)
        pairs = [pair for share in shares for pair in share]
    return dict(sorted(pairs))
