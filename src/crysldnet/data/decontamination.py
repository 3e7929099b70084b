"""Exclude crystals of other data sets from pretraining, so that those can be used for testing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crysldnet.data.datasets import open_part
from crysldnet.data.formulas import formulas_of
from crysldnet.data.matching import matches
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError

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
