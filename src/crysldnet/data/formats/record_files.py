"""Readers of JSON, JSON lines, CSV, extended XYZ and ASE databases; see :class:`crysldnet.data.sources.Reader`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from crysldnet.data.formats import ase_files
from crysldnet.data.formats.compression import DAMAGED, inner_name, open_stream
from crysldnet.data.formats.delimited import CsvRecords
from crysldnet.data.formats.json_stream import top_level
from crysldnet.data.formats.records import Entry, is_record, read_entries
from crysldnet.data.sources import Settings, pieces, stamp_of
from crysldnet.data.structure_files import LIMIT
from crysldnet.data.workspace import Task
from crysldnet.errors import DataError


class FileOfMany:
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
    """A JSON file: a list of records, an object of them by id, a table as pandas splits it, or an OPTIMADE response."""

    def tasks(self, settings: Settings) -> Iterator[Task]:
        for piece in pieces(self._entries()):
            yield partial(read_entries, piece, settings, {})

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


class LinesReader(FileOfMany):
    """JSON lines: a record in each line."""

    def tasks(self, settings: Settings) -> Iterator[Task]:
        for piece in pieces(self._entries(), lambda entry: len(entry.record)):
            yield partial(read_entries, piece, settings, {})

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


class CsvReader(FileOfMany):
    """A CSV file with a column of CIFs."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._records = CsvRecords(path)
        self.total = self._records.rows

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
        self._kind = kind
        self.total = ase_files.size_of(path, kind)

    def tasks(self, settings: Settings) -> Iterator[Task]:
        for piece in pieces(ase_files.database_entries(self._path, self._kind)):
            yield partial(read_entries, piece, settings, ase_files.UNITS)
