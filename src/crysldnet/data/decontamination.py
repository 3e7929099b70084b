"""Leave crystals out of pretraining that other data sets have, so that those can be tested on."""

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
    """Find the rows that others have too.

    Args:
        store: the crystals.
        rows: which of them are looked at.
        others: names of data sets, as :func:`crysldnet.data.datasets.open_part` takes them.
        by: ``formula`` takes every crystal of a reduced formula that the other has, ``structure`` only the same
            structures, by pymatgen's matcher.

    Returns:
        The rows, and for each other set a record of its name, sha256, the rule, and how many crystals it took.

    Raises:
        DataError: another set isn't there, or structures can't be compared here.
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
