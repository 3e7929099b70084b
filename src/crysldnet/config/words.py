"""Split command-line words into keys and values, including styles of other programs, and ``data=PATH``."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from crysldnet.config.files import choices
from crysldnet.errors import ConfigError

PLAIN_WORDS = {"report": "runs", "predict": "files", "embed": "files", "suggest": "files", "explain": "files"}
"""Commands that accept plain words, with the key for them."""
DATA_WORDS = "CRYSTALS TABLE"
"""Placeholder for the files of a training run, which are imported before its configuration is composed."""
TRAINS = ("pretrain", "finetune")
"""Commands that accept data files in this way."""
NAMED = ("target_types.", "target_per.", "descriptors.")
"""Keys followed by a name from the data, in which hyphens are kept."""
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
                    raise ConfigError(f"{word}: it needs a value; {_meant(key, keys)}", key)
                value = waiting.pop(0)
        elif plain is not None and (("/" in key and equals) or (not equals and _is_plain(word, plain))):
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


def _is_plain(word: str, key: str) -> bool:
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
