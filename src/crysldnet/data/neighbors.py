"""Periodic neighbor lists of a whole batch of crystals, compiled.

Shapes: ``B`` crystals, ``N`` atoms, ``E`` directed edges.

For a target atom i every lattice point j + n within a radius is enumerated exactly: the lattice is brought to lower
triangular form, so that the third, then the second, then the first component of n runs over just the integers whose
coordinate can lie inside the sphere. Nothing is assumed of the cell: one atom, needles, plates and skewed cells that
nobody reduced are all exact.

By number (``k``), the sphere starts at the radius that the density suggests and grows until the k-th distance, with
its tolerance, is provably inside; all neighbors at that distance are kept, so the result doesn't depend on order.
Squared distances are bitwise equal seen from both ends, which makes the symmetric union exact too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray


class Neighbors(NamedTuple):
    """Directed edges, sorted by target."""

    source: NDArray[np.int64]
    """[E] index of the source atom in the batch."""
    target: NDArray[np.int64]
    """[E] index of the target atom in the batch."""
    image: NDArray[np.int32]
    """[E, 3] the cell n that the source lies in, seen from the target: its position is x_source + n · lattice."""
    vector: NDArray[np.float64]
    """[E, 3] displacement x_target − (x_source + n · lattice) in Å."""
    distances: NDArray[np.float64]
    """[N, n_distances] each atom's nearest distances in Å, ascending, multiplicity counted."""
    shell: NDArray[np.float64]
    """[N] distance in Å up to which each atom's own neighbors were kept: of its k-th, or the radius."""


@njit(cache=True, nogil=True, error_model="numpy")
def _triangular(lattice):
    """Return the lower triangular T with T = lattice · Q for a rotation Q (Gram–Schmidt on the rows)."""
    t = np.zeros((3, 3))
    basis = np.zeros((3, 3))
    for row in range(3):
        rest = lattice[row].copy()
        for other in range(row):
            t[row, other] = rest[0] * basis[other, 0] + rest[1] * basis[other, 1] + rest[2] * basis[other, 2]
            for axis in range(3):
                rest[axis] -= t[row, other] * basis[other, axis]
        t[row, row] = np.sqrt(rest[0] ** 2 + rest[1] ** 2 + rest[2] ** 2)
        for axis in range(3):
            basis[row, axis] = rest[axis] / t[row, row]
    return t


@njit(cache=True, nogil=True, error_model="numpy")
def _points_in_sphere(t, frac, first, last, center, radius, found_d2, found_j, found_n):
    """Write all (j, n) within ``radius`` of atom ``center``; return their number, or −1 where the buffers are full."""
    r2 = radius * radius
    slack = 1e-9
    t00, t10, t11, t20, t21, t22 = t[0, 0], t[1, 0], t[1, 1], t[2, 0], t[2, 1], t[2, 2]
    per0, per1, per2 = 1.0 / t00, 1.0 / t11, 1.0 / t22
    capacity = found_d2.shape[0]
    count = 0
    c0, c1, c2 = frac[center, 0], frac[center, 1], frac[center, 2]
    for j in range(first, last):
        f0, f1, f2 = frac[j, 0] - c0, frac[j, 1] - c1, frac[j, 2] - c2
        reach2 = radius * per2
        for n2 in range(int(np.ceil(-reach2 - f2 - slack)), int(np.floor(reach2 - f2 + slack)) + 1):
            g2 = f2 + n2
            z = g2 * t22
            left2 = r2 - z * z
            if left2 < 0.0:
                continue
            shift1 = f1 + g2 * t21 * per1
            reach1 = np.sqrt(left2) * per1
            for n1 in range(int(np.ceil(-reach1 - shift1 - slack)), int(np.floor(reach1 - shift1 + slack)) + 1):
                g1 = f1 + n1
                y = g1 * t11 + g2 * t21
                left1 = left2 - y * y
                if left1 < 0.0:
                    continue
                across = g1 * t10 + g2 * t20
                shift0 = f0 + across * per0
                reach0 = np.sqrt(left1) * per0
                for n0 in range(int(np.ceil(-reach0 - shift0 - slack)), int(np.floor(reach0 - shift0 + slack)) + 1):
                    x = (f0 + n0) * t00 + across
                    d2 = x * x + y * y + z * z
                    if d2 > r2 or (j == center and n0 == 0 and n1 == 0 and n2 == 0):
                        continue
                    if count == capacity:
                        return -1
                    found_d2[count] = d2
                    found_j[count] = j
                    found_n[count, 0] = n0
                    found_n[count, 1] = n1
                    found_n[count, 2] = n2
                    count += 1
    return count


