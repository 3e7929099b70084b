"""Split file: ids, the rule that made it, and hashes, to repeat a study on the same crystals."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError

SPLITS = ("train", "val", "test")
Rows = dict[str, NDArray[np.int64]]
FORMAT_VERSION = 1


def _digest(ids: Mapping[str, list[str]]) -> str:
    return hashlib.sha256(json.dumps([ids[name] for name in SPLITS]).encode()).hexdigest()


def split_text(store: CrystalStore, rows: Rows, rule: Mapping[str, Any]) -> str:
    """Return the content of a split file.

    Args:
        store: the crystals.
        rows: rows of each split.
        rule: how the split was made, as plain values.
    """
    ids = {name: store.ids_at(rows[name]) for name in SPLITS}
    content = {
        "format_version": FORMAT_VERSION,
        "rule": dict(rule),
        "store": store.metadata.get("dataset", store.name),
        "store_sha256": store.hash,
        "counts": {name: len(ids[name]) for name in SPLITS},
        "sha256": _digest(ids),
        **ids,
    }
    return json.dumps(content, indent=None, separators=(", ", ": "))


def read_split_file(path: str | os.PathLike[str], store: CrystalStore) -> Rows:
    """Read a split file and find its crystals.

    Raises:
        DataError: it is missing, damaged, of a newer format or of another store, or the store lacks one of its
            crystals.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        ids = {name: [str(id_) for id_ in content[name]] for name in SPLITS}
        version, digest, of_store = content["format_version"], content["sha256"], content["store_sha256"]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a run saves its split as split.json") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not a split file ({type(error).__name__}: {error})") from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: its format version is {version}, this version reads {FORMAT_VERSION}; upgrade crysldnet"
        )
    if digest != _digest(ids):
        raise DataError(f"{path}: its ids were changed after it was written (sha256 differs)")
    if of_store is not None and of_store != store.hash:
        raise DataError(
            f"{path}: it was made for other data than {store.name} (sha256 of the store differs); to use it all the "
            "same, put null in place of its store_sha256"
        )
    where = {id_: row for row, id_ in enumerate(store.ids.to_pylist())}
    for name in SPLITS:
        missing = [id_ for id_ in ids[name] if id_ not in where]
        if missing:
            raise DataError(f"{path}: {len(missing)} crystals of {name} aren't in {store.name} ({missing[0]}, …)")
    return {name: np.array(sorted(where[id_] for id_ in ids[name]), np.int64) for name in SPLITS}
