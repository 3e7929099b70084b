"""Read the first crystal of a CIF file with gemmi; ambiguous content is rejected or noted.

gemmi parses the syntax. The atoms of the cell are generated here, because gemmi merges images of an atom up to 0.4 Å
apart, which would hide a split site. If a file contradicts itself, the stated formula and number of formula units
decide, with a note; otherwise it is rejected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import gemmi
import numpy as np
from gemmi import cif
from numpy.typing import NDArray

from crysldnet.data.elements import SYMBOLS
from crysldnet.errors import DataError
from crysldnet.graphs.crystals import MAX_FRACTION
from crysldnet.readers.cif_symmetry import (
    IDENTITY,
    Cell,
    Named,
    Operations,
    Sites,
    expand,
    fits,
    gives_same,
    listed,
    numbers_of,
    only_setting,
    same_settings,
    settings_of,
)
from crysldnet.readers.species import (
    Formula,
    element_symbols,
    elements_of_labels,
    formula_units,
    read_formula,
    without_hydrogen,
    without_isotopes,
)

NOTE_BLOCKS = "hold several crystals, of which the first was read"
NOTE_NO_SYMMETRY = "state no symmetry and were read as P 1"
NOTE_SETTING = "name their space group but not its operations, which were looked up"
NOTE_FORMULA = "state a formula that their atoms don't give; hydrogens may be missing in them"
NOTE_UNITS = "state another number of formula units (Z) than their atoms are"
NOTE_VOLUME = "state another volume than their cell has"
NOTE_MULTIPLICITY = "state multiplicities of sites that their symmetry doesn't give"
NOTE_LISTED = "list symmetry operations of another space group than they name; the operations were used"
NOTE_NAMED = "list symmetry operations of another space group than they name; only the named one gives Z formula units"

_NUMBER = {symbol: number for number, symbol in enumerate(SYMBOLS)}
_CELL = (*(f"_cell_length_{x}" for x in "abc"), *(f"_cell_angle_{x}" for x in ("alpha", "beta", "gamma")))
_FRACT = tuple(f"_atom_site_fract_{x}" for x in "xyz")
_OPERATIONS = ("_space_group_symop_operation_xyz", "_symmetry_equiv_pos_as_xyz")
_NAMES = ("_space_group_name_h-m_alt", "_symmetry_space_group_name_h-m", "_space_group_name_h-m_full")
_HALL = ("_space_group_name_hall", "_symmetry_space_group_name_hall")
_TABLE_NUMBER = ("_space_group_it_number", "_symmetry_int_tables_number")
_SYMMETRY = re.compile(r"symop|equiv_pos|space_group_name|_ssg_|modulation_dimension")
_DECISIVE = re.compile(r"_cell_(length|angle)_|_atom_site_(?!aniso)|symop|equiv_pos|_(space_group|int_tables)_|_ssg_")
_NO_SYMMETRY = {"", "0", "P1", "X,Y,Z", "+X,+Y,+Z"}
Tags = dict[str, list[str]]
"""values of each tag of a block, with tags in lowercase and underscores for dots"""


def read_cif(text: str, max_atoms: int | None, notes: list[str]) -> tuple[Any, Any, Any]:
    """Return lattice, atomic numbers and fractional coordinates as in :func:`read_structure`."""
    tags = _block_with_atoms(text, notes)
    lattice = _lattice(tags)
    formulas = read_formula(_first(tags, ("_chemical_formula_sum",)))
    sites = _sites(tags, max_atoms, formulas, notes)
    operations, contradicted = _symmetry(tags, lattice, notes)
    cell = expand(sites, operations, lattice, notes)
    stated_units = _number(_first(tags, ("_cell_formula_units_z",)) or "?")
    if contradicted is not None:
        cell = _decided(cell, operations, contradicted, sites, lattice, formulas, stated_units, notes)
    _compare(cell, lattice, tags, formulas, stated_units, notes)
    return lattice, cell.numbers, cell.frac_coords


def _block_with_atoms(text: str, notes: list[str]) -> Tags:
    try:
        blocks = list(cif.read_string(text, check_level=0))
    except (RuntimeError, ValueError) as error:
        if not re.search(r"^\s*data_", text, re.MULTILINE | re.IGNORECASE):
            raise DataError("not a CIF: there is no data_ block in it") from error
        place = re.sub(r"^string:(\d+)(:\d+\(\d+\))?:?", r"line \1:", str(error))
        raise DataError(f"not valid CIF ({place})") from error
    if not blocks:
        raise DataError("not a CIF: there is no data_ block in it")
    with_atoms = [tags for tags in map(_tags, blocks) if _FRACT[0] in tags]
    if not with_atoms:
        raise DataError("it has no atoms (no _atom_site_fract_x)")
    if len(with_atoms) > 1:
        notes.append(NOTE_BLOCKS)
    return with_atoms[0]


def _tags(block: Any) -> Tags:
    tags: Tags = {}
    for item in block:
        if (pair := item.pair) is not None:
            names, values = pair[:1], pair[1:]
        elif (loop := item.loop) is not None:
            names, values = loop.tags, loop.values
        else:
            continue
        for j, name in enumerate(names):
            tag, column = name.lower().replace(".", "_"), values[j :: len(names)]
            if tag in tags:
                if tags[tag] != column and _DECISIVE.search(tag):
                    raise DataError(f"{name} occurs twice")
                if any(map(_text, tags[tag])):
                    continue
            tags[tag] = column
    return tags


def _text(raw: str) -> str:
    """Return a value without quotes; "" for unknown or inapplicable values."""
    return "" if raw in ("?", ".") else cif.as_string(raw).strip()


def _first(tags: Tags, names: tuple[str, ...]) -> str:
    for name in names:
        if (values := tags.get(name)) and (text := _text(values[0])):
            return text
    return ""


def _number(raw: str) -> float:
    """Parse a CIF number such as ``5.64(2)``; NaN if invalid."""
    return cif.as_number(_text(raw)) if raw[0] in "'\"" else cif.as_number(raw)


def _lattice(tags: Tags) -> NDArray[np.float64]:
    """Return lattice vectors as rows, a along x and b in the xy plane."""
    values = []
    for tag in _CELL:
        if not tags.get(tag):
            raise DataError(f"it has no {tag}")
        value = _number(tags[tag][0])
        if not math.isfinite(value):
            raise DataError(f"{tag} is {_text(tags[tag][0])!r}, not a finite number")
        if value <= 0 or ("angle" in tag and value >= 180):
            raise DataError(f"{tag} is {value:g}: its cell has no volume")
        values.append(value)
    lattice = np.array(gemmi.UnitCell(*values).orth.mat.tolist()).T
    if not lattice.diagonal().prod() > 1e-6:
        raise DataError("its cell has no volume; check the angles")
    return lattice


def _sites(tags: Tags, max_atoms: int | None, formulas: list[Formula], notes: list[str]) -> Sites:
    """Return the listed sites; reject sites that aren't one whole atom."""
    count = len(tags[_FRACT[0]])
    if not count:
        raise DataError("it has no atoms: its list of them is empty")
    if max_atoms is not None and count > max_atoms:
        raise DataError(f"it has {count} atoms, over the limit of {max_atoms} (max_atoms)")
    symbols, labels = tags.get("_atom_site_type_symbol"), tags.get("_atom_site_label")
    names = symbols if symbols is not None and any(map(_text, symbols)) else labels
    if names is None:
        raise DataError("it names no elements (no _atom_site_type_symbol, no _atom_site_label)")
    columns = {tag: values for tag, values in tags.items() if tag.startswith("_atom_site_") and len(values) == count}
    if len(names) != count or any(axis not in columns for axis in _FRACT):
        raise DataError("it has no _atom_site_fract_x, _y and _z of the same atoms")
    frac_coords = np.array([[_number(raw) for raw in columns[axis]] for axis in _FRACT]).T
    if not np.isfinite(frac_coords).all():
        i, axis = np.argwhere(~np.isfinite(frac_coords))[0].tolist()
        raise DataError(
            f"site {_text((labels or names)[i])} has the coordinate {columns[_FRACT[axis]][i]!r}, "
            "which is not a finite number"
        )
    if (farthest := np.abs(frac_coords).max()) > MAX_FRACTION:
        raise DataError(f"an atom is {farthest:.3g} cells away from the origin: is the unit right?")
    if fault := _first_fault(columns):
        i, reason = fault
        raise DataError(f"site {_text((labels or names)[i])} {reason}")
    texts = [_text(name) for name in names]
    if names is labels:
        types = [text for raw in tags.get("_atom_type_symbol", ()) if (text := _text(raw))]
        stated = [*map(set, formulas)] or [set(element_symbols(types, notes=[]))]
        elements = without_isotopes(elements_of_labels(texts, stated), notes)
    else:
        elements = element_symbols(texts, notes=notes)
    return Sites(np.array([_NUMBER[symbol] for symbol in elements], np.uint8), frac_coords)


