"""Readers of JSON, JSON lines, CSV, extended XYZ and ASE databases; see :class:`crysldnet.readers.sources.Reader`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from crysldnet.errors import DataError
from crysldnet.readers import ase_files
from crysldnet.readers.compression import DAMAGED, inner_name, open_stream
from crysldnet.readers.json_stream import top_level
from crysldnet.readers.records import ID_KEYS, PREFERRED, Entry, is_record, read_entries, structures_in
from crysldnet.readers.rows import Task
from crysldnet.readers.sources import Settings, pieces
from crysldnet.readers.structure_files import LIMIT, MAX_EMPTY_LINES, printable
from crysldnet.readers.table_cells import CsvRecords


class FileOfMany:
    """Common part of all multi-crystal files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = printable(path.name)
        self._stem = Path(inner_name(self.name)).stem
        self.metadata: Mapping[str, str] = {}
        self.total: int | None = None

    def _damaged(self, error: Exception, after: int) -> DataError:
        return DataError(f"{self._path}: damaged after record {after} ({error})")


def json_reader(path: Path) -> FileOfMany:
    """Return the reader of a JSON file: of records, or of an ASE database."""
    try:
        with open_stream(path) as stream:
            first = next(top_level(stream), None)
    except (ValueError, *DAMAGED) as error:
        raise DataError(f"{path}: not a JSON file that can be read ({error})") from error
    if first is not None and ase_files.is_ase_json(first.value):
        return DatabaseReader(path, "json")
    return JsonReader(path)


class JsonReader(FileOfMany):
    """A JSON file: a list of records, an object of records by id, one record, a pandas table in split format, or an
    OPTIMADE response.
    """

    def tasks(self, settings: Settings) -> Iterator[Task]:
        for piece in pieces(self.entries()):
            yield partial(read_entries, piece, settings, {})

    def entries(self) -> Iterator[Entry]:
        """Yield the records; an object's members are kept until it is clear whether they are records by id."""
        head: dict[str, Any] = {}
        by_id, records, found, kept = False, 0, 0, 0
        try:
            with open_stream(self._path) as stream:
                for key, is_element, value, size in top_level(stream):
                    members: dict[str | None, Any] = {None: value}
                    if is_element and isinstance(value, list):
                        if "columns" not in head:
                            head["columns"] = self._columns()
                        members = {_index_of(head, found): _row_of(head["columns"], value)}
                    elif by_id and isinstance(value, Mapping):
                        members = {key: value}
                    elif by_id and _is_value(key, value):
                        raise self._undecided(key)
                    elif by_id:
                        continue
                    elif not is_element:
                        kept += size
                        if kept > LIMIT or len(head) == MOST_KEYS:
                            raise ValueError(f"over {MOST_KEYS:,} keys or {LIMIT // 2**20} MiB before any record by id")
                        head[key or ""] = value
                        records += key not in _ENVELOPES and is_record(value)
                        by_id = records > 1 and not _is_one(head)
                        members = {k: v for k, v in head.items() if isinstance(v, Mapping)} if by_id else {}
                        if records > MOST_STRUCTURES and not by_id:
                            raise self._undecided(next(k for k in head if _is_one({k: head[k]})))
                    for label, record in members.items():
                        found += 1
                        yield Entry(f"{self.name} record {found}", label or f"{self._stem}-{found}", record)
        except (ValueError, *DAMAGED) as error:
            raise self._damaged(error, found) from error
        if not found:
            yield self._one(head)

    def _undecided(self, key: str | None) -> DataError:
        return DataError(
            f"{self._path}: {key!r} stands beside structures; if all are of one record, put {key!r} first and choose a "
            f"structure with --structure; if they are records by their ids, take {key!r} away"
        )

    def _one(self, head: Mapping[str, Any]) -> Entry:
        """Return the only record of a file that is one object."""
        inner = {key: value for key, value in head.items() if is_record(value)}
        if not inner and not is_record(head):
            raise DataError(f"{self._path}: no crystal in a layout that is known")
        if len(inner) == 1:
            ((key, record),) = inner.items()
            wraps = structures_in(record) != [""] and not head.keys() & set(ID_KEYS)
            if wraps or not _is_one(head):
                return Entry(self.name, self._stem if key in _ENVELOPES else key, record)
        return Entry(self.name, self._stem, head)

    def _columns(self) -> list[Any] | None:
        """Find the column names anywhere in the file."""
        with open_stream(self._path) as stream:
            items = (item.value for item in top_level(stream) if item.key == "columns" and not item.element)
            names: list[Any] | None = next(items, None)
        if isinstance(names, list) and len(set(map(str, names))) < len(names):
            raise DataError(f"{self._path}: a column name occurs twice; rename one of {', '.join(map(str, names))}")
        return names


