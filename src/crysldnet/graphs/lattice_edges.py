"""Edges along lattice vectors, and the frame of three shortest lattice vectors.

Shapes: ``B`` crystals, ``N`` atoms, ``E`` directed edges, ``m`` lattice vectors per crystal.

K. Yan et al., "Periodic Graph Transformers for Crystal Material Property Prediction" (Matformer), NeurIPS 2022,
connects every atom to its own images along the cell; K. Yan et al., "Complete and Efficient Graph Transformers for
Crystal Material Property Prediction" (ComFormer), ICLR 2024, along the frame.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crysldnet.graphs.compiled import njit
from crysldnet.graphs.neighbors import Neighbors

CELL_IMAGES = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], np.int32)
"""a, b, c, a + b, a + c, b + c."""


@njit(inline="always", error_model="numpy")
def _cross(a, b):
    """Return a × b as three numbers; numpy's version, and sums and products, take numba seconds to compile."""
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@njit(inline="always", error_model="numpy")
def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@njit(inline="always", error_model="numpy")
def _along(image, lattice):
    """Return the lattice vector for integers, as three numbers."""
    n0, n1, n2 = image
    return (
        n0 * lattice[0, 0] + n1 * lattice[1, 0] + n2 * lattice[2, 0],
        n0 * lattice[0, 1] + n1 * lattice[1, 1] + n2 * lattice[2, 1],
        n0 * lattice[0, 2] + n1 * lattice[1, 2] + n2 * lattice[2, 2],
    )


@njit(error_model="numpy")
def _sort(order, first, last, by):
    """Stable sort of ``order[first:last]`` by the values it points to."""
    for place in range(first + 1, last):
        moved, back = order[place], place
        while back > first and by[order[back - 1]] > by[moved]:
            order[back] = order[back - 1]
            back -= 1
        order[back] = moved


@njit(inline="always", error_model="numpy")
def _three(images, place):
    return np.int64(images[place, 0]), np.int64(images[place, 1]), np.int64(images[place, 2])


@njit(cache=True, nogil=True, error_model="numpy")
def _reduced(lattice):
    """Return the integers [3, 3] of a Minkowski-reduced basis of a lattice, shortest vector first.

    The greedy algorithm of P. Q. Nguyen and D. Stehlé, "Low-dimensional lattice basis reduction revisited" (2009).
    """
    basis, images = lattice.copy(), np.eye(3)
    while True:
        for one, other in ((0, 1), (1, 2), (0, 1)):
            if _dot(basis[other], basis[other]) < _dot(basis[one], basis[one]):
                for axis in range(3):
                    basis[one, axis], basis[other, axis] = basis[other, axis], basis[one, axis]
                    images[one, axis], images[other, axis] = images[other, axis], images[one, axis]
        a, b, c = basis
        aa, ab, bb, ac, bc, cc = _dot(a, a), _dot(a, b), _dot(b, b), _dot(a, c), _dot(b, c), _dot(c, c)
        turn = np.floor(ab / aa + 0.5)
        if abs(turn) > 0.0 and bb - 2.0 * turn * ab + turn * turn * aa < bb * (1.0 - 1e-12):
            for axis in range(3):
                basis[1, axis] -= turn * basis[0, axis]
                images[1, axis] -= turn * images[0, axis]
            continue
        area = aa * bb - ab * ab
        low_a, low_b = np.floor((ac * bb - bc * ab) / area), np.floor((bc * aa - ac * ab) / area)
        least, best_a, best_b = cc * (1.0 - 1e-12), 0.0, 0.0
        for by_a in (low_a, low_a + 1.0):
            for by_b in (low_b, low_b + 1.0):
                length2 = cc + by_a * (by_a * aa + 2.0 * (by_b * ab - ac)) + by_b * (by_b * bb - 2.0 * bc)
                if length2 < least:
                    least, best_a, best_b = length2, by_a, by_b
        if best_a == 0.0 and best_b == 0.0:
            return images.astype(np.int64)
        for axis in range(3):
            basis[2, axis] -= best_a * basis[0, axis] + best_b * basis[1, axis]
            images[2, axis] -= best_a * images[0, axis] + best_b * images[1, axis]


