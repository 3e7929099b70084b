"""Pretrain an encoder without labels.

Stage 1 trains a variational autoencoder, stage 2 diffusion in its latent space together with the encoder. Writes
encoder.safetensors for finetuning, and prints what the model learned on the validation split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from crysldnet.build import build
from crysldnet.console import print_table
from crysldnet.data.batch import CrystalBatch
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.fingerprint import Fingerprints
from crysldnet.errors import ConfigError
from crysldnet.models.latent import LatentStatistics
from crysldnet.models.pretraining import PretrainingModel
from crysldnet.training import checkpoint, plots
from crysldnet.training.diagnostics import OF_THE_MACHINE
from crysldnet.training.loggers import describe_data
from crysldnet.training.metrics import Means
from crysldnet.training.optimizer import AdamW
from crysldnet.training.run_folder import RunFolder, code_version
from crysldnet.training.trainer import TrainerSettings, announce, fit, make_trainer
from crysldnet.training.wandb_run import begin_stage, publish

Stage = Literal["vae", "diffusion"]

MODEL_KEYS = ("encoder", "objective", "denoiser", "model", "diffusion")
"""What of the configuration a checkpoint has to be resumed with."""

PLOTTED = (
    "train/loss",
    "val/masked_accuracy",
    "val/coordinate_error",
    "val/lattice_length_error",
    "val/loss/diffusion",
    "val/features_spread",
    "val/features_rank",
)


class PretrainModule(pl.LightningModule):
    """Train a :class:`PretrainingModel`; the stage is the model's: with or without latent diffusion.

    Logs ``train/…`` and, each epoch, ``val/…``: every loss term (``val/loss/…``), masked accuracy beside that of
    always guessing the commonest species, errors of lattice (Å, degrees) and coordinates (Å) beside those of the
    corrupted input, spread and effective rank of the encoder's output and of the latent mean.

    Args:
        model: what is trained.
        optimizer: its optimizer.
        validate_in_train_mode: keep dropout and batch statistics on in validation, as the published code does.
    """

    def __init__(self, *, model: PretrainingModel, optimizer: AdamW, validate_in_train_mode: bool = False) -> None:
        super().__init__()
        self.model, self.optimizer = model, optimizer
        self.validate_in_train_mode = validate_in_train_mode
        self._teacher_step = 0
        self.means = Means()
        self.feature_statistics = LatentStatistics(model.encoder.width)
        self.latent_statistics = LatentStatistics(model.posterior.latent_dim)

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule over all steps of the stage."""
        return self.optimizer.build(self.model, total_steps(self.trainer))

    def _step(self, batch: CrystalBatch, stage: Literal["train", "val"]) -> Tensor:
        output = self.model(batch)
        loss = torch.stack(list(output.terms.values())).sum()
        if stage == "train":
            terms = {f"train/{name}": value.detach() for name, value in output.terms.items()}
            self.log("train/loss", loss.detach(), prog_bar=True, batch_size=batch.num_crystals)
            self.log_dict(terms, batch_size=batch.num_crystals)
            return loss
        count = torch.tensor(float(batch.num_crystals), device=loss.device)
        measures = {"loss": (loss * count, count)}
        measures |= {f"loss/{name}": (value * count, count) for name, value in output.terms.items()}
        measures |= output.measures
        if batch.undo is not None:
            hidden = batch.undo.masked
            guessed = ((batch.undo.numbers == self._commonest_species()) & hidden).sum()
            measures["masked_accuracy_baseline"] = (guessed, hidden.sum())
        self.means.update(measures)
        self.feature_statistics.update(output.features)
        self.latent_statistics.update(output.latent.mean)
        return loss

    def _commonest_species(self) -> int:
        data: CrystalDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return data.commonest_species

    def training_step(self, batch: CrystalBatch, batch_idx: int) -> Tensor:
        """Return the loss."""
        return self._step(batch, "train")

    def on_train_start(self) -> None:
        """Know which steps a resumed run has behind it."""
        self._teacher_step = self.trainer.global_step

    def on_train_batch_end(self, outputs: Any, batch: CrystalBatch, batch_idx: int) -> None:
        """Move the teacher, where there is one."""
        if self.trainer.global_step != self._teacher_step:  # once an optimizer step, not once a batch
            self._teacher_step = self.trainer.global_step
            self.model.update_teacher()

    def validation_step(self, batch: CrystalBatch, batch_idx: int) -> None:
        """Collect measures."""
        self._step(batch, "val")

    def on_validation_model_eval(self) -> None:
        """Switch to evaluation, or don't, as published."""
        if not self.validate_in_train_mode:
            super().on_validation_model_eval()

    def on_validation_epoch_end(self) -> None:
        """Log the measures of the whole split."""
        values = {f"val/{name}": value for name, value in self.means.compute().items()}
        for title, statistics in (("features", self.feature_statistics), ("latent", self.latent_statistics)):
            values |= {f"val/{title}_{name}": value for name, value in statistics.compute().items()}
            statistics.reset()
        self.means.reset()
        self.log_dict({name: value.float() for name, value in values.items()})