def _first_fault(columns: Tags) -> tuple[int, str] | None:
    """Return the first site that isn't one whole atom, with the reason."""
    faults = []
    for tag, values in columns.items():
        if tag in _FAULTS:
            is_sound, reason = _FAULTS[tag]
            for wrong in [raw for raw in {*values} if not is_sound(raw)]:
                faults.append((values.index(wrong), reason.format(wrong)))
    return min(faults, default=None)


def _is_unknown(raw: str) -> bool:
    return not _text(raw)


_DISORDERED = "is disordered: a crystal needs whole atoms, make an ordered approximation"
_FAULTS: dict[str, tuple[Callable[[str], bool], str]] = {
    "_atom_site_occupancy": (
        lambda raw: raw in ("?", ".") or abs(_number(raw) - 1) < 1e-3,
        "has partial occupancy ({}): a crystal needs whole atoms, make an ordered approximation",
    ),
    "_atom_site_disorder_group": (_is_unknown, _DISORDERED),
    "_atom_site_disorder_assembly": (_is_unknown, _DISORDERED),
    "_atom_site_attached_hydrogens": (
        lambda raw: _text(raw) in ("", "0"),
        "has hydrogens attached that have no coordinates; add them",
    ),
    "_atom_site_calc_flag": (lambda raw: _text(raw).lower() != "dum", "is a dummy atom; leave it out"),
}
"""Checks that a site is one whole atom: whether a value is valid, and the message if it isn't."""