@njit(cache=True, nogil=True, error_model="numpy")
def _kth_smallest(values, count, k):
    """Return the k-th smallest (k from 0) of ``values[:count]``, reordering them (quickselect)."""
    low, high = 0, count - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if k <= j:
            high = j
        elif k >= i:
            low = i
        else:
            break
    return values[k]


@njit(cache=True, nogil=True, error_model="numpy")
def _directed(lattices, frac, ptr, k, radius, tolerance, n_distances):
    """Return each target's own neighbors: (start [N+1], source, image, d2, limit2 [N], distances)."""
    n_atoms = frac.shape[0]
    start = np.zeros(n_atoms + 1, np.int64)
    limit2 = np.empty(n_atoms)
    distances = np.empty((n_atoms, n_distances))
    room = max(64, n_atoms * (k + 4 if k > 0 else 48))
    source = np.empty(room, np.int64)
    image = np.empty((room, 3), np.int32)
    d2 = np.empty(room)
    found_d2 = np.empty(512)
    found_j = np.empty(512, np.int64)
    found_n = np.empty((512, 3), np.int32)
    scratch = np.empty(512)
    wanted = max(k, n_distances)
    size = 0
    for crystal in range(lattices.shape[0]):
        first, last = ptr[crystal], ptr[crystal + 1]
        t = _triangular(lattices[crystal])
        volume = t[0, 0] * t[1, 1] * t[2, 2]
        if not (volume > 0.0 and np.isfinite(volume)):
            raise ValueError("a cell without volume has no neighbor list")
        search = radius
        if wanted > 0:
            expected = wanted + 2.0 * np.sqrt(wanted) + 2.0
            search = max(radius, (0.75 / np.pi * expected * volume / max(last - first, 1)) ** (1.0 / 3.0))
        for center in range(first, last):
            while True:
                count = _points_in_sphere(t, frac, first, last, center, search, found_d2, found_j, found_n)
                if count < 0:
                    capacity = 2 * found_d2.shape[0]
                    found_d2 = np.empty(capacity)
                    found_j = np.empty(capacity, np.int64)
                    found_n = np.empty((capacity, 3), np.int32)
                    scratch = np.empty(capacity)
                    continue
                if count < wanted:
                    search *= 1.25
                    continue
                limit, least2 = radius, 0.0
                if k > 0:
                    for m in range(count):
                        scratch[m] = found_d2[m]
                    least2 = _kth_smallest(scratch, count, k - 1)
                    limit = np.sqrt(least2) + tolerance
                if limit > search:
                    search = limit * (1.0 + 1e-9)
                    continue
                break
            limit2[center] = max(limit * limit, least2)  # the square of a root may lie one rounding below
            if n_distances > 0:
                for m in range(count):
                    scratch[m] = found_d2[m]
                _kth_smallest(scratch, count, n_distances - 1)
                nearest = np.sort(scratch[:n_distances])
                for m in range(n_distances):
                    distances[center, m] = np.sqrt(nearest[m])
            if size + count > source.shape[0]:
                room = 2 * source.shape[0] + count
                more_source = np.empty(room, np.int64)
                more_image = np.empty((room, 3), np.int32)
                more_d2 = np.empty(room)
                for e in range(size):  # copied one by one: a slice takes numba seconds to compile
                    more_source[e], more_d2[e] = source[e], d2[e]
                    for axis in range(3):
                        more_image[e, axis] = image[e, axis]
                source, image, d2 = more_source, more_image, more_d2
            for m in range(count):
                if found_d2[m] <= limit2[center]:
                    source[size] = found_j[m]
                    image[size, 0] = found_n[m, 0]
                    image[size, 1] = found_n[m, 1]
                    image[size, 2] = found_n[m, 2]
                    d2[size] = found_d2[m]
                    size += 1
            start[center + 1] = size
    return start, source, image, d2, limit2, distances


