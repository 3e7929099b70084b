"""Crystals as flat arrays, and validity checks.

Shapes: ``B`` crystals, ``N`` atoms in total, crystal b has the atoms ``ptr[b] … ptr[b + 1] − 1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crysldnet.graphs.neighbors import neighbor_list

MAX_ATOMIC_NUMBER = 118
MIN_DISTANCE = 0.4
"""Å; closer atoms overlap."""
MIN_VOLUME_PER_ATOM = 0.5
"""Å³; no solid is denser (diamond has 5.7)."""
MAX_LENGTH = 10_000.0
"""Å; a longer lattice vector means a wrong unit."""
MAX_FRACTION = 1000.0
"""cells; a coordinate beyond has lost its precision, or isn't fractional"""


@dataclass(frozen=True)
class Crystals:
    """Any number of crystals.

    Attributes:
        lattice: [B, 3, 3] float64, rows are lattice vectors in Å.
        ptr: [B + 1] int64, first atom of each crystal.
        numbers: [N] uint8 atomic numbers.
        frac_coords: [N, 3] float32 fractional coordinates, not necessarily wrapped.
    """

    lattice: NDArray[np.float64]
    ptr: NDArray[np.int64]
    numbers: NDArray[np.uint8]
    frac_coords: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ptr) - 1

    @property
    def sizes(self) -> NDArray[np.int64]:
        """[B] number of atoms of each crystal."""
        return np.diff(self.ptr)

    @property
    def crystal(self) -> NDArray[np.int64]:
        """[N] the crystal of each atom."""
        return np.repeat(np.arange(len(self)), self.sizes)

    @property
    def positions(self) -> NDArray[np.float64]:
        """[N, 3] Cartesian coordinates in Å."""
        return np.einsum("ni,nij->nj", self.frac_coords.astype(np.float64), self.lattice[self.crystal])

    def take(self, index: NDArray[np.int64]) -> Crystals:
        """Copy the crystals at ``index`` in that order; the cost is independent of the size of the store."""
        begin = np.asarray(self.ptr[index])
        sizes = np.asarray(self.ptr[index + 1]) - begin
        ptr = np.concatenate([[0], np.cumsum(sizes)])
        atoms = np.arange(ptr[-1]) + np.repeat(begin - ptr[:-1], sizes)
        return Crystals(
            np.asarray(self.lattice[index]), ptr, np.asarray(self.numbers[atoms]), np.asarray(self.frac_coords[atoms])
        )


def from_lists(
    lattices: Sequence[NDArray[np.float64]],
    numbers: Sequence[NDArray[np.uint8]],
    frac_coords: Sequence[NDArray[np.float64]],
) -> Crystals:
    """Combine single crystals.

    Args:
        lattices: one [3, 3] per crystal, in Å.
        numbers: one [n] per crystal.
        frac_coords: one [n, 3] per crystal.
    """
    ptr = np.concatenate([[0], np.cumsum([len(z) for z in numbers])]).astype(np.int64)
    if not len(lattices):
        return Crystals(np.empty((0, 3, 3)), ptr, np.empty(0, np.uint8), np.empty((0, 3), np.float32))
    return Crystals(
        np.stack(lattices).astype(np.float64),
        ptr,
        np.concatenate(numbers).astype(np.uint8),
        np.concatenate(frac_coords).astype(np.float32),
    )


def concatenate(parts: Sequence[Crystals]) -> Crystals:
    """Concatenate crystals."""
    return Crystals(
        np.concatenate([part.lattice for part in parts]),
        np.concatenate([[0], np.cumsum(np.concatenate([part.sizes for part in parts]))]),
        np.concatenate([part.numbers for part in parts]),
        np.concatenate([part.frac_coords for part in parts]),
    )


