"""Train a property model on labelled crystals, from a pretrained encoder or from scratch.

Chooses the best epoch on the validation split and reads the test split once, at the end. Writes model.safetensors for
``crysldnet predict`` and predictions_test.csv with the ids.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from crysldnet.build import build
from crysldnet.data.batch import CrystalBatch
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.fingerprint import Fingerprints
from crysldnet.encoders.protocol import Encoder
from crysldnet.errors import CheckpointError, ConfigError
from crysldnet.models.head import PropertyModel
from crysldnet.pretrain import total_steps
from crysldnet.report import print_table
from crysldnet.training import checkpoint, plots
from crysldnet.training.metrics import RegressionErrors
from crysldnet.training.optimizer import AdamW
from crysldnet.training.pretraining_set import encoder_file, pretraining_overlap, print_overlap
from crysldnet.training.run_folder import RunFolder, code_version
from crysldnet.training.trainer import TrainerSettings, announce, fit, make_trainer

Loss = Literal["l1", "mse", "huber"]


class FinetuneModule(pl.LightningModule):
    """Train a :class:`PropertyModel`.

    Logs ``train/loss`` (normalised units) and ``val/…``, ``test/…``: MAE, RMSE and R² in physical units. The best epoch
    is the one of the lowest ``val/normalised_mae``, the mean over the targets of MAE over standard deviation.

    Args:
        model: what is trained.
        optimizer: its optimizer.
        loss: on normalised targets.
    """

    def __init__(self, *, model: PropertyModel, optimizer: AdamW, loss: Loss = "l1") -> None:
        super().__init__()
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.errors = RegressionErrors(model.targets)
        self.predictions: list[tuple[Tensor, Tensor]] = []
        """Rows and predictions of the last test loop, of this rank."""

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule over all steps of the run."""
        return self.optimizer.build(self.model, total_steps(self.trainer))

    def _step(self, batch: CrystalBatch, stage: Literal["train", "val", "test"]) -> Tensor:
        loss, predicted = self.model.loss(batch, self.loss)
        if stage == "train":
            self.log("train/loss", loss.detach(), prog_bar=True, batch_size=batch.num_crystals)
        else:
            assert batch.targets is not None
            self.errors.update(predicted, batch.targets)
        if stage == "test":
            self.predictions.append((batch.rows.cpu(), predicted.float().cpu()))
        return loss

    def training_step(self, batch: CrystalBatch, batch_idx: int) -> Tensor:
        """Return the loss."""
        return self._step(batch, "train")

    def validation_step(self, batch: CrystalBatch, batch_idx: int) -> None:
        """Collect errors."""
        self._step(batch, "val")

    def test_step(self, batch: CrystalBatch, batch_idx: int) -> None:
        """Collect errors and predictions."""
        self._step(batch, "test")

    def _log_errors(self, stage: str) -> None:
        values = {f"{stage}/{name}": value.float() for name, value in self.errors.compute().items()}
        self.log_dict(values, prog_bar=stage == "val")
        if stage == "val":
            self.log("val/normalised_mae", (self.errors.mae() / self.model.std).nanmean().float())
        self.errors.reset()

    def on_validation_epoch_end(self) -> None:
        """Log MAE, RMSE and R²."""
        self._log_errors("val")

    def on_test_epoch_start(self) -> None:
        """Forget earlier predictions."""
        self.predictions = []

    def on_test_epoch_end(self) -> None:
        """Log MAE, RMSE and R²."""
        self._log_errors("test")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Every key of ``conf/finetune.yaml``."""

    pretrained: str | None
    seed: int
    name: str | None
    runs: str
    resume: Literal["last"] | None
    epochs: int
    loss: Loss
    gradient_clip: float | None
    data: dict[str, Any]
    encoder: dict[str, Any]
    head: dict[str, Any]
    optimizer: dict[str, Any]
    trainer: dict[str, Any]
    strategy: dict[str, Any]
    logger: dict[str, Any]

    def __post_init__(self) -> None:
        if self.seed < 0 or self.epochs < 1:
            raise ValueError(f"seed must be 0 or more and epochs at least 1, not {self.seed} and {self.epochs}")


def make_encoder(config: FinetuneConfig) -> tuple[Encoder, dict[str, Any], dict[str, Any]]:
    """Return the encoder, its plain configuration and the provenance of its weights."""
    path = encoder_file(config.pretrained)
    if path is None:
        return build(config.encoder, "encoder"), config.encoder, {}
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file; make one with crysldnet pretrain, or start from scratch with pretrained=none"
        )
    encoder, info = checkpoint.load_encoder(path)
    return encoder, info["encoder"], info["provenance"]


def _make_data(config: FinetuneConfig, encoder: Encoder) -> CrystalDataModule:
    data: CrystalDataModule = build(config.data, "data", graph=encoder.graph, seed=config.seed)
    if not data.targets:
        raise ConfigError("data.targets: name the columns to predict, as data.targets=[formation_energy_per_atom]")
    data.setup()
    return data


@dataclass(frozen=True)
class Finetuned:
    """A trained property model and how it did."""

    model: PropertyModel
    info: dict[str, Any]
    metrics: dict[str, float]
    data: CrystalDataModule
    predictions: dict[int, list[float]]
    """Row in the store to predictions, for the test split."""


def train(
    config: FinetuneConfig,
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
        data = _make_data(config, encoder)
    data.setup()
    head = build(config.head, "head", width=encoder.width, outputs=len(data.targets))
    model = PropertyModel(encoder=encoder, head=head, targets=data.targets, units=data.units)
    model.fit_normalisation(data.train_targets(), data.store.crystals.sizes[data.rows["train"]])
    module = FinetuneModule(model=model, optimizer=build(config.optimizer, "optimizer"), loss=config.loss)
    has_validation = len(data.rows["val"]) > 0
    trainer = make_trainer(
        settings,
        build(config.strategy, "strategy"),
        folder=folder,
        epochs=config.epochs,
        seed=config.seed,
        gradient_clip=config.gradient_clip,
        resume=config.resume is not None,
        loggers=loggers or [],
        monitor="val/normalised_mae" if has_validation else None,
    )
    announce("finetune", trainer, model, data)
    fit(trainer, module, data, resume=config.resume is not None)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name == "train/loss"}
    best = folder / "checkpoints" / ("best.ckpt" if has_validation else "last.ckpt")
    if has_validation:
        metrics |= _evaluate(trainer.validate, module, data, best)
    predictions: dict[int, list[float]] = {}
    if len(data.rows["test"]):
        metrics |= _evaluate(trainer.test, module, data, best)
        predictions = _gather(module.predictions)
    info = {
        **checkpoint.encoder_info(encoder, encoder_config, provenance),
        "head": config.head,
        "targets": data.targets,
        "units": data.units,
        "data_sha256": data.store.hash,
        "train_crystals": len(data.rows["train"]),
        "code_version": code_version(),
        "config": values,
        "metrics": metrics,
    }
    whole = trainer.strategy.lightning_module_state_dict()
    checkpoint.refuse_diverged(whole, "finetuning")
    if trainer.is_global_zero:
        state = {k.removeprefix("model."): v for k, v in whole.items() if k.startswith("model.")}
        checkpoint.write(folder / "model.safetensors", "property_model", state, info)
    trainer.strategy.barrier("export")
    return Finetuned(model.cpu().eval(), info, metrics, data, predictions)


def _evaluate(loop: Any, module: FinetuneModule, data: CrystalDataModule, best: Path) -> dict[str, float]:
    results = loop(module, datamodule=data, ckpt_path=str(best), verbose=False, weights_only=True)
    return {name: float(value) for name, value in results[0].items()}


def _gather(predictions: list[tuple[Tensor, Tensor]]) -> dict[int, list[float]]:
    pairs = [(int(row), values.tolist()) for rows, all_ in predictions for row, values in zip(rows, all_, strict=True)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shares: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, pairs)
        pairs = [pair for share in shares for pair in share]
    return dict(sorted(pairs))


def write_predictions(path: Path, result: Finetuned) -> None:
    """Write ids, true values and predictions of the test split as CSV."""
    rows = list(result.predictions)
    values = result.data.target_values
    assert values is not None
    ids = result.data.store.ids_at(np.array(rows, np.int64))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["material_id", "target", "true", "prediction", "unit"])
        for material_id, row in zip(ids, rows, strict=True):
            for place, target in enumerate(result.data.targets):
                true = values[row, place]
                predicted = result.predictions[row][place]
                writer.writerow(
                    [
                        material_id,
                        target,
                        "" if true != true else f"{true:.6g}",
                        f"{predicted:.6g}",
                        result.data.units[place],
                    ]
                )


def _plot_parity(folder: Path, result: Finetuned) -> None:
    rows = list(result.predictions)
    predicted = np.array([result.predictions[row] for row in rows])
    assert result.data.target_values is not None
    for place, target in enumerate(result.data.targets):
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in target)
        true = result.data.target_values[rows, place]
        plots.parity(true, predicted[:, place], folder / f"parity_{name}.png", target, result.data.units[place])


def run(config: FinetuneConfig, values: dict[str, Any]) -> int:
    """Finetune; return the exit status.

    Args:
        config: the settings.
        values: the same as plain values, to be saved with everything that the run writes.
    """
    settings: TrainerSettings = build(config.trainer, "trainer")
    settings.check(build(config.strategy, "strategy"))
    encoder, encoder_config, _ = make_encoder(config)  # what is wrong stops here, before a folder is made
    data = _make_data(config, encoder)
    data.steps_per_epoch(settings.world_size, settings.accumulate)
    folder = RunFolder(config.runs, "finetune", config.name, resume=config.resume is not None)
    folder.save_config({**values, "encoder": encoder_config})
    folder.save_split(data.split_text())
    loggers = build(config.logger, "logger", folder=folder.path, name=folder.name, config=values)
    result = train(config, values, folder.path, loggers=loggers)
    _finish(folder, result, config)
    return 0


@pl.utilities.rank_zero_only
def _finish(folder: RunFolder, result: Finetuned, config: FinetuneConfig) -> None:
    if result.predictions:
        write_predictions(folder.path / "predictions_test.csv", result)
        _plot_parity(folder.path / "plots", result)
    plots.learning_curves(
        folder.path / "metrics.csv",
        folder.path / "plots" / "curves.png",
        ["train/loss", "val/mae", "val/r2"],
        ", ".join(result.data.targets),
    )
    tested = Fingerprints.of(result.data.store, result.data.rows["test"])
    overlap = pretraining_overlap(config.pretrained, tested)
    folder.finish(
        {
            "command": "finetune",
            "seed": config.seed,
            "pretrained": config.pretrained,
            "train_crystals": result.info["train_crystals"],
            "data_sha256": result.data.store.hash,
            "left_out": result.data.left_out,
            "pretraining_overlap": overlap,
            **result.metrics,
        }
    )
    splits = [split for split in ("val", "test") if any(name.startswith(f"{split}/") for name in result.metrics)]
    names = dict.fromkeys(name.split("/", 1)[1] for name in result.metrics if name.startswith(("val/", "test/")))
    unit = result.data.units[0] if len(set(result.data.units)) == 1 else ""
    rows = []
    for name in names:
        title = {"mae": "MAE", "rmse": "RMSE", "r2": "R²"}.get(name, name)
        suffix = f" ({unit})" if unit and not name.startswith("r2") else ""
        if not all(f"{split}/{name}" in result.metrics for split in splits):
            continue
        cells = [f"{result.metrics[f'{split}/{name}']:.4f}" for split in splits]
        rows.append([title + suffix, *cells])
    print_table(", ".join(result.data.targets), ["", *splits], rows)
    print_overlap(overlap)
    print_table("", ["written", ""], [["model", str(folder.path / "model.safetensors")]])
