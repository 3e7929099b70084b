"""Read the CSV of targets that belongs to imported crystals."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from crysldnet.data.ledger import Ledger
from crysldnet.data.rows import MISSING
from crysldnet.data.schema import STRUCTURE_COLUMNS
from crysldnet.data.structure_files import material_ids, without_suffix
from crysldnet.errors import DataError

ID_COLUMNS = ("material_id", "id", "file", "filename", "name")


@dataclass(frozen=True)
class Targets:
    """Properties of crystals by id.

    Attributes:
        name: the file's name.
        columns: [R] a column of numbers or text for each property.
        units: unit of each property whose header states one.
        rows: the row of each id.
    """

    name: str
    columns: dict[str, pa.Array]
    units: dict[str, str]
    rows: dict[str, int]

    def take(self, ids: list[str], ledger: Ledger) -> dict[str, pa.Array]:
        """Return the properties of some crystals, null for those without a row."""
        index = [self.rows.get(material_id) for material_id in ids]
        for material_id, row in zip(ids, index, strict=True):
            if row is None:
                ledger.note(f"crystals have no row in {self.name}: their values are null", material_id)
        return {name: column.take(pa.array(index, pa.int64())) for name, column in self.columns.items()}


def check_table(path: Path, id_column: str | None) -> None:
    """Refuse a table that has no column of ids or none of properties, before any crystal is read.

    Raises:
        DataError: as :func:`read_targets`.
    """
    _key_column(path, _read_csv(path)[0], id_column)


def read_targets(path: Path, ids: set[str], id_column: str | None, ledger: Ledger) -> Targets:
    """Read a CSV of properties for crystals with these ids; commas, semicolons or tabs separate its cells.

    Raises:
        DataError: the file can't be read, or has no column of ids or none of properties.
    """
    header, rows = _read_csv(path)
    key = _key_column(path, header, id_column)
    found = _rows_by_id(path, header, key, rows, ids, ledger)
    columns: dict[str, pa.Array] = {}
    units: dict[str, str] = {}
    for j, title in enumerate(header):
        if j == key or not title:
            continue
        name, unit = name_and_unit(title)
        cells = [(place, material_id, row[j].strip()) for material_id, (place, row) in found.items()]
        columns[name] = _column(name, unit, cells, ledger)
        if unit:
            units[name] = unit
    return Targets(path.name, columns, units, {material_id: row for row, material_id in enumerate(found)})


def _rows_by_id(
    path: Path, header: list[str], key: int, rows: list[tuple[int, list[str]]], ids: set[str], ledger: Ledger
) -> dict[str, tuple[str, list[str]]]:
    """Return the place and cells of each crystal's row; rows that can't be told apart are all rejected."""
    found: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    for line, cells in rows:
        place = f"{path.name} line {line}"
        written = cells[key].strip() if key < len(cells) else ""
        material_id = next((name for name in _spellings(written) if name in ids), None)
        if len(cells) != len(header):
            ledger.reject(place, written, f"it has {len(cells)} cells where the header has {len(header)}")
        elif not written:
            ledger.reject(place, "", "the id is empty")
        elif material_id is None:
            ledger.reject(place, written, "no crystal has this id")
        else:
            found[material_id].append((place, cells))
    if not found:
        raise DataError(f"{path}: no row belongs to a crystal; is {header[key]!r} the column of ids (id_column)?")
    for material_id, same in found.items():
        if len(same) > 1:
            for place, _ in same:
                ledger.reject(place, material_id, f"the id stands in {len(same)} rows, so none of them is used")
    return {material_id: same[0] for material_id, same in found.items() if len(same) == 1}


def _read_csv(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header and the rows that aren't empty, each with its line number."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: can't be opened ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line}: not UTF-8; save the table as CSV in UTF-8") from error
    first = text.lstrip().split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
    try:
        rows = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}") from error
    if not rows:
        raise DataError(f"{path}: the table is empty")
    return [title.strip() for title in rows[0][1]], rows[1:]


def _key_column(path: Path, header: list[str], id_column: str | None) -> int:
    """Return the index of the column of ids, having checked the names of all columns."""
    key = id_column or next((name for name in ID_COLUMNS if name in header), None)
    if key is None or key not in header:
        raise DataError(
            f"{path}: no column {key or ', '.join(ID_COLUMNS)} for the ids; "
            f"name one of {', '.join(map(repr, header))} with id_column"
        )
    names = [name_and_unit(title)[0] for title in header if title and title != key]
    for name in names:
        if names.count(name) > 1 or name in STRUCTURE_COLUMNS:
            raise DataError(f"{path}: the column name {name!r} is taken or stands there twice; rename it")
    if header.count(key) > 1:
        raise DataError(f"{path}: {key!r} stands there twice; rename one")
    if not names:
        raise DataError(f"{path}: it has no column beside the ids; are its cells separated by commas?")
    return header.index(key)


def name_and_unit(title: str) -> tuple[str, str | None]:
    """Split ``band_gap (eV)`` or ``band_gap [eV]``."""
    match = re.fullmatch(r"(.*\S)\s*[(\[]([^()\[\]]+)[)\]]", title)
    return (match[1], match[2].strip()) if match else (title, None)


def _spellings(written: str) -> Iterator[str]:
    """Give the ids that a table may mean: as written, without suffix, without folder, the folder of a POSCAR."""
    bare = without_suffix(written)
    yield from (written, bare, *material_ids([written], ""), Path(written).name, Path(bare).name)


def _column(name: str, unit: str | None, cells: list[tuple[str, str, str]], ledger: Ledger) -> pa.Array:
    """Make a column of numbers, or of text where it has no unit and no number."""
    numbers = [number_in(text) for _, _, text in cells]
    if unit is None and None in numbers and all(number is None or math.isnan(number) for number in numbers):
        return pa.array([None if text.lower() in MISSING else text for *_, text in cells], pa.string())
    for (place, material_id, text), number in zip(cells, numbers, strict=True):
        if number is None:
            ledger.reject(place, material_id, f"{name} is {text!r}, not a finite number; its value is null")
    values = [math.nan if number is None else number for number in numbers]
    return pa.array(np.array(values, np.float64), from_pandas=True)


def number_in(text: str) -> float | None:
    """Read a cell: NaN where it is empty, None where it isn't a finite number."""
    if text.lower() in MISSING:
        return math.nan
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None
