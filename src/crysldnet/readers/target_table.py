"""Read the target table of imported crystals."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from crysldnet.console import did_you_mean, from_spreadsheet, listed
from crysldnet.data.cells import MISSING_TEXT, CellError, has_decimal_comma, plain_numbers, read_numbers
from crysldnet.data.schema import STRUCTURE_COLUMNS
from crysldnet.data.units import name_and_unit
from crysldnet.errors import DataError
from crysldnet.readers.rows import MOST_COLUMNS, ImportIssues
from crysldnet.readers.structure_files import material_ids, printable, without_suffix
from crysldnet.readers.table_cells import EXCEL, read_cells

ID_COLUMNS = ("material_id", "id", "file", "filename", "name")


@dataclass(frozen=True)
class Targets:
    """Properties of crystals by id.

    Attributes:
        name: the file's name.
        columns: [R] numeric or text column per property.
        units: unit of each property with a unit in the header.
        rows: row of each id.
    """

    name: str
    columns: dict[str, pa.Array]
    units: dict[str, str]
    rows: dict[str, int]

    def take(self, ids: list[str], issues: ImportIssues) -> dict[str, pa.Array]:
        """Return the properties of some crystals, null for those without a row."""
        index = [self.rows.get(material_id) for material_id in ids]
        for material_id, row in zip(ids, index, strict=True):
            if row is None:
                issues.note(f"crystals have no row in {self.name}, so their values are null", material_id)
        return {name: column.take(pa.array(index, pa.int64())) for name, column in self.columns.items()}


def check_table(path: Path, id_column: str | None) -> None:
    """Reject a table that can't be read or has no properties, before reading crystals."""
    _checked_header(path, read_cells(path).header, id_column)


def read_targets(path: Path, ids: set[str], id_column: str | None, issues: ImportIssues) -> Targets:
    """Read a table of properties for crystals with these ids.

    The id column is identified by its name in any case and spelling, or else by its ids.

    Raises:
        DataError: the file can't be read, has no id column or no properties, or has an ambiguous cell.
    """
    header, rows, commas, others = read_cells(path)
    for text in others:
        issues.note("further sheets of the table aren't read", text)
    named = _checked_header(path, header, id_column)
    key = _matching(path, header, rows, ids, named)
    if key != named:
        issues.note("columns were taken for that of the ids, because they hold ids of crystals", header[key])
    found = _rows_by_id(path, header, key, rows, ids, issues)
    columns: dict[str, pa.Array] = {}
    units: dict[str, str] = {}
    values = [j for j, title in enumerate(header) if j != key and title]
    others_have = commas and path.suffix.lower() not in EXCEL  # numbers aren't text there
    others_have = others_have and has_decimal_comma(row[j] for _, row in found.values() for j in values)
    for j in values:
        title = header[j]
        name, unit = name_and_unit(title)
        if unit is None and title[-1] in ")]":
            issues.note("columns end in brackets that hold no known unit; they are part of the name", title)
        texts = [row[j].strip() for _, row in found.values()]
        if (numbers := plain_numbers(pa.array(texts, pa.string()), commas=others_have)) is not None:
            issues.count(f"values of {name!r}", len(numbers) - numbers.null_count)
            columns[name] = numbers
            units |= {name: unit} if unit else {}
            continue
        cells = [(place, i, text) for (i, (place, _)), text in zip(found.items(), texts, strict=True)]
        try:
            read, unit = _columns(name, unit, cells, commas, others_have, issues)
        except CellError as error:
            place = next(place for place, _, text in cells if text == error.text)
            raise DataError(f"{path.parent / place}: {title!r} has {error.text!r}, {error.reason}") from error
        if twice := next((new for new in read if new in columns), None):
            raise DataError(f"{path}: the uncertainties of {name!r} need the column name {twice!r}; rename it")
        columns |= read
        units |= dict.fromkeys(read, unit) if unit else {}
    return Targets(printable(path.name), columns, units, {material_id: row for row, material_id in enumerate(found)})


def _rows_by_id(
    path: Path, header: list[str], key: int, rows: list[tuple[int, list[str]]], ids: set[str], issues: ImportIssues
) -> dict[str, tuple[str, list[str]]]:
    """Return position and cells of each crystal's row; ambiguous rows are all dropped."""
    found: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    table = printable(path.name)
    kind = f"rows of {table}"
    issues.count(kind, len(rows))
    alike: dict[str, str] = {}
    reason = ""
    for line, cells in rows:
        place = f"{table} line {line}"
        written = cells[key].strip() if key < len(cells) else ""
        material_id = _id_of(written, ids)
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
            issues.leave_out(kind, written, place, written, reason)
    if not found:
        raise DataError(f"{path}: no row could be used: {reason}")
    for material_id, same in found.items():
        if len(same) > 1:
            for place, _ in same:
                reason = f"the id is in {len(same)} rows, so none of them is used"
                issues.leave_out(kind, material_id, place, material_id, reason)
    return {material_id: same[0] for material_id, same in found.items() if len(same) == 1}


