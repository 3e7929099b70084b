"""Sources of crystals: a store, a Parquet file, ``embedded:NAME`` or ``published:NAME``, each optionally with
``@SPLIT``; and the files of several splits joined into one store.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from crysldnet.console import listed, note
from crysldnet.data.catalog import definition_of, published
from crysldnet.data.output import StoreWriter
from crysldnet.data.schema import STRUCTURE_COLUMNS
from crysldnet.data.store import FORMAT_VERSION, CrystalStore, utf8_path
from crysldnet.data.units import same_unit
from crysldnet.errors import DataError

EMBEDDED = Path(__file__).parent / "embedded"
EMBEDDED_TARGETS = {"matbench_jdft2d": "exfoliation_energy", "matbench_phonons": "last_phdos_peak"}
"""Matbench tasks whose crystals are included, re-encoded, with their target column."""
DATA_VARIABLE = "CRYSLDNET_DATA"
"""Environment variable with the folder of published data sets; default ``data`` in the current folder."""

CACHE_VARIABLE = "CRYSLDNET_CACHE"
"""Environment variable with the cache folder, ``none`` for no cache; default ``~/.cache/crysldnet``."""
CACHED_FROM = 2 << 20
"""Size in bytes above which a Parquet file is converted to a store; checking a smaller one takes less than 0.2 s."""
UNUSED_DAYS = 30


def data_folder() -> Path:
    """Return the folder of published data sets."""
    return Path(os.environ.get(DATA_VARIABLE) or "data").expanduser()


def published_path(name: str) -> Path:
    """Return the path of a published data set's store, whether or not it exists."""
    return data_folder() / f"{name}.store"


def open_store(path: str) -> CrystalStore:
    """Open a store or Parquet file.

    Args:
        path: its path, ``embedded:NAME`` for an included set, or ``published:NAME`` for one downloaded with
            ``crysldnet data download NAME``.

    Raises:
        DataError: it is missing or damaged.
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
    """Print a note once, in the first process, that a published set is unverified."""
    known = published().get(name)
    files = known.unverified if known is not None else []
    if files and os.environ.get("LOCAL_RANK", "0") == "0":
        note(
            f"published:{name} is not verified: no sha256 is published of {listed(files)}; "
            f"crysldnet data describe published:{name} shows that of the files it was made from"
        )


def _open_converted(file: Path) -> CrystalStore:
    """Open a Parquet file as a cached store, converted by the first process that needs it.

    If the cache isn't writable, the file itself is read and checked.
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
    except (OSError, RuntimeError):  # no home, no space, no locks on this file system
        return CrystalStore.open(file)


def _converted(file: Path, converted: Path) -> CrystalStore:
    """Open a converted file, or convert it; conversions unused for a month are removed."""
    try:
        store = CrystalStore.open(converted)
        os.utime(converted)
    except (DataError, OSError):  # missing or damaged
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
    """Open a store and select rows: all, or with ``@SPLIT`` those with that value in the column ``split``.

    Raises:
        DataError: the store, column or value doesn't exist.
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


def open_selected(path: str) -> CrystalStore:
    """Return a store of only the selected rows; errors as in :func:`open_part`."""
    store, rows = open_part(path)
    return store if len(rows) == len(store) else CrystalStore.from_table(store.to_table(rows), path)


def refuse_repeated_ids(store: CrystalStore) -> None:
    """Reject a store with missing or duplicate ids."""
    ids = store.ids
    if ids.null_count:
        raise DataError(f"{store.name}: row {pc.index(ids.is_null(), True).as_py()} has no material_id; give it one")
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    values, numbers = counts.field("values"), counts.field("counts").to_numpy()
    first = values[int(np.flatnonzero(numbers > 1)[0])]
    rows = np.flatnonzero(pc.equal(ids, first).to_numpy())
    raise DataError(
        f"{store.name}: material_id {first.as_py()!r} is in rows {', '.join(map(str, rows[:3].tolist()))} "
        f"({int((numbers > 1).sum())} such ids); an id is of one crystal, so rename one, or keep the first of each: "
        f"crysldnet data import {store.name} --out clean.store"
    )


def join_splits(stores: Mapping[str, CrystalStore], targets: Sequence[str]) -> CrystalStore:
    """Concatenate the stores of splits; the column ``split`` has the split of each crystal.

    Args:
        stores: stores by split.
        targets: target columns. Others are left out if their unit or type differs.

    Raises:
        DataError: an id is duplicated, or a target's unit or type differs between stores.
    """
    for store in stores.values():
        refuse_repeated_ids(store)
    ids = {name: set(store.ids.to_pylist()) for name, store in stores.items()}
    for one, other in combinations(ids, 2):
        if shared := sorted(ids[one] & ids[other]):
            raise DataError(f"data.path: {len(shared)} crystals are both in {one} and in {other} ({shared[0]}, …)")
    tables = [store.to_table() for store in stores.values()]
    columns = [name for name in tables[0].column_names if name != "split" and _alike(name, stores, name in targets)]
    parts = [
        table.select(columns).append_column("split", pa.array([name] * len(table)))
        for name, table in zip(stores, tables, strict=True)
    ]
    joined = pa.concat_tables(parts, promote_options="permissive")
    return CrystalStore.from_table(joined, " + ".join(store.name for store in stores.values()))


def _alike(name: str, stores: Mapping[str, CrystalStore], strict: bool) -> bool:
    """Return whether a column has the same unit and type in all stores; raise for a target that doesn't."""
    if name in STRUCTURE_COLUMNS:
        return True
    first, *others = stores
    for other in others:
        here, there = stores[first], stores[other]
        if name not in there.column_names:
            fault = f"{there.name} has no such column"
        elif (kinds := (_kind(here.type_of(name)), _kind(there.type_of(name))))[0] != kinds[1]:
            fault = f"it holds {kinds[0]} in {here.name} and {kinds[1]} in {there.name}"
        elif not same_unit(*(units := (here.units.get(name), there.units.get(name)))):
            said = [f"{unit!r}" if unit else "not stated" for unit in units]
            fault = (
                f"its unit is {said[0]} in {here.name} and {said[1]} in {there.name}; state it when you import, --units"
            )
        else:
            continue
        if strict:
            raise DataError(f"data.path: column {name!r}: {fault}")
        return False
    return True


def _kind(type_: pa.DataType) -> str:
    if pa.types.is_integer(type_) or pa.types.is_floating(type_):
        return "numbers"
    return "texts" if pa.types.is_string(type_) or pa.types.is_large_string(type_) else str(type_)
