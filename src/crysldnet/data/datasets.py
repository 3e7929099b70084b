"""Where crystals are: a store, a Parquet file, ``embedded:NAME`` or ``published:NAME``, each with ``@SPLIT``."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crysldnet.console import listed, note
from crysldnet.data.catalog import definition_of, published
from crysldnet.data.store import FORMAT_VERSION, CrystalStore, utf8_path
from crysldnet.data.store_writer import StoreWriter
from crysldnet.errors import DataError

EMBEDDED = Path(__file__).parent / "embedded"
EMBEDDED_TARGETS = {"matbench_jdft2d": "exfoliation_energy", "matbench_phonons": "last_phdos_peak"}
"""Tasks of Matbench whose crystals ship with the package, re-encoded, and the column of their target."""
DATA_VARIABLE = "CRYSLDNET_DATA"
"""Names the folder of published data sets; ``data`` in the current folder by default."""

CACHE_VARIABLE = "CRYSLDNET_CACHE"
"""Names the folder of what can be made again at any time, ``none`` for no such folder; ``~/.cache/crysldnet`` by
default."""
CACHED_FROM = 2 << 20
"""Bytes from which on a Parquet file is converted to a store; checking the crystals of a smaller one takes no 0.2 s."""
UNUSED_DAYS = 30


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
        folder = published_path(name)
        if not folder.exists():
            definition_of(name)
            raise DataError(
                f"{path}: {folder} isn't here; make it with: crysldnet data download {name} "
                f"(or name the folder that holds {name}.store in the environment variable {DATA_VARIABLE})"
            )
        _note_unverified(name)
        return CrystalStore.open(folder)
    file = utf8_path(Path(path))
    if file.suffix == ".parquet" and file.is_file() and file.stat().st_size >= CACHED_FROM:
        return _open_converted(file)
    return CrystalStore.open(path)


@cache
def _note_unverified(name: str) -> None:
    """Note once, in the first process, that a published set can't be compared with what was published."""
    known = published().get(name)
    files = known.unverified if known is not None else []
    if files and os.environ.get("LOCAL_RANK", "0") == "0":
        note(
            f"published:{name} is not verified: no sha256 is published of {listed(files)}; "
            f"crysldnet data describe published:{name} shows that of the files it was made from"
        )


def _open_converted(file: Path) -> CrystalStore:
    """Open a Parquet file as a store in the cache, made by the first process that asks for this content.

    If the cache can't be written, the file is read and checked as it is.
    """
    from filelock import FileLock

    if os.environ.get(CACHE_VARIABLE) == "none":
        return CrystalStore.open(file)
    try:
        user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "crysldnet"
        folder = Path(os.environ.get(CACHE_VARIABLE) or user).expanduser() / "stores"
        folder.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        converted = folder / f"{digest}-{FORMAT_VERSION}.store"
        with FileLock(converted.with_suffix(".lock")):
            return _converted(file, converted)
    except (OSError, RuntimeError):  # no home, no room, no locks on this file system
        return CrystalStore.open(file)


def _converted(file: Path, converted: Path) -> CrystalStore:
    """Open a converted file, or convert it; other conversions that nobody has opened for a month are removed."""
    try:
        store = CrystalStore.open(converted)
        os.utime(converted)
    except (DataError, OSError):  # not there yet, or damaged
        store = CrystalStore.open(file)
        shutil.rmtree(converted, ignore_errors=True)
        try:
            with StoreWriter(converted, hash_=store.hash) as writer:
                writer.append(store.to_table())
            store = CrystalStore.open(converted)
        except (DataError, OSError):
            return store
        for other in converted.parent.glob("*.store"):
            if time.time() - other.stat().st_mtime > UNUSED_DAYS * 86_400:
                shutil.rmtree(other, ignore_errors=True)
    store.name = str(file)
    return store


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
