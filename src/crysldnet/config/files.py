"""Configuration files: those in ``conf/``, the user's own, and those saved by a run."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crysldnet.build import NO_YAML, from_yaml
from crysldnet.console import did_you_mean
from crysldnet.errors import ConfigError
from crysldnet.io import conf_folder
from crysldnet.renames import renamed

CHOICES = "defaults"
"""Key of a file with the choice of each group."""


def choices(group: str) -> list[str]:
    """Return the choices of a group."""
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


def load_yaml(path: Path) -> DictConfig:
    """Read a YAML file of keys.

    Raises:
        ConfigError: it is invalid, or it uses a resolver and isn't part of the package.
    """
    return OmegaConf.create(read_yaml(path))


def read_yaml(path: Path, group: str = "") -> dict[Any, Any]:
    """Read a YAML file of keys with a group name for messages; raises like :func:`load_yaml`."""
    try:
        loaded = deepcopy(_parsed(path.read_text(encoding="utf-8")))
    except (OSError, OmegaConfBaseException, *NO_YAML) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: it must hold keys and values")
    if not path.resolve().is_relative_to(conf_folder().resolve()):
        refuse_resolvers(loaded, str(path), group)
        if not group and loaded.get("plugins"):
            raise ConfigError(f"{path}: plugins run code; give them on the command line, plugins=[…]", "plugins")
        return renamed(loaded, group)
    return loaded


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.load(StringIO(text)))


_saved = lru_cache(maxsize=16)(from_yaml)


def lay_over(base: dict[Any, Any], layer: Mapping[Any, Any]) -> None:
    """Override the values of a base with those of a layer, key by key; ??? keeps the existing value."""
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            lay_over(base[key], value)
        elif value != MISSING or key not in base:
            base[key] = value


def refuse_resolvers(value: Any, source: str, key: str = "") -> None:
    """Reject plain values from a file that would read the environment or use another resolver."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            refuse_resolvers(item, source, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            refuse_resolvers(item, source, key)
    elif isinstance(value, str) and ":" in value.partition("${")[2]:
        raise ConfigError(
            f"{source}: {key}: {value!r} isn't resolved in a file; write the value there, or give {key}=…",
            key,
        )


def group_file(group: str, choice: str) -> Path:
    """Return the file of a group's choice, given as a name or path.

    Raises:
        ConfigError: the choice is unknown.
    """
    if choice.endswith((".yaml", ".yml")):
        return Path(choice)
    path = conf_folder() / group / f"{choice}.yaml"
    if not path.is_file():
        key = group.partition("/")[0]
        hint = did_you_mean(choice, choices(group), "")
        raise ConfigError(
            f"{key}={choice}: no such choice; {f'{hint} ' if hint else ''}available: {', '.join(choices(group))}", key
        )
    return path


def choices_in(choice: str) -> list[str]:
    """Return the choices of a group: one, or those of a list in brackets."""
    if not (choice.startswith("[") and choice.endswith("]")):
        return [choice]
    return [name.strip() for name in choice[1:-1].split(",")]


def read_saved(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the values and, if stored, the choices from the ``config.yaml`` of a run.

    Raises:
        ConfigError: it can't be read.
    """
    try:
        values = deepcopy(_saved(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: it must hold keys and values")
    values = renamed(values)
    recorded = values.pop(CHOICES, None)
    return values, recorded if isinstance(recorded, dict) else {}
