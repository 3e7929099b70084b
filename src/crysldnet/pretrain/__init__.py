"""Pretrain an encoder without labels.

Stage 1 trains a variational autoencoder; stage 2 trains diffusion in its latent space together with the encoder. Writes
encoder.safetensors for finetuning, and prints what the model learned, measured on the validation split.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from torch import Tensor

from crysldnet import CommandModule
from crysldnet.artifacts import model_file
from crysldnet.artifacts.rebuild import check_graph, load_strictly
from crysldnet.build import build
from crysldnet.console import note, print_table, suggest_next
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.fingerprint import Fingerprints
from crysldnet.errors import ConfigError
from crysldnet.measures import MEASURES
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
from crysldnet.training import plots
from crysldnet.training.diagnostics import OF_THE_MACHINE
from crysldnet.training.fit import fit_and_export
from crysldnet.training.inputs import inputs_of
from crysldnet.training.loggers import describe_data
from crysldnet.training.optimizer import AdamW
from crysldnet.training.run_folder import RunFolder, code_version
from crysldnet.training.trainer import TrainerSettings, checked_settings, make_trainer
from crysldnet.training.wandb_run import begin_stage, publish

__all__ = ["PretrainConfig", "PretrainModule", "build_model", "make_data", "run"]

sys.modules[__name__].__class__ = CommandModule

MODEL_KEYS = ("encoder", "objective", "denoiser", "latent", "diffusion")
"""Configuration keys that a checkpoint must match to be resumed."""


def run(config: PretrainConfig, values: dict[str, Any], choices: Mapping[str, Any] | None = None) -> int:
    """Pretrain; return the exit status.

    Args:
        config: the settings.
        values: the same as plain values, saved with the run's output.
        choices: configuration files by group.
    """
    stages: list[Stage] = ["vae", "diffusion"] if config.stage == "both" else [config.stage]
    if config.init is not None and config.stage != "diffusion":
        raise ConfigError(f"init is for stage=diffusion; stage={config.stage} starts with new weights", "init")
    if config.init is None and config.stage == "diffusion":
        raise ConfigError("stage=diffusion needs init=PATH, the pretraining.safetensors of a first stage", "init")
    settings = checked_settings(config.trainer, config.strategy)
    model = build_model(config, with_flow="diffusion" in stages)  # errors stop here, before a folder is created
    data = make_data(config, model)
    data.setup()
    data.steps_per_epoch(settings.world_size, settings.accumulate_grad_batches)
    if config.init is not None:
        load_stage(model, Path(config.init))
    folder = RunFolder(config.runs, "pretrain", config.name, resume=config.resume is not None)
    folder.save_split(data.split_text())
    folder.save_inputs(inputs_of(data, init=config.init), config.plugins)
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
    """Return the crystals, corrupted by the model's objective, with the seed of the run unless another is given."""
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
    stages = ["vae", "diffusion"] if config.stage == "both" else [stage]
    model = build_model(config, with_flow=stage == "diffusion")
    if previous is not None:
        load_stage(model, previous)
    model.start_teacher()
    settings.prepare(model.encoder)
    seed = stage_seed(config, stage)
    data = make_data(config, model, seed)
    data.setup()
    pace: StageSettings = getattr(config.stages, stage)
    trainer = make_trainer(
        settings,
        build(config.strategy, "strategy"),
        folder=folder.path / stage,
        epochs=pace.epochs,
        seed=seed,
        gradient_clip_val=pace.gradient_clip_val,
        owner={
            "command": "pretrain",
            "stage": stage,
            "model": {key: values[key] for key in MODEL_KEYS},
            "inputs": {"data_sha256": data.store.hash},
        },
        resume=config.resume is not None,
        loggers=loggers,
        stage=f"stage {stages.index(stage) + 1} of {len(stages)} ({stage})",
    )
    begin_stage(loggers, stage)

    def export(metrics: dict[str, float], weights: dict[str, Tensor]) -> None:
        provenance = _provenance(data, stage, values)
        info = {**model_file.encoder_info(model.encoder, config.encoder, provenance), "metrics": metrics}
        write_stage(folder.path, stage, weights, info, _seen(data, previous))

    return fit_and_export(stage, trainer, _make_module(config, pace, model), data, _kept, export)


def _make_module(config: PretrainConfig, pace: StageSettings, model: PretrainingModel) -> PretrainModule:
    optimizer: AdamW = build(config.optimizer, "optimizer")
    second = pace if isinstance(pace, DiffusionStageSettings) and model.flow is not None else None
    return PretrainModule(
        model=model,
        optimizer=replace(optimizer, lr=optimizer.lr * pace.lr_factor),
        denoiser_lr=1.0 if second is None else second.denoiser_lr,
        hold_encoder_epochs=0 if second is None else second.hold_encoder_epochs,
        clip_apart=second is not None and second.clip_apart,
        validate_in_train_mode=config.validate_in_train_mode,
    )


def _kept(metrics: dict[str, float]) -> dict[str, float]:
    """Return the model metrics stored in a stage's file."""
    return {k: v for k, v in metrics.items() if k.startswith(("val/", "train/")) and k not in OF_THE_MACHINE}


def _provenance(data: CrystalDataModule, stage: Stage, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "data": data.store.metadata.get("dataset", data.store.name),
        "data_sha256": data.store.hash,
        "train_crystals": len(data.rows["train"]),
        "excluded": data.excluded,
        "code_version": code_version(),
        "stage": stage,
        "config": values,
    }


