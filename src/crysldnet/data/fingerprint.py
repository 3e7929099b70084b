"""What a crystal is known by in another data set: its id, its reduced formula, its geometry.

Shapes: ``B`` crystals, ``D`` = 12 distances. Ids and formulas are kept as 64-bit hashes, so the fingerprints of a
million crystals take 42 MB and can travel inside a checkpoint.

The geometry is the logarithm of the volume of an atom, and an atom's distances to some of its 24 nearest neighbors,
averaged over the atoms of the cell (the average minimum distance: D. Widdowson et al., MATCH 87, 529, 2022) and divided
by the cube root of that volume. It doesn't depend on the choice of the cell or the order of the atoms, and moves little
when atoms do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from crysldnet.data.crystals import Crystals
from crysldnet.data.elements import reduced_formula
from crysldnet.data.neighbors import neighbor_list
from crysldnet.data.store import CrystalStore

RANKS = (1, 4, 8, 12, 13, 14, 15, 17, 19, 21, 23, 24)
"""Which neighbors, counted from the nearest; those after the twelfth tell close packings from each other."""
_CHUNK = 4096


@dataclass(frozen=True)
class Tolerance:
    """How far two geometries may differ.

    Attributes:
        log_volume: of the volumes of an atom.
        distance: of each averaged distance, in units of the cube root of the volume of an atom.
    """

    log_volume: float
    distance: float


SIMILAR = Tolerance(0.05, 0.02)
"""Most crystals of one formula that are so alike are the same structure, and most of the same structure are so alike
(experiments/leakage)."""
POSSIBLE = Tolerance(0.4, 0.25)
"""Wide enough that pymatgen's StructureMatcher matched no pair of real crystals beyond it (experiments/leakage)."""


@dataclass(frozen=True)
class Fingerprints:
    """The fingerprints of any number of crystals.

    Attributes:
        ids: [B] int64 hashes of the material ids.
        formulas: [B] int64 hashes of the reduced formulas.
        geometry: [B, 1 + D] float16.
    """

    ids: NDArray[np.int64]
    formulas: NDArray[np.int64]
    geometry: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, store: CrystalStore, rows: NDArray[np.int64] | None = None) -> Fingerprints:
        """Take the fingerprints of some rows of a store, by default of all."""
        rows = np.arange(len(store)) if rows is None else rows
        parts = [np.empty((0, 1 + len(RANKS)), np.float16)]
        formulas: list[str] = []
        for start in range(0, len(rows), _CHUNK):
            crystals = store.crystals.take(rows[start : start + _CHUNK])
            formulas += formulas_of(crystals)
            parts.append(geometry_of(crystals))
        return cls(hashes(store.ids_at(rows)), hashes(formulas), np.concatenate(parts))

    def joined(self, other: Fingerprints) -> Fingerprints:
        """Return those of both, each once."""
        ids = np.concatenate([self.ids, other.ids])
        formulas = np.concatenate([self.formulas, other.formulas])
        geometry = np.concatenate([self.geometry, other.geometry])
        rows = np.concatenate([part.reshape(len(ids), -1).view(np.uint8) for part in (ids, formulas, geometry)], axis=1)
        _, first = np.unique(np.ascontiguousarray(rows).view(f"V{rows.shape[1]}"), return_index=True)
        first = np.sort(first)
        return Fingerprints(ids[first], formulas[first], geometry[first])


def hashes(texts: Iterable[str]) -> NDArray[np.int64]:
    """Return the first 8 bytes of the sha256 of each text, as integers."""
    digests = b"".join(hashlib.sha256(text.encode()).digest()[:8] for text in texts)
    return np.frombuffer(digests, "<i8").astype(np.int64)


def formulas_of(crystals: Crystals) -> list[str]:
    """Return each crystal's reduced formula."""
    ptr, numbers = crystals.ptr.tolist(), np.asarray(crystals.numbers)
    return [reduced_formula(numbers[begin:end]) for begin, end in pairwise(ptr)]


def volumes_per_atom(crystals: Crystals) -> NDArray[np.float64]:
    """[B] in Å³."""
    return np.abs(np.linalg.det(crystals.lattice)) / crystals.sizes


def geometry_of(crystals: Crystals) -> NDArray[np.float16]:
    """[B, 1 + D] logarithm of the volume of an atom in Å³, then the averaged distances over its cube root."""
    if not len(crystals):
        return np.empty((0, 1 + len(RANKS)), np.float16)
    volume = volumes_per_atom(crystals)
    nearest = neighbor_list(crystals.lattice, crystals.frac_coords, crystals.ptr, k=1, n_distances=RANKS[-1]).distances
    mean = np.add.reduceat(nearest[:, np.array(RANKS) - 1], crystals.ptr[:-1], axis=0) / crystals.sizes[:, None]
    return np.concatenate([np.log(volume)[:, None], mean / np.cbrt(volume)[:, None]], axis=1).astype(np.float16)


def candidates(a: Fingerprints, b: Fingerprints, tolerance: Tolerance) -> NDArray[np.int64]:
    """[M, 2] indices in ``a`` and ``b`` of crystals with the same formula and geometries within the tolerance."""
    order = np.argsort(b.formulas, kind="stable")
    keys, geometry = b.formulas[order], b.geometry[order].astype(np.float32)
    first = np.searchsorted(keys, a.formulas, side="left")
    last = np.searchsorted(keys, a.formulas, side="right")
    limit = np.array([tolerance.log_volume, *[tolerance.distance] * (a.geometry.shape[1] - 1)], np.float32)
    pairs = [np.empty((0, 2), np.int64)]
    for i in np.flatnonzero(last > first):
        near = (np.abs(geometry[first[i] : last[i]] - a.geometry[i].astype(np.float32)) <= limit).all(axis=1)
        found = order[first[i] : last[i]][near]
        pairs.append(np.stack([np.full(len(found), i), found], axis=1))
    return np.concatenate(pairs)


def overlap(a: Fingerprints, b: Fingerprints) -> dict[str, int]:
    """Count the crystals of ``a`` that ``b`` has too.

    Returns:
        ``ids`` and ``formulas`` that are shared, and ``similar``: same formula, geometries within :data:`SIMILAR`.
    """
    return {
        "ids": int(np.isin(a.ids, b.ids).sum()),
        "formulas": int(np.isin(a.formulas, b.formulas).sum()),
        "similar": len(np.unique(candidates(a, b, SIMILAR)[:, 0])),
    }