def _bare(material_id: str) -> str:
    """Return an id without what programs change: case, suffix, leading zeros, composed characters."""
    return re.sub(r"\.(0|[a-z]\w{0,6})$", "", unicodedata.normalize("NFKC", material_id).casefold()).lstrip("0")


def _checked_header(path: Path, header: list[str], id_column: str | None) -> int | None:
    """Validate all column names, and return the index of the id column, None if not identified by name."""
    key = _named(header, id_column)
    if id_column is not None and key is None:
        hint = did_you_mean(id_column, header, f"name one of {listed([*map(repr, header)])}")
        raise DataError(f"{path}: no column {id_column!r} for the ids; {hint} (id_column)")
    title_of_ids = None if key is None else header[key]
    names = [name_and_unit(title)[0] for title in header if title and title != title_of_ids]
    if len(names) > MOST_COLUMNS:
        raise DataError(f"{path}: it has {len(names):,} columns; an import takes {MOST_COLUMNS:,} properties")
    for name, count in Counter(names).items():
        if count > 1 or name in STRUCTURE_COLUMNS:
            raise DataError(f"{path}: the column name {name!r} is taken or occurs twice; rename it")
    if title_of_ids is not None and header.count(title_of_ids) > 1:
        raise DataError(f"{path}: {title_of_ids!r} occurs twice; rename one")
    if len(names) < (2 if key is None else 1):
        raise DataError(f"{path}: it has no column beside the ids; are its cells separated by commas?")
    return key


def _named(header: list[str], id_column: str | None) -> int | None:
    """Return the index of the column with this name or a usual id name: exactly, or else in another spelling."""
    unnamed = header[:1] if header[0] == "" else []  # pandas writes the index of a data frame this way
    wanted = [id_column] if id_column is not None else [*ID_COLUMNS, *unnamed]
    spelled = [_bare_title(title) for title in header]
    found = [header.index(name) for name in wanted if name in header]
    return next(iter(found + [spelled.index(b) for b in map(_bare_title, wanted) if b and b in spelled]), None)


def _bare_title(title: str) -> str:
    return re.sub(r"[\W_]+", "", title.casefold())


def _matching(
    path: Path, header: list[str], rows: list[tuple[int, list[str]]], ids: set[str], named: int | None
) -> int:
    """Return the index of the column with the most crystal ids; the named one if it has any."""
    if named is not None and _has_ids(named, rows, ids):
        return named
    places = sorted(range(len(header)), key=lambda place: place != named)
    counts = {place: sum(_has_ids(place, [row], ids) for row in rows) for place in places}
    best = max(places, key=lambda place: counts[place])
    if counts[best]:
        return best
    example = min(ids, default="")
    if named is None:
        raise DataError(
            f"{path}: no row belongs to a crystal: no column is called {', '.join(ID_COLUMNS)}, and none of "
            f"{listed([*map(repr, header)])} holds ids, such as {example!r}; name it with id_column"
        )
    first = next((cells[named] for _, cells in rows if named < len(cells)), "")
    raise DataError(
        f"{path}: no row belongs to a crystal; is {header[named]!r} the column of ids (id_column)? "
        f"Its first id is {first!r}, one of a crystal is {example!r}"
    )


def _has_ids(place: int, rows: list[tuple[int, list[str]]], ids: set[str]) -> bool:
    """Return whether a row has a crystal id in that column."""
    return any(place < len(cells) and _id_of(cells[place].strip(), ids) is not None for _, cells in rows)


def _id_of(written: str, ids: set[str]) -> str | None:
    return next((name for name in _spellings(written) if name in ids), None)


def _spellings(written: str) -> Iterator[str]:
    """Yield the possible meanings of an id: as written, without suffix, without folder, the folder of a POSCAR."""
    bare = without_suffix(written)
    yield from (written, bare, *material_ids([written], ""), Path(written).name, Path(bare).name)
    if "'" in written:  # this program's own tables, if a spreadsheet would interpret the id as a formula
        yield from_spreadsheet(written)


def _columns(
    name: str,
    unit: str | None,
    cells: list[tuple[str, str, str]],
    may_have_commas: bool,
    others_have_commas: bool,
    issues: ImportIssues,
) -> tuple[dict[str, pa.Array], str | None]:
    """Return a numeric column, with its uncertainties if any, or a text column."""
    texts = [text for *_, text in cells]
    numbers = read_numbers(Counter(texts), unit, commas=may_have_commas, others_have_commas=others_have_commas)
    if numbers is None:
        missing = [text in MISSING_TEXT for text in texts]
        for text in (text for text, gone in zip(texts, missing, strict=True) if gone):
            issues.note(f"texts are {text!r}, which was read as no value", name)
        known = [None if gone else text or None for text, gone in zip(texts, missing, strict=True)]
        return {name: pa.array(known, pa.string())}, None
    kind = f"values of {name!r}"
    for place, material_id, text in cells:
        if text in numbers.unread:
            reason = f"{name} is {text!r}, not a finite number; its value is null"
            issues.leave_out(kind, text, place, material_id, reason)
    issues.count(kind, sum(map(numbers.says_something, texts)))
    return numbers.columns(name, texts), numbers.unit
