"""Read the first crystal of a CIF file with gemmi; what could only be guessed is refused or noted.

gemmi reads the syntax, the symmetry operations and the tables of space groups. The atoms of the cell are made here,
because gemmi merges images of an atom that are up to 0.4 Å apart, which would hide a split site.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import lru_cache
from typing import Any

import gemmi
import numpy as np
from gemmi import cif
from numpy.typing import NDArray

from crysldnet.data.crystals import MAX_FRACTION
from crysldnet.data.elements import SYMBOLS
from crysldnet.data.species import NOTE_ISOTOPE, element_symbols
from crysldnet.errors import DataError

NOTE_BLOCKS = "hold several crystals, of which the first was read"
NOTE_NO_SYMMETRY = "state no symmetry and were read as P 1"
NOTE_SETTING = "name their space group but not its operations, which were looked up"
NOTE_FORMULA = "state a formula that their atoms don't give; hydrogens may be missing in them"
NOTE_MOVED = "have atoms beside a special position of their space group, which were moved onto it"

_NUMBER = {symbol: number for number, symbol in enumerate(SYMBOLS)}
_CELL = (*(f"_cell_length_{x}" for x in "abc"), *(f"_cell_angle_{x}" for x in ("alpha", "beta", "gamma")))
_FRACT = tuple(f"_atom_site_fract_{x}" for x in "xyz")
_OPERATIONS = ("_space_group_symop_operation_xyz", "_symmetry_equiv_pos_as_xyz")
_NAMES = ("_space_group_name_h-m_alt", "_symmetry_space_group_name_h-m", "_space_group_name_h-m_full")
_HALL = ("_space_group_name_hall", "_symmetry_space_group_name_hall")
_TABLE_NUMBER = ("_space_group_it_number", "_symmetry_int_tables_number")
_SYMMETRY = re.compile(r"symop|equiv_pos|space_group_name|_ssg_|modulation_dimension")
_NO_SYMMETRY = {"", "0", "P1", "X,Y,Z", "+X,+Y,+Z"}
_SAME = 0.05
"""Å; images of one atom that are closer are one atom on a special position, written with few digits."""
_MOVED = 0.01
"""Å; from here on it is noted that an atom was moved onto its special position."""
_GRID = 1 << 16
"""steps of a cell edge in which images on special positions are told apart"""

Tags = dict[str, list[str]]
"""the values of each tag of a block, the tag in lower case and with an underscore for a dot"""


def read_cif(text: str, max_atoms: int | None, notes: list[str]) -> tuple[Any, Any, Any]:
    """Return lattice, atomic numbers and fractional coordinates, as :func:`read_structure` describes them."""
    tags = _block_with_atoms(text, notes)
    lattice = _lattice(tags)
    numbers, frac_coords = _sites(tags, max_atoms, notes)
    rotations, translations = _operations(tags, lattice, notes)
    site, frac_coords = _expand(frac_coords, rotations, translations, lattice, notes)
    numbers = numbers[site]
    # hydrogen in place of deuterium gives another formula too, and is noted already
    if NOTE_ISOTOPE not in notes and not _formula_fits(_first(tags, ("_chemical_formula_sum",)), numbers):
        notes.append(NOTE_FORMULA)
    return lattice, numbers, frac_coords


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
        if item.pair is not None:
            names, values = item.pair[:1], item.pair[1:]
        elif item.loop is not None:
            names, values = item.loop.tags, item.loop.values
        else:
            continue
        for j, name in enumerate(names):
            tag = name.lower().replace(".", "_")
            if tag in tags:
                raise DataError(f"{name} stands there twice")
            tags[tag] = values[j :: len(names)]
    return tags


def _text(raw: str) -> str:
    """Return a value without its quotes; "" where it is "not known" or "doesn't apply"."""
    return "" if raw in ("?", ".") else cif.as_string(raw).strip()


def _first(tags: Tags, names: tuple[str, ...]) -> str:
    return next((text for name in names if tags.get(name) and (text := _text(tags[name][0]))), "")


def _number(raw: str) -> float:
    """Read a CIF number such as ``5.64(2)``; NaN where it isn't one."""
    return cif.as_number(_text(raw)) if raw[0] in "'\"" else cif.as_number(raw)


def _lattice(tags: Tags) -> NDArray[np.float64]:
    """Return lattice vectors in rows, a along x and b in the plane of x and y."""
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
    if not (np.isfinite(lattice).all() and np.linalg.det(lattice) > 1e-6):
        raise DataError("its cell has no volume; check the angles")
    return lattice


