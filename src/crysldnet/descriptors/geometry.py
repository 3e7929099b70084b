"""Geometry: density, packing, slabs, coordination, bond lengths and angles, neighbor contrasts, dimensionality.

Neighbors count by R. Hoppe's effective coordination number (Z. Kristallogr. 150, 23, 1979): a neighbor at distance d
has the weight exp(1 − (d / d̄)⁶), where d̄ is the atom's mean distance with these weights. It needs no cutoff and
varies little with small displacements.

Symmetry and the shape of the reduced cell are excluded: models were as good without them, and symmetry detection takes
ten times as long as everything else.

Shapes: ``B`` crystals, ``N`` atoms, ``E`` edges sorted by target, ``M`` local quantities.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crysldnet.descriptors.composition import Features, element_table, side_by_side
from crysldnet.graphs.compiled import njit
from crysldnet.graphs.crystals import Crystals
from crysldnet.graphs.neighbors import Neighbors, neighbor_list

NEIGHBORS = 16
"""Neighbors per atom, plus all at the distance of the last."""
RANKS = (1, 2, 4, 6, 8, 12, 16, 24)
"""Ranks of neighbors whose distances are averaged, counted from the nearest."""
BOND = 1.25
"""Atoms are bonded if their distance is below this times the sum of their covalent radii."""
CONTRASTS = ("Electronegativity", "CovalentRadius", "MendeleevNumber", "NValence", "GSvolume_pa")
"""Properties compared between neighbors."""


class Surroundings(NamedTuple):
    """The neighbors of each atom and their weights."""

    near: Neighbors
    length: NDArray[np.float64]
    """[E] in Å."""
    scaled: NDArray[np.float64]
    """[E] length over the sum of the covalent radii."""
    weight: NDArray[np.float64]
    """[E] weight in the effective coordination number."""
    begin: NDArray[np.int64]
    """[N] first edge of each atom."""


def surroundings_of(crystals: Crystals) -> Surroundings:
    """Find and weight the neighbors."""
    near = neighbor_list(
        crystals.lattice, crystals.frac_coords, crystals.ptr, k=NEIGHBORS, tolerance=1e-3, n_distances=RANKS[-1]
    )
    radius = element_table()["CovalentRadius"][crystals.numbers] / 100
    length = np.linalg.norm(near.vector, axis=1)
    scaled = length / (radius[near.source] + radius[near.target])
    begin = np.searchsorted(near.target, np.arange(len(crystals.numbers)))
    reference = np.minimum.reduceat(length, begin)
    weight = np.empty(0)
    for _ in range(4):  # d̄ depends on the weights and vice versa; a few iterations suffice
        weight = np.exp(1 - (length / reference[near.target]) ** 6)
        reference = np.add.reduceat(weight * length, begin) / np.add.reduceat(weight, begin)
    return Surroundings(near, length, scaled, weight, begin)


def environment_features(crystals: Crystals) -> Features:
    """Return environment descriptors: mean, spread, minimum and maximum over the atoms of a crystal."""
    around = surroundings_of(crystals)
    local = _local(crystals, around)
    start, atoms = crystals.ptr[:-1], crystals.sizes[:, None]
    values = np.stack(list(local.values()), axis=1)
    mean = np.add.reduceat(values, start) / atoms
    spread = np.sqrt(np.add.reduceat((values - mean[crystals.crystal]) ** 2, start) / atoms)
    pooled = {"mean": mean, "std": spread, "min": np.minimum.reduceat(values, start)}
    pooled["max"] = np.maximum.reduceat(values, start)
    blocks = [Features(tuple(f"{how} {name}" for name in local), part) for how, part in pooled.items()]
    return side_by_side([*blocks, _shells(crystals, around.near), _connectivity(crystals, around)])


def _local(crystals: Crystals, around: Surroundings) -> dict[str, NDArray[np.float64]]:
    """Return local quantities, [N] each."""
    source, target = around.near.source, around.near.target
    total = np.add.reduceat(around.weight, around.begin)
    share = around.weight / total[target]

    def over_neighbors(values: NDArray) -> NDArray:
        return np.add.reduceat(values * share, around.begin)

    length, scaled = over_neighbors(around.length), over_neighbors(around.scaled)
    local = {
        "coordination number": total,
        "bond length": length,
        "bond length over radii": scaled,
        "bond length spread": np.sqrt(over_neighbors((around.length / length[target] - 1) ** 2)),
        "like neighbors": over_neighbors((crystals.numbers[source] == crystals.numbers[target]).astype(np.float64)),
    }
    for name in CONTRASTS:
        of_atom = element_table()[name][crystals.numbers]
        local[f"neighbor difference {name}"] = over_neighbors(np.abs(of_atom[source] - of_atom[target]))
    return local | _orientation(around, share)


def _orientation(around: Surroundings, share: NDArray) -> dict[str, NDArray[np.float64]]:
    """Return P. J. Steinhardt's bond orientation q_l (Phys. Rev. B 28, 784, 1983), with weights.

    q_l² = Σ_jk s_j s_k P_l(cos θ_jk), and Σ_jk s_j s_k cosᵖ θ_jk is the squared norm of the moment tensor of order p.
    """
    unit = around.near.vector / around.length[:, None]
    powers = [np.ones_like(unit), unit]
    while len(powers) < 7:
        powers.append(powers[-1] * unit)
    moment = {0: np.ones(len(around.begin))}
    for p in (1, 2, 3, 4, 6):
        moment[p] = np.zeros(len(around.begin))
        for i in range(p + 1):
            for j in range(p + 1 - i):
                k = p - i - j
                component = share * powers[i][:, 0] * powers[j][:, 1] * powers[k][:, 2]
                times = factorial(p) / (factorial(i) * factorial(j) * factorial(k))
                moment[p] += times * np.add.reduceat(component, around.begin) ** 2
    squared = {
        1: moment[1],
        2: (3 * moment[2] - 1) / 2,
        3: (5 * moment[3] - 3 * moment[1]) / 2,
        4: (35 * moment[4] - 30 * moment[2] + 3) / 8,
        6: (231 * moment[6] - 315 * moment[4] + 105 * moment[2] - 5) / 16,
    }
    return {f"bond orientation q{order}": np.sqrt(np.maximum(value, 0)) for order, value in squared.items()}


def _shells(crystals: Crystals, near: Neighbors) -> Features:
    """Return mean distances to the n-th nearest neighbors, in Å and over the cube root of the volume per atom."""
    chosen = near.distances[:, np.array(RANKS) - 1]
    mean = np.add.reduceat(chosen, crystals.ptr[:-1]) / crystals.sizes[:, None]
    edge = np.cbrt(np.abs(np.linalg.det(crystals.lattice)) / crystals.sizes)[:, None]
    names = [f"distance of neighbor {rank}" for rank in RANKS]
    return Features((*names, *(f"{name} over size" for name in names)), np.concatenate([mean, mean / edge], axis=1))


def _connectivity(crystals: Crystals, around: Surroundings) -> Features:
    """Return the fractions of atoms in molecules, chains, layers and networks, from bonds only."""
    near, bonded = around.near, around.scaled < BOND
    source, target, image = near.source[bonded], near.target[bonded], near.image[bonded]
    offset = np.searchsorted(target, np.arange(len(crystals.numbers) + 1))
    dimension = _dimensions(offset, source, image)
    columns = {"bonds of an atom": np.bincount(crystals.crystal, np.diff(offset)) / crystals.sizes}
    for d, name in enumerate(("molecules", "chains", "layers", "networks")):
        columns[f"atoms in {name}"] = np.bincount(crystals.crystal, dimension == d) / crystals.sizes
    return Features.of(columns)


@njit(cache=True, nogil=True, error_model="numpy")
def _dimensions(offset, source, image):
    """Return [N] the number of directions in which the bonded component of each atom is infinite.

    Each visited atom is assigned the cell in which it was reached; a bond to the same atom in another cell is a
    translation of the component, and the rank of these translations is the dimension.
    """
    n_atoms = offset.shape[0] - 1
    dimension = np.full(n_atoms, -1, np.int64)
    cell = np.zeros((n_atoms, 3), np.int64)
    seen = np.zeros(n_atoms, np.bool_)
    queue = np.empty(n_atoms, np.int64)
    for first in range(n_atoms):
        if seen[first]:
            continue
        seen[first] = True
        queue[0] = first
        done, size, rank = 0, 1, 0
        u0, u1, u2, v0, v1, v2 = 0, 0, 0, 0, 0, 0
        while done < size:
            i = queue[done]
            done += 1
            for e in range(offset[i], offset[i + 1]):
                j = source[e]
                n0, n1, n2 = cell[i, 0] + image[e, 0], cell[i, 1] + image[e, 1], cell[i, 2] + image[e, 2]
                if not seen[j]:
                    seen[j] = True
                    cell[j, 0], cell[j, 1], cell[j, 2] = n0, n1, n2
                    queue[size] = j
                    size += 1
                    continue
                t0, t1, t2 = n0 - cell[j, 0], n1 - cell[j, 1], n2 - cell[j, 2]
                if rank == 0 and (t0 != 0 or t1 != 0 or t2 != 0):
                    u0, u1, u2, rank = t0, t1, t2, 1
                elif rank == 1:
                    w0, w1, w2 = u1 * t2 - u2 * t1, u2 * t0 - u0 * t2, u0 * t1 - u1 * t0
                    if w0 != 0 or w1 != 0 or w2 != 0:
                        v0, v1, v2, rank = w0, w1, w2, 2
                elif rank == 2 and v0 * t0 + v1 * t1 + v2 * t2 != 0:
                    rank = 3
        for m in range(size):
            dimension[queue[m]] = rank
    return dimension


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
