"""Property columns of an import: one type and one way to parse text for all chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from crysldnet.data.cells import (
    LOOKS_LIKE_A_NUMBER,
    MISSING,
    MISSING_TEXT,
    CellError,
    Numbers,
    has_decimal_comma,
    plain_numbers,
    read_numbers,
)
from crysldnet.data.schema import STRUCTURE_COLUMNS
from crysldnet.errors import DataError
from crysldnet.readers.rows import MOST_COLUMNS, PLACE, ImportIssues, Piece, common_type

_MISSING = pa.array(MISSING_TEXT)
_ANY_MISSING = pa.array(sorted({*MISSING, *map(str.upper, MISSING), *map(str.capitalize, MISSING), "NaN"}))


class Columns:
    """Columns of all chunks: add each chunk, then call :meth:`decide` once.

    Args:
        pieces: all chunks, iterated several times.
        commas: whether decimal commas are allowed, because other characters separate the cells.
    """

    def __init__(self, pieces: Iterable[Piece], *, commas: bool = False) -> None:
        self._pieces, self._commas = pieces, commas
        self._others_have_commas = False
        self.types: dict[str, list[pa.DataType]] = {}
        """Types of each column in the chunks."""
        self.notes: list[tuple[str, str]] = []
        self._kinds: dict[str, pa.DataType] = {}
        self._numbers: dict[str, Numbers] = {}
        """Text columns that are parsed as numbers."""
        self._all_plain: frozenset[str] = frozenset()
        """Those with only plain numbers, which are parsed at once."""
        self._texts, self._alike, self._plain = Counter[str](), Counter[str](), Counter[str]()
        """Number of nonempty texts per column, of those that look like numbers, and of numeric values."""
        self._with_missing: set[str] = set()
        """Text columns in which some texts may mean a missing value."""

    def add(self, table: pa.Table) -> None:
        """Register the columns of a chunk."""
        for name, column in zip(table.column_names, table.columns, strict=True):
            if name in STRUCTURE_COLUMNS or name == PLACE:
                continue
            self.types.setdefault(name, []).append(column.type)
            if len(self.types) > MOST_COLUMNS:
                raise DataError(
                    f"over {MOST_COLUMNS:,} properties, such as {name!r}: every crystal has a place for each; give "
                    "records that have keys of their own the same ones"
                )
            if not _holds_texts(column.type):
                self._plain[name] += len(column) - column.null_count
                continue
            texts = _as_texts(column)
            self._texts[name] += len(texts) - texts.null_count
            first, last = pc.min_max(texts).as_py().values()
            if first is not None and (first < "A" or last >= "{"):  # all others start with a letter
                self._alike[name] += pc.sum(pc.match_substring_regex(texts, LOOKS_LIKE_A_NUMBER)).as_py()
            said = pc.is_in(texts, _ANY_MISSING)
            if pc.any(said).as_py():
                self._texts[name] -= pc.sum(said).as_py()
                self._with_missing.add(name)

    def decide(self, without: Collection[str], units: dict[str, str]) -> None:
        """Determine the column types.

        Args:
            without: names of columns to leave out.
            units: units of the columns that state one. Units found in cells are added.

        Raises:
            DataError: text is ambiguous.
        """
        self._kinds = {name: common_type(found) for name, found in self.types.items() if name not in without}
        texts = [name for name, kind in self._kinds.items() if pa.types.is_string(kind)]
        likely = [name for name in texts if name in units or self._may_be_numbers(name)]
        counted = self._counted(self._odd(likely))
        self._others_have_commas = self._commas and any(map(has_decimal_comma, counted.values()))
        if self._others_have_commas:
            counted |= self._counted(self._odd([name for name in likely if name not in counted]))
        self._numbers = {name: Numbers({}, units.get(name), frozenset()) for name in likely if name not in counted}
        self._all_plain = frozenset(self._numbers)
        for name, counts in counted.items():
            self._decide(name, counts, self._plain[name], units)
        mixed = [name for name in texts if self._plain[name] and name not in self._numbers]
        self.notes = [("columns mix numbers and text and were kept as text", name) for name in mixed]

    def _may_be_numbers(self, name: str) -> bool:
        like = self._alike[name] + self._plain[name]
        return like > 0 and like >= self._texts[name] - self._alike[name]

    def _odd(self, names: Sequence[str]) -> list[str]:
        """Return the columns with text other than plain numbers."""
        odd = {
            name
            for name, _, column in self._each(names)
            if _holds_texts(column.type) and _numbers(column, commas=self._others_have_commas) is None
        }
        return [name for name in names if name in odd]

    def _each(self, names: Sequence[str]) -> Iterator[tuple[str, pa.Table, pa.ChunkedArray]]:
        """Yield some columns of each chunk."""
        for table, *_ in self._pieces if names else ():
            yield from ((name, table, table[name]) for name in names if name in table.column_names)

    def _counted(self, names: Sequence[str]) -> dict[str, Counter[str]]:
        """Count each text in columns."""
        counts: dict[str, Counter[str]] = {name: Counter() for name in names}
        for name, _, column in self._each(names):
            if _holds_texts(column.type):
                texts, numbers = pc.value_counts(_as_texts(column).drop_null()).flatten()
                counts[name].update(dict(zip(texts.to_pylist(), numbers.to_pylist(), strict=True)))
        return counts

    def _decide(self, name: str, counts: Mapping[str, int], plain: int, units: dict[str, str]) -> None:
        try:
            numbers = read_numbers(
                counts,
                units.get(name),
                numbers=plain,
                commas=self._commas,
                others_have_commas=self._others_have_commas,
            )
        except CellError as error:
            place = self._place_of(name, error.text)
            raise DataError(f"{place}: {name!r} has {error.text!r}, {error.reason}") from error
        if numbers is None:
            return
        self._numbers[name] = numbers
        for new in numbers.names(name)[1:]:
            if new in self._kinds:
                raise DataError(f"the uncertainties of {name!r} need the column name {new!r}; rename that column")
        if numbers.unit is not None:
            units |= dict.fromkeys(numbers.names(name), numbers.unit)

    def _place_of(self, name: str, text: str) -> str:
        """Return the first location of a text in a column."""
        for _, table, column in self._each([name]):
            if _holds_texts(column.type) and (row := pc.index(_as_texts(column), text).as_py()) >= 0:
                return table[PLACE][row].as_py()
        raise KeyError(text)

    @property
    def names(self) -> list[str]:
        """Names of the resulting columns."""
        return [
            new
            for name in self._kinds
            for new in (self._numbers[name].names(name) if name in self._numbers else [name])
        ]

    def complete(self, table: pa.Table, issues: ImportIssues) -> pa.Table:
        """Add missing columns to a chunk, recording which values are left out."""
        there = dict(zip(table.column_names, table.columns, strict=True))
        columns = {name: there[name] for name in (PLACE, *STRUCTURE_COLUMNS)}
        for name, kind in self._kinds.items():
            column = there[name] if name in there else pa.chunked_array([pa.nulls(len(table), kind)])
            if name in self._numbers and _holds_texts(column.type):
                columns |= self._read(name, column, table, issues)
            elif name in self._numbers:
                columns |= {new: pa.nulls(len(table), pa.float64()) for new in self._numbers[name].names(name)}
                columns[name] = _finite(name, column.cast(pa.float64(), safe=False), table, issues)
            elif pa.types.is_string(kind):
                columns[name] = _as_texts(column)
                if name in self._with_missing:
                    columns[name] = _known(name, columns[name], issues)
            else:
                columns[name] = _finite(name, column.cast(kind, safe=False), table, issues)
        return pa.table(columns)

    def _read(self, name: str, column: pa.ChunkedArray, table: pa.Table, issues: ImportIssues) -> dict[str, pa.Array]:
        if name in self._all_plain:
            values = _numbers(column)
            assert values is not None
            issues.count(f"values of {name!r}", len(values) - values.null_count)
            return {name: values}
        numbers, texts = self._numbers[name], _as_texts(column).to_pylist()
        issues.count(f"values of {name!r}", sum(text is not None and numbers.says_something(text) for text in texts))
        for row in (row for row, text in enumerate(texts) if text in numbers.unread):
            _leave_out(name, texts[row], f"{texts[row]!r}, not a finite number", table, row, issues)
        return numbers.columns(name, texts)


def _leave_out(name: str, what: str, said: str, table: pa.Table, row: int, issues: ImportIssues) -> None:
    place, material_id = table[PLACE][row].as_py(), table["material_id"][row].as_py()
    issues.leave_out(f"values of {name!r}", what, place, material_id, f"{name} is {said}; its value is null")


def _holds_texts(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_boolean(kind)


def _as_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column as text, with Python's spelling of booleans."""
    if pa.types.is_boolean(column.type):
        return pc.if_else(column, "True", "False")
    return column if pa.types.is_string(column.type) else column.cast(pa.string())


