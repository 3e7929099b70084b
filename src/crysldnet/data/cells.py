"""Parse a text column as numbers with uncertainties and a unit, or keep it as text.

The decision is made once per column from all of its cells. Unambiguous values are parsed: ``-1.5e3``, ``1.5D+03``,
``1,063.26``, ``63.26 ± 3``, ``5.64(3)``, ``63.26 GPa`` if every cell has this unit, and decimal commas if other
characters separate the cells. Ambiguous values are errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from crysldnet.data.units import is_unit, same_unit

MISSING = frozenset(("", "nan", "na", "n/a", "#n/a", "<na>", "null", "none", "-", "--", "—", "?"))
"""Lowercase texts that mean a missing value in a numeric column."""
MISSING_TEXT = ("n/a", "N/A", "null", "Null", "NULL", "#N/A", "<NA>")
"""Texts that mean a missing value in a text column, besides empty ones: Na and NaN are formulas."""
_MARKS = "'’\u00a0\u2009\u202f"
_MINUS = "–‐‑‒﹣－"
"""Dashes used as a minus sign before a number."""
_EXPONENT = r"(?:[eEdD][-+]?\d+)?"
_NUMBER = rf"[-+]?[.,]?\d[\d.,{_MARKS}]*{_EXPONENT}"
_GLUED = r"(?:[a-zA-ZΩµμ/^]{2,10}[-^]?[1-9]?|[%°ÅK])"
"""Units that may follow a number without a space; 2H and 3C name polytypes."""
_ABOUT = r"(?:[<>≤≥~≈]=?|c\.|ca\.?|circa|about|approx\.?)"
_RAISED = "⁺⁻⁰¹²³⁴-⁹"
LOOKS_LIKE_A_NUMBER = (
    rf"^[\s{_MARKS}]*{_ABOUT}?\s*[-+−＋{_MINUS}]?\s*[.,．，]?\d[\d.,．，_{_MARKS}]*(?:[eEdD][-+−]?\d+)?\s*"
    rf"(?:$|[\s±(+–—×x*·†‡§¶#{_RAISED}-]|\.\.|{_GLUED}$)"
).replace(r"\d", r"\p{Nd}")
"""Found in every cell that may be a number, and in others: for a quick check of many."""
_CELL = re.compile(rf"({_NUMBER})(?:\s*(?:±|\+/-|\+-)\s*({_NUMBER})|\((\d+)\))?(\s*)(\D.*)?")
_POINT = re.compile(rf"[-+]?(?:\d+\.?\d*|\.\d+){_EXPONENT}")
_COMMA = re.compile(rf"[-+]?(?:\d+,?\d*|,\d+){_EXPONENT}")
_GROUPED = {  # by decimal mark: integers in groups of three, and decimals if the groups are unambiguous
    ".": re.compile(rf"[-+]?[1-9]\d{{0,2}}(?:(?:,\d{{3}})+\.\d*|(?:,\d{{3}}){{2,}}|(?:[{_MARKS}]\d{{3}})+(?:\.\d*)?)"),
    ",": re.compile(rf"[-+]?[1-9]\d{{0,2}}(?:(?:\.\d{{3}})+,\d*|(?:\.\d{{3}}){{2,}}|(?:[{_MARKS}]\d{{3}})+(?:,\d*)?)"),
}
_TWO_WAYS = re.compile(r"[-+]?[1-9]\d{0,2},\d{3}")
TWO_WAYS_POINT = r"^[-+]?[1-9]\d{0,2}\.\d{3}$"
"""1.063 where points may be thousands separators."""
_ODD = {
    "is a bound or an estimate, not a value": re.compile(rf"{_ABOUT}\s*[-+]?[.,]?\d.*"),
    "is a range, not a value": re.compile(r"[-+]?(?=[\d.]*\.)[\d.]+\s*(?:[-–—]|to|\.\.+)\s*[\d.]+.*"),
    "has a space or an underscore in it": re.compile(r"[-+]?[1-9]\d{0,2}([ _]\d{3})+([.,]\d*)?|[-+]\s+\d.*"),
    "has a power of ten in words": re.compile(rf"{_NUMBER}\s*[×x*·]\s*10.*"),
    "has a raised digit, a power or a footnote": re.compile(rf"{_NUMBER}[{_RAISED}]+"),
    "has the mark of a footnote": re.compile(rf"{_NUMBER}\s*[*†‡§¶#]+"),
    "has an uncertainty in percent, of the value or as the value": re.compile(rf"{_NUMBER}\s*(?:±|\+/-|\+-).*%"),
}
_MONTHS = (
    "jan|feb|mar|mär|mrz|apr|avr|abr|may|mai|mag|jun|jui|giu|jul|lug|aug|aoû|ago|sep|set|o[ck]t|ott|nov|de[cz]|déc|dic"
)
_DATE = re.compile(
    rf"\d{{1,4}}[-./]\d{{1,2}}[-./]\d{{1,4}}([ T].*)?|\d{{1,2}}/\d{{1,2}}|\d+:\d\d(:\d\d)?"
    rf"|\d{{1,2}}[-./ ]{{1,2}}({_MONTHS})\w*\.?([-./ ]+\d{{2,4}})?"
    rf"|({_MONTHS})\w*[-./ ]+\d{{2,4}}",
    re.IGNORECASE,
)
"""What spreadsheets turn 1.5 or 2/1 into: 01.Mai, 2-Jan, Jan 63, 2024-05-01."""
_ASCII = str.maketrans("０１２３４５６７８９．，＋−％", "0123456789.,+-%")
_PLAINLY = "write a plain number such as -1.5e3, or leave the cell empty"


class CellError(Exception):
    """An ambiguous cell.

    Attributes:
        text: text of the cell.
        reason: reason and remedy.
    """

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text, reason)
        self.text, self.reason = text, reason


class Number(NamedTuple):
    """Parsed content of a cell."""

    value: float
    uncertainty: float | None = None


NO_VALUE = Number(math.nan)


@dataclass(frozen=True)
class Numbers:
    """How the texts of a column are parsed.

    Attributes:
        read: number for each text, NaN for a missing value.
        unit: unit from cells or header.
        unread: texts that aren't finite numbers.
    """

    read: Mapping[str, Number]
    unit: str | None
    unread: frozenset[str]

    def names(self, name: str) -> list[str]:
        """Return the names of a column and, if any cell has one, of its uncertainty column."""
        uncertain = any(number.uncertainty is not None for number in self.read.values())
        return [name, f"{name}_uncertainty"] if uncertain else [name]

    def columns(self, name: str, texts: Sequence[str | None]) -> dict[str, pa.Array]:
        """Return the values of cells and their uncertainties by column name."""
        found = [self.read.get(text, NO_VALUE) if text is not None else NO_VALUE for text in texts]
        names = self.names(name)
        return {
            new: pa.array([number[place] for number in found], pa.float64(), from_pandas=True)
            for place, new in enumerate(names)
        }

    def says_something(self, text: str) -> bool:
        """Return whether a cell is meant to have a value, valid or not."""
        return text in self.unread or not math.isnan(self.read[text].value)


def plain_numbers(texts: pa.Array, *, commas: bool = False) -> pa.Array | None:
    """Return stripped texts as numbers if each is empty or a plain finite number; None otherwise, or if a point may be
    a thousands separator, as in a table with decimal commas.
    """
    if commas and pc.any(pc.match_substring_regex(texts, TWO_WAYS_POINT)).as_py():
        return None
    known = pc.if_else(pc.equal(texts, ""), None, texts)
    try:
        numbers = known.cast(pa.float64())
    except pa.ArrowInvalid:
        return None
    plain = pc.and_not(pc.is_finite(numbers), pc.match_substring_regex(known, r"^[-+]?0\d"))
    return numbers if numbers.null_count < len(numbers) and pc.all(plain).as_py() else None


class _Parts(NamedTuple):
    number: str
    uncertainty: str | None = None
    last_digits: str | None = None
    suffix: str = ""
    odd: str = ""
    """Why it can't be parsed although it looks like a number."""


