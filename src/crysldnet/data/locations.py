"""Where crystals are: a store, a Parquet file, ``embedded:NAME`` or ``published:NAME``, each with ``@SPLIT``."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crysldnet.data.published.catalog import definition_of
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError

EMBEDDED = Path(__file__).parent / "embedded"
EMBEDDED_TARGETS = {"matbench_jdft2d": "exfoliation_energy", "matbench_phonons": "last_phdos_peak"}
"""Tasks of Matbench whose crystals ship with the package, re-encoded, and the column of their target."""
DATA_VARIABLE = "CRYSLDNET_DATA"
"""Names the folder of published data sets; ``data`` in the current folder by default."""


def data_folder() -> Path:
    """Return the folder of published data sets."""
    return Path(os.environ.get(DATA_VARIABLE) or "data").expanduser()


def published_path(name: str) -> Path:
    """Return where the store of a published data set is, or would be."""
    return data_folder() / f"{name}.store"


def open_store(path: str) -> CrystalStore:
    """Open a store or Parquet file.

    Args:
        path: its path, ``embedded:NAME`` for a set that ships with the package, or ``published:NAME`` for one that
            ``crysldnet data download NAME`` brought here.

    Raises:
        DataError: there is none, or it is damaged.
    """
    kind, _, name = path.partition(":")
    if kind == "embedded":
        file = EMBEDDED / f"{name}.parquet"
        if not file.exists():
            names = ", ".join(sorted(f"embedded:{p.stem}" for p in EMBEDDED.glob("*.parquet")))
            raise DataError(f"{path}: no such embedded data set; there are {names}")
        store = CrystalStore.open(file)
        store.name = path
        return store
    if kind == "published":
        folder = published_path(definition_of(name).name)
        if not folder.exists():
            raise DataError(
                f"{path}: {folder} isn't here; make it with: crysldnet data download {name} "
                f"(or name the folder that holds {name}.store in the environment variable {DATA_VARIABLE})"
            )
        return CrystalStore.open(folder)
    return CrystalStore.open(path)


def open_part(path: str) -> tuple[CrystalStore, NDArray[np.int64]]:
    """Open a store and choose rows: all, or with ``@SPLIT`` those whose column ``split`` says so.

    Raises:
        DataError: there is no such store, column or value.
    """
    name, at, split = path.rpartition("@")
    if not at or os.path.exists(path):
        store = open_store(path)
        return store, np.arange(len(store))
    store = open_store(name)
    values = store.texts_of("split")
    rows = np.flatnonzero(values == split)
    if not len(rows):
        there = ", ".join(sorted({str(value) for value in values if value is not None}))
        raise DataError(f"{path}: no row of the column split is {split!r}; there are {there}")
    return store, rows
