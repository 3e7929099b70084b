"""Run Matbench tasks on their official folds and write a submission folder.

Each fold's model selects its best epoch on a part of the fold's training crystals; afterwards the test crystals are
read once, without targets. The official package defines the folds and records and scores the predictions. Finished
folds are kept in the run folder, so resume=last continues with the next one. parallel=N trains N folds at once.

Crystals are read from MATMINER_DATA/TASK.json.gz. Without that file, matbench_jdft2d and matbench_phonons are
re-encoded from the data in this package, and the result is labeled "not the official file".

crysldnet matbench validate FOLDER checks a submission folder and recomputes its scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from crysldnet.artifacts.provenance import print_overlap
from crysldnet.build import build
from crysldnet.console import print_table
from crysldnet.errors import ConfigError, DataError
from crysldnet.finetune.settings import make_encoder
from crysldnet.tools.matbench.benchmark_run import BenchmarkRun, open_task, run_folds
from crysldnet.tools.matbench.folds import TaskRun, fold_folder, read_fold, record_folds, run_fold, write_tested
from crysldnet.tools.matbench.scores import TaskScores, print_scores, taken_names, true_roc_auc, write_comparison
from crysldnet.tools.matbench.settings import MatbenchConfig, check_settings, make_recipes
from crysldnet.tools.matbench.submission import TaskResult, keep_command, write_submission
from crysldnet.tools.matbench.tasks import task_hashes, task_metadata
from crysldnet.tools.matbench.validation import check_submission
from crysldnet.training.inputs import hashes_of
from crysldnet.training.processes import wait_until_free
from crysldnet.training.run_folder import RunFolder
from crysldnet.training.trainer import checked_settings
from crysldnet.training.wandb_run import publish_submission

__all__ = ["MatbenchConfig", "check_settings", "run"]


def run(config: MatbenchConfig, values: dict[str, Any], choices: Mapping[str, Any] | None = None) -> int:
    """Run the tasks; return the exit status.

    Args:
        config: the settings.
        values: the same as plain values, saved with the run's output.
        choices: configuration files by group.
    """
    checked_settings(config.trainer, config.strategy)
    check_settings(config)
    hashes = task_hashes(config.names)  # checks that all files exist
    config.check_targets([task_metadata(name).target for name in config.names], "a target of the tasks")
    if config.algorithm in taken_names():
        raise ConfigError(f"algorithm={config.algorithm}: the leaderboard has an entry of that name", "algorithm")
    make_recipes(config, values)
    make_encoder(config)
    folder = RunFolder(config.runs, "matbench", config.name, resume=config.resume is not None, extend=True)
    folder.save_inputs({"files": hashes_of(pretrained=config.pretrained), "tasks": hashes}, config.plugins)
    folder.save_config(values, choices)
    keep_command(folder.path, values)
    begun = BenchmarkRun.of(config, values, folder)
    if config.parallel > 1:
        run_folds(begun)
    told = {}
    for name in config.names:
        task_run = open_task(begun, name)
        for fold in task_run.folds:
            wait_until_free(fold_folder(folder.path, name, fold))
            run_fold(task_run, fold)
        told[name] = _score(task_run)
        task_run.task.df = None  # keep the crystals of one task in memory at a time
    _finish(begun, values, told)
    return 0


def _score(task_run: TaskRun) -> TaskResult:
    """Record and score the folds of a task with the official package, and keep the results for the submission."""
    record_folds(task_run)
    write_tested(task_run)
    task = task_run.task
    scores = {fold: dict(task.results[task.folds_map[fold]].scores) for fold in task_run.folds}
    areas = {}
    if task.metadata.task_type == "classification":
        for fold in task_run.folds:
            true = task.get_test_data(fold, include_target=True)[1]
            areas[fold] = true_roc_auc(true.tolist(), read_fold(task_run, fold)["predictions"])
    return TaskResult(
        TaskScores(task_run.name, scores, areas, task_run.source.label),
        task_run.source,
        task_run.inputs,
        task_run.overlap,
    )


@rank_zero_only
def _finish(begun: BenchmarkRun, values: dict[str, Any], told: dict[str, TaskResult]) -> None:
    config = begun.config
    submission = write_submission(begun, told)
    if config.complete:
        checked = check_submission(submission)
        if checked.problems:
            raise DataError(f"{submission}: not a valid submission: {'; '.join(checked.problems)}")
    written = [["submission", str(submission)]]
    if config.complete:
        scores = [t.scores for t in told.values()]
        written.append(["comparison", str(write_comparison(begun.folder.path, config.algorithm, scores))])
    begun.folder.finish(
        {
            "command": "matbench",
            "tasks": {name: _summary(t) for name, t in told.items()},
            "seed": config.seed,
            "pretrained": config.pretrained,
            "pretrained_sha256": next(iter(told.values())).inputs["pretrained_sha256"],
            "valid": config.complete,
            "submission": str(submission),
        }
    )
    about = values | {
        "data_sha256": {name: t.source.sha256 for name, t in told.items()},
        "target_units": {name: t.scores.unit for name, t in told.items()},
    }
    loggers = build(config.logger, "logger", folder=begun.folder.path, name=begun.folder.name, config=about)
    totals = {f"{name}/{key}": value for name, t in told.items() for key, value in _total(t).items()}
    publish_submission(loggers, begun.folder.path, totals, submission)
    for t in told.values():
        print_scores(t.scores.task, config.algorithm, t.scores)
        print_overlap(t.overlap)
    state = "valid" if config.complete else f"INCOMPLETE, folds {config.folds} alone"
    print_table("", ["", ""], [*written, ["state", state]])


def _total(told: TaskResult) -> dict[str, float]:
    scores = told.scores
    return {f"{scores.metric}_mean": scores.mean(), f"{scores.metric}_std": scores.std()}


def _summary(told: TaskResult) -> dict[str, Any]:
    scores = told.scores
    return {
        **_total(told),
        "unit": scores.unit,
        "scores": {f"fold_{fold}": s for fold, s in scores.folds.items()},
        **({"true_roc_auc": {f"fold_{fold}": a for fold, a in scores.true_auc.items()}} if scores.true_auc else {}),
        "official_data": told.source.official,
        "data_sha256": told.inputs["data_sha256"],
        "pretraining_overlap": told.overlap,
    }