def read_numbers(
    counts: Mapping[str, int],
    unit: str | None = None,
    *,
    numbers: int = 0,
    commas: bool = False,
    others_have_commas: bool = False,
) -> Numbers | None:
    """Decide how the texts of a column are parsed; None to keep text.

    They are numbers if at least half of them look like numbers, or if the header states a unit. Words among them are
    rejected.

    Args:
        counts: count of each text.
        unit: unit in the header.
        numbers: number of other cells that are already numbers.
        commas: whether decimal commas are allowed.
        others_have_commas: whether other columns of the table have decimal commas.

    Raises:
        CellError: a cell is ambiguous.
    """
    parts, words = _sorted_out(counts)
    there, other = sum(counts[text] for text in parts) + numbers, sum(counts[text] for text in words)
    dates = [text for text in words if _DATE.fullmatch(_clean(text))] if there else []
    if dates and (made := sum(counts[text] for text in dates)) + there >= other - made:
        raise CellError(dates[0], "a date among numbers, which spreadsheets make of 1.5 or 2-1; restore the number")
    empty = all(not text.strip() for text in counts)
    if unit is None and not empty and (there < max(other, 1) or (not numbers and _are_codes(parts.values()))):
        return None
    if words and not there:
        reason = f"where the column has the unit {unit}, but no cell is a number; correct the cells or rename it"
        raise CellError(next(iter(words)), reason)
    for text in words:
        if text.strip().lower() in ("true", "false", "yes", "no"):
            raise CellError(text, "which stands among numbers; write 1 and 0, or words alone")
    for text, found in parts.items():
        if found.odd:
            raise CellError(text, f"which {found.odd}; {_PLAINLY}")
    comma = commas and any(_has_decimal_comma(found.number) for found in parts.values())
    if commas and others_have_commas and not comma:
        comma = _follows(parts)
    unit = _unit_of(parts, unit, bool(numbers))
    read = {
        text: _read(text, parts[text], comma) if text in parts else NO_VALUE for text in counts if text not in words
    }
    return Numbers(read, unit, frozenset(words))


