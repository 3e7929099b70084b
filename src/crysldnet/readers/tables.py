"""Readers of Parquet files, data frames and other objects; see :class:`crysldnet.readers.sources.Reader`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crysldnet.data.datasets import open_part
from crysldnet.data.schema import (
    STRUCTURE_COLUMNS,
    crystals_from_table,
    ids_of,
    metadata_of,
    refuse_claims,
    refuse_repeated_columns,
    table_from_crystals,
    units_of,
)
from crysldnet.errors import DataError
from crysldnet.graphs.crystals import Crystals
from crysldnet.readers.record_files import FileOfMany
from crysldnet.readers.records import ID_KEYS, Entry, is_data_frame, is_object, read_entries
from crysldnet.readers.rows import NOTE_NESTED, Found, Piece, Task
from crysldnet.readers.sources import PIECE, Settings, pieces

TABLE_PIECE = 4 * PIECE
"""rows per chunk of a table in the schema, which is read in bulk"""


class ParquetReader(FileOfMany):
    """A Parquet file in the schema or with a column of structures; some or all of its columns."""

    def __init__(self, path: Path, columns: Sequence[str] | None = None) -> None:
        super().__init__(path)
        self._columns = columns
        try:
            # With prebuffering, data would be kept until the file is closed, so memory would grow.
            self._file = pq.ParquetFile(pa.OSFile(os.fsencode(path)), page_checksum_verification=True, pre_buffer=False)
            schema = self._file.schema_arrow
            self.total = self._file.metadata.num_rows
            self.metadata = {"source": self.name} | metadata_of(schema)
            names = set(schema.names)
            refuse_repeated_columns(schema.names)
            refuse_claims(self._file, path.stat().st_size)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not a readable Parquet file ({error})") from error
        self._in_schema = not names & KNOWN_COLUMNS or _has_schema(schema)
        if self._in_schema:
            try:
                crystals_from_table(schema.empty_table())
            except DataError as error:
                raise DataError(f"{path}: {error}") from error

    def tasks(self, settings: Settings) -> Iterator[Task]:
        row = 1
        try:
            for batch in self._file.iter_batches(TABLE_PIECE if self._in_schema else PIECE, columns=self._columns):
                table = pa.Table.from_batches([batch])
                read = read_table if self._in_schema else read_table_rows
                yield partial(read, table, f"{self.name} row ", f"{self._stem}-", row, settings)
                row += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self._path}: damaged at or after row {row} ({error})") from error


KNOWN_COLUMNS = {"structure", "atoms", "cif", "lattice_vectors", "lattice_mat"}
"""Columns that identify a table with structures in another layout."""


def _has_schema(schema: pa.Schema) -> bool:
    return set(STRUCTURE_COLUMNS) <= set(schema.names)


def read_table(table: pa.Table, place: str, _default_id: str, row: int, settings: Settings) -> Piece:
    """Read a chunk of a table in the schema, all rows at once."""
    _validate(table, place, row)
    places = [f"{place}{row + i}" for i in range(len(table))]
    ids = [(material_id or "").strip() for material_id in ids_of(table).to_pylist()]
    order = list(range(len(table)))
    rejects: list[tuple[int, str, str, str]] = []
    try:
        crystals = crystals_from_table(table)
    except DataError:
        faults = [_row_fault(table.slice(i, 1)) for i in order]
        rejects = [(i, places[i], ids[i], fault) for i, fault in enumerate(faults) if fault is not None]
        order = [i for i, fault in enumerate(faults) if fault is None]
        table = table.take(pa.array(order, pa.int64()))
        crystals = crystals_from_table(table)
    kinds = {field.name: _property_type(field.type) for field in table.schema if field.name not in STRUCTURE_COLUMNS}
    kept = {name: kind for name, kind in kinds.items() if kind is not None}
    found = Found(
        places=[places[i] for i in order],
        ids=[ids[i] for i in order],
        order=order,
        crystals=crystals,
        properties={name: table[name].cast(kind).combine_chunks() for name, kind in kept.items()},
        units={name: unit for name, unit in units_of(table.schema).items() if name in kept},
        read=len(places),
        rejects=rejects,
        dropped={name: NOTE_NESTED for name in kinds if name not in kept},
    )
    return found.piece(settings.max_atoms)


def _validate(table: pa.Table, place: str, row: int) -> None:
    try:
        table.validate(full=True)
    except pa.ArrowException as error:
        raise DataError(f"{place}{row} to {row + len(table) - 1}: damaged ({error})") from error


def _row_fault(row: pa.Table) -> str | None:
    try:
        crystals_from_table(row)
    except DataError as error:
        return re.sub(r"^row 0 \(.*?\): | in row 0$", "", str(error))
    return None


def _property_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the stored type of a property column, or None if it isn't kept."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_float32(kind):
        return kind
    return pa.float64() if pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind) else None


def read_table_rows(table: pa.Table, place: str, default_id: str, row: int, settings: Settings) -> Piece:
    """Read a chunk of a table with structures in another layout, row by row."""
    _validate(table, place, row)
    entries = (
        Entry(f"{place}{number}", f"{default_id}{number}", record)
        for number, record in enumerate(table.to_pylist(), row)
    )
    return read_entries(entries, settings, units_of(table.schema))


class StoreReader:
    """A crystal store, a named data set, or one split of either, as in :func:`open_part`."""

    def __init__(self, path: str) -> None:
        self._store, self._rows = open_part(path)
        self.name = path
        self.metadata: Mapping[str, str] = {"source": path} | self._store.metadata
        self.total = len(self._rows)

    def tasks(self, settings: Settings) -> Iterator[Task]:
        for first in range(0, len(self._rows), TABLE_PIECE):
            table = self._store.to_table(self._rows[first : first + TABLE_PIECE])
            yield partial(read_table, table, f"{self.name} row ", "", first + 1, settings)


class ObjectReader:
    """Python objects: a data frame, an Arrow table, or an iterable of structures or records."""

    def __init__(self, source: Any) -> None:
        self._source = [source] if is_object(source) or isinstance(source, Mapping) else source
        self.name = type(source).__module__.split(".")[0]
        self.metadata: Mapping[str, str] = {}
        self.total = len(self._source) if hasattr(self._source, "__len__") else None

    def tasks(self, settings: Settings) -> Iterator[Task]:
        if is_data_frame(self._source):
            self._source = _with_ids(self._source, settings.id_column)
        table = _arrow(self._source)
        if table is not None and _has_schema(table.schema):
            for row in range(0, len(table), TABLE_PIECE):
                yield partial(read_table, table.slice(row, TABLE_PIECE), "row ", "", row + 1, settings)
            return
        rows = _rows(self._source if table is None else table)
        entries = (Entry(f"row {number}", f"crystal-{number}", row) for number, row in enumerate(rows, 1))
        for piece in pieces(entries):
            yield partial(read_entries, piece, settings, {} if table is None else units_of(table.schema))


def _with_ids(frame: Any, id_column: str | None) -> Any:
    """Convert the index of a data frame to a column if it has the ids: by its name, or if no column has them."""
    refuse_repeated_columns([str(name) for name in frame.columns])
    keys = {id_column, *ID_KEYS} - {None}
    if keys & set(frame.columns):
        return frame
    own = [name for name in frame.index.names if name in keys]
    if own:
        return frame.reset_index(level=own)
    texts = frame.index.nlevels == 1 and len(frame) and all(isinstance(label, str) for label in frame.index)
    return frame.rename_axis("material_id").reset_index() if texts else frame


def _arrow(source: Any) -> pa.Table | None:
    """Return a table in the schema as Arrow, from any library."""
    if isinstance(source, Crystals):
        return table_from_crystals(source, [f"crystal-{row}" for row in range(1, len(source) + 1)], {}, {}, {})
    if isinstance(source, pa.Table):
        return source
    if not set(STRUCTURE_COLUMNS) <= set(getattr(source, "columns", ())):
        return None
    return pa.Table.from_pandas(source, preserve_index=False) if is_data_frame(source) else source.to_arrow()


def _rows(source: Any) -> Iterator[Any]:
    if isinstance(source, pa.Table):
        for batch in source.to_batches(PIECE):
            yield from batch.to_pylist()
    elif is_data_frame(source):
        for row in range(0, len(source), PIECE):
            yield from source.iloc[row : row + PIECE].to_dict("records")
    elif hasattr(source, "iter_rows"):
        yield from source.iter_rows(named=True)
    else:
        yield from source
