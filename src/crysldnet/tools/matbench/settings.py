"""Settings of a Matbench run, their validation, and the alternative recipes from which each fold selects the best."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crysldnet.config import compose, refuse_unused, split_words, to_yaml, validate
from crysldnet.errors import ConfigError
from crysldnet.finetune.settings import EnsembleConfig
from crysldnet.training.processes import check_parallel

BENCHMARK = "matbench_v0.1"
FOLDS = 5
RECIPE = (
    "recipe networks mode target_types target_per atomic_references epochs min_steps patience loss layer_decay "
    "gradient_clip_val data head optimizer trainer"
).split()
"""Keys that a recipe may set: how a model is trained, but not the data or the initial model."""


@dataclass(frozen=True, kw_only=True)
class MatbenchConfig(EnsembleConfig):
    """All keys of ``conf/matbench.yaml``: those of finetuning, and the benchmark's own."""

    tasks: list[str] | str
    folds: list[int] | None
    validation_fraction: float
    recipes: list[str]
    parallel: int
    algorithm: str
    authors: str
    out: str | None

    @property
    def names(self) -> list[str]:
        """The tasks."""
        return [self.tasks] if isinstance(self.tasks, str) else self.tasks

    @property
    def complete(self) -> bool:
        """Whether all folds are requested, as required for a submission."""
        return self.folds is None or len(self.folds) == FOLDS


def submission_name(config: MatbenchConfig) -> str:
    """Return the name of the submission folder, which indicates missing folds."""
    return f"{BENCHMARK}_{config.algorithm}{'' if config.complete else '_incomplete'}"


def check_settings(config: MatbenchConfig) -> None:
    """Validate what types can't express.

    Raises:
        ConfigError: a key is out of range or invalid here.
    """
    for key in ("path", "targets", "split"):
        if key in config.data:
            raise ConfigError(f"data.{key}: the task decides that", f"data.{key}")
    if not config.names or len(set(config.names)) < len(config.names):
        raise ConfigError(f"tasks={config.names}: name one task or more, each once", "tasks")
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
    if not config.authors.strip():
        raise ConfigError("authors: a submission must name them", "authors")
    check_parallel(config.parallel, config.trainer, "fold")
    _check_recipes(config)
    if config.out is not None and config.resume is None and (Path(config.out) / submission_name(config)).exists():
        raise ConfigError(
            f"{Path(config.out) / submission_name(config)} already exists; choose another algorithm or out", "out"
        )


def _check_recipes(config: MatbenchConfig) -> None:
    if config.recipes and config.validation_fraction == 0:
        raise ConfigError("recipes: validation chooses among them, and validation_fraction=0 leaves none", "recipes")
    if len(set(config.recipes)) < len(config.recipes):
        raise ConfigError("recipes: name each once", "recipes")
    for recipe in config.recipes:
        for key in (word.partition("=")[0] for word in recipe_arguments(recipe)):
            if key.split(".")[0] not in RECIPE:
                raise ConfigError(
                    f"recipes: {key} in {recipe!r}; a recipe may set {', '.join(RECIPE)}, and their parts", "recipes"
                )


def recipe_arguments(recipe: str) -> Sequence[str]:
    """Return the ``key=value`` pairs of a recipe written as on the command line.

    Raises:
        ConfigError: a quote isn't closed, or it would read the environment, which is forbidden because it may come from
            a file.
    """
    if "${" in recipe:
        raise ConfigError(f"recipes: {recipe!r} has ${{…}}; write what it stands for", "recipes")
    return split_words(recipe, "recipes")


@dataclass(frozen=True)
class Recipe:
    """A training recipe.

    Attributes:
        text: recipe as given; empty for the unmodified configuration.
        config: the settings.
        values: the same as plain values.
    """

    text: str
    config: MatbenchConfig
    values: dict[str, Any]


def make_recipes(config: MatbenchConfig, values: dict[str, Any]) -> list[Recipe]:
    """Return one recipe for each of ``recipes``, or the configuration itself if there are none.

    Raises:
        ConfigError: a recipe isn't a valid configuration; the message names it.
    """
    if not config.recipes:
        return [Recipe("", config, values)]
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "config.yaml"
        base.write_text(to_yaml({**values, "recipes": []}))
        return [_make_recipe(text, base) for text in config.recipes]


def _make_recipe(text: str, base: Path) -> Recipe:
    try:
        composition = compose("matbench", recipe_arguments(text), base)
        refuse_unused(composition)
        config = validate(composition, MatbenchConfig)
        check_settings(config)
    except ConfigError as error:
        raise ConfigError(f"recipes: {text!r}: {error}", "recipes") from None
    return Recipe(text, config, composition.values)