ROLES = (
    *("input", "output", "initial", "final", "relaxed", "unrelaxed"),
    *("initial_structure", "primitive", "conventional"),
)
"""Keys, in addition to those of :data:`PREFERRED`, that describe the role of a structure."""
MOST_STRUCTURES = 8
"""per record"""
MOST_KEYS = 100_000
"""of an object that isn't a mapping of records; they are kept in memory"""
_ENVELOPES = ("data", "meta", "metadata", "links", "jsonapi", "response", "result")
"""Keys of an object that aren't ids."""


def _is_value(key: str | None, value: Any) -> bool:
    """Return whether a member of an object can be an id or a property of one record."""
    return isinstance(value, (str, int, float)) and not str(key).startswith("@") and key not in _ENVELOPES


def _is_one(head: Mapping[str, Any]) -> bool:
    """Return whether an object's members show that it is one record: an id, a property, or a role key."""
    roles = {*ID_KEYS, *PREFERRED, *ROLES}
    return any(key in roles or _is_value(key, value) for key, value in head.items())


def _row_of(columns: Any, cells: list[Any]) -> Any:
    if not isinstance(columns, list):
        return DataError("it is a row of a table whose columns aren't named")
    if len(cells) != len(columns):
        return DataError(f"it has {len(cells)} cells where the table has {len(columns)} columns")
    return dict(zip(map(str, columns), cells, strict=True))


def _index_of(head: Mapping[str, Any], row: int) -> str | None:
    """Return the label of a row if the table's index is text."""
    index = head.get("index")
    label = index[row] if isinstance(index, list) and row < len(index) else None
    return label if isinstance(label, str) else None


class LinesReader(FileOfMany):
    """JSON lines: one record per line."""

    def tasks(self, settings: Settings) -> Iterator[Task]:
        for piece in pieces(self._entries(), lambda entry: len(entry.record)):
            yield partial(read_entries, piece, settings, {})

    def _entries(self) -> Iterator[Entry]:
        line = last = 0
        try:
            with open_stream(self._path) as stream:
                while text := stream.readline(LIMIT):
                    line += 1
                    if len(text) == LIMIT:
                        raise DataError(f"{self._path} line {line}: longer than {LIMIT // 2**20} MiB")
                    if line - last > MAX_EMPTY_LINES:
                        raise DataError(f"{self._path} line {line}: over {MAX_EMPTY_LINES:,} empty lines in a row")
                    if text.strip():
                        last = line
                        yield Entry(f"{self.name} line {line}", f"{self._stem}-{line}", text)
        except DAMAGED as error:
            raise self._damaged(error, line) from error


class CsvReader(FileOfMany):
    """A CSV file with a column of CIFs."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._records = CsvRecords(path)
        self.decimal_commas = self._records.delimiter != ","

    def tasks(self, settings: Settings) -> Iterator[Task]:
        for piece in pieces(self._records.entries(), _size_of):
            yield partial(read_entries, piece, settings, self._records.units)


def _size_of(entry: Entry) -> int:
    values = entry.record.values() if isinstance(entry.record, dict) else []
    return sum(len(value) for value in values if isinstance(value, str))


class XyzReader(FileOfMany):
    """An extended XYZ file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        ase_files.require_ase()

    def tasks(self, settings: Settings) -> Iterator[Task]:
        for piece in pieces(self._frames(), lambda frame: len(frame[2])):
            yield partial(ase_files.read_frames, piece, settings)

    def _frames(self) -> Iterator[tuple[str, str, bytes]]:
        number = 0
        try:
            with open_stream(self._path) as stream:
                for number, frame in enumerate(ase_files.frames(stream, str(self._path)), 1):
                    yield f"{self.name} frame {number}", f"{self._stem}-{number}", frame
        except DAMAGED as error:
            raise self._damaged(error, number) from error


class DatabaseReader(FileOfMany):
    """An ASE database in SQLite or JSON."""

    def __init__(self, path: Path, kind: str = "db") -> None:
        super().__init__(path)
        if kind == "db" and not ase_files.is_sqlite(path):
            raise DataError(f"{path}: not an SQLite database")
        ase_files.require_ase()
        if kind == "db":
            ase_files.refuse_what_computes(path)
        self._kind = kind
        self.total = ase_files.size_of(path, kind)

    def tasks(self, settings: Settings) -> Iterator[Task]:
        for piece in pieces(ase_files.database_entries(self._path, self._kind)):
            yield partial(read_entries, piece, settings, ase_files.UNITS)
