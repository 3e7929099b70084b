"""The graph of a crystal, as defined by an encoder.

Shapes: ``B`` crystals, ``N`` atoms, ``E`` directed edges, ``P`` ordered pairs of atoms, ``R`` rows of ``K`` slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crysldnet.graphs.compiled import njit
from crysldnet.graphs.crystals import Crystals
from crysldnet.graphs.lattice_edges import CELL_IMAGES, add_lattice_edges, frames
from crysldnet.graphs.neighbors import Neighbors, neighbor_list
from crysldnet.graphs.potentials import lattice_sums


@dataclass(frozen=True)
class Graph:
    """Result of a :class:`GraphSpec`; parts that it doesn't include are None.

    Attributes:
        neighbors: the edges, sorted by target.
        frame: [B, 3, 3] right-handed frame of three short lattice vectors in Å.
        pairs: [2, P] source and target of every ordered pair of a crystal's atoms.
        potential: [P] the lattice sum of each pair's potential.
        representative: [N] representative of each atom in the asymmetric unit.
        slots: [R, K] the edges of each atom in rows of K, E for empty slots.
        slot_atom: [R] the atom that each row belongs to; atoms with more than K edges have several rows.
    """

    neighbors: Neighbors
    frame: NDArray[np.float64] | None = None
    pairs: NDArray[np.int64] | None = None
    potential: NDArray[np.float64] | None = None
    representative: NDArray[np.int64] | None = None
    slots: NDArray[np.int64] | None = None
    slot_atom: NDArray[np.int64] | None = None


MOST = {"k": 1000, "radius": 100.0, "n_distances": 10_000, "slots": 10_000}
"""Limits; beyond these a graph is a mistake or would exhaust memory."""


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """Definition of an encoder's graph; the data module reads it from the encoder, so that the two agree.

    Attributes:
        k: each target's k nearest neighbors and all that tie with the k-th; or
        radius: all neighbors within this many Å.
        tolerance: Å, tolerance for distances within a shell and lattice vector lengths.
        symmetric: add the reverse of every edge that lacks it.
        repeat_self_images: edges between an atom and its own images count twice (a quirk of the published graphs).
        cut_beyond: exactly k edges per atom: ties are cut in the order of enumeration, and neighbors farther than this
            many Å are replaced by edges from the crystal's first atom, 1 Å longer (quirks of CGCNN).
        n_distances: length of each atom's pairwise distance distribution; 0 for none.
        lattice_edges: connect every atom to its own images along a, b, c, a + b, a + c, b + c (``cell``) or along the
            three vectors of the frame (``frame``).
        lattice_edges_within: crystals with a k-th neighbor farther than this many Å get no lattice edges (a quirk of
            Matformer).
        frame: include the frame of three short lattice vectors.
        potential: include every pair's lattice sum of potentials, see :mod:`crysldnet.graphs.potentials`.
        asymmetric_unit: edges only end at one atom per symmetry-equivalent set.
        slots: K of the padded layout; 0 for none.
    """

    k: int | None = None
    radius: float | None = None
    tolerance: float = 1e-4
    symmetric: bool = False
    repeat_self_images: bool = False
    cut_beyond: float | None = None
    n_distances: int = 0
    lattice_edges: Literal["none", "cell", "frame"] = "none"
    lattice_edges_within: float | None = None
    frame: bool = False
    potential: Literal["none", "corrected", "published"] = "none"
    asymmetric_unit: bool = False
    slots: int = 0

    def __post_init__(self) -> None:
        if (self.k is None) == (self.radius is None):
            raise ValueError("a graph is made by k or by radius, not both or neither")
        for name, most in MOST.items():
            if (value := getattr(self, name)) is not None and not 0 <= value <= most:
                raise ValueError(f"{name}={value} isn't between 0 and {most}")
        if self.cut_beyond is not None and self.k is None:
            raise ValueError("cut_beyond needs k")

    def differences(self, stored: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return the settings that differ from those stored with weights, as (stored, own).

        Settings missing in the stored ones are newer and count as their default.
        """
        defaults = {field.name: field.default for field in fields(self)}
        own = asdict(self)
        pairs = {key: (stored.get(key, defaults.get(key)), own.get(key)) for key in own.keys() | stored.keys()}
        return {key: (theirs, ours) for key, (theirs, ours) in pairs.items() if theirs != ours}

    def neighbors(self, crystals: Crystals) -> Neighbors:
        """Find the edges of all crystals at once, before lattice edges and whatever else is asked for."""
        return neighbor_list(
            crystals.lattice,
            crystals.frac_coords,
            crystals.ptr,
            k=self.k,
            radius=self.radius,
            tolerance=self.tolerance,
            symmetric=self.symmetric,
            repeat_self_images=self.repeat_self_images,
            n_distances=self.n_distances,
        )

    def build(self, crystals: Crystals, neighbors: Neighbors | None = None) -> Graph:
        """Build the graphs of all crystals at once.

        Args:
            crystals: B crystals.
            neighbors: what :meth:`neighbors` returns for them, where that is known.
        """
        lattices, ptr = crystals.lattice, crystals.ptr
        neighbors = self.neighbors(crystals) if neighbors is None else neighbors
        if self.cut_beyond is not None:
            assert self.k is not None
            neighbors = _exactly(neighbors, ptr, self.k, self.cut_beyond)
        images = frames(lattices, self.tolerance) if self.frame or self.lattice_edges == "frame" else None
        if self.lattice_edges != "none":
            neighbors = self._with_lattice_edges(neighbors, crystals, images)
        representative = orbits(crystals) if self.asymmetric_unit else None
        if representative is not None:
            neighbors = reduce_to_unit(neighbors, representative)
        sums = None
        if self.potential != "none":
            sums = lattice_sums(lattices, crystals.frac_coords, ptr, published=self.potential == "published")
        slots, slot_atom = slot_table(neighbors.target, ptr[-1], self.slots) if self.slots else (None, None)
        return Graph(
            neighbors=neighbors,
            frame=images @ lattices if self.frame and images is not None else None,
            pairs=None if sums is None else np.stack([sums.source, sums.target]),
            potential=None if sums is None else sums.potential,
            representative=representative,
            slots=slots,
            slot_atom=slot_atom,
        )

    def near_cut(self, crystals: Crystals, move: float = 1e-3) -> NDArray[np.bool_]:
        """Return [B] whether neighbors of any atom may change when atoms move by this many Å."""
        slack = move * (2.0 if self.k is None else 4.0)  # both atoms of a pair move, and those of the k-th
        found = neighbor_list(
            crystals.lattice,
            crystals.frac_coords,
            crystals.ptr,
            k=self.k,
            radius=None if self.radius is None else self.radius + slack,
            tolerance=self.tolerance + slack,
        )
        inside = np.linalg.norm(found.vector, axis=1) < (found.shell - 2.0 * slack)[found.target]
        count = np.bincount(found.target, minlength=crystals.ptr[-1])
        sure = np.bincount(found.target[inside], minlength=crystals.ptr[-1])
        return np.logical_or.reduceat(count > np.maximum(sure, self.k or 0), crystals.ptr[:-1])

    def _with_lattice_edges(
        self, neighbors: Neighbors, crystals: Crystals, images: NDArray[np.int32] | None
    ) -> Neighbors:
        n = len(crystals)
        if self.lattice_edges == "cell":
            images = np.broadcast_to(CELL_IMAGES, (n, *CELL_IMAGES.shape))
        wanted = np.ones(n, bool)
        if self.lattice_edges_within is not None:
            sparse = neighbors.shell > self.lattice_edges_within
            wanted[crystals.crystal[sparse]] = False
        assert images is not None
        return add_lattice_edges(neighbors, crystals.lattice, crystals.ptr, images, wanted)


