"""Result of reading a chunk: a table of valid crystals, and the issues of the rest."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from crysldnet.data.cells import MISSING
from crysldnet.data.schema import STRUCTURE_COLUMNS, table_from_crystals
from crysldnet.errors import DataError
from crysldnet.graphs.crystals import Crystals, faults, from_lists
from crysldnet.io import write_csv
from crysldnet.readers.structure_files import Structure

PLACE = "__place"
MOST_COLUMNS = 10_000
"""maximum properties of an import, because every crystal stores each"""
NOTE_NESTED = "columns hold neither numbers nor text and were left out"
NOTE_TAKEN = "columns have a name that the schema needs and were left out"


class Piece(NamedTuple):
    """Valid crystals, and the issues of the rest.

    Attributes:
        table: the columns of the Parquet schema, and ``PLACE``, the file or row of each crystal.
        read: number of crystals read or rejected.
        rejects: place, id and reason of each rejection.
        notes: what was normalized, with place and id.
        dropped: columns that can't be kept, with reasons.
    """

    table: pa.Table
    read: int
    rejects: list[tuple[str, str, str]]
    notes: list[tuple[str, str, str]]
    dropped: dict[str, str]

    def enter_account(self, issues: ImportIssues) -> None:
        """Record the rejections.

        Raises:
            DataError: something was rejected, and the issues are strict.
        """
        for reject in self.rejects:
            issues.reject(*reject)
        for note in self.notes:
            issues.note(*note)


Task = Callable[[], Piece]
"""Reads one chunk; pickled for other processes, so it is a ``functools.partial`` of a module's function."""


@dataclass
class Found:
    """Crystals as read, before checks.

    Attributes:
        places: file or row of each crystal.
        ids: crystal ids; an empty one is invalid.
        order: position of each among all crystals read, including rejected ones.
        crystals: the structures.
        properties: numeric or text columns.
        units: units of the properties that have one.
        read: number of crystals read or rejected.
        rejects: order, place, id and reason of each rejection.
        notes: what was normalized, with place and id.
        dropped: columns that can't be kept, with reasons.
    """

    places: list[str]
    ids: list[str]
    order: list[int]
    crystals: Crystals
    properties: dict[str, pa.Array]
    units: Mapping[str, str]
    read: int
    rejects: list[tuple[int, str, str, str]]
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)

    def piece(self, max_atoms: int) -> Piece:
        """Check every crystal and value, and return the valid ones with the issues of the rest."""
        good = []
        for i, fault in enumerate(faults(self.crystals, max_atoms=max_atoms)):
            fault = fault or (None if self.ids[i] else "the id is empty")
            if fault is None:
                good.append(i)
            else:
                self.rejects.append((self.order[i], self.places[i], self.ids[i], fault))
        index = np.array(good, np.int64)
        columns: dict[str, Any] = {PLACE: pa.array([self.places[i] for i in good], pa.string())}
        columns |= {name: column.take(pa.array(index)) for name, column in self.properties.items()}
        table = table_from_crystals(
            self.crystals.take(index), [self.ids[i] for i in good], columns, dict(self.units), {}
        )
        rejects = [reject[1:] for reject in sorted(self.rejects, key=lambda reject: reject[0])]
        return Piece(table, self.read, rejects, self.notes, self.dropped)


class Rows:
    """Collects crystals one by one."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, str, str, Structure, Mapping[str, Any]]] = []
        self._read = 0
        self._rejects: list[tuple[int, str, str, str]] = []
        self._notes: list[tuple[str, str, str]] = []
        self.units: dict[str, str] = {}

    def add(self, place: str, material_id: str, structure: Structure, properties: Mapping[str, Any]) -> None:
        """Add a crystal with its properties, of any type."""
        self._rows.append((self._read, place, material_id, structure, properties))
        self._read += 1

    def reject(self, place: str, material_id: str, reason: str) -> None:
        """Record the rejection of a crystal."""
        self._rejects.append((self._read, place, material_id, reason))
        self._read += 1

    def note(self, text: str, place: str, material_id: str) -> None:
        """Record what was normalized on reading."""
        self._notes.append((text, place, material_id))

    def piece(self, max_atoms: int) -> Piece:
        """Return the result of :meth:`Found.piece`."""
        properties: dict[str, pa.Array] = {}
        dropped = {}
        for name in dict.fromkeys(name for row in self._rows for name in row[4]):
            column = column_of([row[4].get(name) for row in self._rows])
            if name in STRUCTURE_COLUMNS or name == PLACE:
                dropped[name] = NOTE_TAKEN
            elif column is None:
                dropped[name] = NOTE_NESTED
            else:
                properties[name] = column
        structures = [row[3] for row in self._rows]
        return Found(
            places=[row[1] for row in self._rows],
            ids=[row[2] for row in self._rows],
            order=[row[0] for row in self._rows],
            crystals=from_lists(*zip(*structures, strict=True)) if structures else from_lists([], [], []),
            properties=properties,
            units={name: unit for name, unit in self.units.items() if name in properties},
            read=self._read,
            rejects=self._rejects,
            notes=self._notes,
            dropped=dropped,
        ).piece(max_atoms)


def column_of(values: Sequence[Any]) -> pa.Array | None:
    """Return a numeric column or, if a value is text, a text column; None if a value is neither."""
    plain = [_plain(value) for value in values]
    kinds = {type(value) for value in plain if value is not None}
    if not kinds:
        return pa.nulls(len(plain))
    if object in kinds:
        return None
    if str in kinds and kinds != {str}:
        missing = [isinstance(value, str) and value.strip().lower() in MISSING for value in plain]
        if all(gone or not isinstance(value, str) for value, gone in zip(plain, missing, strict=True)):
            plain = [None if gone else value for value, gone in zip(plain, missing, strict=True)]
            kinds.remove(str)
    if str in kinds or (bool in kinds and kinds != {bool}):  # decided when all chunks are read
        return pa.array([None if value is None else str(value) for value in plain], pa.string())
    if kinds == {bool}:
        return pa.array(plain, pa.bool_())
    if kinds == {int} and all(abs(value) < 2**63 for value in plain if value is not None):
        return pa.array(plain, pa.int64())
    return pa.array([None if value is None else float(value) for value in plain], pa.float64())


def _plain(value: Any) -> Any:
    """Return a value as bool, int, float, str or None; otherwise an instance of ``object``."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, int) and abs(value) > sys.float_info.max:  # like a decimal of this size
        return math.inf if value > 0 else -math.inf
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, (float, Decimal)):
        return None if math.isnan(value) else float(value)
    if isinstance(value, (date, time)):
        return value.isoformat()
    return None if type(value).__name__ in ("NAType", "NaTType") else object()


