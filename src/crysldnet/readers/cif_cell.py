"""Generate all atoms of a cell from a CIF's sites and symmetry operations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crysldnet.errors import DataError
from crysldnet.readers.cif_symmetry import Operations

NOTE_MOVED = "have atoms beside a special position of their space group, which were moved onto it"

_SAME = 0.05
"""Å; closer images of an atom are one atom on a special position, written with few digits."""
_MOVED = 0.01
"""Å; moving an atom onto its special position by more than this is noted."""
_GRID = 1 << 16
"""steps per cell edge for distinguishing images on special positions"""


class Sites(NamedTuple):
    """Atomic numbers [S] and fractional coordinates [S, 3] of the listed sites."""

    numbers: NDArray[np.uint8]
    frac_coords: NDArray[np.float64]


class Cell(NamedTuple):
    """All atoms of a cell: site [N], atomic numbers [N], fractional coordinates [N, 3], and the number of symmetry
    operations.
    """

    site: NDArray[np.int64]
    numbers: NDArray[np.uint8]
    frac_coords: NDArray[np.float64]
    operations: int


def expand(sites: Sites, operations: Operations, lattice: NDArray[np.float64], notes: list[str]) -> Cell:
    """Return all atoms of the cell.

    An atom on a special position occurs once. It is moved onto the position exactly, to the mean of its images under
    the operations that keep it in place, because files give 0.3333 for 1/3.

    Raises:
        DataError: two sites give the same atom, or there are too many.
    """
    rotations, translations = operations[:2]
    numbers, frac_coords = sites
    count = len(rotations)
    if len(numbers) * count > 4_000_000 or len(numbers) >= 1 << 14:
        raise DataError(f"it has {len(numbers)} sites and {count} symmetry operations, more than can be expanded")
    frac_coords = frac_coords - np.floor(frac_coords)
    images, multiplicity = frac_coords[:, None], np.ones(len(numbers), np.int64)
    if count > 1:
        images, multiplicity = _images(frac_coords, rotations, translations, lattice, notes)
    # the offset keeps decimal fractions and multiples of 1/24 away from the boundaries between steps
    step = np.floor((images - np.floor(images)) * _GRID + 0.3779645).astype(np.int64) % _GRID
    keys = ((step[..., 0] * _GRID + step[..., 1]) * _GRID + step[..., 2]).reshape(-1)
    order = keys.argsort(kind="stable")
    ordered = keys[order]
    first = order[np.concatenate([[True], ordered[1:] != ordered[:-1]])]
    first.sort()
    if len(first) != (count // multiplicity).sum():
        raise DataError(
            "two sites stand at the same place: a disordered site, which needs an ordered approximation, "
            "or atoms listed in full beside symmetry operations that make them again"
        )
    return Cell(first // count, numbers[first // count], images.reshape(-1, 3)[first], count)


def _images(
    frac_coords: NDArray[np.float64],
    rotations: NDArray,
    translations: NDArray,
    lattice: NDArray[np.float64],
    notes: list[str],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the images [S, M, 3] of sites, and how many of them are the same atom."""
    images = np.einsum("mij,sj->smi", rotations, frac_coords) + translations
    near = images - np.rint(images - frac_coords[:, None])  # the copy of each image nearest to its site
    away = (near - frac_coords[:, None]) @ lattice
    stays = (away * away).sum(axis=2) < _SAME**2
    multiplicity = stays.sum(axis=1)
    special = multiplicity > 1
    if special.any():
        mean = (near * stays[..., None]).sum(axis=1)[special] / multiplicity[special, None]
        if np.linalg.norm((mean - frac_coords[special]) @ lattice, axis=1).max() > _MOVED:
            notes.append(NOTE_MOVED)
        images[special] = np.einsum("mij,sj->smi", rotations, mean) + translations
    return images, multiplicity


def gives_same(cell: Cell, operations: Operations, sites: Sites, lattice: NDArray[np.float64]) -> bool:
    """Return whether operations generate the same atoms from the listed sites."""
    from scipy.spatial import cKDTree

    numbers, frac_coords = sites
    if len(numbers) * len(operations.rotations) > 1_000_000:
        return False
    images = np.einsum("mij,sj->smi", operations.rotations, frac_coords) + operations.translations
    near = cKDTree(cell.frac_coords % 1.0 % 1.0, boxsize=1.0).query(images.reshape(-1, 3) % 1.0 % 1.0)[1]
    away = images.reshape(-1, 3) - cell.frac_coords[near]
    same = np.linalg.norm((away - np.rint(away)) @ lattice, axis=1) < _SAME
    same &= np.repeat(numbers, len(operations.rotations)) == cell.numbers[near]
    return bool(same.all()) and len(np.unique(near)) == len(cell.numbers)
