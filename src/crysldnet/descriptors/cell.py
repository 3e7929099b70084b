"""Descriptors of the whole crystal: density, packing, and slab dimensions.

Symmetry and the shape of the reduced cell are excluded: models were as good without them, and symmetry detection takes
ten times as long as everything else.

Shapes: ``B`` crystals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crysldnet.descriptors.composition import element_table
from crysldnet.descriptors.features import Features, side_by_side
from crysldnet.graphs.crystals import Crystals

VACUUM = 5.0
"""Å; a crystal with a wider gap between parallel planes of atoms is a slab."""
_SAME = 0.01
"""Å; gaps that differ by less count as the same gap."""
_DALTON_PER_CUBIC_ANGSTROM = 1.66053907
"""In g/cm³."""


@dataclass(frozen=True)
class Slabs:
    """Vacuum of each crystal: the widest gap between parallel planes of atoms along an axis of its reduced cell.

    Attributes:
        vacuum: [B] in Å, between atom centers; 0, like the rest, if the gap isn't wider than :data:`VACUUM`.
        thickness: [B] in Å, from the first to the last plane; plus the vacuum it equals the period.
        area: [B] Å² per atom of the slab.
    """

    vacuum: NDArray[np.float64]
    thickness: NDArray[np.float64]
    area: NDArray[np.float64]

    @property
    def is_slab(self) -> NDArray[np.bool_]:
        """[B] whether the crystal is a slab."""
        return self.vacuum > 0


def slabs_of(crystals: Crystals) -> Slabs:
    """Find the vacuum of each crystal, independent of the choice of cell, including supercells."""
    import spglib

    reduced = np.array(crystals.lattice, np.float64)
    for b, lattice in enumerate(reduced):
        found = spglib.niggli_reduce(lattice)
        reduced[b] = lattice if found is None else found
    owner, start = crystals.crystal, crystals.ptr[:-1]
    inside = np.einsum("ni,nij->nj", crystals.positions, np.linalg.inv(reduced)[owner])
    inside -= np.floor(inside)
    areas = np.stack(
        [np.linalg.norm(np.cross(reduced[:, (i + 1) % 3], reduced[:, (i + 2) % 3]), axis=1) for i in range(3)], axis=1
    )
    height = np.abs(np.linalg.det(reduced))[:, None] / areas
    widest, layers = np.empty((len(crystals), 3)), np.empty((len(crystals), 3))
    for axis in range(3):
        order = np.lexsort((inside[:, axis], owner))
        x = inside[order, axis]
        following = np.append(x[1:], 0.0)
        following[crystals.ptr[1:] - 1] = x[start] + 1  # the first plane of the next cell
        gap = (following - x) * height[owner, axis]
        widest[:, axis] = np.maximum.reduceat(gap, start)
        layers[:, axis] = np.add.reduceat((gap > widest[owner, axis] - _SAME).astype(np.float64), start)
    chosen = np.lexsort((areas, -np.round(widest, 2)))[:, 0]  # among equal gaps, the one across the smallest plane
    rows = np.arange(len(crystals))
    gap, count = widest[rows, chosen], layers[rows, chosen]
    vacuum = gap > VACUUM
    return Slabs(
        vacuum=np.where(vacuum, gap, 0.0),
        thickness=np.where(vacuum, height[rows, chosen] / count - gap, 0.0),
        area=np.where(vacuum, areas[rows, chosen] * count / crystals.sizes, 0.0),
    )


def cell_features(crystals: Crystals) -> Features:
    """Return density, packing and slab descriptors."""
    volume, owner, table = np.abs(np.linalg.det(crystals.lattice)), crystals.crystal, element_table()
    mass = np.bincount(owner, table["AtomicWeight"][crystals.numbers])
    spheres = np.bincount(owner, 4 / 3 * np.pi * (table["CovalentRadius"][crystals.numbers] / 100) ** 3)
    elements = np.bincount(owner, table["GSvolume_pa"][crystals.numbers])
    bulk = {
        "density": _DALTON_PER_CUBIC_ANGSTROM * mass / volume,
        "volume of an atom": volume / crystals.sizes,
        "log volume of an atom": np.log(volume / crystals.sizes),
        "packing fraction": spheres / volume,
        "log volume over elements": np.log(volume / elements),
    }
    slabs = slabs_of(crystals)
    sheet = {
        "is slab": slabs.is_slab,
        "slab vacuum": slabs.vacuum,
        "slab thickness": slabs.thickness,
        "slab area of an atom": slabs.area,
        "log slab area of an atom": np.log(np.where(slabs.is_slab, slabs.area, 1.0)),
    }
    return side_by_side([Features.of(bulk), Features.of(sheet)])
