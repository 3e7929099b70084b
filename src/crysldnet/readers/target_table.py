"""Read the CSV of targets that belongs to imported crystals."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from crysldnet.data.cells import MISSING_TEXT, CellError, plain_numbers, read_numbers
from crysldnet.data.schema import STRUCTURE_COLUMNS
from crysldnet.data.units import is_unit
from crysldnet.errors import DataError
from crysldnet.readers.issues import Ledger
from crysldnet.readers.structure_files import material_ids, without_suffix

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
    _key_column(path, _read_csv(path)[1], id_column)


def read_targets(path: Path, ids: set[str], id_column: str | None, ledger: Ledger) -> Targets:
    """Read a CSV of properties for crystals with these ids; commas, semicolons or tabs separate its cells.

    Raises:
        DataError: the file can't be read, has no column of ids or none of properties, or a cell that can't be read
            without guessing.
    """
    delimiter, header, rows = _read_csv(path)
    key = _key_column(path, header, id_column)
    found = _rows_by_id(path, header, key, rows, ids, ledger)
    columns: dict[str, pa.Array] = {}
    units: dict[str, str] = {}
    for j, title in enumerate(header):
        if j == key or not title:
            continue
        name, unit = name_and_unit(title)
        if unit is None and title[-1] in ")]":
            ledger.note("columns end in brackets that hold no known unit; they are part of the name", title)
        texts = [row[j].strip() for _, row in found.values()]
        if (numbers := plain_numbers(pa.array(texts, pa.string()))) is not None:
            ledger.count(f"values of {name!r}", len(numbers) - numbers.null_count)
            columns[name] = numbers
            units |= {name: unit} if unit else {}
            continue
        cells = [(place, i, text) for (i, (place, _)), text in zip(found.items(), texts, strict=True)]
        try:
            read, unit = _columns(name, unit, cells, delimiter, ledger)
        except CellError as error:
            place = next(place for place, _, text in cells if text == error.text)
            raise DataError(f"{path.parent / place}: {title!r} has {error.text!r}, {error.reason}") from error
        if twice := next((new for new in read if new in columns), None):
            raise DataError(f"{path}: the uncertainties of {name!r} need the column name {twice!r}; rename it")
        columns |= read
        units |= dict.fromkeys(read, unit) if unit else {}
    return Targets(path.name, columns, units, {material_id: row for row, material_id in enumerate(found)})


def _rows_by_id(
    path: Path, header: list[str], key: int, rows: list[tuple[int, list[str]]], ids: set[str], ledger: Ledger
) -> dict[str, tuple[str, list[str]]]:
    """Return the place and cells of each crystal's row; rows that can't be told apart are all left out."""
    found: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    kind = f"rows of {path.name}"
    ledger.count(kind, len(rows))
    alike: dict[str, str] = {}
    for line, cells in rows:
        place = f"{path.name} line {line}"
        written = cells[key].strip() if key < len(cells) else ""
        material_id = next((name for name in _spellings(written) if name in ids), None)
        reason = ""
        if len(cells) != len(header):
            reason = f"it has {len(cells)} cells where the header has {len(header)}"
            reason += "; a decimal comma needs semicolons between the cells" if len(cells) > len(header) else ""
        elif not written:
            reason = "the id is empty"
        elif material_id is None:
            alike = alike or {_bare(name): name for name in ids}
            reason = "no crystal has this id"
            reason += f"; there is {alike[_bare(written)]!r}" if _bare(written) in alike else ""
        else:
            found[material_id].append((place, cells))
        if reason:
            ledger.leave_out(kind, written, place, written, reason)
    if not found:
        first = next((cells[key] for _, cells in rows if key < len(cells)), "")
        raise DataError(
            f"{path}: no row belongs to a crystal; is {header[key]!r} the column of ids (id_column)? "
            f"Its first id is {first!r}, one of a crystal is {min(ids, default='')!r}"
        )
    for material_id, same in found.items():
        if len(same) > 1:
            for place, _ in same:
                reason = f"the id stands in {len(same)} rows, so none of them is used"
                ledger.leave_out(kind, material_id, place, material_id, reason)
    return {material_id: same[0] for material_id, same in found.items() if len(same) == 1}


def _bare(material_id: str) -> str:
    """Return an id without what programs change in it: case, suffix, leading zeros."""
    return re.sub(r"\.(0|[a-z]\w{0,6})$", "", material_id.casefold()).lstrip("0")


def _read_csv(path: Path) -> tuple[str, list[str], list[tuple[int, list[str]]]]:
    """Return what separates the cells, the header, and the rows that aren't empty, each with its line number."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: can't be opened ({error.strerror})") from error
    except UnicodeDecodeError as error:
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
    if not rows:
        raise DataError(f"{path}: the table is empty")
    return delimiter, [title.strip() for title in rows[0][1]], rows[1:]


def delimiter_of(text: str) -> str:
    """Return what separates the cells of a table, by its first line."""
    first = text.lstrip().split("\n", 1)[0]
    return max(",;\t", key=first.count)


def _key_column(path: Path, header: list[str], id_column: str | None) -> int:
    """Return the index of the column of ids, having checked the names of all columns."""
    unnamed = header[:1] if header[0] == "" else []  # so pandas writes the index of a data frame
    key = id_column or next((name for name in [*ID_COLUMNS, *unnamed] if name in header), None)
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
    """Split ``band_gap (eV)`` or ``band_gap [eV]``; brackets that hold no unit are part of the name."""
    match = re.fullmatch(r"(.*\S)\s*[(\[]((?:[^()\[\]]|\([^()]*\))+)[)\]]", title)
    return (match[1], match[2].strip()) if match and is_unit(match[2]) else (title, None)


def _spellings(written: str) -> Iterator[str]:
    """Give the ids that a table may mean: as written, without suffix, without folder, the folder of a POSCAR."""
    bare = without_suffix(written)
    yield from (written, bare, *material_ids([written], ""), Path(written).name, Path(bare).name)
    if written.startswith("'"):  # this program's own tables, where spreadsheets would take an id for a formula
        yield written[1:]


def _columns(
    name: str, unit: str | None, cells: list[tuple[str, str, str]], delimiter: str, ledger: Ledger
) -> tuple[dict[str, pa.Array], str | None]:
    """Make a column of numbers, with one of their uncertainties where there are any, or a column of texts."""
    texts = [text for *_, text in cells]
    numbers = read_numbers(Counter(texts), unit, commas=delimiter != ",")
    if numbers is None:
        missing = [text in MISSING_TEXT for text in texts]
        for text in (text for text, gone in zip(texts, missing, strict=True) if gone):
            ledger.note(f"texts are {text!r}, which was read as no value", name)
        known = [None if gone else text or None for text, gone in zip(texts, missing, strict=True)]
        return {name: pa.array(known, pa.string())}, None
    kind = f"values of {name!r}"
    for place, material_id, text in cells:
        if text in numbers.unread:
            reason = f"{name} is {text!r}, not a finite number; its value is null"
            ledger.leave_out(kind, text, place, material_id, reason)
    ledger.count(kind, sum(map(numbers.says_something, texts)))
    return numbers.columns(name, texts), numbers.unit
