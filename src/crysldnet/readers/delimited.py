"""CSV files with a column of CIFs, as in CDVAE's data sets."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from crysldnet.data.units import name_and_unit
from crysldnet.errors import DataError
from crysldnet.readers.compression import DAMAGED, inner_name, open_stream
from crysldnet.readers.records import Entry
from crysldnet.readers.structure_files import LIMIT, MAX_EMPTY_LINES, printable
from crysldnet.readers.table_cells import delimiter_of

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
            raise DataError(f"{self._path}: not UTF-8; save the table as CSV in UTF-8") from error
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