def total_steps(trainer: pl.Trainer) -> int:
    """Return the optimizer steps of a whole run, counted by the sampler itself."""
    data: CrystalDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return data.steps_per_epoch(trainer.world_size, trainer.accumulate_grad_batches) * (trainer.max_epochs or 1)


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """Length and pace of a stage: the learning rate is ``optimizer.lr`` times ``lr_factor``."""

    epochs: int
    lr_factor: float
    gradient_clip: float | None

    def __post_init__(self) -> None:
        if self.epochs < 1 or not self.lr_factor > 0:
            raise ValueError(f"epochs must be at least 1 and lr_factor over 0, not {self.epochs} and {self.lr_factor}")


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Settings of both stages."""

    vae: StageSettings
    diffusion: StageSettings


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Every key of ``conf/pretrain.yaml``."""

    stage: Literal["vae", "diffusion", "both"]
    seed: int
    name: str | None
    runs: str
    resume: Literal["last"] | None
    init: str | None
    validate_in_train_mode: bool
    stages: Stages
    data: dict[str, Any]
    encoder: dict[str, Any]
    objective: dict[str, Any]
    denoiser: dict[str, Any]
    optimizer: dict[str, Any]
    trainer: dict[str, Any]
    strategy: dict[str, Any]
    logger: dict[str, Any]
    model: dict[str, Any]
    diffusion: dict[str, Any]

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, not {self.seed}")


def build_model(config: PretrainConfig, *, with_flow: bool) -> PretrainingModel:
    """Build the model with fresh weights; those of the first stage don't depend on ``with_flow``."""
    torch.manual_seed(config.seed)
    encoder = build(config.encoder, "encoder")
    posterior = build(config.model, "model", width=encoder.width)
    objective = build(config.objective, "objective", latent_dim=posterior.latent_dim)
    flow = None
    if with_flow:
        features = config.diffusion.get("latent") == "features"
        latent_dim = encoder.width if features else posterior.latent_dim
        denoiser = build(config.denoiser, "denoiser", latent_dim=latent_dim)
        flow = build(config.diffusion, "diffusion", denoiser=denoiser, latent_dim=latent_dim)
    return PretrainingModel(encoder=encoder, posterior=posterior, objective=objective, flow=flow)


