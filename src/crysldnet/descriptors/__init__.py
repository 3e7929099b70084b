"""Descriptors: named numbers of a composition or crystal, computed from the store's arrays without training.

All are invariant to rotation, origin, atom order and choice of cell.
"""

from __future__ import annotations

import numpy as np

from crysldnet.descriptors.composition import Features, amounts_of, composition_features, side_by_side, stacked
from crysldnet.descriptors.geometry import cell_features, environment_features
from crysldnet.graphs.crystals import Crystals

_CHUNK = 512


def crystal_descriptors(crystals: Crystals) -> Features:
    """Return composition and geometry descriptors."""
    return side_by_side([composition_descriptors(crystals), geometry_descriptors(crystals)])


def composition_descriptors(crystals: Crystals) -> Features:
    """Return composition descriptors."""
    return composition_features(amounts_of(crystals))


def geometry_descriptors(crystals: Crystals) -> Features:
    """Return geometry descriptors: density, packing, slabs, and environments of the atoms."""
    parts = []
    for start in range(0, len(crystals), _CHUNK):
        some = crystals.take(np.arange(start, min(start + _CHUNK, len(crystals))))
        parts.append(side_by_side([cell_features(some), environment_features(some)]))
    return stacked(parts)