def common_type(types: Sequence[pa.DataType]) -> pa.DataType:
    """Return the common type of a column over chunks: text if one has text, or if only some are boolean."""
    stated = list(dict.fromkeys(kind for kind in types if not pa.types.is_null(kind)))
    if len(stated) == 1:
        return stated[0]
    if any(pa.types.is_string(kind) or pa.types.is_boolean(kind) for kind in stated):
        return pa.string()
    return pa.int64() if stated and all(pa.types.is_integer(kind) for kind in stated) else pa.float64()


class ImportIssues:
    """Records rejections and notes; a strict instance raises at the first rejection."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._lines: list[tuple[str, str, str]] = []
        self._notes: list[tuple[str, str, str]] = []
        self._unused: dict[str, tuple[int, str]] = {}
        self._totals: Counter[str] = Counter()

    def reject(self, place: str, material_id: str, reason: str) -> None:
        """Record the rejection of the crystal, row or value in ``place`` (a file, or file and row).

        Raises:
            DataError: the instance is strict.
        """
        if self._strict:
            raise DataError(f"{place}{f' ({material_id})' if material_id else ''}: {reason}")
        self._lines.append((place, material_id, reason))

    def leave_out(self, kind: str, what: str, place: str, material_id: str, reason: str) -> None:
        """Record the rejection of a value or row, though its crystal may be used.

        Args:
            kind: counted kind, such as "values of 'band_gap'".
            what: the value or the row's id, as written.
            place, material_id, reason: as in :meth:`reject`.

        Raises:
            DataError: the instance is strict.
        """
        self.reject(place, material_id, reason)
        count, first = self._unused.get(kind, (0, f"{what!r} in {place}"))
        self._unused[kind] = (count + 1, first)

    def count(self, kind: str, number: int) -> None:
        """Add to the total number of values or rows of a kind."""
        self._totals[kind] += number

    @property
    def unused(self) -> tuple[str, ...]:
        """Number of rejected values of each property and rows of the table, the total, and the first."""
        return tuple(
            f"{count:,} of {self._totals[kind]:,} {kind} could not be used, first {first}"
            for kind, (count, first) in self._unused.items()
        )

    def note(self, text: str, place: str, material_id: str = "") -> None:
        """Record another ``place`` for a note."""
        self._notes.append((place, material_id, text))

    @property
    def notes(self) -> tuple[str, ...]:
        """Each note with its count, which fits one and many, and its first place."""
        first = {text: place for place, _, text in reversed(self._notes)}
        counts = Counter(text for _, _, text in self._notes)
        return tuple(
            f"{text}: {count:,} ({'first: ' if count > 1 else ''}{first[text]})" for text, count in counts.items()
        )

    def save(self, out: Path, rejects: str = "rejects") -> tuple[Path | None, Path | None]:
        """Write ``OUT.rejects.csv`` and ``OUT.notes.csv`` and return their paths; empty ones are removed."""
        return _save(out, rejects, "reason", self._lines), _save(out, "notes", "note", self._notes)


def _save(out: Path, kind: str, title: str, lines: list[tuple[str, str, str]]) -> Path | None:
    path = out.with_name(f"{out.name}.{kind}.csv")
    if not lines:
        path.unlink(missing_ok=True)
        return None
    write_csv(path, [("source", "id", title), *lines])
    return path