def _numbers(column: pa.ChunkedArray, *, commas: bool = False) -> pa.ChunkedArray | None:
    """Return a text column as numbers if all are plain or null, otherwise None; see :func:`plain_numbers`."""
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column), pa.float64())])
    return plain_numbers(_as_texts(column), commas=commas)


def _known(name: str, texts: pa.ChunkedArray, issues: ImportIssues) -> pa.ChunkedArray:
    """Return texts with null in place of those that mean a missing value."""
    missing = pc.is_in(texts, _MISSING)
    for text in texts.filter(missing).to_pylist():
        issues.note(f"texts are {text!r}, which was read as no value", name)
    return pc.if_else(missing, pa.scalar(None, pa.string()), texts)


def _finite(name: str, column: pa.ChunkedArray, table: pa.Table, issues: ImportIssues) -> pa.ChunkedArray:
    """Replace non-finite numbers by null."""
    if not pa.types.is_floating(column.type):
        return column
    values = column.to_numpy()
    if np.isfinite(values).all():
        issues.count(f"values of {name!r}", len(values))
        return column
    issues.count(f"values of {name!r}", len(values) - int(np.isnan(values).sum()))
    for row in np.flatnonzero(np.isinf(values)).tolist():
        _leave_out(name, "inf", "infinite", table, row, issues)
    return pa.array(values, mask=~np.isfinite(values))
