"""Atomic references: a fixed energy per element that explains composition.

E ≈ Σ_i E(Z_i) over the atoms of a crystal, or the mean for an energy per atom. The model then learns the remainder.
With few crystals of many elements, plain least squares would fit noise, so energies are shrunk toward their mean by
ridge regression with a leave-one-out penalty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crysldnet.encoders.elements import N_SPECIES
from crysldnet.graphs.crystals import Crystals

RANK = 1e-10
"""Singular values below this fraction of the largest are treated as zero."""
PENALTIES = 10.0 ** np.arange(-10, 1.5, 0.5)
"""Candidate ridge penalties, relative to the square of the largest singular value."""


@dataclass(frozen=True)
class References:
    """Fitted atomic references.

    Attributes:
        of_element: [119] by atomic number; elements absent from the crystals get the mean.
        of_crystal: [n] their sum or mean for each crystal.
    """

    of_element: NDArray[np.float64]
    of_crystal: NDArray[np.float64]


def fit_references(crystals: Crystals, values: NDArray[np.float64], *, total: bool) -> References:
    """Fit atomic references.

    Args:
        crystals: n crystals.
        values: [n] their energies, all known.
        total: energies of the whole cell, else per atom.
    """
    composition = np.zeros((len(crystals), N_SPECIES))
    np.add.at(composition, (crystals.crystal, crystals.numbers.astype(np.int64)), 1.0)
    if not total:
        composition /= crystals.sizes[:, None]
    atoms = composition.sum(axis=1)
    mean = float(values.sum() / atoms.sum())
    of_element = mean + _ridge(composition, values - mean * atoms)
    return References(of_element, composition @ of_element)


def _ridge(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return [D] ridge weights for x [n, D] with the penalty of the lowest leave-one-out error."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    kept = s > RANK * s[0]
    u, s, vt = u[:, kept], s[kept], vt[kept]
    along = u.T @ y
    best = np.inf, np.zeros(x.shape[1])
    for penalty in PENALTIES * s[0] ** 2:
        shrunk = s**2 / (s**2 + penalty)
        left = y - u @ (shrunk * along)
        error = float(np.mean((left / np.maximum(1.0 - u**2 @ shrunk, RANK)) ** 2))
        if error < best[0]:
            best = error, vt.T @ (shrunk / s * along)
    return best[1]