def _sorted_out(counts: Mapping[str, int]) -> tuple[dict[str, _Parts], list[str]]:
    """Return the texts that look like numbers and the others, without those that mean a missing value."""
    parts: dict[str, _Parts] = {}
    words = []
    for text in counts:
        if (clean := _clean(text)).lower() in MISSING:
            continue
        if (found := _parts_of(clean)) is not None:
            parts[text] = found
        else:
            words.append(text)
    unknown = {text: f.suffix for text, f in parts.items() if f.suffix and not f.odd and not is_unit(f.suffix)}
    if len(set(unknown.values())) > 1 or len(unknown) == 1:  # not a unit unknown to this program, but words
        words += unknown
        parts = {text: found for text, found in parts.items() if text not in unknown}
    return parts, words


def _clean(text: str) -> str:
    clean = text.strip().translate(_ASCII)
    clean = re.sub(rf"^'(?=[-+{_MINUS}]?[.,]?\d)", "", clean)  # spreadsheets mark text like this
    return re.sub(rf"^[{_MINUS}](?=[.,]?\d)", "-", clean)


def _parts_of(clean: str) -> _Parts | None:
    """Split a cell that looks like a number into its parts; None if it doesn't."""
    if _POINT.fullmatch(clean):
        return _Parts(clean) if math.isfinite(float(clean.lower().replace("d", "e"))) else None
    for reason, pattern in _ODD.items():
        if pattern.fullmatch(clean):
            return _Parts("", odd=reason)
    match = _CELL.fullmatch(clean)
    if match is None:
        return None
    number, uncertainty, last_digits, space, suffix = match.groups(default="")
    if suffix and not space and not (re.fullmatch(_GLUED, suffix) and is_unit(suffix)):
        return None
    if not all(_is_number(part) for part in (number, uncertainty) if part):
        return None
    odd = "has its uncertainty behind the unit" if "±" in suffix or "+/-" in suffix else ""
    odd = odd or ("has its uncertainty behind a power of ten" if last_digits and re.search("[edED]", number) else "")
    return _Parts(number, uncertainty or None, last_digits or None, suffix, odd)


