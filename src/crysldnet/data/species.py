"""Tell which element a structure file means by a species or by the label of a site."""

from __future__ import annotations

import re
from collections.abc import Sequence

from crysldnet.data.elements import SYMBOLS
from crysldnet.errors import DataError

NOTE_ISOTOPE = "have deuterium or tritium, which was read as hydrogen"

_ELEMENTS = frozenset(SYMBOLS[1:])
_TYPE = re.compile(r"([A-Za-z]+)(\d+(\.\d*)?)?[+-]?(\d+(\.\d*)?)?")
_LABEL = re.compile(r"([A-Za-z]+)[\w'\"*()]*[+-]?")


def element_symbols(texts: Sequence[str], *, are_labels: bool, notes: list[str]) -> list[str]:
    """Return the element of each species ("Fe3+") or site label ("Fe1A").

    Args:
        texts: as they stand in the file.
        are_labels: whether they are labels of sites, which may say more than the element.
        notes: ``NOTE_ISOTOPE`` is appended where deuterium or tritium became hydrogen.

    Raises:
        DataError: one is no element.
    """
    symbols = [_element(text, is_label=are_labels) for text in texts]
    if not {"D", "T"}.isdisjoint(symbols):
        notes.append(NOTE_ISOTOPE)
    return ["H" if symbol in ("D", "T") else symbol for symbol in symbols]


def _element(text: str, *, is_label: bool) -> str:
    """Return the symbol of an element, D or T."""
    match = (_LABEL if is_label else _TYPE).fullmatch(text)
    letters = match[1] if match else ""
    candidates = [letters.capitalize()]
    if is_label and not letters[1:2].islower():
        candidates += [letters[:2].capitalize(), letters[:1].upper()]
    for symbol in candidates:
        # the label T1 is as a rule a tetrahedral site, not tritium
        if symbol == "D" or (symbol == "T" and not is_label) or symbol in _ELEMENTS:
            return symbol
    raise DataError(f"{text!r} is not a chemical element (1 to 118)")
