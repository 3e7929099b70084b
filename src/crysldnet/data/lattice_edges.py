"""Edges along lattice vectors, and the frame of three shortest lattice vectors.

Shapes: ``B`` crystals, ``N`` atoms, ``E`` directed edges, ``m`` lattice vectors a crystal.

K. Yan et al., "Periodic Graph Transformers for Crystal Material Property Prediction" (Matformer), NeurIPS 2022, joins
every atom to its own images along the cell; K. Yan et al., "Complete and Efficient Graph Transformers for Crystal
Material Property Prediction" (ComFormer), ICLR 2024, along the frame.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from crysldnet.data.neighbors import Neighbors

CELL_IMAGES = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], np.int32)
"""a, b, c, a + b, a + c, b + c."""


@njit(cache=True, nogil=True, error_model="numpy")
def _sorted_images(lattice, tolerance):
    """Return the lattice vectors as long as the longest edge of the cell at most, shortest first, as integers [n, 3].

    Lengths that differ by less than the tolerance count as equal; equal ones keep the order of their integers.
    """
    lengths = np.sqrt((lattice**2).sum(axis=1))
    radius = lengths.max() + 0.01
    inverse = np.linalg.inv(lattice)
    reach = np.empty(3, np.int64)
    for axis in range(3):
        reach[axis] = int(np.floor(radius * np.sqrt((inverse[:, axis] ** 2).sum()) + 1e-9))
    room = (2 * reach[0] + 1) * (2 * reach[1] + 1) * (2 * reach[2] + 1)
    images, found = np.empty((room, 3), np.int32), np.empty(room)
    count = 0
    for n0 in range(-reach[0], reach[0] + 1):
        for n1 in range(-reach[1], reach[1] + 1):
            for n2 in range(-reach[2], reach[2] + 1):
                x = n0 * lattice[0, 0] + n1 * lattice[1, 0] + n2 * lattice[2, 0]
                y = n0 * lattice[0, 1] + n1 * lattice[1, 1] + n2 * lattice[2, 1]
                z = n0 * lattice[0, 2] + n1 * lattice[1, 2] + n2 * lattice[2, 2]
                length = np.sqrt(x * x + y * y + z * z)
                if length <= radius and not (n0 == 0 and n1 == 0 and n2 == 0):
                    images[count, 0], images[count, 1], images[count, 2] = n0, n1, n2
                    found[count] = length
                    count += 1
    order = np.argsort(found[:count], kind="mergesort")
    first = 0
    for place in range(1, count + 1):  # a run of equal lengths goes back to the order of its integers
        if place == count or found[order[place]] - found[order[place - 1]] > tolerance:
            order[first:place] = np.sort(order[first:place]) if tolerance > 0.0 else order[first:place]
            first = place
    return images[:count][order]


@njit(cache=True, nogil=True, error_model="numpy")
def _frame_images(lattices, tolerance):
    """Return the integers [B, 3, 3] of each crystal's frame; see :func:`frames`."""
    frames = np.empty((lattices.shape[0], 3, 3), np.int32)
    for crystal in range(lattices.shape[0]):
        lattice = lattices[crystal]
        images = _sorted_images(lattice, tolerance)
        one = images[0].astype(np.int64)
        second = 1
        while second < len(images) - 1:
            two = images[second].astype(np.int64)
            if np.abs(np.cross(one, two)).max() > 0:
                break
            second += 1
        two = images[second].astype(np.int64)
        normal = np.cross(one, two)
        third = second
        while third < len(images) - 1:
            if (normal * images[third]).sum() != 0:
                break
            third += 1
        three = images[third].astype(np.int64)
        v1, v2, v3 = (
            one.astype(np.float64) @ lattice,
            two.astype(np.float64) @ lattice,
            three.astype(np.float64) @ lattice,
        )
        slack = tolerance * np.sqrt((v1**2).sum())
        if (v1 * v2).sum() < -slack * np.sqrt((v2**2).sum()):
            two, v2 = -two, -v2
        if (v1 * v3).sum() < -slack * np.sqrt((v3**2).sum()):
            three, v3 = -three, -v3
        sign = 1 if (np.cross(v1, v2) * v3).sum() >= 0.0 else -1
        frames[crystal, 0], frames[crystal, 1], frames[crystal, 2] = sign * one, sign * two, sign * three
    return frames


def frames(lattices: NDArray[np.floating], tolerance: float) -> NDArray[np.int32]:
    """Find three short lattice vectors that span each lattice's space, as a right-handed frame.

    v₁ is the shortest lattice vector, v₂ the next that isn't collinear, v₃ the next that isn't coplanar. v₂ and v₃
    are turned to within 90° of v₁; all three change sign where they are left-handed. For a lattice without ties they
    depend neither on the sign of the first pick nor on the choice of cell. With ties (all cubic, tetragonal and
    hexagonal lattices) the order of the integers decides, so they depend on the cell.

    Args:
        lattices: [B, 3, 3] in Å, rows are lattice vectors.
        tolerance: Å by which equal lengths may differ, and the cosine by which a right angle may; 0 leaves both to
            rounding, as the published code does.

    Returns:
        [B, 3, 3] integers n, row m of crystal b being the vector n[b, m] · lattice[b].
    """
    return _frame_images(np.ascontiguousarray(lattices, np.float64), tolerance)


@njit(cache=True, nogil=True, error_model="numpy")
def _added(lattices, ptr, start, source, image, vector, images, wanted):
    """Append each atom's edges along ± its crystal's images, those that it doesn't have yet."""
    n_atoms = ptr[-1]
    room = len(source) + 2 * images.shape[1] * n_atoms
    out_source, out_target = np.empty(room, np.int64), np.empty(room, np.int64)
    out_image, out_vector = np.empty((room, 3), np.int32), np.empty((room, 3))
    size = 0
    for crystal in range(lattices.shape[0]):
        for atom in range(ptr[crystal], ptr[crystal + 1]):
            for e in range(start[atom], start[atom + 1]):
                out_source[size], out_target[size] = source[e], atom
                out_image[size], out_vector[size] = image[e], vector[e]
                size += 1
            if not wanted[crystal]:
                continue
            for m in range(images.shape[1]):
                n = images[crystal, m]
                there = False
                for e in range(start[atom], start[atom + 1]):
                    if source[e] == atom and (image[e] == n).all():
                        there = True
                        break
                if there:
                    continue
                for sign in (1, -1):
                    out_source[size], out_target[size] = atom, atom
                    out_image[size] = sign * n
                    for axis in range(3):
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
    """Join every atom to its own images at ±n, unless it is already.

    Args:
        neighbors: the edges so far, sorted by target.
        lattices: [B, 3, 3] in Å.
        ptr: [B + 1] first atom of each crystal.
        images: [B, m, 3] the integers n.
        wanted: [B] the crystals that get them.
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
