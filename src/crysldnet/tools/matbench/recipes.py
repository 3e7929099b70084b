"""Alternatives of training, of which each fold takes the one that does best on its inner validation."""

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
    """A way of training.

    Attributes:
        text: as it was given; empty for the configuration as it is.
        config: the settings.
        values: the same as plain values.
    """

    text: str
    config: MatbenchConfig
    values: dict[str, Any]


def make_recipes(config: MatbenchConfig, values: dict[str, Any]) -> list[Recipe]:
    """Return the ways of training: one for each of ``recipes``, or the configuration itself where there are none.

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