@njit(cache=True, nogil=True, error_model="numpy")
def _assemble(lattices, frac, ptr, start, source, image, d2, limit2, symmetric, repeat_self_images):
    """Write the edges sorted by target, with the reverses that ``symmetric`` adds and the repeats asked for."""
    n_atoms = frac.shape[0]
    offset = np.zeros(n_atoms + 1, np.int64)
    for i in range(n_atoms):
        for e in range(start[i], start[i + 1]):
            j = source[e]
            offset[i + 1] += 2 if repeat_self_images and j == i else 1
            if symmetric and d2[e] > limit2[j]:
                offset[j + 1] += 1
    for i in range(n_atoms):
        offset[i + 1] += offset[i]
    total = offset[n_atoms]
    out_source = np.empty(total, np.int64)
    out_target = np.empty(total, np.int64)
    out_image = np.empty((total, 3), np.int32)
    place = offset[:n_atoms].copy()
    for i in range(n_atoms):
        for e in range(start[i], start[i + 1]):
            j = source[e]
            for _ in range(2 if repeat_self_images and j == i else 1):
                out_source[place[i]] = j
                out_target[place[i]] = i
                for axis in range(3):
                    out_image[place[i], axis] = image[e, axis]
                place[i] += 1
            if symmetric and d2[e] > limit2[j]:
                out_source[place[j]] = i
                out_target[place[j]] = j
                for axis in range(3):
                    out_image[place[j], axis] = -image[e, axis]
                place[j] += 1
    vector = np.empty((total, 3))
    for crystal in range(lattices.shape[0]):
        lattice = lattices[crystal]
        for e in range(offset[ptr[crystal]], offset[ptr[crystal + 1]]):
            i, j = out_target[e], out_source[e]
            g0 = frac[i, 0] - frac[j, 0] - out_image[e, 0]
            g1 = frac[i, 1] - frac[j, 1] - out_image[e, 1]
            g2 = frac[i, 2] - frac[j, 2] - out_image[e, 2]
            for axis in range(3):
                vector[e, axis] = g0 * lattice[0, axis] + g1 * lattice[1, axis] + g2 * lattice[2, axis]
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
        k: keep each target's k nearest and all others no farther than the k-th plus ``tolerance``.
        radius: or else keep all within this many Å (≤). Exactly one of ``k`` and ``radius`` is given.
        tolerance: in Å; distances that differ by less are one shell.
        symmetric: add the reverse of every edge that lacks it (the union of the k-nearest relations).
        repeat_self_images: count an edge between an atom and its own image twice, as the published graphs do.
        n_distances: also return this many nearest distances of each atom.

    Returns:
        The edges sorted by target. The only pair left out is an atom with itself in its own cell.
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
    start, source, image, d2, limit2, distances = _directed(
        lattices, frac_coords, ptr, k or 0, float(radius or 0.0), tolerance, n_distances
    )
    found_source, found_target, found_image, vector = _assemble(
        lattices, frac_coords, ptr, start, source, image, d2, limit2, symmetric and k is not None, repeat_self_images
    )
    return Neighbors(found_source, found_target, found_image, vector, distances, np.sqrt(limit2))
