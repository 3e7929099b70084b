"""The asymmetric unit: one atom per symmetry-equivalent set.

R. Ruff et al., "Connectivity optimized nested line graph networks for crystal structures", Digital Discovery 3 (2024)
594, compute messages for these atoms only. For an encoder whose messages end at each target's own neighbors, equivalent
atoms have equal features, so this saves work without changes beyond the symmetry tolerance.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crysldnet.graphs.crystals import Crystals
from crysldnet.graphs.neighbors import Neighbors

SYMMETRY_TOLERANCE = 0.01
"""Å."""


def orbits(crystals: Crystals) -> NDArray[np.int64]:
    """Return [N] the first equivalent atom of each atom; without symmetry, every atom itself."""
    import spglib

    representative = np.arange(len(crystals.numbers))
    for first, last, lattice in zip(crystals.ptr[:-1], crystals.ptr[1:], crystals.lattice, strict=True):
        if last - first < 2:
            continue
        atoms = slice(first, last)
        cell = (lattice.tolist(), crystals.frac_coords[atoms].tolist(), crystals.numbers[atoms].tolist())
        try:
            symmetry = spglib.get_symmetry_dataset(cell, symprec=SYMMETRY_TOLERANCE)
        except spglib.SpglibError:
            continue
        if symmetry is not None:
            representative[first:last] = first + symmetry.crystallographic_orbits
    return representative


def reduce_to_unit(neighbors: Neighbors, representative: NDArray[np.int64]) -> Neighbors:
    """Keep the edges that end at a representative, and start each at its source's representative.

    ``image`` and ``vector`` remain those of the original source; only distances are meaningful.
    """
    kept = representative[neighbors.target] == neighbors.target
    return neighbors._replace(
        source=representative[neighbors.source[kept]],
        target=neighbors.target[kept],
        image=neighbors.image[kept],
        vector=neighbors.vector[kept],
    )