def _is_number(text: str) -> bool:
    return any(p.fullmatch(text) for p in (_POINT, _COMMA, *_GROUPED.values()))


def _has_decimal_comma(number: str) -> bool:
    plain = "," in number and _COMMA.fullmatch(number) and not _TWO_WAYS.fullmatch(number)
    return bool(plain or ("," in number and _GROUPED[","].fullmatch(number) and not _GROUPED["."].fullmatch(number)))


def has_decimal_comma(texts: Iterable[str]) -> bool:
    """Return whether any text is a number with a decimal comma."""
    found = (_parts_of(_clean(text)) for text in texts if "," in text)
    return any(parts is not None and not parts.odd and _has_decimal_comma(parts.number) for parts in found)


def _follows(parts: Mapping[str, _Parts]) -> bool:
    """Return whether a column without decimal commas is parsed like the others of its table, which have some."""
    numbers = [(text, part) for text, found in parts.items() for part in (found.number, found.uncertainty) if part]
    points = [(text, number) for text, number in numbers if "." in number and _POINT.fullmatch(number)]
    if points and all(re.match(TWO_WAYS_POINT, number) for _, number in points):
        text, number = points[0]
        raise CellError(
            text,
            "whose point may divide thousands, for other columns have decimal commas; write "
            f"{number.replace('.', '')} or {number.replace('.', ',')}",
        )
    return not points


def _are_codes(parts: Collection[_Parts]) -> bool:
    """Return whether texts are codes, such as 0012, that would lose leading zeros."""
    numbers = [found.number for found in parts]
    return all(map(str.isdigit, numbers)) and any(len(number) > 1 and number[0] == "0" for number in numbers)


def _unit_of(parts: Mapping[str, _Parts], unit: str | None, plain: bool) -> str | None:
    """Return the unit in header or cells."""
    plain = plain or any(not found.suffix for found in parts.values())
    stated = unit
    for text, found in parts.items():
        if not found.suffix:
            continue
        if not is_unit(found.suffix):
            raise CellError(text, f"and {found.suffix!r} is not known as a unit; {_PLAINLY}")
        if plain and unit is None:
            raise CellError(text, f"which has the unit {found.suffix!r} where others have none; put it into the header")
        if stated is not None and not same_unit(stated, found.suffix):
            raise CellError(
                text, f"where others, or the header, have the unit {stated!r}; put one unit into the header"
            )
        stated = stated or found.suffix
    return stated


def _read(text: str, parts: _Parts, comma: bool) -> Number:
    value = _value(text, parts.number, comma)
    if parts.uncertainty is not None:
        return Number(value, abs(_value(text, parts.uncertainty, comma)))
    if parts.last_digits is not None:
        decimals = re.search(rf"(?<=\{',' if comma else '.'})\d+$", parts.number)
        return Number(value, float(f"{parts.last_digits}e-{len(decimals[0]) if decimals else 0}"))
    return Number(value)


def _value(text: str, number: str, comma: bool) -> float:
    if (_COMMA if comma else _POINT).fullmatch(number):
        return float(number.replace(",", ".").lower().replace("d", "e"))
    if _GROUPED["," if comma else "."].fullmatch(number):
        whole, mark, decimals = (
            number.partition("," if comma else ".") if (comma or "." in number) else (number, "", "")
        )
        return float(re.sub(r"[^\d+-]", "", whole) + (f".{decimals}" if mark else ""))
    if comma:
        raise CellError(text, f"which has no decimal comma as others have; {_PLAINLY}")
    if "," not in number:
        raise CellError(text, f"whose points seem to divide thousands; {_PLAINLY}")
    raise CellError(
        text,
        "which has a comma that may be a decimal one or divide thousands; write decimal points and no commas, or save "
        "the table with decimal commas and semicolons between the cells",
    )
