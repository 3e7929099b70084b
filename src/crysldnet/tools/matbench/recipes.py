"""Alternative training recipes, from which each fold selects the best by validation."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crysldnet.config import compose, refuse_unused, to_yaml, validate
from crysldnet.errors import ConfigError
from crysldnet.tools.matbench.settings import MatbenchConfig, check_settings, recipe_arguments


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
