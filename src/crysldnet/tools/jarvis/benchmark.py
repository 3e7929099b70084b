"""The official split and test values of a property of JARVIS-DFT (dft_3d)."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crysldnet.console import did_you_mean
from crysldnet.data.catalog import published
from crysldnet.data.elements import formulas_of
from crysldnet.data.split import SPLITS, Rows, Split, split_text
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError

DATASET = "dft_3d"
NAME = "jarvis_dft_3d"
"""The published data set."""
RELATIVE, ABSOLUTE = 1e-4, 1e-5
"""Tolerances between a value of the benchmark and that of the data, which may be rounded."""


def properties() -> list[str]:
    """Return the properties of the benchmark."""
    return [str(own.name) for own in published()[NAME].properties]


@dataclass(frozen=True)
class Benchmark:
    """The crystals of one property.

    Attributes:
        property: its name.
        rows: rows of the store in each split.
        truth: test values by id.
        unit: unit of the values.
        shared_formulas: test crystals whose reduced formula is in the training or validation split.
        source: where the split is from.
    """

    property: str
    rows: Rows
    truth: dict[str, float]
    unit: str
    shared_formulas: int
    source: str


def read_split(folder: Path, name: str) -> tuple[Path, dict[str, dict[str, float] | list[str]]]:
    """Return the file of the benchmark for a property, and the values by id, or the ids, of each split.

    Args:
        folder: has ``dft_3d_PROPERTY.json.zip`` or ``dft_3d_PROPERTY.json``.
        name: the property.

    Raises:
        DataError: the file is missing or damaged, or lacks a split.
    """
    stem = f"{DATASET}_{name}.json"
    path = next((p for p in (folder / f"{stem}.zip", folder / stem) if p.is_file()), None)
    if path is None:
        raise DataError(
            f"{folder}: no {stem}.zip; copy it from jarvis_leaderboard/benchmarks/AI/SinglePropertyPrediction of the "
            "leaderboard, or leave out splits, to use those stored with the data"
        )
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                content = json.loads(archive.read(stem))
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, Any] = {split: content.get(split, {}) for split in SPLITS}
        for split, own in found.items():
            if not isinstance(own, dict | list) or (split != "val" and not own):
                raise ValueError(f"{split} must be a mapping of ids to values, or a list of ids")
            if isinstance(own, dict):
                found[split] = {str(id_): float(value) for id_, value in own.items()}
            else:
                found[split] = [str(id_) for id_ in own]
    except (OSError, KeyError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a split of the leaderboard ({error}); copy it again") from error
    return path, found


def open_benchmark(store: CrystalStore, name: str, folder: Path | None) -> Benchmark:
    """Find the crystals of a property and check them.

    Args:
        store: the data.
        name: the property.
        folder: as in :func:`read_split`; None for the split stored with the data.

    Raises:
        DataError: a crystal is missing, in two splits, or has no value or another value than in the benchmark.
    """
    if name not in store.column_names:
        hint = did_you_mean(name, store.column_names, "leave it out of properties, or import it", 0.5)
        raise DataError(f"{store.name}: no column {name!r}; {hint}")
    if folder is None:
        rows, source = Split(by="official").rows(store, [name]), store.name
        stated: dict[str, float] = {}
    else:
        path, splits = read_split(folder, name)
        source, stated = (
            str(path),
            {id_: v for own in splits.values() if isinstance(own, dict) for id_, v in own.items()},
        )
        rows = _rows_of(store, path, splits)
    values = store.numbers_of(name)
    for split, own in rows.items():
        unknown = own[~np.isfinite(values[own])]
        if len(unknown):
            first = store.ids_at(unknown[:1])[0]
            raise DataError(f"{store.name}: {len(unknown)} {split} crystals have no {name} ({first}, …)")
    _compare(store, name, values, stated, source)
    ids = store.ids_at(rows["test"])
    truth = {id_: stated.get(id_, float(values[row])) for id_, row in zip(ids, rows["test"], strict=True)}
    return Benchmark(name, rows, truth, store.units.get(name) or "", _shared_formulas(store, rows), source)


def _rows_of(store: CrystalStore, path: Path, splits: Mapping[str, dict[str, float] | list[str]]) -> Rows:
    where = {str(id_): row for row, id_ in enumerate(store.ids.to_pylist())}
    ids = [id_ for own in splits.values() for id_ in own]
    if missing := [id_ for id_ in ids if id_ not in where]:
        raise DataError(
            f"{path}: crystals that aren't in {store.name}: {len(missing):,} of {len(ids):,} ({missing[0]}, …); use "
            "the version of the data that the benchmark was made from"
        )
    if len(set(ids)) < len(ids):
        raise DataError(f"{path}: ids that occur again: {len(ids) - len(set(ids)):,}; copy it again")
    return {split: np.array(sorted(where[id_] for id_ in own), np.int64) for split, own in splits.items()}


def _compare(
    store: CrystalStore, name: str, values: NDArray[np.float64], stated: Mapping[str, float], source: str
) -> None:
    """Refuse data with values other than those of the benchmark."""
    where = {str(id_): row for row, id_ in enumerate(store.ids.to_pylist())} if stated else {}
    own = np.array([values[where[id_]] for id_ in stated])
    wrong = ~np.isclose(own, list(stated.values()), rtol=RELATIVE, atol=ABSOLUTE)
    if wrong.any():
        id_ = list(stated)[int(wrong.argmax())]
        raise DataError(
            f"{store.name}: {name} of {id_} is {values[where[id_]]:.6g}, and {stated[id_]:.6g} in {source} "
            f"({int(wrong.sum()):,} such crystals); use the version of the data that the benchmark was made from"
        )


def _shared_formulas(store: CrystalStore, rows: Rows) -> int:
    known = set(formulas_of(store.crystals.take(np.concatenate([rows["train"], rows["val"]]))))
    return sum(formula in known for formula in formulas_of(store.crystals.take(rows["test"])))


def split_file(store: CrystalStore, benchmark: Benchmark) -> str:
    """Return the content of a ``split.json`` for ``data.split.by=file``."""
    return split_text(store, benchmark.rows, {"by": "official", "file": benchmark.source})
