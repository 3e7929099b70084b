"""A run with a folder: what all its tasks and folds need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crysldnet.build import build
from crysldnet.encoders.protocol import Encoder
from crysldnet.errors import ConfigError
from crysldnet.finetune.settings import make_encoder
from crysldnet.tools.matbench.folds import TaskRun
from crysldnet.tools.matbench.settings import MatbenchConfig, Recipe, make_recipes
from crysldnet.tools.matbench.tasks import import_matbench, load_task
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
    refuse_seen_labels(begun.config.pretrained, name, task_run.overlap)
    return task_run


def refuse_seen_labels(pretrained: str | None, task: str, overlap: dict[str, Any] | None) -> None:
    """Reject a finetuned model that may have been trained on labels of crystals with formulas of a task.

    Raises:
        ConfigError: it may have.
    """
    if overlap is None or not overlap.get("labels") or overlap["formulas"] == 0:
        return
    learned = f"pretrained={pretrained} has learned labels ({', '.join(overlap['labels'])})"
    if overlap["formulas"] is None:
        raise ConfigError(f"{learned}, and its file doesn't say of which crystals; finetune it again", "pretrained")
    raise ConfigError(
        f"{learned}, and the crystals it has seen share the formulas of {overlap['formulas']:,} of the "
        f"{overlap['test_crystals']:,} crystals of {task}; pretrain and finetune with "
        f"data.exclude=[embedded:{task}] data.exclude_by=formula",
        "pretrained",
    )
