"""Read the first crystal of a CIF file: what pymatgen would guess is refused or noted before it can."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crysldnet.data.species import NOTE_ISOTOPE, element_symbols
from crysldnet.errors import DataError

NOTE_BLOCKS = "hold several crystals, of which the first was read"
NOTE_NO_SYMMETRY = "state no symmetry and were read as P 1"
NOTE_SETTING = "name their space group but not its operations; its standard setting was taken"
NOTE_FORMULA = "state a formula that their atoms don't give; hydrogens may be missing in them"

_CELL = (*(f"_cell_length_{x}" for x in "abc"), *(f"_cell_angle_{x}" for x in ("alpha", "beta", "gamma")))
_SITE = ("fract_x", "fract_y", "fract_z", "occupancy", "disorder_group", "attached_hydrogens")
_SYMMETRY = re.compile(r"name_h[-_]m|name_hall|it_number|int_tables_number|symop_operation|equiv_pos_as_xyz", re.I)
_UNKNOWN = ("?", ".")
"""CIF's "not known" and "doesn't apply"."""
_NO_SYMMETRY = {"", "?", ".", "1", "P1", "X,Y,Z", "+X,+Y,+Z"}


def read_cif(text: str, max_atoms: int | None, notes: list[str]) -> tuple[Any, Any, Any]:
    """Return lattice, atomic numbers and fractional coordinates, as :func:`read_structure` describes them."""
    text = _block_with_atoms(text, notes)
    parser, data = _parse(text)
    if len(_operations(data)) == 1 and any("rounded" in remark for remark in parser.warnings):
        # 0.33335 became 1/3, which is meant for special positions and wrong where there is no symmetry
        parser, data = _parse(text, frac_tolerance=0)
    _check_cell(data)
    _check_sites(data, max_atoms, notes)
    try:
        structure = parser.parse_structures(primitive=False, on_error="raise")[0]
    except ValueError as error:
        if "exceeded tolerance" not in str(error):
            raise
        raise DataError(
            "two sites stand at the same place: a disordered site, which needs an ordered approximation, "
            "or atoms listed in full beside symmetry operations that make them again"
        ) from error
    _check_symmetry(data, parser, structure.lattice.matrix, notes)
    # hydrogen in place of deuterium gives another formula too, and is noted already
    if NOTE_ISOTOPE not in notes and (parser.check(structure) or "").startswith(("Missing", "Incorrect")):
        notes.append(NOTE_FORMULA)
    return structure.lattice.matrix, structure.atomic_numbers, structure.frac_coords


def _block_with_atoms(text: str, notes: list[str]) -> str:
    blocks = re.split(r"^\s*data_", text, flags=re.MULTILINE | re.IGNORECASE)[1:]
    if not blocks:
        raise DataError("not a CIF: there is no data_ block in it")
    blocks = [block for block in blocks if re.search(r"^\s*_atom_site_fract_x", block, re.MULTILINE)]
    if not blocks:
        raise DataError("it has no atoms (no _atom_site_fract_x)")
    if len(blocks) > 1:
        notes.append(NOTE_BLOCKS)
    return f"data_{blocks[0]}"


def _parse(text: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return pymatgen's parser and the tags of its block, which it reads the structure from later."""
    from pymatgen.io.cif import CifParser

    parser: Any = CifParser.from_str(text, **options)
    return parser, next(iter(parser._cif.data.values())).data


def _operations(data: dict[str, Any]) -> list[str]:
    """Return the symmetry operations that a block lists."""
    for key in ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz"):
        if key in data:
            return [data[key]] if isinstance(data[key], str) else data[key]
    return []


def _number(text: str) -> float:
    """Read a CIF number such as ``5.64(2)``; NaN where it isn't one."""
    try:
        return float(re.sub(r"\(\d*\)?$", "", text))
    except ValueError:
        return math.nan


def _check_cell(data: dict[str, Any]) -> None:
    for tag in _CELL:
        if tag not in data:
            raise DataError(f"it has no {tag}")
        value = _number(data[tag])
        if not math.isfinite(value):
            raise DataError(f"{tag} is {data[tag]!r}, not a finite number")
        if value <= 0 or ("angle" in tag and value >= 180):
            raise DataError(f"{tag} is {data[tag]}: its cell has no volume")


def _check_sites(data: dict[str, Any], max_atoms: int | None, notes: list[str]) -> None:
    """Refuse sites that aren't one whole atom each, and write the others so that pymatgen has nothing to guess."""
    for key in [key for key in data if key.startswith("_atom_site_") and isinstance(data[key], str)]:
        data[key] = [data[key]]
    labels = data["_atom_site_label"]
    if max_atoms is not None and len(labels) > max_atoms:
        raise DataError(f"it has {len(labels)} atoms, over the limit of {max_atoms} (max_atoms)")
    columns = [name for name in _SITE if f"_atom_site_{name}" in data]
    for i, label in enumerate(labels):
        if fault := _fault_of_site({name: data[f"_atom_site_{name}"][i] for name in columns}):
            raise DataError(f"site {label} {fault}")
    species = data.get("_atom_site_type_symbol")
    data["_atom_site_type_symbol"] = element_symbols(species or labels, are_labels=species is None, notes=notes)
    data["_atom_site_occupancy"] = ["1"] * len(labels)
    data.pop("_atom_type_oxidation_number", None)


def _fault_of_site(site: dict[str, str]) -> str | None:
    for axis in ("fract_x", "fract_y", "fract_z"):
        if axis not in site:
            return f"has no _atom_site_{axis}"
        if not math.isfinite(_number(site[axis])):
            return f"has the coordinate {site[axis]!r}, which is not a finite number"
    occupancy = site.get("occupancy", "1")
    if occupancy not in _UNKNOWN and not abs(_number(occupancy) - 1) < 1e-3:
        return f"has partial occupancy ({occupancy}): a crystal needs whole atoms, make an ordered approximation"
    if site.get("disorder_group", ".") not in _UNKNOWN:
        return "is disordered: a crystal needs whole atoms, make an ordered approximation"
    if site.get("attached_hydrogens", "0") not in (*_UNKNOWN, "0"):
        return "has hydrogens attached that have no coordinates; add them"
    return None


def _check_symmetry(data: dict[str, Any], parser: Any, lattice: NDArray[np.float64], notes: list[str]) -> None:
    """Refuse a symmetry that pymatgen didn't understand and left out, or that isn't one of the lattice."""
    rotations = np.array([operation.rotation_matrix for operation in parser.symmetry_operations])
    metric = lattice @ lattice.T
    if not np.allclose(rotations.transpose(0, 2, 1) @ metric @ rotations, metric, rtol=0, atol=0.02 * metric.max()):
        raise DataError(
            "its symmetry operations don't fit its cell; write it with operations in the cell's own setting"
        )
    if _operations(data):
        return
    if not any("Defaulting to P1" in remark for remark in parser.warnings):
        notes.append(NOTE_SETTING)
        return
    for key, value in data.items():
        stated = value if isinstance(value, str) else (value or [""])[0]
        if _SYMMETRY.search(key) and "".join(stated.split()).upper() not in _NO_SYMMETRY:
            raise DataError(f"its symmetry isn't understood ({key} {stated}): write it with its symmetry operations")
    notes.append(NOTE_NO_SYMMETRY)
