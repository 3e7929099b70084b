"""Composition descriptors: statistics of the elements' properties, after Magpie.

L. Ward et al., npj Comput. Mater. 2, 16028 (2016). They depend only on element ratios. Equal to the ``magpie`` preset
of matminer's ElementProperty, its ValenceOrbital and Stoichiometry (test_descriptors.py).

The features of every kind of descriptor are :class:`Features`.

Shapes: ``B`` crystals, ``P`` properties, ``M`` pairs of a crystal and an element in it.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crysldnet.graphs.crystals import Crystals


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


N_ELEMENTS = 119
"""Atomic numbers 0 (no element) to 118."""
NORMS = (2, 3, 5, 7, 10)
_STATISTICS = ("minimum", "maximum", "range", "mean", "avg_dev", "mode")


@cache
def element_table() -> dict[str, NDArray[np.float64]]:
    """Return [119] values of each property by atomic number; missing ones are the mean of the others."""
    with (Path(__file__).parent / "tables" / "magpie_elements.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    table = {}
    for column in list(rows[0])[2:]:
        values = np.array([np.nan, *(float(row[column] or "nan") for row in rows)])
        table[column.partition(" ")[0]] = np.where(np.isnan(values), np.nanmean(values), values)
    return table


def amounts_of(crystals: Crystals) -> NDArray[np.float64]:
    """Return [B, 119] atom counts by element."""
    flat = np.bincount(
        crystals.crystal * N_ELEMENTS + crystals.numbers.astype(np.int64), minlength=len(crystals) * N_ELEMENTS
    )
    return flat.reshape(len(crystals), N_ELEMENTS).astype(np.float64)


def composition_features(amounts: NDArray[np.floating]) -> Features:
    """Return composition descriptors.

    Args:
        amounts: [B, 119] amount of each element, in any unit; nonzero rows.

    Returns:
        Six statistics of each property (minimum, maximum, range, mean, mean absolute deviation, and the value of the
        most abundant element, or the smallest of several), the fractions of valence electrons in s, p, d and f
        orbitals, the number of elements, norms of the fractions, and the ionic character of the pairs of elements.
    """
    amounts = np.asarray(amounts, np.float64)
    row, element = np.nonzero(amounts > 0)
    total = amounts.sum(axis=1)
    if len(amounts) and not (total > 0).all():
        raise ValueError(f"composition {int(np.flatnonzero(~(total > 0))[0])} has no elements")
    begin = np.searchsorted(row, np.arange(len(amounts)))
    weight = amounts[row, element]
    fraction = (weight / total[row])[:, None]
    table = element_table()
    values = np.stack(list(table.values()), axis=1)[element]
    least, most = np.minimum.reduceat(values, begin), np.maximum.reduceat(values, begin)
    mean = np.add.reduceat(values * fraction, begin)
    deviation = np.add.reduceat(np.abs(values - mean[row]) * fraction, begin)
    abundant = weight >= np.maximum.reduceat(weight, begin)[row] * (1 - 1e-5)
    mode = np.minimum.reduceat(np.where(abundant[:, None], values, np.inf), begin)
    found = np.stack([least, most, most - least, mean, deviation, mode], axis=2).reshape(len(amounts), -1)
    names = tuple(f"MagpieData {statistic} {name}" for name in table for statistic in _STATISTICS)
    return side_by_side([Features(names, found), _valence(table, mean), _stoichiometry(amounts / total[:, None])])


def _valence(table: dict[str, NDArray], mean: NDArray) -> Features:
    names = list(table)
    electrons = mean[:, [names.index(f"N{orbital}Valence") for orbital in "spdf"]]
    shares = electrons / electrons.sum(axis=1, keepdims=True)
    return Features(tuple(f"frac {orbital} valence electrons" for orbital in "spdf"), shares)


def _stoichiometry(fractions: NDArray) -> Features:
    """Return norms of the fractions, and L. Pauling's ionic character 1 − exp(−(χ_i − χ_j)²/4) of the pairs."""
    chi = element_table()["Electronegativity"]
    ionic = 1 - np.exp(-((chi[:, None] - chi) ** 2) / 4)
    present = fractions > 0
    columns = {"number of elements": present.sum(axis=1).astype(np.float64)}
    columns |= {f"{p}-norm": (fractions**p).sum(axis=1) ** (1 / p) for p in NORMS}
    extremes = np.where(present, chi, -np.inf).max(axis=1) - np.where(present, chi, np.inf).min(axis=1)
    columns["max ionic char"] = 1 - np.exp(-(extremes**2) / 4)
    columns["avg ionic char"] = np.einsum("bi,ij,bj->b", fractions, ionic, fractions, optimize=True)
    return Features.of(columns)
