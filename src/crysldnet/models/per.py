"""Targets learned per area, volume or formula unit; predictions keep the unit of the data.

A value per atom (unit ending in ``/atom``) times the number of atoms, or a value of the cell, is divided by the area,
volume or number of formula units of the cell. Predictions are converted back exactly.

Shapes: ``B`` crystals, ``T`` targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crysldnet.data.elements import formulas_of
from crysldnet.descriptors.composition import amounts_of
from crysldnet.descriptors.geometry import VACUUM, slabs_of
from crysldnet.errors import DataError
from crysldnet.graphs.crystals import Crystals

Per = Literal["area", "volume", "formula_unit"]


def bulk_of(crystals: Crystals) -> NDArray[np.bool_]:
    """Return [B] whether a crystal has no vacuum, and therefore no area."""
    return ~slabs_of(crystals).is_slab


def no_area(name: str) -> str:
    """Return why a crystal without area is rejected."""
    return f"{name} has no gap of over {VACUUM:g} Å between planes of atoms: no slab, so it has no area (target_per)"


def _basis(per: Per, crystals: Crystals) -> NDArray[np.float64]:
    """Return [B] the area in Å², volume in Å³, or number of formula units of each cell."""
    if per == "volume":
        return np.abs(np.linalg.det(crystals.lattice))
    if per == "formula_unit":
        return np.gcd.reduce(amounts_of(crystals).astype(np.int64), axis=1).astype(np.float64)
    slabs = slabs_of(crystals)
    if not slabs.is_slab.all():
        first = np.flatnonzero(~slabs.is_slab)[:1]
        raise DataError(no_area(formulas_of(crystals, first)[0]))
    return slabs.area * crystals.sizes


def factors_of(
    per: Mapping[str, Per], targets: Sequence[str], units: Sequence[str], crystals: Crystals
) -> NDArray[np.float64]:
    """Return [B, T] factors of the values for training, 1 for targets learned directly.

    Raises:
        DataError: a required area is missing.
    """
    bases = {kind: _basis(kind, crystals) for kind in dict.fromkeys(per[name] for name in targets if name in per)}
    found = np.ones((len(crystals), len(targets)))
    for place, (name, unit) in enumerate(zip(targets, units, strict=True)):
        if name in per:
            found[:, place] = (crystals.sizes if unit.endswith("/atom") else 1.0) / bases[per[name]]
    return found
