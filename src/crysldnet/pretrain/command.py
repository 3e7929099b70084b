"""Run both stages of pretraining, and export what they learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from crysldnet.artifacts import model_file
from crysldnet.artifacts.strict_load import load_strictly
from crysldnet.build import build
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.fingerprint import Fingerprints
from crysldnet.errors import ConfigError
from crysldnet.models.pretraining import PretrainingModel
from crysldnet.pretrain.module import PretrainModule
from crysldnet.pretrain.settings import (
    DiffusionStageSettings,
    PretrainConfig,
    Stage,
    StageSettings,
    build_model,
    stage_seed,
)
from crysldnet.pretrain.verdict import print_result, verdict
from crysldnet.training import plots
from crysldnet.training.diagnostics import OF_THE_MACHINE
from crysldnet.training.inputs import inputs_of
from crysldnet.training.loggers import describe_data
from crysldnet.training.optimizer import AdamW
from crysldnet.training.run_folder import RunFolder, code_version
from crysldnet.training.trainer import TrainerSettings, announce, fit, make_trainer
from crysldnet.training.wandb_run import begin_stage, publish

MODEL_KEYS = ("encoder", "objective", "denoiser", "model", "diffusion")
"""What of the configuration a checkpoint has to be resumed with."""

PLOTTED = (
    "train/loss",
    "val/masked_accuracy",
    "val/coordinate_error",
    "val/lattice_length_error",
    "val/diffusion_error",
    "val/features_spread",
    "val/features_rank",
)


def run(config: PretrainConfig, values: dict[str, Any], choices: Mapping[str, Any] | None = None) -> int:
    """Pretrain; return the exit status.

    Args:
        config: the settings.
        values: the same as plain values, to be saved with everything that the run writes.
        choices: the files that they came from, by group.
    """
    stages: list[Stage] = ["vae", "diffusion"] if config.stage == "both" else [config.stage]
    if config.init is not None and config.stage != "diffusion":
        raise ConfigError(f"init is for stage=diffusion; stage={config.stage} begins with fresh weights", "init")
    if config.init is None and config.stage == "diffusion":
        raise ConfigError("stage=diffusion needs init=PATH, the pretraining.safetensors of a first stage", "init")
    settings: TrainerSettings = build(config.trainer, "trainer")
    settings.check(build(config.strategy, "strategy"))
    model = build_model(config, with_flow="diffusion" in stages)  # what is wrong stops here, before a folder is made
    data = make_data(config, model)
    data.setup()
    data.steps_per_epoch(settings.world_size, settings.accumulate)
    if config.init is not None:
        load_stage(model, Path(config.init))
    folder = RunFolder(config.runs, "pretrain", config.name, resume=config.resume is not None)
    folder.save_split(data.split_text())
    folder.save_inputs(inputs_of(data, init=config.init))
    folder.save_config(values, choices)
    about = values | describe_data(data)
    loggers = build(config.logger, "logger", folder=folder.path, name=folder.name, config=about)
    previous = Path(config.init) if config.init is not None else None
    summary: dict[str, Any] = {"command": "pretrain", "seed": config.seed}
    for stage in stages:
        done = folder.path / stage / "pretraining.safetensors"
        if done.exists():
            summary[stage] = model_file.read(done, "pretraining")[0]["metrics"]
        else:
            summary[stage] = _run_stage(config, values, stage, previous, folder, settings, loggers)
        _draw(folder.path, stage)
        previous = done
    summary |= {
        "data_sha256": data.store.hash,
        "train_crystals": len(data.rows["train"]),
        "left_out": data.left_out,
        "excluded": data.excluded,
    }
    summary["verdict"] = verdict(summary)
    summary["collapsed"] = summary["verdict"]["collapsed"]
    folder.finish(summary)
    rank_zero_only(print_result)(summary, stages, str(folder.path / "encoder.safetensors"))
    publish(loggers, folder.path)
    return 0


def make_data(config: PretrainConfig, model: PretrainingModel, seed: int | None = None) -> CrystalDataModule:
    """Return the crystals, corrupted as the model's objective asks, with the seed of the run unless told another."""
    seen = model.reconstructs or model.needs_clean
    return build(
        config.data,
        "data",
        graph=model.encoder.graph,
        seed=config.seed if seed is None else seed,
        corruption=model.objective.corruption if seen else None,
        with_clean=model.needs_clean,
    )


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
    seed = stage_seed(config, stage)
    data = make_data(config, model, seed)
    data.setup()
    pace: StageSettings = getattr(config.stages, stage)
    optimizer: AdamW = build(config.optimizer, "optimizer")
    second = pace if isinstance(pace, DiffusionStageSettings) and model.flow is not None else None
    module = PretrainModule(
        model=model,
        optimizer=replace(optimizer, lr=optimizer.lr * pace.lr_factor),
        denoiser_lr=1.0 if second is None else second.denoiser_lr,
        hold_encoder_epochs=0 if second is None else second.hold_encoder_epochs,
        clip_apart=second is not None and second.clip_apart,
        validate_in_train_mode=config.validate_in_train_mode,
    )
    trainer = make_trainer(
        settings,
        build(config.strategy, "strategy"),
        folder=folder.path / stage,
        epochs=pace.epochs,
        seed=seed,
        gradient_clip=pace.gradient_clip,
        owner={
            "command": "pretrain",
            "stage": stage,
            "model": {key: values[key] for key in MODEL_KEYS},
            "inputs": {"data_sha256": data.store.hash},
        },
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
    info = {**model_file.encoder_info(model.encoder, config.encoder, provenance), "metrics": metrics}
    export(trainer, info, folder.path, stage, _seen(data, previous) if trainer.is_global_zero else None)
    return metrics


@rank_zero_only
def _draw(folder: Path, stage: Stage) -> None:
    """Draw the learning curves of a stage that is complete, unless that is done."""
    out = folder / "plots" / f"{stage}.png"
    if not out.exists():
        plots.learning_curves(folder / stage / "metrics.csv", out, PLOTTED, f"{stage} stage")


def _seen(data: CrystalDataModule, previous: Path | None) -> NDArray[np.uint64]:
    """Return what the encoder was trained on, in this stage and the one before it."""
    seen = Fingerprints.of(data.store, data.rows["train"]).packed()
    before = None if previous is None else model_file.read_pretraining_set(previous, "pretraining")
    return seen if before is None else np.union1d(before, seen)


def export(
    trainer: pl.Trainer, info: dict[str, Any], folder: Path, stage: Stage, seen: NDArray[np.uint64] | None = None
) -> None:
    """Write the encoder, and the whole model for a next stage; gathered on all ranks, written by the first."""
    prefix = "model."
    whole = trainer.strategy.lightning_module_state_dict()
    model_file.refuse_diverged(whole, f"stage {stage}")
    if trainer.is_global_zero:
        state = {key.removeprefix(prefix): value for key, value in whole.items() if key.startswith(prefix)}
        encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
        kept = {k: v for k, v in state.items() if not k.startswith("teacher.")}
        model_file.write(folder / "encoder.safetensors", "encoder", encoder, info, seen)
        model_file.write(folder / stage / "pretraining.safetensors", "pretraining", kept, info, seen)
    trainer.strategy.barrier("export")


FRESH = ("flow.", "teacher.", "condition.")
"""Prefixes of what a first stage may lack."""


def load_stage(model: PretrainingModel, path: Path) -> None:
    """Copy the weights of a finished first stage; what it lacks of latent diffusion and conditions stays fresh."""
    info, state = model_file.read(path, "pretraining")
    model_file.check_graph(model.encoder, info.get("graph", {}), path)
    fresh = {k: v for k, v in model.state_dict().items() if k.startswith(FRESH) and k not in state}
    load_strictly(model, {**state, **fresh}, path)
