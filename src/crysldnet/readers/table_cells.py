"""Cells of tables as text: property tables in CSV, TSV or Excel, and CSV files with a column of CIFs."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from crysldnet.console import note
from crysldnet.data.units import name_and_unit
from crysldnet.errors import DataError
from crysldnet.readers.compression import DAMAGED, inner_name, open_stream
from crysldnet.readers.records import Entry
from crysldnet.readers.structure_files import LIMIT, MAX_EMPTY_LINES, printable

LARGEST = 512 * 2**20
"""bytes of a table, uncompressed"""
_TOO_LARGE = f"over {LARGEST // 2**20} MiB; import crystals with their properties as JSON lines or Parquet"
EXCEL = (".xlsx", ".xlsm")
NO_TABLE = {
    ".xls": "an Excel file of before 2007",
    ".xlsb": "a binary Excel file",
    ".ods": "an OpenDocument spreadsheet",
    ".numbers": "a Numbers spreadsheet",
}
"""Unsupported spreadsheets."""
_SIGNATURES = {b"PK\x03\x04": "an Excel or OpenDocument file, or a zip archive", b"\xd0\xcf\x11\xe0": NO_TABLE[".xls"]}


class Cells(NamedTuple):
    """A table.

    Attributes:
        header: column titles.
        rows: line number and cells of each nonempty row.
        commas: whether a comma within a cell can be a decimal comma, because it doesn't separate cells.
        others: ignored sheets.
    """

    header: list[str]
    rows: list[tuple[int, list[str]]]
    commas: bool
    others: tuple[str, ...] = ()


def read_cells(path: Path) -> Cells:
    """Read a table by its suffix; commas, semicolons or tabs separate text cells.

    Raises:
        DataError: it can't be opened, doesn't match its suffix, or is empty.
    """
    suffix = path.suffix.lower()
    if suffix in NO_TABLE and path.exists():
        raise DataError(f"{path}: {NO_TABLE[suffix]}, which isn't read; save it as .xlsx or as CSV in UTF-8")
    return _of_excel(path) if suffix in EXCEL else _of_text(path)


def delimiter_of(text: str) -> str:
    """Return the cell separator of a table from its first line."""
    first = text.lstrip().split("\n", 1)[0]
    return max(",;\t", key=first.count)


def _decoded(path: Path, raw: bytes) -> str:
    """Return the text of a table; in Windows encoding if only the header requires it, with a note."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return raw.decode("utf-16")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        header, end, rows = raw.partition(b"\n")
        if not rows.isascii() or raw[:4] in _SIGNATURES or b"\0" in raw:
            raise
        text = header.decode("cp1252")
        note(f"{path}: its header isn't UTF-8; read in the encoding of Windows (cp1252): {text.strip()}")
        return text + (end + rows).decode("ascii")


def _not_utf8(raw: bytes, at: int) -> str:
    """Return why bytes aren't UTF-8, with the text at a position in the encoding of Windows, and the remedy.

    It isn't assumed, because ids in a wrongly guessed encoding would be other ids.
    """
    around = re.split(rb"[\s,;\"]", raw[max(0, at - 30) : at])[-1] + re.split(rb"[\s,;\"]", raw[at : at + 30])[0]
    with contextlib.suppress(UnicodeDecodeError):
        text = around.decode("cp1252")
        return (
            f"not UTF-8; in the encoding of Windows (cp1252) it is {text!r}. Save the table as CSV in UTF-8 (in Excel: "
            "CSV UTF-8), or convert it, iconv -f CP1252 -t UTF-8"
        )
    return "not UTF-8; save the table as CSV in UTF-8"


def _of_text(path: Path) -> Cells:
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise DataError(f"{path}: {_TOO_LARGE}")
        text = _decoded(path, raw)
    except OSError as error:
        raise DataError(f"{path}: can't be opened ({error.strerror})") from error
    except UnicodeDecodeError as error:
        if raw[:4] in _SIGNATURES:
            kind = _SIGNATURES[raw[:4]]
            raise DataError(f"{path}: {kind}, whatever its name says; name it .xlsx, or save CSV in UTF-8") from error
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line}: {_not_utf8(raw, error.start)}") from error
    if "\0" in text:
        raise DataError(f"{path}: not a table in text, for it has null characters; save it as CSV in UTF-8")
    delimiter = delimiter_of(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}") from error
    return _with_header(path, rows, delimiter != ",")


def _with_header(path: Path, rows: list[tuple[int, list[str]]], commas: bool, others: tuple[str, ...] = ()) -> Cells:
    if not rows:
        raise DataError(f"{path}: the table is empty")
    return Cells([title.strip() for title in rows[0][1]], rows[1:], commas, others)


