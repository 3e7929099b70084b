"""The settings of a Matbench run, and what can be said of them before it starts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from crysldnet.errors import ConfigError
from crysldnet.finetune import TrainingConfig

BENCHMARK = "matbench_v0.1"
FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class MatbenchConfig(TrainingConfig):
    """Every key of ``conf/matbench.yaml``: those of finetuning, and the benchmark's own."""

    task: str
    folds: list[int] | None
    validation_fraction: float
    algorithm: str
    authors: str
    out: str | None


def submission_name(config: MatbenchConfig) -> str:
    """Return the name of the submission folder, which says so where folds are missing."""
    complete = config.folds is None or len(config.folds) == FOLDS
    return f"{BENCHMARK}_{config.algorithm}{'' if complete else '_incomplete'}"


def check_settings(config: MatbenchConfig) -> None:
    """Check what the types can't say.

    Raises:
        ConfigError: a key is out of range, or has no meaning here.
    """
    for key in ("path", "targets", "split"):
        if key in config.data:
            raise ConfigError(f"data.{key}: the task decides that", f"data.{key}")
    if not 0 <= config.validation_fraction < 1:
        raise ConfigError(
            f"validation_fraction={config.validation_fraction}: from 0 to less than 1", "validation_fraction"
        )
    if config.folds is not None and (
        not config.folds or len(set(config.folds)) < len(config.folds) or not set(config.folds) <= set(range(FOLDS))
    ):
        raise ConfigError(f"folds={config.folds}: name some of 0, 1, 2, 3, 4, each once", "folds")
    if not re.fullmatch(r"[\w.+-]+", config.algorithm):
        raise ConfigError(f"algorithm={config.algorithm!r}: letters, digits and . _ + - make a folder", "algorithm")
    if config.out is not None and config.resume is None and (Path(config.out) / submission_name(config)).exists():
        raise ConfigError(
            f"{Path(config.out) / submission_name(config)} exists already; choose another algorithm or out", "out"
        )
