"""Split command-line words into keys and values; parse, override and resolve the values of a configuration."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crysldnet.build import NO_YAML
from crysldnet.config.files import choices
from crysldnet.errors import ConfigError
from crysldnet.renames import renamed_argument

PLAIN_WORDS = {"report": "runs", "predict": "files", "embed": "files", "suggest": "files", "explain": "files"}
"""Commands that accept plain words, with the key for them."""
DATA_WORDS = "CRYSTALS TABLE"
"""Placeholder for the files of a training run, which are imported before its configuration is composed."""
TRAINS = ("pretrain", "finetune")
"""Commands that accept data files in this way."""
NAMED = ("target_types.", "target_per.", "descriptors.")
"""Keys followed by a name from the data, in which hyphens are kept."""
SWITCHES = ("--help", "--print-config")
"""Flags without a value."""
_KEY = re.compile(r"-{0,2}[A-Za-z_][\w.-]*=")


def split(
    arguments: Sequence[str], keys: Collection[str], plain: str | None, literally: Callable[[Any], Any]
) -> list[tuple[str, str]]:
    """Return keys and values.

    ``--key=value`` and ``--key value`` are read as ``key=value``.

    Args:
        arguments: words from the shell.
        keys: keys of the command and its groups, for suggestions.
        plain: key that collects plain words, which may contain = after a slash; None for none.
        literally: protects text in plain values from being resolved.

    Raises:
        ConfigError: a word is invalid; with a suggestion.
    """
    pairs: list[tuple[str, str]] = []
    words: list[str] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        key, equals, value = word.partition("=")
        if word.startswith("--"):
            key = key[2:].strip()
            key = key if key.startswith(NAMED) else key.replace("-", "_")
            if not equals:
                if not waiting or waiting[0].startswith("--") or _KEY.match(waiting[0]):
                    _refuse_flag(word, key, keys)
                value = waiting.pop(0)
        elif plain is not None and (("/" in key and equals) or (not equals and _is_path(word, plain))):
            words.append(word)
            continue
        elif not equals or not key.strip():
            _refuse(word, waiting, keys, plain)
        pairs.append((key.strip(), value))
    if words and plain in dict(pairs):
        raise ConfigError(f"{words[0]}: give {plain} either as plain words or as {plain}=[…]", plain or "")
    if words and plain is not None:
        pairs.append((plain, json.dumps(literally(words), ensure_ascii=False)))
    return pairs


def _refuse_flag(word: str, key: str, keys: Collection[str]) -> NoReturn:
    """Reject a flag without a value with a suggestion."""
    if key not in keys and (meant := get_close_matches(word, SWITCHES, n=1)):
        raise ConfigError(f"{word}: no such option; did you mean {meant[0]}?", key)
    raise ConfigError(f"{word}: it needs a value; {_meant(key, keys)}", key)


def _is_path(word: str, key: str) -> bool:
    """Return whether a word may be a file or folder; runs are searched later."""
    there = os.path.exists(os.path.expanduser(word)) or glob.has_magic(word) or re.search(r"[/\\:@.]", word)
    return not word.startswith("-") and (key == "runs" or bool(there))


def _refuse(word: str, following: Sequence[str], keys: Collection[str], plain: str | None) -> NoReturn:
    """Reject an invalid word with a suggestion."""
    if re.fullmatch(r"-[A-Za-z]", word):
        meant = [key for key in keys if key.startswith(word[1:])]
        names = f"; {' or '.join(f'{key}=…' for key in meant)}" if meant else ""
        raise ConfigError(f"{word}: there are no flags of one letter{names}")
    if following[:1] == ["="] or word.startswith("=") or (following and following[0].startswith("=")):
        raise ConfigError(f"{word!r}: leave out the spaces around =, as in key=value")
    key = word.lstrip("-").replace("-", "_")
    if following and key in keys and not _KEY.match(following[0]) and not following[0].startswith("-"):
        raise ConfigError(f"{word!r}: write {key}={following[0]}", key)
    if key in keys or get_close_matches(key, keys, n=1):
        raise ConfigError(f"{word!r}: expected group=name or key=value; {_meant(key, keys)}", key)
    if plain is not None:
        raise ConfigError(f"{word!r}: no such file or folder, and not key=value")
    raise ConfigError(f"{word!r}: expected group=name or key=value")


def _meant(key: str, keys: Collection[str]) -> str:
    near = key if key in keys else next(iter(get_close_matches(key, keys, n=1)), None)
    return f"write {near}=…" if near else f"write {key}=VALUE"


def in_brackets(text: str) -> list[str]:
    """Return the names in a list without brackets, split at commas outside of (…) and […]."""
    return [name.strip() for name in re.split(r",(?![^()\[\]]*[)\]])", text) if name.strip()]


OWN = "custom"
"""Choice of the group ``data`` that takes a path."""


def is_opened(path: str) -> bool:
    """Return whether a path is a store, a Parquet file or a named data set, which need no import."""
    whole = path.rpartition("@")[0] if "@" in path and not os.path.exists(path) else path
    named = path.startswith(("embedded:", "published:"))
    return named or whole.endswith(".parquet") or os.path.isfile(os.path.join(whole, "store.json"))


def with_paths(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Replace ``data=PATH`` by the choice that takes a path, and its path."""
    found: list[tuple[str, str]] = []
    for key, value in pairs:
        if key == "data" and value not in choices("data") and is_opened(value):
            found += [(key, OWN), ("data.path", value)]
        else:
            found.append((key, value))
    return found


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