def _of_excel(path: Path) -> Cells:
    """Read the first nonempty sheet of an Excel file; formulas give their saved values."""
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise DataError(
            f"{path}: an Excel file, which needs openpyxl: pip install 'crysldnet[excel]'; or save it as CSV in UTF-8"
        ) from None
    try:
        with path.open("rb") as file:
            if sum(member.file_size for member in zipfile.ZipFile(file).infolist()) > LARGEST:
                raise DataError(f"{path}: {_TOO_LARGE}")
            book = load_workbook(file, read_only=True, data_only=True)
            sheets = {sheet.title: _rows_of(sheet) for sheet in book.worksheets}
    except OSError as error:
        raise DataError(f"{path}: can't be opened ({error.strerror})") from error
    except DataError:
        raise
    except Exception as error:  # openpyxl has no error class for most problems
        raise DataError(f"{path}: not a readable Excel file ({str(error).splitlines()[0] or type(error)})") from error
    filled = [title for title, rows in sheets.items() if rows]
    return _with_header(path, sheets[filled[0]] if filled else [], True, tuple(filled[1:]))


def _rows_of(sheet: object) -> list[tuple[int, list[str]]]:
    """Return line and cells of nonempty rows, without trailing columns that have neither title nor values."""
    sheet.reset_dimensions()  # type: ignore[attr-defined]  # those that it claims would be filled with empty cells
    rows = [
        (line, [_text(value) for value in values])
        for line, values in enumerate(sheet.iter_rows(values_only=True), 1)  # type: ignore[attr-defined]
        if any(value is not None and str(value).strip() for value in values)
    ]
    width = max((1 + max(i for i, cell in enumerate(cells) if cell.strip()) for _, cells in rows), default=0)
    return [(line, [*cells[:width], *[""] * (width - len(cells))]) for line, cells in rows]


def _text(value: object) -> str:
    """Return a cell as text; integers have no decimal point, as in Excel."""
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


STRUCTURE_TITLES = ("cif", "structure")
LONGEST_LINE = 16 * 2**20
"""characters; the lines of a CIF within a cell are lines of the file"""


class CsvRecords:
    """The rows of a CSV file as text records.

    Attributes:
        units: units of the columns that have one.
        delimiter: cell separator.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stem = Path(inner_name(printable(path.name))).stem
        with self._rows() as (titles, _):
            self._titles = titles
        if not any(title in titles for title in STRUCTURE_TITLES):
            raise DataError(
                f"{path}: no column {' or '.join(STRUCTURE_TITLES)}; a table of properties alone goes with --targets, "
                "beside the crystals"
            )
        named = [name_and_unit(title) for title in titles]
        self._names = [name for name, _ in named]
        self.units = {name: unit for name, unit in named if unit}
        if twice := [name for name in self._names if name and self._names.count(name) > 1]:
            raise DataError(f"{path}: the column name {twice[0]!r} occurs twice; rename one")

    @contextmanager
    def _rows(self) -> Iterator[tuple[list[str], Iterator[tuple[int, list[str]]]]]:
        """Return the titles and an iterator over nonempty rows with line numbers."""
        before = csv.field_size_limit(min(LIMIT, sys.maxsize))
        reader = None
        try:
            with open_stream(self._path) as stream:
                text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
                lines = iter(partial(text.readline, LONGEST_LINE), "")
                first = next(lines, "")
                self.delimiter = delimiter_of(first)
                reader = csv.reader(map(_short, chain([first], lines)), delimiter=self.delimiter, strict=True)
                titles = [title.strip() for title in next(reader, [])]
                yield titles, _filled(reader)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}: {_not_utf8(error.object, error.start)}") from error
        except csv.Error as error:
            line = f" line {reader.line_num}" if reader else ""
            raise DataError(f"{self._path}{line}: {error}") from error
        except DAMAGED as error:
            raise DataError(f"{self._path}: can't be read ({error})") from error
        finally:
            csv.field_size_limit(before)

    def entries(self) -> Iterator[Entry]:
        """Yield each row as a record."""
        with self._rows() as (_, lines):
            for number, (line, cells) in enumerate(lines, 1):
                place = f"{printable(self._path.name)} line {line}"
                if len(cells) != len(self._titles):
                    fault = DataError(f"it has {len(cells)} cells where the header has {len(self._titles)}")
                    yield Entry(place, f"{self._stem}-{number}", fault)
                else:
                    record = {name: cell for name, cell in zip(self._names, cells, strict=True) if name}
                    yield Entry(place, f"{self._stem}-{number}", record)


def _short(line: str) -> str:
    """Reject an overlong line before its cells exhaust memory."""
    if len(line) == LONGEST_LINE:
        raise csv.Error(f"a line of over {LONGEST_LINE // 2**20} MiB")
    return line


def _filled(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield nonempty rows with line numbers."""
    last = 0
    for cells in reader:
        if any(cells):
            last = reader.line_num
            yield last, cells
        elif reader.line_num - last > MAX_EMPTY_LINES:
            raise csv.Error(f"over {MAX_EMPTY_LINES:,} empty lines in a row")
