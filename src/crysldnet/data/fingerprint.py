"""Fingerprints to find crystals in other data sets: id, reduced formula, geometry.

Shapes: ``B`` crystals, ``D`` = 12 distances. Ids and formulas are 64-bit hashes. In model files a fingerprint is packed
into 8 bytes.

The geometry is the logarithm of the volume per atom, and an atom's distances to some of its 24 nearest neighbors,
averaged over the atoms of the cell (the average minimum distance: D. Widdowson et al., MATCH 87, 529, 2022) and divided
by the cube root of that volume. It is invariant to choice of cell and atom order, and varies little with small
displacements.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crysldnet.data.elements import formulas_of, hashes
from crysldnet.data.store import CrystalStore
from crysldnet.graphs.crystals import Crystals
from crysldnet.graphs.neighbors import neighbor_list

RANKS = (1, 4, 8, 12, 13, 14, 15, 17, 19, 21, 23, 24)
"""Ranks of neighbors, counted from the nearest; those after the twelfth distinguish close packings."""
_CHUNK = 4096
_PAIRS = 1 << 20
_PACKED = [0, *(1 + RANKS.index(rank) for rank in (14, 19))]
"""Indices of the three packed numbers of a geometry: of all choices of two distances, these best distinguish crystals
with the same formula (experiments/leakage).
"""
_FORMULA, _ID, _NUMBER = 36, 16, 4
"""Bits of the formula hash, the id hash and each of those numbers."""


@dataclass(frozen=True)
class Tolerance:
    """Maximum difference of two geometries.

    Attributes:
        log_volume: for the logarithm of the volume per atom.
        distance: for each averaged distance, in units of the cube root of the volume per atom.
    """

    log_volume: float
    distance: float


SIMILAR = Tolerance(0.05, 0.02)
"""Most crystals with the same formula within this tolerance have the same structure, and vice versa
(experiments/leakage).
"""
POSSIBLE = Tolerance(0.4, 0.25)
"""So wide that pymatgen's StructureMatcher matched no pair of real crystals beyond it (experiments/leakage)."""


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
        """Compute the fingerprints of some rows of a store, by default all."""
        rows = np.arange(len(store)) if rows is None else rows
        formulas = hashes(formulas_of(store.crystals, rows))
        return cls(hashes(store.ids_at(rows)), formulas, geometries_of(store.crystals, rows))

    def packed(self) -> NDArray[np.uint64]:
        """[B] formula, id and geometry in 36, 16 and 12 bits, starting with the highest.

        Formula and id are the highest bits of their hashes. The geometry is three numbers of 4 bits: the logarithm of
        the volume per atom, and the distances to the 14th and 19th neighbor, in whole steps of :data:`SIMILAR`, modulo
        16. Two crystals within SIMILAR are at most one step apart in each.
        """
        steps = np.array([SIMILAR.log_volume, *[SIMILAR.distance] * (len(_PACKED) - 1)], np.float32).astype(np.float64)
        numbers = np.floor(self.geometry[:, _PACKED] / steps).astype(np.int64) % (1 << _NUMBER)
        code: NDArray[np.uint64] = self.formulas.view(np.uint64) >> np.uint64(64 - _FORMULA)
        code = code << np.uint64(_ID) | self.ids.view(np.uint64) >> np.uint64(64 - _ID)
        for number in numbers.T.astype(np.uint64):
            code = code << np.uint64(_NUMBER) | number
        return code