@rank_zero_only
def _draw(folder: Path, stage: Stage) -> None:
    """Plot the learning curves of a finished stage, unless already done."""
    out = folder / "plots" / f"{stage}.png"
    if not out.exists():
        names = ["train/loss", *(f"val/{name}" for name, measure in MEASURES.items() if measure.plotted)]
        plots.learning_curves(folder / stage / "metrics.csv", out, names, f"{stage} stage")


def _seen(data: CrystalDataModule, previous: Path | None) -> NDArray[np.uint64]:
    """Return the training crystals of the encoder, in this stage and the previous one."""
    seen = Fingerprints.of(data.store, data.rows["train"]).packed()
    before = None if previous is None else model_file.read_pretraining_set(previous, "pretraining")
    return seen if before is None else np.union1d(before, seen)


def write_stage(
    folder: Path,
    stage: Stage,
    weights: dict[str, Tensor],
    info: dict[str, Any],
    seen: NDArray[np.uint64] | None = None,
) -> None:
    """Write the encoder, and the whole model for the next stage."""
    encoder = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
    kept = {k: v for k, v in weights.items() if not k.startswith("teacher.")}
    model_file.write(folder / "encoder.safetensors", "encoder", encoder, info, seen)
    model_file.write(folder / stage / "pretraining.safetensors", "pretraining", kept, info, seen)


FRESH = ("flow.", "teacher.", "condition.")
"""Prefixes of weights that a first stage may lack."""


def load_stage(model: PretrainingModel, path: Path) -> None:
    """Load the weights of a finished first stage; weights of latent diffusion and conditions that it lacks stay
    untrained.
    """
    info, state = model_file.read(path, "pretraining")
    check_graph(model.encoder, info.get("graph", {}), path)
    fresh = {k: v for k, v in model.state_dict().items() if k.startswith(FRESH) and k not in state}
    load_strictly(model, {**state, **fresh}, path)


Metrics = Mapping[str, float]


KEPT = 0.5
"""A second stage that retains less than this fraction of the spread or effective rank has collapsed."""
GAIN = 0.02
"""An error at least this fraction below its baseline counts as learned."""


def verdict(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Describe what was learned relative to which baseline, and whether the run failed.

    Args:
        summary: run summary with the metrics of each stage under its name.

    Returns:
        ``sentences``; ``failed``, whether a metric of the last stage is no better than its baseline or the second stage
        collapsed; ``collapsed``, None if undetermined.
    """
    stages = [stage for stage in ("vae", "diffusion") if stage in summary]
    last: Metrics = summary[stages[-1]]
    sentences, failed = [], False
    for measure in MEASURES.values():
        value, baseline = last.get(f"val/{measure.name}"), last.get(f"val/{measure.name}_baseline")
        if not measure.learned or value is None or baseline is None:
            continue
        higher = measure.better == "higher"
        gain = (value - baseline) / max(1.0 - baseline, 1e-9) if higher else 1.0 - value / max(baseline, 1e-12)
        learned = gain > GAIN
        failed |= not learned
        word = "learned" if learned else "not learned"
        compared = f"{measure.form.format(value)} against {measure.form.format(baseline)} ({measure.baseline})"
        sentences.append(f"{measure.learned}: {word}, {compared}")
    shares = _shares(summary) if len(stages) == 2 else {}
    for name, (before, after) in shares.items():
        if after >= KEPT * before:
            continue
        sentences.append(f"encoder output: its {name} fell from {before:.3g} to {after:.3g} in the second stage")
    collapsed = any(not after > KEPT * before for before, after in shares.values()) if shares else None
    return {"sentences": sentences, "failed": failed or bool(collapsed), "collapsed": collapsed}


def _shares(summary: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return spread and effective rank of the encoder output after both stages."""
    names = {"spread": "val/features_spread", "effective rank": "val/features_rank"}
    if not all(key in summary[stage] for stage in ("vae", "diffusion") for key in names.values()):
        return {}
    return {name: (summary["vae"][key], summary["diffusion"][key]) for name, key in names.items()}


def print_result(summary: Mapping[str, Any], stages: Sequence[str], encoder: str) -> None:
    """Print the table, the verdict and the path of the encoder."""
    shown = [stage for stage in stages if stage in summary]
    table = []
    for measure in (known for known in MEASURES.values() if known.shown):
        cells = [_cell(summary[stage], measure.name, measure.form) for stage in shown]
        if all(cell == "–" for cell in cells):
            continue
        bases = [_cell(summary[stage], f"{measure.name}_baseline", measure.form) for stage in shown]
        base = next((cell for cell in bases if cell != "–"), None) if measure.baseline else None
        table.append([measure.heading, *cells, f"{base} ({measure.baseline})" if base is not None else ""])
    print_table("On the validation split", ["", *shown, "baseline"], table)
    said = summary["verdict"]
    for sentence in said["sentences"]:
        note(sentence)
    if said["failed"]:
        note("pretraining failed in what is named above: see docs/method.md")
    print_table("", ["written", ""], [["encoder", encoder]])
    suggest_next(f"crysldnet finetune pretrained={encoder}", f"make finetune ENCODER={encoder}")


def _cell(metrics: Metrics, key: str, form: str) -> str:
    value = metrics.get(f"val/{key}")
    return "–" if value is None else form.format(value)
