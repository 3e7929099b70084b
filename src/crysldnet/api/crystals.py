"""Convert crystals and labels from Python objects to one table for training.

Shapes: ``n`` crystals, ``T`` targets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crysldnet.console import note
from crysldnet.data.elements import formulas_of
from crysldnet.data.schema import STRUCTURE_COLUMNS, refuse_repeated_columns, table_from_crystals
from crysldnet.data.units import name_and_unit, same_unit
from crysldnet.errors import DataError
from crysldnet.graphs.crystals import Crystals, concatenate
from crysldnet.inference import Refusals
from crysldnet.readers.records import ID_KEYS, is_data_frame
from crysldnet.readers.stream import CrystalStream, StreamSettings
from crysldnet.readers.structure_files import kind_of

SPLIT = "split"
"""Column that assigns crystals to training or validation."""
VALIDATED = 10
"""Every tenth formula is used for validation."""


def is_path(structures: Any) -> bool:
    """Return whether the structures are given as one path: a file, folder, store or pattern."""
    return isinstance(structures, str | os.PathLike)


@dataclass(frozen=True)
class Source:
    """Structures in a form that the readers accept.

    Attributes:
        readable: what :class:`crysldnet.readers.stream.CrystalStream` reads.
        index: [n] position of each structure in ``readable``; None if the order is the same.
        ids: [n] ids of the structures; None to use those found by the readers.
    """

    readable: Any
    index: NDArray[np.int64] | None = None
    ids: list[str] | None = None

    @classmethod
    def of(cls, structures: Any) -> Source:
        """Return the source of structures.

        Raises:
            DataError: a path in a list isn't a file with a single structure, so rows would be ambiguous.
        """
        if is_path(structures):
            return cls(structures)
        pandas = hasattr(structures, "iloc")
        ids = _labels_of(structures.index) if pandas else None
        if is_data_frame(structures):
            has_ids = bool(set(ID_KEYS) & set(structures.columns))
            return cls(structures) if has_ids else cls(structures.reset_index(drop=True), ids=ids)
        if pandas or isinstance(structures, np.ndarray | tuple):
            structures = list(structures)
        if not (isinstance(structures, list) and any(map(is_path, structures))):
            return cls(structures, ids=ids)
        for path in structures:
            if not is_path(path) or kind_of(path) is None:
                named = path if is_path(path) else type(path).__name__
                raise DataError(
                    f"{named}: a list with paths names a CIF or POSCAR file for each structure; give a folder, archive "
                    "or table by itself"
                )
        places = {path: place for place, path in enumerate(dict.fromkeys(map(os.fspath, structures)))}
        return cls(list(places), np.array([places[os.fspath(path)] for path in structures]), ids)


def _labels_of(index: Any) -> list[str] | None:
    """Return the labels of an index as ids, or None if they aren't unique."""
    labels = [str(label) for label in index]
    return labels if len(set(labels)) == len(labels) else None


def read(structures: Any, numbers: Sequence[str] = ()) -> tuple[Crystals, list[str], dict[str, NDArray[np.float64]]]:
    """Return all crystals of a source, their ids, and the requested numeric columns.

    Raises:
        DataError: a crystal is invalid or lacks a requested number.
    """
    source = Source.of(structures)
    account = Refusals("raise")
    parts: list[Crystals] = []
    ids: list[str] = []
    columns: dict[str, list[NDArray[np.float64]]] = {name: [] for name in numbers}
    settings = StreamSettings(batch_size=4096, batch_atoms=1 << 20)
    for portion in CrystalStream(source.readable, [], settings, dict.fromkeys(numbers, "")):
        account.take(portion)
        for name, found in columns.items():
            found.append(portion.columns[name])
        parts.append(portion.crystals)
        ids += portion.ids
    for text in account.notes:
        note(text)
    crystals = concatenate(parts)
    if source.index is not None:
        crystals, ids = crystals.take(source.index), [ids[place] for place in source.index]
        if len(set(ids)) < len(ids):
            ids = [f"{name}-{row}" for row, name in enumerate(ids, 1)]
    return crystals, source.ids or ids, {name: np.concatenate(found) for name, found in columns.items()}