def run(config: PretrainConfig, values: dict[str, Any]) -> int:
    """Pretrain; return the exit status.

    Args:
        config: the settings.
        values: the same as plain values, to be saved with everything that the run writes.
    """
    stages: list[Stage] = ["vae", "diffusion"] if config.stage == "both" else [config.stage]
    if config.init is not None and config.stage != "diffusion":
        raise ConfigError(f"init is for stage=diffusion; stage={config.stage} begins with fresh weights", "init")
    if config.init is None and config.stage == "diffusion":
        raise ConfigError("stage=diffusion needs init=PATH, the pretraining.safetensors of a first stage", "init")
    settings: TrainerSettings = build(config.trainer, "trainer")
    settings.check(build(config.strategy, "strategy"))
    model = build_model(config, with_flow="diffusion" in stages)  # what is wrong stops here, before a folder is made
    data = _make_data(config, model)
    data.setup()
    data.steps_per_epoch(settings.world_size, settings.accumulate)
    if config.init is not None:
        load_stage(model, Path(config.init))
    folder = RunFolder(config.runs, "pretrain", config.name, resume=config.resume is not None)
    folder.save_config(values)
    folder.save_split(data.split_text())
    about = values | describe_data(data)
    loggers = build(config.logger, "logger", folder=folder.path, name=folder.name, config=about)
    previous = Path(config.init) if config.init is not None else None
    summary: dict[str, Any] = {"command": "pretrain", "seed": config.seed}
    for stage in stages:
        done = folder.path / stage / "pretraining.safetensors"
        if done.exists():
            summary[stage] = checkpoint.read(done, "pretraining")[0]["metrics"]
        else:
            summary[stage] = _run_stage(config, values, stage, previous, folder, settings, loggers)
        previous = done
    summary |= {
        "data_sha256": data.store.hash,
        "train_crystals": len(data.rows["train"]),
        "left_out": data.left_out,
        "excluded": data.excluded,
        "collapsed": has_collapsed(summary),
    }
    _finish(folder, summary, stages)
    publish(loggers, folder.path)
    return 0


def has_collapsed(summary: dict[str, Any]) -> bool | None:
    """Say whether the second stage lost half of the first one's spread or effective rank; None where one is missing."""
    names = ("val/features_spread", "val/features_rank")
    if not all(name in summary.get(stage, {}) for stage in ("vae", "diffusion") for name in names):
        return None
    return any(not summary["diffusion"][name] > 0.5 * summary["vae"][name] for name in names)


def _make_data(config: PretrainConfig, model: PretrainingModel) -> CrystalDataModule:
    corruption = model.objective.corruption if model.reconstructs else None
    return build(config.data, "data", graph=model.encoder.graph, seed=config.seed, corruption=corruption)


def _run_stage(
    config: PretrainConfig,
    values: dict[str, Any],
    stage: Stage,
    previous: Path | None,
    folder: RunFolder,
    settings: TrainerSettings,
    loggers: list,
) -> dict[str, float]:
    pl.seed_everything(config.seed, workers=True, verbose=False)
    model = build_model(config, with_flow=stage == "diffusion")
    if previous is not None:
        load_stage(model, previous)
    model.start_teacher()
    if settings.compile:
        model.encoder.compile_layers()
    if settings.activation_checkpointing:
        model.encoder.checkpoint_layers()
    data = _make_data(config, model)
    data.setup()
    pace: StageSettings = getattr(config.stages, stage)
    optimizer: AdamW = build(config.optimizer, "optimizer")
    module = PretrainModule(
        model=model,
        optimizer=replace(optimizer, lr=optimizer.lr * pace.lr_factor),
        validate_in_train_mode=config.validate_in_train_mode,
    )
    trainer = make_trainer(
        settings,
        build(config.strategy, "strategy"),
        folder=folder.path / stage,
        epochs=pace.epochs,
        seed=config.seed,
        gradient_clip=pace.gradient_clip,
        owner={"command": "pretrain", "stage": stage, "model": {key: values[key] for key in MODEL_KEYS}},
        resume=config.resume is not None,
        loggers=loggers,
    )
    announce(stage, trainer, model, data)
    begin_stage(loggers, stage)
    metrics = {
        name: value
        for name, value in fit(trainer, module, data).items()
        if name.startswith(("val/", "train/")) and name not in OF_THE_MACHINE
    }
    provenance = {
        "data": data.store.metadata.get("dataset", data.store.name),
        "data_sha256": data.store.hash,
        "train_crystals": len(data.rows["train"]),
        "excluded": data.excluded,
        "code_version": code_version(),
        "stage": stage,
        "config": values,
    }
    info = {**checkpoint.encoder_info(model.encoder, config.encoder, provenance), "metrics": metrics}
    export(trainer, info, folder.path, stage, _seen(data, previous) if trainer.is_global_zero else None)
    if trainer.is_global_zero:
        plots.learning_curves(
            folder.path / stage / "metrics.csv", folder.path / "plots" / f"{stage}.png", PLOTTED, f"{stage} stage"
        )
    return metrics