@njit(cache=True, nogil=True, error_model="numpy")
def _sorted_images(lattice, tolerance):
    """Return short lattice vectors, including the three shortest independent ones, sorted by length, as integers [26,
    3].

    In a reduced basis their components are −1, 0 and 1 for any cell. Lengths that differ by less than the
    tolerance count as equal; equal ones keep the order of their integers.
    """
    basis, count = _reduced(lattice), 26
    keys, images, found = np.empty(count), np.empty((count, 3), np.int64), np.empty(count)
    place = 0
    for n in range(27):
        if n == 13:  # the zero vector
            continue
        by0, by1, by2 = n // 9 - 1, n // 3 % 3 - 1, n % 3 - 1
        for axis in range(3):
            images[place, axis] = by0 * basis[0, axis] + by1 * basis[1, axis] + by2 * basis[2, axis]
        place += 1
    order = np.arange(count)
    for axis in range(2, -1, -1):
        for place in range(count):
            keys[place] = images[place, axis]
        _sort(order, 0, count, keys)
    images = images[order]
    for place in range(count):
        vector = _along(_three(images, place), lattice)
        found[place] = np.sqrt(_dot(vector, vector))
    order = np.arange(count)
    _sort(order, 0, count, found)
    first = 0
    for place in range(1, count + 1):  # sort a run of equal lengths by integers
        if place == count or found[order[place]] - found[order[place - 1]] > tolerance:
            if tolerance > 0.0:
                _sort(order, first, place, np.arange(count))
            first = place
    ordered = np.empty((count, 3), np.int32)
    for place in range(count):
        for axis in range(3):
            ordered[place, axis] = images[order[place], axis]
    return ordered


@njit(cache=True, nogil=True, error_model="numpy")
def _reduced_bases(lattices):
    bases = np.empty((lattices.shape[0], 3, 3), np.int64)
    for crystal in range(lattices.shape[0]):
        basis = _reduced(lattices[crystal])
        for row in range(3):
            for axis in range(3):
                bases[crystal, row, axis] = basis[row, axis]
    return bases


