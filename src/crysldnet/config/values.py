"""Values of a configuration: parse, override and resolve."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crysldnet.build import NO_YAML
from crysldnet.config.words import in_brackets
from crysldnet.errors import ConfigError
from crysldnet.renames import renamed_argument

LISTS = ("data.targets", "data.descriptors", "data.exclude", "atomic_references", "plugins")
"""Keys of name lists; one name, or several separated by commas, needs no brackets."""
MISSING = "???"
"""Marks a required key until it is given."""


def parse(value: str) -> Any:
    """Parse a value as YAML, or ``None``, which W&B's agent writes for null.

    Invalid YAML, such as the pattern ``*.cif``, is text, and so is ``-``.
    """
    if value.strip() in ("-", "None"):
        return value if value.strip() == "-" else None
    return _parse(value) if "${" in value else deepcopy(_parse_plain(value))


def _parse(value: str) -> Any:
    try:
        parsed = OmegaConf.from_dotlist([f"value={value}"])
    except UnicodeEncodeError:  # file names may not be UTF-8; several of them are in JSON
        return json.loads(value) if value.startswith("[") else value
    except OmegaConfBaseException:
        raise
    except NO_YAML:
        return value
    return OmegaConf.to_container(parsed, resolve=True)["value"]  # type: ignore[call-overload, index]


_parse_plain = lru_cache(maxsize=1024)(_parse)
"""For text without a resolver, which always has the same value."""


def refuse_other_bytes(pairs: Sequence[tuple[str, str]]) -> None:
    """Reject values that aren't UTF-8, because saved configurations can't contain them."""
    for key, value in pairs:
        if (shown := value.encode(errors="backslashreplace").decode()) != value:
            raise ConfigError(f"{key}={shown}: not UTF-8; rename the file or folder", key)


def literally(value: Any) -> Any:
    """Return plain values in which no text is resolved."""
    if isinstance(value, Mapping):
        return {key: literally(item) for key, item in value.items()}
    if isinstance(value, list):
        return [literally(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _value_of(key: str, text: str) -> Any:
    value = parse(text)
    value = in_brackets(value) if key in LISTS and isinstance(value, str) else value
    return renamed_argument(key, value)[1]


def changed(values: dict[str, Any], changes: Sequence[tuple[str, str]]) -> DictConfig:
    """Return values with the command line applied, unresolved."""
    try:
        merged = OmegaConf.create(values)
    except OmegaConfBaseException as error:  # dates and sets are valid YAML
        raise ConfigError(f"{getattr(error, 'full_key', '')}: {str(error).splitlines()[0]}") from error
    for key, value in changes:
        try:
            OmegaConf.update(merged, key, literally(_value_of(key, value)), merge=False)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key}={value}: {str(error).splitlines()[0]}", key) from error
    return merged


def changed_plainly(values: dict[str, Any], changes: Sequence[tuple[str, str]]) -> dict[str, Any] | None:
    """Return the same if nothing needs resolving, several times as fast; otherwise None."""
    if not _is_plain(values) or any("${" in text for _, text in changes):
        return None
    new = deepcopy(values)
    for key, text in changes:
        try:
            value = _value_of(key, text)
        except OmegaConfBaseException:
            return None
        *parents, last = key.split(".")
        if not (_is_plain(value) and re.fullmatch(r"\w+(\.\w+)*", key)):
            return None
        node = new
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                return None
        node[last] = value
    return new


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if type(value) is str:
        return value != MISSING and "${" not in value
    return value is None or type(value) in (bool, int, float)


def flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the innermost keys, dotted, and their values; an empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def resolve(merged: DictConfig) -> dict[str, Any]:
    """Return plain values with references resolved.

    Raises:
        ConfigError: a reference is invalid.
    """
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "")
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}", key) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