def _seen(data: CrystalDataModule, previous: Path | None) -> Fingerprints:
    """Return what the encoder was trained on, in this stage and the one before it."""
    seen = Fingerprints.of(data.store, data.rows["train"])
    before = None if previous is None else checkpoint.read_pretraining_set(previous, "pretraining")
    return seen if before is None else before.joined(seen)


def export(
    trainer: pl.Trainer, info: dict[str, Any], folder: Path, stage: Stage, seen: Fingerprints | None = None
) -> None:
    """Write the encoder, and the whole model for a next stage; gathered on all ranks, written by the first."""
    prefix = "model."
    whole = trainer.strategy.lightning_module_state_dict()
    checkpoint.refuse_diverged(whole, f"stage {stage}")
    if trainer.is_global_zero:
        state = {key.removeprefix(prefix): value for key, value in whole.items() if key.startswith(prefix)}
        encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
        kept = {k: v for k, v in state.items() if not k.startswith("teacher.")}
        checkpoint.write(folder / "encoder.safetensors", "encoder", encoder, info, seen)
        checkpoint.write(folder / stage / "pretraining.safetensors", "pretraining", kept, info, seen)
    trainer.strategy.barrier("export")


def load_stage(model: PretrainingModel, path: Path) -> None:
    """Copy the weights of a finished first stage; those of latent diffusion stay fresh if it has none."""
    info, state = checkpoint.read(path, "pretraining")
    checkpoint.check_graph(model.encoder, info, path)
    fresh = {k: v for k, v in model.state_dict().items() if k.startswith(("flow.", "teacher.")) and k not in state}
    checkpoint.load_strictly(model, {**state, **fresh}, path)


@rank_zero_only
def _finish(folder: RunFolder, summary: dict[str, Any], stages: list[Stage]) -> None:
    folder.finish(summary)
    rows = [
        ("masked species found", "masked_accuracy", "masked_accuracy_baseline", "commonest species", "{:.3f}"),
        ("coordinate error (Å)", "coordinate_error", "coordinate_error_baseline", "as corrupted", "{:.4f}"),
        ("lattice length error (Å)", "lattice_length_error", "lattice_length_error_baseline", "as corrupted", "{:.4f}"),
        ("lattice angle error (°)", "lattice_angle_error", "lattice_angle_error_baseline", "as corrupted", "{:.3f}"),
        ("diffusion loss, weighted", "loss/diffusion", "", "", "{:.4f}"),
        ("encoder output: spread", "features_spread", "", "", "{:.3f}"),
        ("encoder output: effective rank", "features_rank", "", "", "{:.1f}"),
        ("latent: effective rank", "latent_rank", "", "", "{:.1f}"),
    ]
    shown = [stage for stage in stages if stage in summary]
    table = []
    for title, key, baseline, meaning, form in rows:
        cells = [
            form.format(summary[stage][f"val/{key}"]) if f"val/{key}" in summary[stage] else "–" for stage in shown
        ]
        if all(cell == "–" for cell in cells):
            continue
        base = next((summary[s][f"val/{baseline}"] for s in shown if f"val/{baseline}" in summary[s]), None)
        table.append([title, *cells, f"{form.format(base)} ({meaning})" if base is not None else ""])
    print_table("On the validation split", ["", *shown, "baseline"], table)
    if summary["collapsed"]:
        print_table(
            "",
            ["collapse", ""],
            [["the encoder lost over half of its spread or rank in stage 2", "see docs/method.md"]],
        )
    print_table("", ["written", ""], [["encoder", str(folder.path / "encoder.safetensors")]])
