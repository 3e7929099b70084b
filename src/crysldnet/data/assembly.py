"""Put the pieces of an import together: the second of its two steps (:mod:`crysldnet.data.importer`)."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from crysldnet.data.ledger import Ledger
from crysldnet.data.rows import NOTE_MIXED, PLACE, common_type, dropped_of, enter_account
from crysldnet.data.schema import STRUCTURE_COLUMNS, units_of
from crysldnet.data.targets import Targets
from crysldnet.data.workspace import ids_of, open_piece, schema_of
from crysldnet.errors import DataError

_ROWS = 16_384
_ATOMS = 1_000_000
"""crystals and atoms that are written at a time"""


class Output(Protocol):
    """A context manager that takes tables; what it writes appears on leaving it without an exception."""

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def append(self, table: pa.Table) -> None:
        """Add the rows of a table."""


class Plan:
    """How pieces are put together: which columns of which type, and which ids are there more than once."""

    def __init__(self, pieces: Sequence[Path], about: Mapping[str, str]) -> None:
        self._pieces, self._about = pieces, about
        self._targets: Targets | None = None
        types: dict[str, list[pa.DataType]] = {}
        self._dropped: dict[str, str] = {}
        self.units: dict[str, str] = {}
        for schema in map(schema_of, pieces):
            self._dropped |= dropped_of(schema)
            for name, unit in units_of(schema).items():
                if self.units.setdefault(name, unit) != unit:
                    raise DataError(f"the unit of {name!r} is {self.units[name]!r} in one file and {unit!r} in another")
            for field in schema:
                if field.name not in STRUCTURE_COLUMNS and field.name != PLACE:
                    types.setdefault(field.name, []).append(field.type)
        kept = {name: found for name, found in types.items() if name not in self._dropped}
        self._types = {name: common_type(found) for name, found in kept.items()}
        self._mixed = [
            name
            for name, kind in self._types.items()
            if pa.types.is_string(kind) and any(not (pa.types.is_string(t) or pa.types.is_null(t)) for t in types[name])
        ]
        self._repeated = _repeated(map(ids_of, pieces))

    def ids(self) -> set[str]:
        """Return all ids, for a table of targets."""
        return {material_id for piece in self._pieces for material_id in ids_of(piece)}

    def join(self, targets: Targets | None, given: Mapping[str, str]) -> None:
        """Add the columns of a table of targets, and units.

        Raises:
            DataError: a column is there twice, a unit is of no column, or differs from the one stated.
        """
        self._targets = targets
        names = [*self._types, *(targets.columns if targets else ())]
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"column {twice[0]!r} stands in the crystals' file and in the targets; leave one out")
        self.units |= targets.units if targets else {}
        for name, unit in given.items():
            if name not in names:
                close = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names) or 'none'}"
                raise DataError(f"units are given for {name!r}, which is no property; {hint}")
            if self.units.setdefault(name, unit) != unit:
                raise DataError(f"the unit of {name!r} is {self.units[name]!r} in the file and {unit!r} in units")

    def tables(self, ledger: Ledger) -> Iterator[pa.Table]:
        """Give the crystals of each piece, entering in the ledger what is left out."""
        for name, note in self._dropped.items():
            ledger.note(note, name)
        for name in self._mixed:
            ledger.note(NOTE_MIXED, name)
        seen: set[str] = set()
        for piece in self._pieces:
            table = open_piece(piece)
            enter_account(table.schema, ledger)
            ids = table["material_id"].to_pylist()
            if self._repeated:
                table, ids = self._without_repeated(table, ids, seen, ledger)
            yield self._table(table, ids, ledger)

    def _without_repeated(
        self, table: pa.Table, ids: list[str], seen: set[str], ledger: Ledger
    ) -> tuple[pa.Table, list[str]]:
        good = []
        for row, material_id in enumerate(ids):
            if material_id in seen:
                ledger.reject(table[PLACE][row].as_py(), material_id, "an earlier crystal has the same id")
                continue
            good.append(row)
            if _hash(material_id) in self._repeated:
                seen.add(material_id)
        return table.take(pa.array(good, pa.int64())), [ids[row] for row in good]

    def _table(self, table: pa.Table, ids: list[str], ledger: Ledger) -> pa.Table:
        columns: dict[str, pa.Array | pa.ChunkedArray] = {name: table[name] for name in STRUCTURE_COLUMNS}
        for name, kind in self._types.items():
            found = name in table.column_names
            columns[name] = table[name].cast(kind, safe=False) if found else pa.nulls(len(table), kind)
        columns |= {} if self._targets is None else self._targets.take(ids, ledger)
        fields = [
            pa.field(name, column.type, metadata={"units": self.units[name]} if name in self.units else None)
            for name, column in columns.items()
        ]
        return pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields, metadata=dict(self._about)))


def _repeated(ids: Iterable[list[str]]) -> set[int]:
    """Return the hashes of the ids that are there more than once, 8 bytes being kept of each id."""
    hashes = np.fromiter((_hash(material_id) for some in ids for material_id in some), np.uint64)
    hashes.sort()
    return set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())


def _hash(material_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(material_id.encode(), digest_size=8).digest(), "little")


def write(tables: Iterable[pa.Table], output: Output, ledger: Ledger, report_path: Path) -> int:
    """Write crystals, many at a time; the list of what was rejected is there before they appear."""
    kept = 0
    try:
        with output:
            for table in _joined(tables):
                output.append(table)
                kept += len(table)
            ledger.save(report_path)
            if not kept:
                raise _NothingKept
    except _NothingKept:
        pass
    return kept


class _NothingKept(Exception):
    """Leaves the output's context so that nothing is written."""


def _joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Put small tables together."""
    waiting: list[pa.Table] = []
    rows = atoms = 0
    for table in tables:
        if len(table):
            waiting.append(table)
            rows += len(table)
            atoms += len(table["atomic_numbers"].combine_chunks().flatten())
        if rows >= _ROWS or atoms >= _ATOMS:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting, rows, atoms = [], 0, 0
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()
