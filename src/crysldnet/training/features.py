"""Features of atoms that are computed once, because their encoder is frozen.

Shapes: ``B`` crystals, ``N`` atoms of a batch, ``D`` width of the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crysldnet.data.batch import CrystalBatch, make_batch
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.sampler import BatchSampler
from crysldnet.encoders.protocol import Encoder


@dataclass(frozen=True)
class FeatureTable:
    """Features of the atoms of some crystals, in memory: 4 D bytes an atom.

    Attributes:
        features: [all atoms, D].
        begin: [crystals of the store] where a crystal's atoms begin, −1 for crystals that aren't there.
    """

    features: Tensor
    begin: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, encoder: Encoder, data: CrystalDataModule, device: torch.device) -> FeatureTable:
        """Compute the features of all crystals of a data module, on a device."""
        rows = np.concatenate(list(data.rows.values()))
        sizes = data.store.crystals.sizes[rows]
        budget = data.share_of_a_step(1).for_any(sizes)
        begin, parts, count = torch.full((len(data.store),), -1), [], 0
        for chosen, *_ in BatchSampler(rows, sizes, None, budget, shuffle=False):
            crystals = data.store.crystals.take(chosen)
            parts.append(encoder(make_batch(crystals, encoder.graph).to(device)))
            begin[torch.from_numpy(chosen)] = count + torch.from_numpy(crystals.ptr[:-1])
            count += len(crystals.numbers)
        return cls(torch.cat(parts), begin.to(device))

    def __call__(self, batch: CrystalBatch) -> Tensor:
        """Return the features [N, D] of a batch's atoms."""
        first = self.begin[batch.rows] - batch.sizes.cumsum(0) + batch.sizes
        place = torch.arange(batch.num_atoms, device=first.device) + first.index_select(0, batch.crystal)
        return self.features.index_select(0, place)
