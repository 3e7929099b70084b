"""A run with a folder: what all its tasks and folds need, and its folds in separate processes.

``crysldnet matbench fold RUN TASK FOLD`` trains one fold of an existing run with the configuration in its folder. A run
with ``parallel=N`` starts it for N folds at a time. You can also start it manually or with a scheduler; the run with
``resume=last`` then reuses the fold.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

from crysldnet.artifacts.provenance import refuse_seen_labels
from crysldnet.build import build
from crysldnet.config import settings_of
from crysldnet.encoders.protocol import Encoder
from crysldnet.errors import ConfigError
from crysldnet.finetune.settings import make_encoder
from crysldnet.tools.matbench.folds import TaskRun, fold_folder, is_done, run_fold
from crysldnet.tools.matbench.settings import FOLDS, MatbenchConfig, Recipe, make_recipes
from crysldnet.tools.matbench.tasks import import_matbench, load_task
from crysldnet.training.processes import Job, own_command, places, run_all
from crysldnet.training.run_folder import RunFolder
from crysldnet.training.trainer import TrainerSettings


@dataclass(frozen=True)
class BenchmarkRun:
    """A run with a folder."""

    config: MatbenchConfig
    recipes: list[Recipe]
    folder: RunFolder
    encoder: Encoder
    provenance: dict[str, Any]
    """Provenance of the pretrained encoder; empty without one."""
    device: str
    benchmark: Any
    """The ``MatbenchBenchmark`` of the run's tasks."""

    @classmethod
    def of(cls, config: MatbenchConfig, values: dict[str, Any], folder: RunFolder) -> BenchmarkRun:
        """Build what all folds need."""
        settings: TrainerSettings = build(config.trainer, "trainer")
        encoder, _, provenance = make_encoder(config)
        benchmark = import_matbench().MatbenchBenchmark(autoload=False, subset=config.names)
        return cls(config, make_recipes(config, values), folder, encoder, provenance, settings.device, benchmark)


def open_task(begun: BenchmarkRun, name: str) -> TaskRun:
    """Load the crystals of a task.

    Raises:
        ConfigError: the model was trained on labels of crystals with its formulas.
    """
    task = begun.benchmark.tasks_map[name]
    source = load_task(task)
    task_run = TaskRun(begun.config, begun.recipes, begun.folder, task, source, begun.encoder, begun.device)
    refuse_seen_labels(begun.config.pretrained, name, f"embedded:{name}", task_run.overlap)
    return task_run


def run_folds(begun: BenchmarkRun) -> None:
    """Run the missing folds of all tasks, ``parallel`` at a time.

    Raises:
        Interrupted: some folds were stopped.
        CrysldnetError: some failed; the others finished.
    """
    root = begun.folder.path
    jobs = []
    for task in begun.config.names:
        for fold in begun.config.folds or range(FOLDS):
            if not is_done(root, task, fold):
                log = fold_folder(root, task, fold) / "log.txt"
                jobs.append(
                    Job(f"{task} fold {fold}", own_command("matbench", "fold", str(root), task, str(fold)), log)
                )
    run_all(jobs, places(begun.config.parallel, begun.device), "folds")


def main(arguments: argparse.Namespace) -> int:
    """Train one fold of an existing run; return the exit status."""
    path = arguments.run.absolute()
    config, values = settings_of("matbench", path, MatbenchConfig)
    if arguments.task not in config.names:
        raise ConfigError(f"{path}: {arguments.task} isn't one of its tasks, {', '.join(config.names)}", "task")
    if not is_done(path, arguments.task, arguments.fold):
        config = replace(config, name=path.name, runs=str(path.parents[1]), resume="last")
        part = fold_folder(path, arguments.task, arguments.fold)
        folder = RunFolder(config.runs, "matbench", config.name, resume=True, part=part)
        run_fold(open_task(BenchmarkRun.of(config, values, folder), arguments.task), arguments.fold)
    return 0