def _symmetry(tags: Tags, lattice: NDArray[np.float64], notes: list[str]) -> tuple[Operations, Named | None]:
    """Return the listed operations, or those of the space group, and the name if the list contradicts it."""
    named, again = (
        Named(*(_first(tags, names[::step]).replace("_", "") for names in (_NAMES, _HALL, _TABLE_NUMBER)))
        for step in (1, -1)
    )
    there = [tags[name] for name in _OPERATIONS if name in tags]
    lists = [tuple(triplets) for triplets in there if any(map(_text, triplets))]
    if there and not lists:
        raise DataError("its list of symmetry operations is empty")
    if lists:
        operations, *others = map(_listed, lists)
        if not all(map(operations.same_as, others)):
            raise DataError("it has two lists of symmetry operations that differ; take the wrong one away")
        if not fits(operations, lattice):
            raise DataError(
                "its symmetry operations don't fit its cell; write it with operations in the cell's own setting"
            )
        wrong = (name for name in (named, again) if numbers_of(name) - {operations.number})
        return operations, next(wrong, None)
    if again != named and numbers_of(again) and not same_settings(named, again, lattice):
        raise DataError(f"it names two space groups, {named} and {again}; take the wrong one away")
    if named.symbol or named.hall or named.number not in ("", "1"):
        notes.append(NOTE_SETTING)
        return only_setting(named, lattice), None
    for tag in filter(_SYMMETRY.search, tags):
        if "".join((stated := _first(tags, (tag,))).split()).upper() not in _NO_SYMMETRY:
            raise DataError(f"its symmetry isn't understood ({tag} {stated})")
    notes.append(NOTE_NO_SYMMETRY)
    return IDENTITY, None


