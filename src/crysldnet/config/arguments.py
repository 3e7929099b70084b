"""Write a configuration as command-line arguments that reproduce it exactly."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from crysldnet.build import TARGET
from crysldnet.config.compose import compose
from crysldnet.config.files import choices, conf_folder, load_yaml
from crysldnet.config.values import literally, parse
from crysldnet.errors import ConfigError
from crysldnet.renames import renamed


def split_words(text: str, key: str) -> list[str]:
    """Split a string of ``key=value`` like a shell.

    Raises:
        ConfigError: a quote or escape isn't closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{key}: {text!r} can't be split into words ({error})", key) from None


def arguments_for(command: str, values: Mapping[str, Any], without: Collection[str] = ()) -> list[str] | None:
    """Return arguments that reproduce a resolved configuration, only where it differs from the defaults.

    Args:
        command: the name of a file in ``conf/``.
        values: the configuration.
        without: keys to leave out.

    Returns:
        None if that isn't possible, as for a version with different keys.
    """
    wanted = {key: value for key, value in renamed(values, quiet=True).items() if key not in without}
    base = compose(command)
    chosen = []
    for group in base.groups:
        target = wanted.get(group, {}).get(TARGET)
        if target != base.values[group].get(TARGET):
            files = {name: load_yaml(conf_folder() / group / f"{name}.yaml") for name in choices(group)}
            chosen += [f"{group}={name}" for name, file in files.items() if file.get(TARGET) == target][:1]
    try:
        arguments = [*chosen, *_differences(compose(command, chosen).values, wanted)]
    except KeyError:
        return None
    made = compose(command, arguments).values
    return arguments if all(made.get(key) == value for key, value in wanted.items()) else None


def _differences(base: Mapping[str, Any], values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield arguments that turn a base with the same keys into the values."""
    for key, value in values.items():
        before = base[key]
        if isinstance(value, Mapping) and isinstance(before, Mapping) and before:
            yield from _differences(before, value, f"{prefix}{key}.")
        elif before != value:
            yield argument(f"{prefix}{key}", value)


def argument(key: str, value: Any) -> str:
    """Return ``key=value`` for the command line, which reproduces this value for any text."""
    if isinstance(value, str) and "$" not in value:
        try:
            if parse(value) == value:
                return f"{key}={value}"
        except OmegaConfBaseException:
            pass
    return f"{key}={_flow(literally(value))}"


def _flow(value: Any) -> str:
    """Return plain values as single-line YAML with all text quoted."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_flow(key)}: {_flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    if not isinstance(value, str):
        return json.dumps(value)
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)
