"""Cells of a property table in CSV, TSV or Excel, as text."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path
from typing import NamedTuple

from crysldnet.console import note
from crysldnet.errors import DataError

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
        raise DataError(f"{path} line {line}: not UTF-8; save the table as CSV in UTF-8") from error
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
