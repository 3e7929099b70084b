"""Matching structures of two data sets: pymatgen's StructureMatcher with a cheap prefilter. Crystals of
other data sets can be excluded from training with it, or by formula, so that those can be used for testing.

Only pairs with the same reduced formula and similar volumes and distances (:data:`POSSIBLE`) are passed to the matcher,
which scales volumes, reduces cells, and compares positions. experiments/leakage measures what the filter loses and
saves on real crystals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crysldnet.data.datasets import open_part
from crysldnet.data.elements import formulas_of
from crysldnet.data.fingerprint import POSSIBLE, Fingerprints, candidates
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError
from crysldnet.graphs.crystals import Crystals


def new_matcher() -> Any:
    """Return pymatgen's StructureMatcher with its default settings.

    Raises:
        DataError: pymatgen isn't installed.
    """
    try:
        from pymatgen.analysis.structure_matcher import StructureMatcher
    except ImportError as error:
        raise DataError(
            f"structures are compared by pymatgen, which isn't installed ({error}): pip install pymatgen; or compare "
            "by formula"
        ) from None
    return StructureMatcher()


def reduced_structure(crystals: Crystals, index: int) -> Any:
    """Return one crystal as a pymatgen Structure in its reduced primitive cell, as the matcher would reduce it."""
    from pymatgen.core import Structure

    atoms = slice(crystals.ptr[index], crystals.ptr[index + 1])
    structure = Structure(
        crystals.lattice[index], crystals.numbers[atoms].tolist(), crystals.frac_coords[atoms].astype(np.float64)
    )
    return structure.get_reduced_structure(reduction_algo="niggli").get_primitive_structure()


class Matcher:
    """Return whether crystals of two stores are the same structure; each crystal is reduced once while in use.

    Args:
        a, b: the stores; the same one twice for pairs within a store.
    """

    def __init__(self, a: Crystals, b: Crystals) -> None:
        self._matcher = new_matcher()
        self._of_a: Callable[[int], Any] = lru_cache(20_000)(lambda i: reduced_structure(a, i))
        self._of_b = self._of_a if b is a else lru_cache(20_000)(lambda i: reduced_structure(b, i))

    def __call__(self, i: int, j: int) -> bool:
        """Compare crystal i of a with crystal j of b; the matcher isn't symmetric, so a match in one direction
        suffices.
        """
        one, other = self._of_a(i), self._of_b(j)
        return any(self._matcher.fit(*pair, skip_structure_reduction=True) for pair in ((one, other), (other, one)))


def matches(a: CrystalStore, rows_a: NDArray[np.int64], b: CrystalStore, rows_b: NDArray[np.int64]) -> Iterator[tuple]:
    """Yield the rows in ``a`` and ``b`` of each matching pair, by row in ``a``."""
    matcher = Matcher(a.crystals, b.crystals)
    pairs = candidates(Fingerprints.of(a, rows_a), Fingerprints.of(b, rows_b), POSSIBLE)
    for i, j in np.stack([rows_a[pairs[:, 0]], rows_b[pairs[:, 1]]], axis=1).tolist():
        if matcher(i, j):
            yield i, j


def duplicates(store: CrystalStore) -> dict[int, int]:
    """Return each row that duplicates an earlier structure, and the earliest unique row that it matches."""
    matcher = Matcher(store.crystals, store.crystals)
    fingerprints = Fingerprints.of(store)
    repeats: dict[int, int] = {}
    for later, earlier in candidates(fingerprints, fingerprints, POSSIBLE).tolist():
        if earlier >= later or later in repeats or earlier in repeats:
            continue
        if matcher(later, earlier):
            repeats[later] = earlier
    return repeats


By = Literal["formula", "structure"]


def shared_rows(
    store: CrystalStore, rows: NDArray[np.int64], others: Sequence[str], by: By
) -> tuple[NDArray[np.int64], list[dict[str, Any]]]:
    """Find the rows that other data sets also contain.

    Args:
        store: the crystals.
        rows: rows to check.
        others: names of data sets as in :func:`crysldnet.data.datasets.open_part`.
        by: ``formula`` for every crystal with a reduced formula in the other set, ``structure`` only for matching
            structures by pymatgen's matcher.

    Returns:
        The rows, and for each other set its name, sha256, rule, and number of crystals removed.

    Raises:
        DataError: another set is missing, or structures can't be compared.
    """
    gone = np.zeros(len(store), bool)
    records = []
    for name in others:
        other, other_rows = open_part(name)
        if by == "formula":
            formulas = set(formulas_of(other.crystals, other_rows))
            mine = formulas_of(store.crystals, rows)
            shared = rows[np.array([formula in formulas for formula in mine], bool)]
        elif by == "structure":
            shared = np.unique(np.array([row for row, _ in matches(store, rows, other, other_rows)], np.int64))
        else:
            raise DataError(f"exclude_by must be formula or structure, not {by!r}")
        records.append({"name": name, "sha256": other.hash, "by": by, "crystals": len(shared)})
        gone[shared] = True
    return np.flatnonzero(gone), records
