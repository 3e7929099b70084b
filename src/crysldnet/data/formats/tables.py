"""Readers of files and objects that hold many crystals; see :class:`crysldnet.data.sources.Reader`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crysldnet.data.formats import ase_files
from crysldnet.data.formats.compression import DAMAGED, inner_name, open_stream
from crysldnet.data.formats.delimited import CsvRecords
from crysldnet.data.formats.json_stream import top_level
from crysldnet.data.formats.records import Entry, is_record, read_entries
from crysldnet.data.rows import NOTE_NESTED, Found
from crysldnet.data.schema import STRUCTURE_COLUMNS, crystals_from_table, metadata_of, units_of
from crysldnet.data.sources import PIECE, Settings, pieces, stamp_of
from crysldnet.data.structure_files import LIMIT
from crysldnet.data.workspace import Task
from crysldnet.errors import DataError

TABLE_PIECE = 4 * PIECE
"""rows in the schema that are a piece; they are read many at a time"""


class _FileReader:
    """What all files of many crystals have in common."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stem = Path(inner_name(path.name)).stem
        self.name = path.name
        self.metadata: Mapping[str, str] = {}
        self.total: int | None = None

    def stamp(self) -> Any:
        return stamp_of([self._path])

    def _damaged(self, error: Exception, after: int) -> DataError:
        return DataError(f"{self._path}: damaged after record {after} ({error})")


def json_reader(path: Path) -> _FileReader:
    """Return the reader of a JSON file: of records, or of an ASE database."""
    try:
        with open_stream(path) as stream:
            first = next(top_level(stream), None)
    except (ValueError, *DAMAGED) as error:
        raise DataError(f"{path}: not a JSON file that can be read ({error})") from error
    if first is not None and ase_files.is_ase_json(first.value):
        return DatabaseReader(path, "json")
    return JsonReader(path)


class JsonReader(_FileReader):
    """A JSON file: a list of records, an object of them by id, a table as pandas splits it, or an OPTIMADE response."""

    def tasks(self, settings: Settings) -> Iterator[Task]:
        for piece in pieces(self._entries()):
            yield partial(_read_entries, piece, settings, {})

    def _entries(self) -> Iterator[Entry]:
        head: dict[str, Any] = {}
        found = 0
        try:
            with open_stream(self._path) as stream:
                for key, is_element, value in top_level(stream):
                    default_id = f"{self._stem}-{found + 1}"
                    if is_element and isinstance(value, list):
                        if "columns" not in head:
                            head["columns"] = self._columns()
                        default_id = _index_of(head, found, default_id)
                        value = _row_of(head["columns"], value)
                    elif not is_element and is_record(value):
                        default_id = key or default_id
                    elif not is_element:
                        head[key or ""] = value
                        continue
                    found += 1
                    yield Entry(f"{self.name} record {found}", default_id, value)
        except (ValueError, *DAMAGED) as error:
            raise self._damaged(error, found) from error
        if not found:
            if not is_record(head):
                raise DataError(f"{self._path}: no crystal in a layout that is known")
            yield Entry(self.name, self._stem, head)

    def _columns(self) -> list[Any] | None:
        """Find the names of the columns where they stand behind the rows."""
        with open_stream(self._path) as stream:
            return next((item.value for item in top_level(stream) if item.key == "columns" and not item.element), None)


def _row_of(columns: Any, cells: list[Any]) -> Any:
    if not isinstance(columns, list):
        return DataError("it is a row of a table whose columns aren't named")
    if len(cells) != len(columns):
        return DataError(f"it has {len(cells)} cells where the table has {len(columns)} columns")
    return dict(zip(map(str, columns), cells, strict=True))


def _index_of(head: Mapping[str, Any], row: int, otherwise: str) -> str:
    """Return the label of a row where the table's index has texts."""
    index = head.get("index")
    label = index[row] if isinstance(index, list) and row < len(index) else None
    return label if isinstance(label, str) else otherwise


def _read_entries(entries: Iterable[Entry], settings: Settings, units: Mapping[str, str]) -> pa.Table:
    return read_entries(entries, max_atoms=settings.max_atoms, id_column=settings.id_column, units=units)


class LinesReader(_FileReader):
    """JSON lines: a record in each line."""

    def tasks(self, settings: Settings) -> Iterator[Task]:
        for piece in pieces(self._entries(), lambda entry: len(entry.record)):
            yield partial(_read_entries, piece, settings, {})

    def _entries(self) -> Iterator[Entry]:
        line = 0
        try:
            with open_stream(self._path) as stream:
                while text := stream.readline(LIMIT):
                    line += 1
                    if len(text) == LIMIT:
                        raise DataError(f"{self._path} line {line}: longer than {LIMIT // 2**20} MiB")
                    if text.strip():
                        yield Entry(f"{self.name} line {line}", f"{self._stem}-{line}", text)
        except DAMAGED as error:
            raise self._damaged(error, line) from error