@lru_cache(512)
def _listed(triplets: tuple[str, ...]) -> Operations:
    return listed(tuple(map(_text, triplets)))


def _decided(
    cell: Cell,
    operations: Operations,
    named: Named,
    sites: Sites,
    lattice: NDArray[np.float64],
    formulas: list[Formula],
    stated_units: float,
    notes: list[str],
) -> Cell:
    """Return the cell from the listed operations, or that of the stated space group."""
    others: list[Cell] = []
    for setting in settings_of(named, lattice):
        if gives_same(cell, setting, sites, lattice):
            return cell
        try:
            other = expand(sites, setting, lattice, [])
        except DataError:
            continue
        if _has_units(_atoms_of(other), formulas, stated_units):
            others.append(other)
    if _has_units(_atoms_of(cell), formulas, stated_units) or (not others and operations.number in numbers_of(named)):
        notes.append(NOTE_LISTED)
        return cell
    if len(others) == 1:
        notes.append(NOTE_NAMED)
        return others[0]
    group = gemmi.find_spacegroup_by_number(operations.number)
    raise DataError(
        f"its symmetry operations are of space group {group.hm if group else '?'} (number {operations.number}), but it "
        f"names {named}; correct what is wrong"
    )


def _atoms_of(cell: Cell) -> dict[str, int]:
    counts = np.bincount(cell.numbers)
    return {SYMBOLS[number]: int(counts[number]) for number in np.flatnonzero(counts).tolist()}


def _has_units(atoms: Mapping[str, int], formulas: list[Formula], stated: float) -> bool | None:
    """Return whether atoms match the stated formula units, apart from hydrogen; None if their ratio differs."""
    heavy = without_hydrogen(atoms)
    for formula in filter(None, map(without_hydrogen, formulas)):
        if (units := formula_units(heavy, formula)) is not None:
            # pymatgen states the sum of the cell, and Z of the reduced formula
            reduced = units * math.gcd(*map(round, formula.values()))
            return any(abs(found - stated) < 0.02 * stated for found in (units, reduced))
    return None


def _compare(
    cell: Cell,
    lattice: NDArray[np.float64],
    tags: Tags,
    formulas: list[Formula],
    stated_units: float,
    notes: list[str],
) -> None:
    """Note where a file's statements don't match its atoms."""
    atoms = _atoms_of(cell)
    if formulas and all(formula_units(atoms, formula) is None for formula in formulas):
        notes.append(NOTE_FORMULA)
    if math.isfinite(stated_units) and _has_units(atoms, formulas, stated_units) is False:
        if NOTE_NO_SYMMETRY in notes:
            raise DataError(
                f"it states no symmetry, and has other atoms than Z = {stated_units:g} formula units; "
                "write it with its symmetry operations"
            )
        notes.append(NOTE_UNITS)
    volume = _number(_first(tags, ("_cell_volume",)) or "?")
    if abs(volume - lattice.diagonal().prod()) > 0.01 * volume:
        notes.append(NOTE_VOLUME)
    stated = tags.get("_atom_site_symmetry_multiplicity") or tags.get("_atom_site_site_symmetry_multiplicity")
    if stated and (cell.operations > 1 or {*stated} != {"1"}):
        found = np.bincount(cell.site).tolist()
        known = {raw: _number(raw) for raw in {*stated}}
        # SHELX writes the order of the site symmetry here
        if len(stated) == len(found) and not all(
            (value := known[raw]) in (count, cell.operations / count) or math.isnan(value)
            for raw, count in zip(stated, found, strict=True)
        ):
            notes.append(NOTE_MULTIPLICITY)