def faults(crystals: Crystals, *, max_atoms: int | None = None) -> list[str | None]:
    """Return the fault of each crystal, or None.

    A crystal is invalid with no atoms, more than ``max_atoms``, an atomic number outside 1 to 118, a nonfinite
    lattice or coordinates, a cell without volume (or absurdly small or large: wrong unit), or two atoms closer than 0.4
    Å.
    """
    found: list[str | None] = [None] * len(crystals)

    def report(bad: NDArray, message: str, values: NDArray | None = None) -> None:
        for b in np.flatnonzero(bad):
            if found[b] is None:
                found[b] = message.format(None if values is None else values[b])

    sizes = crystals.sizes
    lattice_bad = np.asarray(~np.isfinite(crystals.lattice).all(axis=(1, 2)))
    coords_bad = np.zeros(len(crystals), bool)
    numbers_bad = np.zeros(len(crystals), bool)
    owner = crystals.crystal
    coords_bad[owner[~np.isfinite(crystals.frac_coords).all(axis=1)]] = True
    far = np.zeros(len(crystals), bool)
    far[owner[(np.abs(crystals.frac_coords) > MAX_FRACTION).any(axis=1)]] = True
    numbers_bad[owner[(crystals.numbers < 1) | (crystals.numbers > MAX_ATOMIC_NUMBER)]] = True
    safe = np.where(lattice_bad[:, None, None], np.eye(3), crystals.lattice)
    per_atom: NDArray = np.abs(np.linalg.det(safe)) / np.maximum(sizes, 1)
    lengths = np.linalg.norm(safe, axis=2).max(axis=1) if len(crystals) else np.empty(0)

    report(sizes == 0, "it has no atoms")
    if max_atoms is not None:
        report(sizes > max_atoms, f"it has {{}} atoms, over the limit of {max_atoms} (max_atoms)", sizes)
    report(lattice_bad, "its lattice has a value that is not finite")
    report(coords_bad, "a coordinate is not finite")
    report(far, f"an atom is over {MAX_FRACTION:g} cells away from the origin: are its coordinates fractional?")
    report(numbers_bad, f"an atomic number is not between 1 and {MAX_ATOMIC_NUMBER}")
    report(lengths > MAX_LENGTH, "a lattice vector is {:.3g} Å long: is the unit right?", lengths)
    report(per_atom < MIN_VOLUME_PER_ATOM, "its cell has {:.3g} Å³ per atom: flat, or not in Å?", per_atom)

    sound = np.array([b for b, fault in enumerate(found) if fault is None], np.int64)
    if len(sound):
        subset = crystals.take(sound)
        pairs = neighbor_list(subset.lattice, subset.frac_coords, subset.ptr, radius=MIN_DISTANCE)
        for edge in range(len(pairs.source)):
            i, j = int(pairs.target[edge]), int(pairs.source[edge])
            b = int(np.searchsorted(subset.ptr, i, side="right")) - 1
            first = subset.ptr[b]
            distance = float(np.linalg.norm(pairs.vector[edge]))
            found[sound[b]] = found[sound[b]] or (
                f"atoms {i - first + 1} and {j - first + 1} overlap: "
                f"they are {distance:.3f} Å apart (under {MIN_DISTANCE})"
            )
    return found


def damage(crystals: Crystals) -> str | None:
    """Return invalid content in a store's files, or None; its crystals were checked on writing."""
    sizes = crystals.sizes
    if crystals.ptr[0] != 0 or crystals.ptr[-1] != len(crystals.numbers) or (sizes < 1).any():
        first = int(np.argmax(sizes < 1))
        return f"ptr.bin doesn't ascend from 0 to {len(crystals.numbers)} (crystal {first} has {sizes[first]} atoms)"
    bounds: dict[str, tuple[NDArray, float, float]] = {
        "lattice": (crystals.lattice, -MAX_LENGTH, MAX_LENGTH),
        "numbers": (crystals.numbers, 1, MAX_ATOMIC_NUMBER),
        "frac_coords": (crystals.frac_coords, -MAX_FRACTION, MAX_FRACTION),
    }
    for name, (array, low, high) in bounds.items():
        if len(array) and not (array.min() >= low and array.max() <= high):  # also false for NaN
            place = np.unravel_index(np.argmin((array >= low) & (array <= high)), array.shape)
            crystal = place[0] if name == "lattice" else np.searchsorted(crystals.ptr, place[0], side="right") - 1
            return f"{name}.bin has {array[place]} (crystal {crystal}), which isn't between {low:g} and {high:g}"
    volume = np.abs(np.linalg.det(crystals.lattice))
    flat = ~(volume >= MIN_VOLUME_PER_ATOM * (1 - 1e-9) * sizes)
    return f"lattice.bin has a cell without volume (crystal {int(np.argmax(flat))})" if flat.any() else None
