"""Features of the other contestants: Magpie and structure by matminer, and CHGNet's frozen ones; each read once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crysldnet.data.elements import SYMBOLS
from experiments.tasks import Labelled

Features = NDArray[np.float64]


def structures_of(labelled: Labelled) -> list[Any]:
    """Return the crystals of a task as pymatgen structures."""
    from pymatgen.core import Structure

    crystals, found = labelled.store.crystals, []
    for row in labelled.rows:
        atoms = slice(crystals.ptr[row], crystals.ptr[row + 1])
        species = [SYMBOLS[number] for number in crystals.numbers[atoms]]
        found.append(Structure(crystals.lattice[row], species, crystals.frac_coords[atoms]))
    return found


def magpie(structures: list[Any]) -> Features:
    """Return Magpie's element statistics, and density, volume per atom and symmetry of the structure."""
    from matminer.featurizers.composition import ElementProperty, Stoichiometry, ValenceOrbital
    from matminer.featurizers.structure import DensityFeatures, GlobalSymmetryFeatures

    of_composition = [ElementProperty.from_preset("magpie", impute_nan=True), Stoichiometry(), ValenceOrbital()]
    symmetry = GlobalSymmetryFeatures(["spacegroup_num", "crystal_system_int"])
    of_structure = [DensityFeatures(["density", "vpa"]), symmetry]
    rows = []
    with warnings.catch_warnings(action="ignore"):
        for structure in structures:
            found = [x for part in of_composition for x in part.featurize(structure.composition)]
            found += [x for part in of_structure for x in part.featurize(structure)]
            rows.append(found)
    return np.nan_to_num(np.array(rows, dtype=np.float64))


def chgnet(structures: list[Any]) -> Features:
    """Return CHGNet's features of each crystal, before its last layer."""
    from chgnet.model import CHGNet

    model = CHGNet.load(use_device="cpu", verbose=False)
    found = model.predict_structure(structures, task="e", return_crystal_feas=True, batch_size=32)
    return np.array([np.asarray(one["crystal_fea"]) for one in found], dtype=np.float64)


def read(labelled: Labelled, name: str, make: Callable[[list[Any]], Features], runs: Path) -> tuple[Features, float]:
    """Return the features of a task's crystals and the seconds for each, computed once and kept in a file."""
    import time

    file = runs / "features" / f"{labelled.task.name.replace(' ', '_')}-{name}.npz"
    if not file.exists():
        structures = structures_of(labelled)
        start = time.process_time()
        values = make(structures)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, values=values, seconds=(time.process_time() - start) / len(structures))
    with np.load(file) as kept:
        return kept["values"], float(kept["seconds"])
