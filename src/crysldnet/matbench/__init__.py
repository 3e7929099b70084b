"""Run a task of the official Matbench benchmark on its own folds and write a submission folder.

Each fold's model chooses its best epoch on a part of the fold's training crystals; the test crystals are read without
their targets, once, when that is done. The official package keeps the folds, records the predictions and scores them.
A finished fold is kept in the run folder, so resume=last goes on with the next one.

The crystals are read from MATMINER_DATA/TASK.json.gz. Without that file matbench_jdft2d and matbench_phonons are
re-encoded from the data inside this package; the result is then labelled "not the official file".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lightning.pytorch.utilities import rank_zero_only

from crysldnet.build import build
from crysldnet.errors import ConfigError
from crysldnet.finetune import make_encoder
from crysldnet.matbench.folds import Run, run_fold, score_folds
from crysldnet.matbench.settings import MatbenchConfig, check_settings
from crysldnet.matbench.submission import load_submission, write_submission
from crysldnet.matbench.tasks import open_benchmark
from crysldnet.report import print_table
from crysldnet.training.pretraining_set import print_overlap
from crysldnet.training.run_folder import RunFolder
from crysldnet.training.trainer import TrainerSettings

FIXED = (
    "task seed pretrained mode target_types element_references epochs min_steps patience loss layer_decay "
    "gradient_clip validation_fraction data encoder head optimizer trainer"
).split()
"""Keys that must be the same in all folds of a run, so also when it is resumed."""


def run(config: MatbenchConfig, values: dict[str, Any]) -> int:
    """Run the task; return the exit status.

    Args:
        config: the settings.
        values: the same as plain values, to be saved with everything that the run writes.
    """
    settings: TrainerSettings = build(config.trainer, "trainer")
    settings.check(build(config.strategy, "strategy"))
    check_settings(config)
    encoder, _, provenance = make_encoder(config)
    benchmark, source = open_benchmark(config.task)
    folder = RunFolder(config.runs, "matbench", config.name, resume=config.resume is not None)
    _check_resumed(folder, values)
    folder.save_config(values)
    device = "cuda" if settings.resolve_accelerator() == "gpu" else "cpu"
    whole = Run(config, values, folder, benchmark, source, encoder.graph, provenance, device)
    for fold in whole.folds:
        run_fold(whole, fold)
    _finish(whole)
    return 0


def _check_resumed(folder: RunFolder, values: Mapping[str, Any]) -> None:
    path = folder.path / "config.yaml"
    before = yaml.safe_load(path.read_text()) if path.exists() else values
    for key in FIXED:
        if before.get(key) != values[key]:
            raise ConfigError(
                f"{folder.path} was begun with {key}={before.get(key)}, not {values[key]}: all folds of a run are "
                "trained alike; resume it as it was, or choose another name",
                key,
            )


@rank_zero_only
def _finish(run: Run) -> None:
    scores = score_folds(run)
    submission = write_submission(run)
    if run.complete:
        load_submission(submission)
    metadata = run.task.metadata
    mae = np.array([s["mae"] for s in scores.values()])
    run.folder.finish(
        {
            "command": "matbench",
            "task": run.config.task,
            "seed": run.config.seed,
            "pretrained": run.config.pretrained,
            **run.inputs,
            "pretraining_overlap": run.overlap,
            "official_data": run.source.official,
            "valid": run.complete,
            "unit": metadata.unit,
            "mae_mean": float(mae.mean()),
            "mae_std": float(mae.std()),
            "scores": {f"fold_{fold}": s for fold, s in scores.items()},
            "submission": str(submission),
        }
    )
    _print_scores(run, scores, submission)
    print_overlap(run.overlap)


def _print_scores(run: Run, scores: dict[int, dict[str, float]], submission: Path) -> None:
    metadata = run.task.metadata
    rows = [[f"fold {fold}", f"{s['mae']:.4f}", f"{s['rmse']:.4f}"] for fold, s in scores.items()]
    errors = [np.array([s[name] for s in scores.values()]) for name in ("mae", "rmse")]
    rows.append(["mean ± std", *(f"{e.mean():.4f} ± {e.std():.4f}" for e in errors)])
    rows.append(["MAD of the targets", f"{metadata.mad:.4f}", ""])
    print_table(run.config.task, ["", f"MAE ({metadata.unit})", f"RMSE ({metadata.unit})"], rows)
    state = "valid" if run.complete else f"INCOMPLETE, folds {run.folds} of {len(run.task.folds)}"
    print_table("", ["", ""], [["submission", str(submission)], ["state", state], ["data", run.source.label]])