@dataclass(frozen=True)
class Labels:
    """Target values.

    Attributes:
        names: [T] target names.
        units: units of the targets that have one.
        values: [n, T] numbers, NaN if unknown; for classes objects, None if unknown.
        flat: the values were given as one column, [n].
        index: [n] row labels, or None.
    """

    names: list[str]
    units: dict[str, str]
    values: NDArray[Any]
    flat: bool
    index: list[str] | None

    @classmethod
    def of(cls, y: Any, *, classes: bool) -> Labels:
        """Read an array, a Series or a DataFrame; units are in ``attrs`` or in the names, ``band_gap (eV)``.

        Raises:
            DataError: a value isn't a number, or units conflict.
        """
        kind: type = object if classes else np.float64
        try:
            if hasattr(y, "iloc"):
                values = y.to_numpy(dtype=kind, na_value=None if classes else np.nan)
            else:
                values = np.asarray(y, kind)
        except (TypeError, ValueError) as error:
            raise DataError(f"y: {error}; targets of a regression are numbers, with NaN where unknown") from error
        if values.ndim not in (1, 2):
            raise DataError(
                f"y must have one row for each structure and one column for each target, not {values.ndim}D"
            )
        if classes:
            values = np.frompyfunc(lambda v: None if v != v else v, 1, 1)(values)
        elif np.isinf(values).any():
            raise DataError("y: a value is infinite; targets are finite numbers, with NaN where unknown")
        flat = values.ndim == 1
        values = values[:, None] if flat else values
        titles = _titles(y, values.shape[1])
        units = {title: _unit(y, title) for title in titles}
        names = [name_and_unit(title)[0] for title in titles]
        refuse_repeated_columns([*STRUCTURE_COLUMNS, SPLIT, *names])
        known = {name: unit for name, unit in zip(names, units.values(), strict=True) if unit}
        return cls(names, known, values, flat, [str(label) for label in y.index] if hasattr(y, "iloc") else None)

    def rows_of(self, structures: Any, ids: Sequence[str]) -> NDArray[Any]:
        """Return [n, T] values in the order of the structures.

        Raises:
            DataError: values can't be matched to structures.
        """
        if is_path(structures):
            return self._by_id(ids)
        if len(self.values) != len(ids):
            raise DataError(f"y has {len(self.values)} rows and there are {len(ids)} structures; they must be as many")
        if self.index is not None and hasattr(structures, "iloc"):
            for own, other in zip(self.index, map(str, structures.index), strict=True):
                if own != other:
                    raise DataError(
                        f"y has the index {own!r} where the structures have {other!r}; bring them into one order, "
                        "as y.loc[structures.index]"
                    )
        return self.values

    def _by_id(self, ids: Sequence[str]) -> NDArray[Any]:
        places = {label: row for row, label in enumerate(self.index or [])}
        strange = next((label for label in places if label not in set(ids)), None)
        if not places or strange is not None:
            found = "" if strange is None else f", and there is no crystal {strange!r}"
            raise DataError(
                f"structures in files are matched with y by id{found}; give y as a Series or DataFrame whose index has "
                f"the ids, such as {ids[0]!r}, or as names of columns beside the crystals"
            )
        rows = np.array([places.get(material_id, -1) for material_id in ids])
        values: NDArray[Any] = self.values[rows]
        values[rows < 0] = None if values.dtype == object else np.nan
        return values


def _titles(y: Any, count: int) -> list[str]:
    if isinstance(name := getattr(y, "name", None), str | int):
        return [str(name)]
    if hasattr(y, "columns"):
        return [str(column) for column in y.columns]
    return ["target"] if count == 1 else [f"target_{place}" for place in range(1, count + 1)]


def _unit(y: Any, title: str) -> str:
    """Return the unit of a target, or an empty string."""
    name, unit = name_and_unit(title)
    given = getattr(y, "attrs", {}).get("units")
    other = given.get(title, given.get(name)) if isinstance(given, Mapping) else given
    if unit and other and not same_unit(unit, other):
        raise DataError(f"y: {title!r} states {unit}, and attrs['units'] says {other}; leave one of them out")
    return unit or other or ""


def write(structures: Any, labels: Labels, path: Path, seed: int, numbers: Sequence[str] = ()) -> None:
    """Write crystals, labels and extra numeric columns as Parquet, with some formulas for validation.

    Raises:
        DataError: a crystal is invalid, or labels and structures don't match.
    """
    crystals, ids, beside = read(structures, numbers)
    values = labels.rows_of(structures, ids)
    formulas, which = np.unique(formulas_of(crystals), return_inverse=True)
    chosen = np.random.default_rng([seed, 4]).permutation(len(formulas)) % VALIDATED == 0
    split = np.where(chosen[which] & (len(formulas) > 1), "val", "train")
    columns = {name: _column(values[:, place]) for place, name in enumerate(labels.names)}
    refuse_repeated_columns([*columns, *beside])
    table = table_from_crystals(crystals, ids, {SPLIT: split, **columns, **beside}, labels.units, {})
    pq.write_table(table, path)


def _column(values: NDArray[Any]) -> list[Any] | NDArray[Any]:
    return values if values.dtype != object else [None if value is None else label_text(value) for value in values]


def label_text(value: Any) -> str:
    """Return the name of a class; 1 and 1.0 have the same name."""
    return str(int(value)) if isinstance(value, float | np.floating) and value == int(value) else str(value)


def known_classes(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield the sorted classes of each target."""
    for column in values.T:
        yield np.unique(np.array([value for value in column if value is not None]))
