"""Identify elements from species or site labels in a structure file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from crysldnet.data.elements import SYMBOLS
from crysldnet.errors import DataError

NOTE_ISOTOPE = "have deuterium or tritium, which was read as hydrogen"

_ELEMENTS = frozenset(SYMBOLS[1:])
_TYPE = re.compile(r"([A-Za-z]+)(\d+(\.\d*)?)?[+-]?(\d+(\.\d*)?)?")
_LABEL = re.compile(r"([A-Za-z]+)[\w'\"*()]*[+-]?")


def element_symbols(texts: Sequence[str], *, notes: list[str]) -> list[str]:
    """Return the element of each species ("Fe3+", "D").

    Args:
        texts: texts in the file.
        notes: ``NOTE_ISOTOPE`` is appended if deuterium or tritium was converted to hydrogen.

    Raises:
        DataError: one isn't an element.
    """
    known = {text: _symbol(text) for text in dict.fromkeys(texts)}
    return without_isotopes([known[text] for text in texts], notes)


def without_isotopes(symbols: Sequence[str], notes: list[str]) -> list[str]:
    """Replace D and T by H, with a note."""
    if not {"D", "T"}.isdisjoint(symbols):
        notes.append(NOTE_ISOTOPE)
    return ["H" if symbol in ("D", "T") else symbol for symbol in symbols]


def _symbol(text: str) -> str:
    match = _TYPE.fullmatch(text)
    symbol = match[1].capitalize() if match else ""
    if symbol not in _ELEMENTS and symbol not in ("D", "T"):
        raise _no_element(text)
    return symbol


def symbols_in_label(text: str) -> tuple[str, ...]:
    """Return the possible elements, or D, for a site label ("Fe1A"): two for CO1, one for Co1.

    Raises:
        DataError: there is no such element.
    """
    match = _LABEL.fullmatch(text)
    letters = match[1] if match else ""
    candidates = [letters.capitalize()]
    if not letters[1:2].islower():
        candidates += [letters[:2].capitalize(), letters[:1].upper()]
    elif letters[2:3].isupper():
        candidates.append(letters[:2])
    # the label T1 usually means a tetrahedral site, not tritium
    found = tuple(dict.fromkeys(symbol for symbol in candidates if symbol == "D" or symbol in _ELEMENTS))
    if not found:
        raise _no_element(text)
    return found


def _no_element(text: str) -> DataError:
    return DataError(f"{text!r} is not a chemical element (1 to 118)")
