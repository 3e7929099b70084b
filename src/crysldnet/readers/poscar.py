"""Read POSCAR files. Files without element names are rejected, because pymatgen would guess them."""

from __future__ import annotations

import re
import warnings
from typing import Any

from pymatgen.io.vasp.inputs import Poscar

from crysldnet.errors import DataError
from crysldnet.readers.species import element_symbols


def read_poscar(text: str, max_atoms: int | None, notes: list[str]) -> tuple[Any, Any, Any]:
    """Return lattice, atomic numbers and fractional coordinates as in :func:`read_structure`."""
    lines = text.split("\n")
    float(lines[1])  # the scale; otherwise it isn't a POSCAR, as the error says
    names = [re.split("[_/]", word)[0] for word in lines[5].split()]
    counts = [int(word) for word in lines[6].split() if word.isdigit()]
    if names and not names[0].isdigit():
        element_symbols(names, notes=notes)
        if not sum(counts):
            raise DataError("it has no atoms")
    if max_atoms is not None and sum(counts) > max_atoms:
        raise DataError(f"it has {sum(counts)} atoms, over the limit of {max_atoms} (max_atoms)")
    if sum(counts) > len(lines):
        raise DataError(f"it ends too early for its {sum(counts)} atoms")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        poscar = Poscar.from_str(text, read_velocities=False)
    if not poscar.true_names:
        raise DataError("it doesn't name its elements (VASP 4); add a line with their symbols above the counts")
    structure = poscar.structure
    return structure.lattice.matrix, structure.atomic_numbers, structure.frac_coords
