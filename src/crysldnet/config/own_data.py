"""User data in place of a named data set: ``data=my.store``."""

from __future__ import annotations

import os
from collections.abc import Sequence

from crysldnet.config.files import choices

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