def reduced_bases(lattices: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return Minkowski-reduced bases [B, 3, 3] of lattices [B, 3, 3], rows being integer multiples of their vectors."""
    return _reduced_bases(np.ascontiguousarray(lattices, np.float64))


@njit(cache=True, nogil=True, error_model="numpy")
def _frame_images(lattices, tolerance):
    """Return the integers [B, 3, 3] of each crystal's frame; see :func:`frames`."""
    frames = np.empty((lattices.shape[0], 3, 3), np.int32)
    for crystal in range(lattices.shape[0]):
        lattice = lattices[crystal]
        images = _sorted_images(lattice, tolerance)
        one = _three(images, 0)
        second = 1
        while second < len(images) - 1 and _cross(one, _three(images, second)) == (0, 0, 0):
            second += 1
        two = _three(images, second)
        normal = _cross(one, two)
        third = second
        while third < len(images) - 1 and _dot(normal, _three(images, third)) == 0:
            third += 1
        three = _three(images, third)
        v1, v2, v3 = _along(one, lattice), _along(two, lattice), _along(three, lattice)
        slack = tolerance * np.sqrt(_dot(v1, v1))
        sign2 = -1 if _dot(v1, v2) < -slack * np.sqrt(_dot(v2, v2)) else 1
        sign3 = -1 if _dot(v1, v3) < -slack * np.sqrt(_dot(v3, v3)) else 1
        sign = 1 if sign2 * sign3 * _dot(_cross(v1, v2), v3) >= 0.0 else -1
        for axis in range(3):
            frames[crystal, 0, axis] = sign * one[axis]
            frames[crystal, 1, axis] = sign * sign2 * two[axis]
            frames[crystal, 2, axis] = sign * sign3 * three[axis]
    return frames


def frames(lattices: NDArray[np.floating], tolerance: float) -> NDArray[np.int32]:
    """Find three short lattice vectors that span each lattice's space, as a right-handed frame.

    v₁ is the shortest lattice vector, v₂ the next that isn't collinear, v₃ the next that isn't coplanar. v₂ and v₃ are
    inverted if more than 90° from v₁; all three change sign if left-handed. For a lattice without ties they depend
    neither on the sign of the first choice nor on the choice of cell. With ties (all cubic, tetragonal and hexagonal
    lattices) the order of the integers decides, so they depend on the cell.

    Args:
        lattices: [B, 3, 3] in Å, rows are lattice vectors.
        tolerance: Å, tolerance for equal lengths, and tolerance of the cosine of a right angle; 0 leaves both to
            rounding, as in the published code.

    Returns:
        [B, 3, 3] integers n, row m of crystal b being the vector n[b, m] · lattice[b].
    """
    return _frame_images(np.ascontiguousarray(lattices, np.float64), tolerance)


@njit(cache=True, nogil=True, error_model="numpy")
def _added(lattices, ptr, start, source, image, vector, images, wanted):
    """Append each atom's missing edges along ± its crystal's images."""
    n_atoms = ptr[-1]
    room = len(source) + 2 * images.shape[1] * n_atoms
    out_source, out_target = np.empty(room, np.int64), np.empty(room, np.int64)
    out_image, out_vector = np.empty((room, 3), np.int32), np.empty((room, 3))
    size = 0
    for crystal in range(lattices.shape[0]):
        for atom in range(ptr[crystal], ptr[crystal + 1]):
            for e in range(start[atom], start[atom + 1]):
                out_source[size], out_target[size] = source[e], atom
                for axis in range(3):
                    out_image[size, axis], out_vector[size, axis] = image[e, axis], vector[e, axis]
                size += 1
            if not wanted[crystal]:
                continue
            for m in range(images.shape[1]):
                n = images[crystal, m]
                there = False
                for e in range(start[atom], start[atom + 1]):
                    if source[e] == atom and image[e, 0] == n[0] and image[e, 1] == n[1] and image[e, 2] == n[2]:
                        there = True
                        break
                if there:
                    continue
                for sign in (1, -1):
                    out_source[size], out_target[size] = atom, atom
                    for axis in range(3):
                        out_image[size, axis] = sign * n[axis]
                        out_vector[size, axis] = -sign * (
                            n[0] * lattices[crystal, 0, axis]
                            + n[1] * lattices[crystal, 1, axis]
                            + n[2] * lattices[crystal, 2, axis]
                        )
                    size += 1
    return out_source[:size], out_target[:size], out_image[:size], out_vector[:size]


def add_lattice_edges(
    neighbors: Neighbors,
    lattices: NDArray[np.floating],
    ptr: NDArray[np.int64],
    images: NDArray[np.int32],
    wanted: NDArray[np.bool_],
) -> Neighbors:
    """Connect every atom to its own images at ±n, unless already connected.

    Args:
        neighbors: the edges so far, sorted by target.
        lattices: [B, 3, 3] in Å.
        ptr: [B + 1] first atom of each crystal.
        images: [B, m, 3] the integers n.
        wanted: [B] crystals that get these edges.
    """
    start = np.searchsorted(neighbors.target, np.arange(ptr[-1] + 1))
    source, target, image, vector = _added(
        np.ascontiguousarray(lattices, np.float64),
        np.ascontiguousarray(ptr, np.int64),
        start,
        neighbors.source,
        neighbors.image,
        neighbors.vector,
        np.ascontiguousarray(images),
        wanted,
    )
    return neighbors._replace(source=source, target=target, image=image, vector=vector)