def geometries_of(crystals: Crystals, rows: NDArray[np.int64]) -> NDArray[np.float16]:
    """Return [B, 1 + D] geometries of crystals, computed on all cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [rows[start : start + _CHUNK] for start in range(0, max(len(rows), 1), _CHUNK)]
    with ThreadPoolExecutor(min(cores, len(parts))) as threads:
        return np.concatenate(list(threads.map(lambda part: geometry_of(crystals.take(part)), parts)))


def volumes_per_atom(crystals: Crystals) -> NDArray[np.float64]:
    """Return [B] volumes per atom in Å³."""
    return np.abs(np.linalg.det(crystals.lattice)) / crystals.sizes


def geometry_of(crystals: Crystals) -> NDArray[np.float16]:
    """Return [B, 1 + D] logarithm of the volume per atom in Å³, then averaged distances over its cube root."""
    if not len(crystals):
        return np.empty((0, 1 + len(RANKS)), np.float16)
    volume = volumes_per_atom(crystals)
    nearest = neighbor_list(crystals.lattice, crystals.frac_coords, crystals.ptr, k=1, n_distances=RANKS[-1]).distances
    mean = np.add.reduceat(nearest[:, np.array(RANKS) - 1], crystals.ptr[:-1], axis=0) / crystals.sizes[:, None]
    return np.concatenate([np.log(volume)[:, None], mean / np.cbrt(volume)[:, None]], axis=1).astype(np.float16)


def candidates(a: Fingerprints, b: Fingerprints, tolerance: Tolerance) -> NDArray[np.int64]:
    """Return [M, 2] indices in ``a`` and ``b`` of crystals with equal formulas and geometries within tolerance."""
    limit = np.array([tolerance.log_volume, *[tolerance.distance] * (a.geometry.shape[1] - 1)], np.float32)
    pairs = [np.empty((0, 2), np.int64)]
    for i, j in _equal(a.formulas, b.formulas):
        near = (np.abs(b.geometry[j].astype(np.float32) - a.geometry[i].astype(np.float32)) <= limit).all(axis=1)
        pairs.append(np.stack([i[near], j[near]], axis=1))
    return np.concatenate(pairs)


def _equal(a: NDArray, b: NDArray) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield the indices of all pairs of equal values in order, about a million pairs at a time."""
    order = np.argsort(b, kind="stable")
    first, last = (np.searchsorted(b, a, side=side, sorter=order) for side in ("left", "right"))
    shared = np.flatnonzero(last > first)
    part = np.cumsum(last[shared] - first[shared]) // _PAIRS
    for rows in np.split(shared, np.flatnonzero(np.diff(part)) + 1):
        counts = last[rows] - first[rows]
        before = np.cumsum(counts) - counts
        yield np.repeat(rows, counts), order[np.arange(counts.sum()) + np.repeat(first[rows] - before, counts)]


def shared(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> dict[str, NDArray[np.bool_]]:
    """Return which crystals of ``a`` are also in ``b``; both are packed fingerprints.

    Returns:
        [B] shared ``formulas``; shared ``ids`` with the same formula; and ``similar``: same formula and geometries at
        most
        one step of :data:`SIMILAR` apart. None is missed. Hashes of different formulas and ids may agree by chance, and
        one
        step is up to twice SIMILAR; experiments/leakage measures how often.
    """
    found = {name: np.zeros(len(a), bool) for name in ("ids", "formulas", "similar")}
    numbers = _NUMBER * len(_PACKED)
    for i, j in _equal(a >> (_ID + numbers), b >> (_ID + numbers)):
        one, other = a[i], b[j]
        near = np.ones(len(i), bool)
        for place in range(0, numbers, _NUMBER):
            near &= ((one >> place) - (other >> place) + np.uint64(1)) % (1 << _NUMBER) <= 2
        found["formulas"][i] = True
        found["ids"][i[one >> numbers == other >> numbers]] = True
        found["similar"][i[near]] = True
    return found


def overlap(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> dict[str, int]:
    """Count the results of :func:`shared`."""
    return {name: int(which.sum()) for name, which in shared(a, b).items()}


def known(
    crystals: Crystals, ids: Sequence[str], formulas: Sequence[str], among: NDArray[np.uint64]
) -> NDArray[np.bool_]:
    """Return [B] which crystals are among sorted packed fingerprints, by formula and either id or similar geometry.

    The geometry is computed only for crystals with matching formulas.
    """
    keys, below = hashes(formulas), np.uint64((1 << (64 - _FORMULA)) - 1)
    first = np.searchsorted(among, keys.view(np.uint64) & ~below)
    last = np.searchsorted(among, keys.view(np.uint64) | below, side="right")
    found = np.zeros(len(keys), bool)
    if len(rows := np.flatnonzero(last > first)):
        own = Fingerprints(hashes([ids[row] for row in rows.tolist()]), keys[rows], geometry_of(crystals.take(rows)))
        alike = np.unique(np.concatenate([among[first[row] : last[row]] for row in rows.tolist()]))
        which = shared(own.packed(), alike)
        found[rows] = which["ids"] | which["similar"]
    return found
