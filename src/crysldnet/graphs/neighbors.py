"""Periodic neighbor lists of a whole batch of crystals, compiled.

Shapes: ``B`` crystals, ``N`` atoms, ``E`` directed edges.

:mod:`crysldnet.graphs.search` enumerates every lattice point within a radius exactly. For ``k`` neighbors, the sphere
starts at a radius estimated from the density and grows until the k-th distance, with its tolerance, is provably inside;
all neighbors at that distance are kept, so the result doesn't depend on order. Squared distances are bitwise equal from
both ends, which also makes the symmetric union exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crysldnet.graphs.compiled import njit
from crysldnet.graphs.search import directed


class Neighbors(NamedTuple):
    """Directed edges, sorted by target."""

    source: NDArray[np.int64]
    """[E] index of the source atom in the batch."""
    target: NDArray[np.int64]
    """[E] index of the target atom in the batch."""
    image: NDArray[np.int32]
    """[E, 3] cell n of the source relative to the target: its position is x_source + n · lattice."""
    vector: NDArray[np.float64]
    """[E, 3] displacement x_target − (x_source + n · lattice) in Å."""
    distances: NDArray[np.float64]
    """[N, n_distances] each atom's nearest distances in Å, ascending, with multiplicity."""
    shell: NDArray[np.float64]
    """[N] cutoff in Å for each atom's own neighbors: the k-th distance, or the radius."""


@njit(cache=True, python_up_to=50_000, nogil=True, error_model="numpy")
def _with_reverses(lattices, frac, ptr, start, source, image, d2s, limit2, symmetric, repeat_self_images):
    """Return the edges and vectors sorted by target, with the requested reverse and repeated edges."""
    n_atoms = len(limit2)
    offset = np.zeros(n_atoms + 1, np.int64)
    for i in range(n_atoms):
        for e in range(start[i], start[i + 1]):
            j = source[e]
            offset[i + 1] += 2 if repeat_self_images and j == i else 1
            if symmetric and d2s[e] > limit2[j]:
                offset[j + 1] += 1
    for i in range(n_atoms):
        offset[i + 1] += offset[i]
    total = offset[n_atoms]
    out_source, out_target = np.empty(total, np.int64), np.empty(total, np.int64)
    out_image, vector = np.empty((total, 3), np.int32), np.empty((total, 3))
    for i in range(n_atoms):
        for e in range(start[i], start[i + 1]):
            j = source[e]
            for _ in range(2 if repeat_self_images and j == i else 1):
                place = offset[i]
                out_source[place], out_target[place] = j, i
                for axis in range(3):
                    out_image[place, axis] = image[e, axis]
                offset[i] += 1
            if symmetric and d2s[e] > limit2[j]:
                place = offset[j]
                out_source[place], out_target[place] = i, j
                for axis in range(3):
                    out_image[place, axis] = -image[e, axis]
                offset[j] += 1
    e = 0
    for crystal in range(lattices.shape[0]):
        lattice, last = lattices[crystal], ptr[crystal + 1]
        while e < total and out_target[e] < last:
            i, j = out_target[e], out_source[e]
            g0 = frac[i, 0] - frac[j, 0] - out_image[e, 0]
            g1 = frac[i, 1] - frac[j, 1] - out_image[e, 1]
            g2 = frac[i, 2] - frac[j, 2] - out_image[e, 2]
            for axis in range(3):
                vector[e, axis] = g0 * lattice[0, axis] + g1 * lattice[1, axis] + g2 * lattice[2, axis]
            e += 1
    return out_source, out_target, out_image, vector


def neighbor_list(
    lattices: NDArray[np.floating],
    frac_coords: NDArray[np.floating],
    ptr: NDArray[np.int64],
    *,
    k: int | None = None,
    radius: float | None = None,
    tolerance: float = 1e-4,
    symmetric: bool = False,
    repeat_self_images: bool = False,
    n_distances: int = 0,
) -> Neighbors:
    """Find the periodic neighbors of every atom of a batch of crystals.

    Args:
        lattices: [B, 3, 3] in Å, rows are lattice vectors, of non-zero volume.
        frac_coords: [N, 3] fractional coordinates, wrapped or not.
        ptr: [B + 1], crystal b has the atoms ptr[b] … ptr[b + 1] − 1.
        k: keep each target's k nearest and all others up to the k-th distance plus ``tolerance``.
        radius: keep all within this many Å (≤). Give exactly one of ``k`` and ``radius``.
        tolerance: in Å; distances that differ by less are in one shell.
        symmetric: add the reverse of every edge that lacks it (the union of the k-nearest relations).
        repeat_self_images: count an edge between an atom and its own image twice, as in the published graphs.
        n_distances: also return this many nearest distances of each atom.

    Returns:
        The edges sorted by target. Only the pair of an atom with itself in its own cell is excluded.
    """
    if (k is None) == (radius is None):
        raise ValueError("give either k or radius")
    if (k is not None and k < 1) or (radius is not None and not radius > 0):
        raise ValueError(f"k and radius must be positive, not k={k}, radius={radius}")
    if tolerance < 0 or n_distances < 0:
        raise ValueError(f"tolerance and n_distances can't be negative: {tolerance}, {n_distances}")
    lattices = np.ascontiguousarray(lattices, np.float64)
    frac_coords = np.ascontiguousarray(frac_coords, np.float64)
    ptr = np.ascontiguousarray(ptr, np.int64)
    room = 512 + len(frac_coords) * (k or 0) * 4 // 3
    if radius is not None:
        volumes = np.abs(np.linalg.det(lattices)).clip(1e-3 * radius**3)
        room += int(4.5 * radius**3 * (np.diff(ptr) ** 2 / volumes).sum())
    symmetric = symmetric and k is not None
    final = not (symmetric or repeat_self_images)
    start, edges, limit2, distances = directed(
        lattices, frac_coords.reshape(-1), ptr, k or 0, float(radius or 0.0), tolerance, n_distances, room, final
    )
    source, target, image, vector = edges.source, edges.target, edges.image.reshape(-1, 3), edges.vector.reshape(-1, 3)
    end = start[-1]
    found = source[:end], target[:end], image[:end], vector[:end]
    if not final:
        crystals = (lattices, frac_coords, ptr)
        found = _with_reverses(*crystals, start, source, image, edges.d2, limit2, symmetric, repeat_self_images)
    return Neighbors(*found, distances, np.sqrt(limit2))
