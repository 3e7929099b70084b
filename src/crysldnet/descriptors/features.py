"""Named columns of numbers, one row per crystal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Features:
    """A block of features.

    Attributes:
        names: [D] unique column names.
        values: [B, D] float64.
    """

    names: tuple[str, ...]
    values: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.values.shape[1:] != (len(self.names),):
            raise ValueError(f"{len(self.names)} names for values of shape {self.values.shape}")
        if repeated := [name for name in self.names if self.names.count(name) > 1]:
            raise ValueError(f"two columns are named {repeated[0]!r}")

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def of(cls, columns: dict[str, NDArray]) -> Features:
        """Create a block from named columns, each [B]."""
        return cls(tuple(columns), np.stack([np.asarray(c, np.float64) for c in columns.values()], axis=1))


def side_by_side(blocks: Sequence[Features]) -> Features:
    """Concatenate blocks of the same crystals by column."""
    names = tuple(name for block in blocks for name in block.names)
    return Features(names, np.concatenate([block.values for block in blocks], axis=1))


def stacked(parts: Sequence[Features]) -> Features:
    """Concatenate blocks of the same columns by row."""
    return Features(parts[0].names, np.concatenate([part.values for part in parts]))