class CsvReader(_FileReader):
    """A CSV file with a column of CIFs."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._records = CsvRecords(path)
        self.total = self._records.rows

    def tasks(self, settings: Settings) -> Iterator[Task]:
        for piece in pieces(self._records.entries(), _size_of):
            yield partial(_read_entries, piece, settings, self._records.units)


def _size_of(entry: Entry) -> int:
    values = entry.record.values() if isinstance(entry.record, dict) else []
    return sum(len(value) for value in values if isinstance(value, str))


class XyzReader(_FileReader):
    """An extended XYZ file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        ase_files.require_ase()

    def tasks(self, settings: Settings) -> Iterator[Task]:
        for piece in pieces(self._frames(), lambda frame: len(frame[2])):
            yield partial(ase_files.read_frames, piece, max_atoms=settings.max_atoms, id_column=settings.id_column)

    def _frames(self) -> Iterator[tuple[str, str, bytes]]:
        number = 0
        try:
            with open_stream(self._path) as stream:
                for number, frame in enumerate(ase_files.frames(stream, str(self._path)), 1):
                    yield f"{self.name} frame {number}", f"{self._stem}-{number}", frame
        except DAMAGED as error:
            raise self._damaged(error, number) from error


class DatabaseReader(_FileReader):
    """An ASE database in SQLite or JSON."""

    def __init__(self, path: Path, kind: str = "db") -> None:
        super().__init__(path)
        if kind == "db" and not ase_files.is_sqlite(path):
            raise DataError(f"{path}: not an SQLite database")
        ase_files.require_ase()
        self._kind = kind
        self.total = ase_files.size_of(path, kind)

    def tasks(self, settings: Settings) -> Iterator[Task]:
        for piece in pieces(ase_files.database_entries(self._path, self._kind)):
            yield partial(_read_entries, piece, settings, ase_files.UNITS)


class ParquetReader(_FileReader):
    """A Parquet file, in the schema or with a column of structures."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
            schema = self._file.schema_arrow
            self.total = self._file.metadata.num_rows
            self.metadata = {"source": path.name} | metadata_of(schema)
            names = set(schema.names)
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
            for batch in self._file.iter_batches(TABLE_PIECE if self._in_schema else PIECE):
                table = pa.Table.from_batches([batch])
                read = read_table if self._in_schema else read_table_rows
                yield partial(read, table, f"{self.name} row ", f"{self._stem}-", row, settings)
                row += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self._path}: damaged at or after row {row} ({error})") from error


KNOWN_COLUMNS = {"structure", "atoms", "cif", "lattice_vectors", "lattice_mat"}
"""Columns that tell a table with structures in another layout than the schema's."""


def _has_schema(schema: pa.Schema) -> bool:
    return set(STRUCTURE_COLUMNS) <= set(schema.names)


def read_table(table: pa.Table, place: str, _default_id: str, row: int, settings: Settings) -> pa.Table:
    """Read a piece of a table in the schema, all rows at once."""
    _validate(table, place, row)
    places = [f"{place}{row + i}" for i in range(len(table))]
    ids = [material_id or "" for material_id in table["material_id"].cast(pa.string()).to_pylist()]
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
    return found.table(settings.max_atoms)


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
    """Return the type that a property column is kept in, or None for a type that isn't kept."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_float32(kind):
        return kind
    return pa.float64() if pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind) else None


def read_table_rows(table: pa.Table, place: str, default_id: str, row: int, settings: Settings) -> pa.Table:
    """Read a piece of a table with structures in another layout, row by row."""
    _validate(table, place, row)
    entries = (
        Entry(f"{place}{number}", f"{default_id}{number}", record)
        for number, record in enumerate(table.to_pylist(), row)
    )
    return _read_entries(entries, settings, units_of(table.schema))


class ObjectReader:
    """Objects that were handed over in Python: a data frame, an Arrow table, or anything that gives structures or
    records one by one."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self.name = type(source).__module__.split(".")[0]
        self.metadata: Mapping[str, str] = {}
        self.total = len(source) if hasattr(source, "__len__") else None

    def stamp(self) -> Any:
        return None

    def tasks(self, settings: Settings) -> Iterator[Task]:
        table = _arrow(self._source)
        if table is not None and _has_schema(table.schema):
            for row in range(0, len(table), TABLE_PIECE):
                yield partial(read_table, table.slice(row, TABLE_PIECE), "row ", "", row + 1, settings)
            return
        rows = _rows(self._source if table is None else table)
        entries = (Entry(f"row {number}", f"crystal-{number}", row) for number, row in enumerate(rows, 1))
        for piece in pieces(entries):
            yield partial(_read_entries, piece, settings, {} if table is None else units_of(table.schema))


def _arrow(source: Any) -> pa.Table | None:
    """Return a table in the schema as Arrow, whatever library it is of."""
    if isinstance(source, pa.Table):
        return source
    if not set(STRUCTURE_COLUMNS) <= set(getattr(source, "columns", ())):
        return None
    return pa.Table.from_pandas(source, preserve_index=False) if hasattr(source, "iloc") else source.to_arrow()


def _rows(source: Any) -> Iterator[Any]:
    if isinstance(source, pa.Table):
        for batch in source.to_batches(PIECE):
            yield from batch.to_pylist()
    elif hasattr(source, "iloc"):
        for row in range(0, len(source), PIECE):
            yield from source.iloc[row : row + PIECE].to_dict("records")
    elif hasattr(source, "iter_rows"):
        yield from source.iter_rows(named=True)
    else:
        yield from source
