"""Train, validation and test: which rows belong to which."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crysldnet.data.elements import reduced_formula
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError

SPLITS = ("train", "val", "test")
Rows = dict[str, NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a store is split.

    Attributes:
        by: ``column`` reads the split from a text column; ``formula`` keeps all crystals of one reduced formula on
            one side, which is harder and more honest than ``random``.
        column: name of that column; its values are train, val and test.
        fractions: shares of train, val and test, where there is no column.
        seed: of the drawing.
        train_fraction: use only this share of the training rows; smaller shares lie within larger ones.
    """

    by: Literal["column", "formula", "random"] = "column"
    column: str = "split"
    fractions: list[float] = field(default_factory=lambda: [0.8, 0.1, 0.1])
    seed: int = 0
    train_fraction: float = 1.0

    def __post_init__(self) -> None:
        if len(self.fractions) != 3 or min(self.fractions) < 0 or abs(sum(self.fractions) - 1.0) > 1e-6:
            raise DataError(f"split.fractions must be three shares that add up to 1, not {self.fractions}")
        if not 0.0 < self.train_fraction <= 1.0:
            raise DataError(f"split.train_fraction must be over 0 and at most 1, not {self.train_fraction}")

    def rows(self, store: CrystalStore) -> Rows:
        """Return the rows of each split, in the store's order."""
        labels = self._labels(store)
        rows = {name: np.flatnonzero(labels == name) for name in SPLITS}
        train = rows["train"]
        if self.train_fraction < 1.0:
            keep = max(1, round(self.train_fraction * len(train)))
            rows["train"] = np.sort(np.random.default_rng([self.seed, 1]).permutation(train)[:keep])
        return rows

    def _labels(self, store: CrystalStore) -> NDArray:
        if self.by == "column":
            if self.column not in store.column_names:
                raise DataError(
                    f"{store.name}: no column {self.column!r} to split by; "
                    "choose data.split.by=formula (or random), or name the column with data.split.column"
                )
            labels = store.texts_of(self.column)
            strange = set(labels.tolist()) - {*SPLITS, None}
            if strange:
                raise DataError(
                    f"{store.name}: column {self.column!r} has {strange.pop()!r}; it may hold train, val and test"
                )
            return labels
        bounds = np.cumsum(self.fractions)[:2]
        if self.by == "random":
            n = len(store)
            place = np.empty(n)
            place[np.random.default_rng(self.seed).permutation(n)] = (np.arange(n) + 0.5) / n
        else:
            place = self._formula_hashes(store)
        return np.array(SPLITS, object)[np.searchsorted(bounds, place, side="right")]

    def _formula_hashes(self, store: CrystalStore) -> NDArray[np.float64]:
        crystals = store.crystals
        place = np.empty(len(store))
        for row in range(len(store)):
            formula = reduced_formula(crystals.numbers[crystals.ptr[row] : crystals.ptr[row + 1]])
            digest = hashlib.sha256(f"{self.seed}:{formula}".encode()).digest()
            place[row] = int.from_bytes(digest[:8], "big") / 2**64
        return place
