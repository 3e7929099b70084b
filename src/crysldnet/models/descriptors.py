"""Descriptors of a crystal that a head reads in addition to its structure, such as a measurement temperature.

Shapes: ``B`` crystals, ``K`` descriptors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crysldnet.errors import DataError
from crysldnet.graphs.batch import CrystalBatch


class Descriptors(nn.Module):
    """Names, units and normalization of the K descriptors.

    Args:
        names: column names.
        units: units, empty if unknown.

    Attributes:
        stats: [4, K] mean, standard deviation, minimum and maximum in the training split.
    """

    stats: Tensor

    def __init__(self, names: Sequence[str], units: Sequence[str]) -> None:
        super().__init__()
        if len(names) != len(units):
            raise ValueError(f"it has {len(names)} descriptors and {len(units)} units of them")
        self.names, self.units = list(names), list(units)
        self.register_buffer("stats", torch.ones(4, len(names)))

    def fit(self, values: NDArray[np.float64]) -> None:
        """Compute the statistics of the training values [n, K].

        Raises:
            DataError: a descriptor is constant.
        """
        mean, std = values.mean(axis=0), values.std(axis=0)
        for name, center, spread in zip(self.names, mean, std, strict=True):
            if not spread > 1e-6 * abs(center):
                raise DataError(
                    f"data.descriptors: {name} is {center:g} for every training crystal, so nothing can be learned "
                    "from it; leave it out"
                )
        self.stats.copy_(torch.from_numpy(np.stack([mean, std, values.min(axis=0), values.max(axis=0)])))

    def forward(self, batch: CrystalBatch) -> Tensor:
        """Return the normalized descriptors [B, K].

        Raises:
            DataError: the batch has no descriptors.
        """
        if batch.descriptors is None:
            raise DataError(f"the model needs {', '.join(self.names)} of each crystal (data.descriptors)")
        return (batch.descriptors - self.stats[0]) / self.stats[1]

    def beyond_training(self, values: Tensor) -> Tensor:
        """Return [B] whether any descriptor [B, K] is outside the training range."""
        return ((values < self.stats[2]) | (values > self.stats[3])).any(dim=1)