def _exactly(neighbors: Neighbors, ptr: NDArray[np.int64], k: int, beyond: float) -> Neighbors:
    """Keep k edges per atom, nearest first; replace those longer than ``beyond`` by edges from the first atom."""
    length = np.linalg.norm(neighbors.vector, axis=1)
    order = np.lexsort((length, neighbors.target))
    n_atoms = ptr[-1]
    begin = np.searchsorted(neighbors.target, np.arange(n_atoms))
    kept = order[np.arange(len(order)) - begin[neighbors.target] < k]
    far = length[kept] > beyond
    first_atom = np.repeat(ptr[:-1], np.diff(ptr))
    target = neighbors.target[kept]
    padding = np.array([beyond + 1.0, 0.0, 0.0])
    return neighbors._replace(
        source=np.where(far, first_atom[target], neighbors.source[kept]),
        target=target,
        image=np.where(far[:, None], 0, neighbors.image[kept]).astype(np.int32),
        vector=np.where(far[:, None], padding, neighbors.vector[kept]),
    )


@njit(cache=True, python_up_to=5000, nogil=True, error_model="numpy")
def _slots(target, n_atoms, k):
    degree = np.zeros(n_atoms, np.int64)
    for i in target:
        degree[i] += 1
    rows = 0
    for i in range(n_atoms):
        rows += max(1, -(-degree[i] // k))
    table, atom = np.full((rows, k), len(target), np.int64), np.empty(rows, np.int64)
    row, edge = 0, 0
    for i in range(n_atoms):
        for place in range(max(1, -(-degree[i] // k))):
            atom[row] = i
            for slot in range(min(k, degree[i] - place * k)):
                table[row, slot] = edge
                edge += 1
            row += 1
    return table, atom


def slot_table(target: NDArray[np.int64], n_atoms: int, k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Arrange edges in rows of k slots; atoms with more than k edges take several rows.

    Args:
        target: [E] targets of the edges, ascending.
        n_atoms: N; an atom without edges has one row of empty slots.
        k: K.

    Returns:
        [R, K] edges, E for empty slots, and [R] the atom of each row, ascending.
    """
    return _slots(np.ascontiguousarray(target), int(n_atoms), k)


SYMMETRY_TOLERANCE = 0.01
"""Å."""


def orbits(crystals: Crystals) -> NDArray[np.int64]:
    """Return [N] the first symmetry-equivalent atom of each atom; without symmetry, every atom itself.

    For an encoder whose messages end at each target's own neighbors, equivalent atoms have equal features, so computing
    those of the asymmetric unit alone changes nothing beyond the symmetry tolerance (R. Ruff et al., Digital Discovery
    3 (2024) 594).
    """
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
