"""Identify elements from species, site labels and the chemical formula in a structure file."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import product

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


Formula = Mapping[str, float]
"""Amount of each element; deuterium and tritium count as hydrogen."""

_PART = r"({})\s*(\d*\.?\d*)\s*"
_USUAL, _CAPITALS = (re.compile(_PART.format(symbol)) for symbol in ("[A-Z][a-z]?", "[A-Z]{1,2}"))


def read_formula(text: str) -> list[Formula]:
    """Return the meanings of a formula such as ``'Na2 O'``: two if it is capitalized, as ``'CO2'``.

    Text that isn't a plain sum formula gives none.
    """
    readings = [_parsed(text, _USUAL)]
    if text.isupper():
        capitals = _parsed(text, _CAPITALS)
        # the standard separates elements by spaces
        readings = [capitals] if 1 < len(capitals) == len(text.split()) else [*readings, capitals]
    return [formula for i, formula in enumerate(readings) if formula and formula not in readings[:i]]


def _parsed(text: str, part: re.Pattern[str]) -> Formula:
    amounts: dict[str, float] = {}
    end = 0
    while end < len(text):
        match = part.match(text, end)
        name = match[1].capitalize() if match else ""
        name = "H" if name in ("D", "T") else name
        if match is None or name not in _ELEMENTS or match[2] == ".":
            return {}
        amounts[name] = amounts.get(name, 0.0) + float(match[2] or 1)
        end = match.end()
    return amounts if all(amounts.values()) else {}


def formula_units(atoms: Formula, formula: Formula) -> float | None:
    """Return the number of formula units of atoms, or None if their ratio differs."""
    if atoms == formula:
        return 1.0
    units = sum(atoms.values()) / sum(formula.values())
    fits = atoms.keys() == formula.keys() and all(abs(atoms[s] - units * formula[s]) < 0.02 * atoms[s] for s in atoms)
    return units if fits else None


def without_hydrogen(amounts: Formula) -> Formula:
    """Remove hydrogen, for which many files have no coordinates."""
    return {symbol: amount for symbol, amount in amounts.items() if symbol != "H"} if "H" in amounts else amounts


def elements_of_labels(labels: Sequence[str], stated: Sequence[Collection[str]]) -> list[str]:
    """Return the element of each site label; D and T are kept.

    A capitalized label such as CO1 may be cobalt or carbon. The choice must make the elements of all sites match those
    stated in the file.

    Args:
        labels: labels in the file.
        stated: stated elements, for each meaning of the formula.

    Raises:
        DataError: a label matches no element, or two.
    """
    candidates = {label: symbols_in_label(label) for label in dict.fromkeys(labels)}
    sure = {"H" if found[0] == "D" else found[0] for found in candidates.values() if len(found) == 1}
    unsure = {found: label for label, found in reversed(candidates.items()) if len(found) > 1}
    if not unsure:
        return [candidates[label][0] for label in labels]
    elements = [{*stated_here, "H"} for stated_here in stated]
    choices = {*product(*unsure)} if len(unsure) < 10 else set()
    found_by = {chosen: sure | {*chosen, "H"} for chosen in choices}
    fitting = [chosen for chosen, found in found_by.items() if found in elements]
    if len(fitting) != 1:  # other atoms may also be missing
        fitting = [chosen for chosen, found in found_by.items() if any(found <= known for known in elements)]
    if len(fitting) != 1:
        found, label = [*unsure.items()][-1]
        raise DataError(
            f"site {label} is {' or '.join(found)}, and the formula doesn't tell which; add _atom_site_type_symbol"
        )
    decided = dict(zip(unsure, fitting[0], strict=True))
    return [decided.get(found, found[0]) for found in (candidates[label] for label in labels)]
