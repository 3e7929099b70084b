"""Energies of the elements: what a crystal's energy would be if each atom had a fixed one.

E ≈ Σ_i E(Z_i) over the atoms of a crystal, or the mean over its atoms for an energy per atom, by least squares. The
model then learns what the composition alone doesn't explain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crysldnet.encoders.elements import N_SPECIES
from crysldnet.graphs.crystals import Crystals


@dataclass(frozen=True)
class References:
    """Fitted energies.

    Attributes:
        of_element: [119] by atomic number, the mean of the others for elements that no crystal has.
        of_crystal: [n] what they give for each crystal.
    """

    of_element: NDArray[np.float64]
    of_crystal: NDArray[np.float64]


def fit_references(crystals: Crystals, values: NDArray[np.float64], *, total: bool) -> References:
    """Fit energies of the elements.

    Args:
        crystals: n crystals.
        values: [n] their energies, all known.
        total: of the whole cell, else per atom.
    """
    composition = np.zeros((len(crystals), N_SPECIES))
    np.add.at(composition, (crystals.crystal, crystals.numbers.astype(np.int64)), 1.0)
    if not total:
        composition /= crystals.sizes[:, None]
    seen = composition.any(axis=0)
    of_element = np.zeros(N_SPECIES)
    of_element[seen] = np.linalg.lstsq(composition[:, seen], values, rcond=None)[0]
    of_element[~seen] = of_element[seen].mean()
    return References(of_element, composition @ of_element)
