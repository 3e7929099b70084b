"""Keep and assemble the chunks of an import, the second of its two steps (:mod:`crysldnet.tools.importer.importer`)."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from crysldnet.console import did_you_mean, listed
from crysldnet.data.output import Output
from crysldnet.data.schema import described_table, units_of
from crysldnet.data.units import same_unit
from crysldnet.errors import DataError
from crysldnet.readers.rows import PLACE, ImportIssues, Piece
from crysldnet.readers.target_table import Targets
from crysldnet.tools.importer.columns import Columns


class Spool:
    """Chunks whose tables are in an unnamed file: memory stays constant, and a killed process leaves nothing behind.

    Args:
        folder: folder with enough space, such as that of the output.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._pieces: list[tuple[int, int, Piece]] = []

    def close(self) -> None:
        """Remove the file."""
        self._file.close()

    def append(self, piece: Piece) -> None:
        """Add a chunk."""
        begin = -(-self._file.tell() // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._file.seek(begin)
        with pa.ipc.new_stream(self._file, piece.table.schema) as writer:
            writer.write_table(piece.table)
        self._pieces.append((begin, self._file.tell() - begin, piece._replace(table=piece.table.schema.empty_table())))

    def __iter__(self) -> Iterator[Piece]:
        """Yield the chunks with memory-mapped tables."""
        self._file.flush()
        for begin, size, piece in self._pieces:
            mapped = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ, offset=begin)
            yield piece._replace(table=pa.ipc.open_stream(pa.py_buffer(mapped)).read_all())


_ROWS = 16_384
_ATOMS = 1_000_000
"""crystals and atoms written at a time"""


class Plan:
    """How to assemble chunks: column types and duplicate ids."""

    def __init__(self, pieces: Iterable[Piece], about: Mapping[str, str], *, commas: bool = False) -> None:
        self._pieces, self._about = pieces, about
        self._targets: Targets | None = None
        self._dropped: dict[str, str] = {}
        self.units: dict[str, str] = {}
        self._without_unit: dict[str, str] = {}
        """First place with values of a column but without a unit."""
        self._columns = Columns(pieces, commas=commas)
        self._repeated = _repeated(self._look_at(piece) for piece in pieces)

    def _look_at(self, piece: Piece) -> list[str]:
        """Register the columns of a chunk; return its ids."""
        table = piece.table
        units = units_of(table.schema)
        self._dropped |= piece.dropped
        self._columns.add(table)
        for field in table.schema:
            if field.name in units:
                self._add_unit(field.name, units[field.name], "one file", "another")
            elif len(table) and not pa.types.is_null(field.type) and field.name not in self._without_unit:
                self._without_unit[field.name] = table[PLACE][0].as_py()
        return table["material_id"].to_pylist()

    def _add_unit(self, name: str, unit: str, one: str, other: str) -> None:
        known = self.units.setdefault(name, unit)
        if not same_unit(known, unit):
            raise DataError(f"the unit of {name!r} is {known!r} in {one} and {unit!r} in {other}")

    def ids(self) -> set[str]:
        """Return all ids, for a table of targets."""
        return {material_id for piece in self._pieces for material_id in piece.table["material_id"].to_pylist()}

    def join(self, targets: Targets | None, given: Mapping[str, str]) -> None:
        """Add the columns of a target table and units; decide how text is parsed.

        Raises:
            DataError: a column is duplicated; a unit has no column, conflicts with the stated one, or is stated in only
                    some files; text is ambiguous.
        """
        self._targets = targets
        names = self._names(self._columns.types)
        for name, unit in (targets.units if targets else {}).items():
            self._add_unit(name, unit, "the crystals' file", "the targets")
        for name, unit in given.items():
            if name not in names:
                hint = did_you_mean(name, names, f"there are {listed(names) or 'none'}")
                raise DataError(f"units are given for {name!r}, which is no property; {hint}")
            self._add_unit(name, unit, "the file", "units")
        for name in sorted(self.units.keys() & self._without_unit.keys() - given.keys()):
            raise DataError(
                f"the unit of {name!r} is {self.units[name]!r} in one file and isn't stated in another "
                f"({self._without_unit[name]}); if it is the same there, say so: --units {name}={self.units[name]}"
            )
        self._columns.decide(self._dropped, self.units)
        self._names(self._columns.names)

    def _names(self, of_crystals: Iterable[str]) -> list[str]:
        """Return the names of all columns."""
        names = [*of_crystals, *(self._targets.columns if self._targets else ())]
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"column {twice[0]!r} stands in the crystals' file and in the targets; leave one out")
        return names

    def tables(self, issues: ImportIssues) -> Iterator[pa.Table]:
        """Yield the crystals of each chunk, recording what is left out."""
        for name, note in [*self._dropped.items(), *((name, note) for note, name in self._columns.notes)]:
            issues.note(note, name)
        seen: set[str] = set()
        for piece in self._pieces:
            piece.enter_account(issues)
            table = self._columns.complete(piece.table, issues)
            ids = table["material_id"].to_pylist()
            if self._repeated:
                table, ids = self._without_repeated(table, ids, seen, issues)
            yield self._table(table, ids, issues)

    def _without_repeated(
        self, table: pa.Table, ids: list[str], seen: set[str], issues: ImportIssues
    ) -> tuple[pa.Table, list[str]]:
        good = []
        for row, material_id in enumerate(ids):
            if material_id in seen:
                issues.reject(table[PLACE][row].as_py(), material_id, "an earlier crystal has the same id")
                continue
            good.append(row)
            if hash(material_id) in self._repeated:
                seen.add(material_id)
        return table.take(pa.array(good, pa.int64())), [ids[row] for row in good]

    def _table(self, table: pa.Table, ids: list[str], issues: ImportIssues) -> pa.Table:
        columns: dict[str, pa.Array | pa.ChunkedArray] = dict(zip(table.column_names, table.columns, strict=True))
        del columns[PLACE]
        columns |= {} if self._targets is None else self._targets.take(ids, issues)
        return described_table(columns, self.units, self._about)


def _repeated(ids: Iterable[list[str]]) -> set[int]:
    """Return the hashes of duplicate ids, keeping 8 bytes per id."""
    hashes = np.fromiter((hash(material_id) for some in ids for material_id in some), np.int64)
    hashes.sort()
    return set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())


def write(tables: Iterable[pa.Table], output: Output, issues: ImportIssues, out: Path) -> int:
    """Write crystals in large batches; the lists of rejections and notes are written before the crystals appear."""
    kept = 0
    try:
        with output:
            for table in _joined(tables):
                output.append(table)
                kept += len(table)
            issues.save(out)
            if not kept:
                raise _NothingKept
    except _NothingKept:
        pass
    return kept


class _NothingKept(Exception):
    """Exits the output context without writing anything."""


def _joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Concatenate small tables."""
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