def _sites(tags: Tags, max_atoms: int | None, notes: list[str]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return atomic numbers and coordinates of the sites listed; refuse what isn't one whole atom each."""
    count = len(tags[_FRACT[0]])
    if not count:
        raise DataError("it has no atoms: its list of them is empty")
    if max_atoms is not None and count > max_atoms:
        raise DataError(f"it has {count} atoms, over the limit of {max_atoms} (max_atoms)")
    types, labels = tags.get("_atom_site_type_symbol"), tags.get("_atom_site_label")
    names = types if types is not None and any(map(_text, types)) else labels
    if names is None:
        raise DataError("it names no elements (no _atom_site_type_symbol, no _atom_site_label)")
    columns = {tag: values for tag, values in tags.items() if tag.startswith("_atom_site_") and len(values) == count}
    if len(names) != count or any(axis not in columns for axis in _FRACT):
        raise DataError("it has no _atom_site_fract_x, _y and _z of the same atoms")
    frac_coords = np.array([[_number(raw) for raw in columns[axis]] for axis in _FRACT]).T
    for i, axis in np.argwhere(~np.isfinite(frac_coords)).tolist():
        raise DataError(
            f"site {_text((labels or names)[i])} has the coordinate {columns[_FRACT[axis]][i]!r}, "
            "which is not a finite number"
        )
    if (farthest := np.abs(frac_coords).max()) > MAX_FRACTION:
        raise DataError(f"an atom is {farthest:.3g} cells away from the origin: is the unit right?")
    for i in range(count):
        if fault := _fault_of_site(columns, i):
            raise DataError(f"site {_text((labels or names)[i])} {fault}")
    symbols = element_symbols([_text(name) for name in names], are_labels=names is labels, notes=notes)
    return np.array([_NUMBER[symbol] for symbol in symbols], np.uint8), frac_coords


def _fault_of_site(columns: Tags, i: int) -> str | None:
    occupancy = columns["_atom_site_occupancy"][i] if "_atom_site_occupancy" in columns else "1"
    if occupancy not in ("1", "1.0", "?", ".") and not abs(_number(occupancy) - 1) < 1e-3:
        return f"has partial occupancy ({occupancy}): a crystal needs whole atoms, make an ordered approximation"
    for tag in ("_atom_site_disorder_group", "_atom_site_disorder_assembly"):
        if tag in columns and _text(columns[tag][i]):
            return "is disordered: a crystal needs whole atoms, make an ordered approximation"
    tag = "_atom_site_attached_hydrogens"
    if tag in columns and _text(columns[tag][i]) not in ("", "0"):
        return "has hydrogens attached that have no coordinates; add them"
    tag = "_atom_site_calc_flag"
    if tag in columns and _text(columns[tag][i]).lower() == "dum":
        return "is a dummy atom; leave it out"
    return None


def _operations(tags: Tags, lattice: NDArray[np.float64], notes: list[str]) -> tuple[NDArray, NDArray]:
    """Return rotations [M, 3, 3] and translations [M, 3]: those that are listed, else those of the space group."""
    listed = next((tags[name] for name in _OPERATIONS if name in tags), None)
    if listed is not None and not any(map(_text, listed)):
        raise DataError("its list of symmetry operations is empty")
    if listed is not None:
        rotations, translations = _matrices(tuple(listed))
        if not _fits(rotations, lattice):
            raise DataError(
                "its symmetry operations don't fit its cell; write it with operations in the cell's own setting"
            )
        return rotations, translations
    name, hall, number = (_first(tags, names).replace("_", "") for names in (_NAMES, _HALL, _TABLE_NUMBER))
    if name or hall or number not in ("", "1"):
        notes.append(NOTE_SETTING)
        return _tabulated(name, hall, number, lattice)
    for tag in filter(_SYMMETRY.search, tags):
        if "".join((stated := _first(tags, (tag,))).split()).upper() not in _NO_SYMMETRY:
            raise DataError(f"its symmetry isn't understood ({tag} {stated})")
    notes.append(NOTE_NO_SYMMETRY)
    return np.eye(3)[None], np.zeros((1, 3))


@lru_cache(512)
def _matrices(triplets: tuple[str, ...]) -> tuple[NDArray, NDArray]:
    texts = list(dict.fromkeys(map(_text, triplets)))
    if wrong := next((text or "?" for text in texts if not text or re.search("[a-w]", text, re.I)), None):
        raise DataError(f"its symmetry isn't understood ({wrong})")
    try:
        operations = [gemmi.Op(text) for text in texts]
    except (RuntimeError, ValueError) as error:
        raise DataError(f"its symmetry isn't understood ({error})") from error
    if not _is_group(operations):
        raise DataError("its symmetry operations don't form a group; write it with all operations, x,y,z included")
    den = gemmi.Op.DEN
    return np.array([op.rot for op in operations]) / den, np.array([op.tran for op in operations]) / den


def _is_group(operations: list[gemmi.Op]) -> bool:
    """Say whether operations are all of a group: one that is tabulated, or one that their products don't leave."""
    own = {operation.wrap().triplet() for operation in operations}
    tabulated = gemmi.find_spacegroup_by_ops(gemmi.GroupOps(operations))
    if tabulated is not None and len(tabulated.operations()) == len(own):
        return True
    return all((one * other).wrap().triplet() in own for one in operations for other in operations)


def _fits(rotations: NDArray, lattice: NDArray[np.float64]) -> bool:
    """Say whether all rotations map the lattice onto itself."""
    if len(rotations) == 1 and (rotations[0] == np.eye(3)).all():
        return True
    metric = lattice @ lattice.T
    return bool(np.abs(rotations.transpose(0, 2, 1) @ metric @ rotations - metric).max() <= 0.02 * metric.max())


def _tabulated(name: str, hall: str, number: str, lattice: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """Return the operations of the one tabulated setting that has these names and fits the cell."""
    stated = " ".join(text for text in (name, hall, number) if text)
    table = [*gemmi.spacegroup_table()]
    if name:
        found = gemmi.find_spacegroup_by_name(name)
        if found is None:
            raise DataError(f"its symmetry isn't understood ({stated}): write it with its symmetry operations")
        chosen = re.search(r":\s*[12hr]\s*$|\s[hr]$", name, re.I)
        table = [group for group in table if (group.xhm() == found.xhm() if chosen else group.hm == found.hm)]
    if hall:
        table = [group for group in table if _plain(group.hall) == _plain(hall)]
    if number:
        table = [group for group in table if str(group.number) == number]
    settings: dict[bytes, tuple[NDArray, NDArray]] = {}
    for group in table:
        rotations, translations = _matrices(tuple(op.triplet() for op in group.operations()))
        order = np.lexsort((*rotations.reshape(len(rotations), 9).T, *translations.T))
        if _fits(rotations, lattice):
            settings[rotations[order].tobytes() + translations[order].tobytes()] = (rotations, translations)
    if not settings:
        raise DataError(f"its symmetry isn't understood ({stated}): write it with its symmetry operations")
    if len(settings) > 1:
        raise DataError(
            f"its space group ({stated}) has {len(settings)} settings that fit its cell, and it doesn't say which it "
            "is in; write it with its symmetry operations"
        )
    return next(iter(settings.values()))


def _plain(hall: str) -> str:
    return "".join(hall.split()).lower()


def _expand(
    frac_coords: NDArray[np.float64],
    rotations: NDArray,
    translations: NDArray,
    lattice: NDArray[np.float64],
    notes: list[str],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return all atoms of the cell: the site of each, and its coordinates.

    An atom on a special position is there once. It is moved onto it exactly, to the mean of its images under the
    operations that keep it in place, because a file gives 0.3333 where 1/3 is meant.
    """
    sites, count = len(frac_coords), len(rotations)
    if sites * count > 4_000_000 or sites >= 1 << 14:
        raise DataError(f"it has {sites} sites and {count} symmetry operations, more than can be expanded")
    frac_coords = frac_coords - np.floor(frac_coords)
    images = np.einsum("mij,sj->smi", rotations, frac_coords) + translations
    near = images - np.rint(images - frac_coords[:, None])  # the copy of each image that is nearest to its site
    stays = np.linalg.norm((near - frac_coords[:, None]) @ lattice, axis=2) < _SAME
    multiplicity = stays.sum(axis=1)
    special = multiplicity > 1
    if special.any():
        mean = (near * stays[..., None]).sum(axis=1)[special] / multiplicity[special, None]
        if np.linalg.norm((mean - frac_coords[special]) @ lattice, axis=1).max() > _MOVED:
            notes.append(NOTE_MOVED)
        images[special] = np.einsum("mij,sj->smi", rotations, mean) + translations
    # the offset keeps decimal fractions and multiples of 1/24 off the borders between steps
    step = np.floor((images - np.floor(images)) * _GRID + 0.3779645).astype(np.int64) % _GRID
    keys = ((step[..., 0] * _GRID + step[..., 1]) * _GRID + step[..., 2]).reshape(-1)
    _, first = np.unique(keys, return_index=True)
    first.sort()
    if len(first) != (count // multiplicity).sum():
        raise DataError(
            "two sites stand at the same place: a disordered site, which needs an ordered approximation, "
            "or atoms listed in full beside symmetry operations that make them again"
        )
    return first // count, images.reshape(-1, 3)[first]


def _formula_fits(formula: str, numbers: NDArray[np.uint8]) -> bool:
    """Say whether atoms are in the ratio of a formula such as ``'Na2 O'``; true where there is none to compare."""
    parts = re.findall(r"([A-Z][a-z]?)\s*([\d.]*)", formula)
    try:
        stated = Counter({symbol: float(amount or 1) for symbol, amount in parts})
    except ValueError:
        return True
    own = Counter(SYMBOLS[number] for number in numbers.tolist())
    if not stated or not all(stated.values()):
        return True
    ratio = len(numbers) / sum(stated.values())
    return stated.keys() == own.keys() and all(abs(own[s] - ratio * stated[s]) < 0.02 * own[s] for s in own)
