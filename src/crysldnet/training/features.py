"""Inputs of a head for many crystals: cached for a frozen encoder, and used for standardization.

Shapes: ``B`` crystals, ``N`` atoms of a batch, ``I`` numbers that the head reads per crystal or atom.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.encoders.protocol import batch_statistics
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.models.head import PropertyModel


@torch.no_grad()
def read_batches(
    model: PropertyModel, data: CrystalDataModule, rows: NDArray[np.int64], device: torch.device
) -> Iterator[Tensor]:
    """Yield the head's inputs for rows of the store, batch by batch."""
    for batch in data.batches(rows, model.encoder.graph):
        yield model.head.read(model.encoder, batch.to(device))


def standardize(model: PropertyModel, data: CrystalDataModule, device: torch.device, *, fresh: bool) -> None:
    """Set mean and standard deviation of the head's inputs from the training split, if it needs them.

    Args:
        model: on its device.
        data: training data.
        device: device of the model.
        fresh: the encoder's running batch statistics, if any, are uninitialized, so use those of each batch.
    """
    if model.head.layers_read == "last" or bool(model.head.standardized):
        return
    count, total, square = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    with batch_statistics(model.encoder, own=fresh):
        for read in read_batches(model, data, data.rows["train"], device):
            read = read.double()
            count, total, square = count + len(read), total + read.sum(0), square + read.square().sum(0)
    center = total / count
    model.head.standardize(center.float(), (square / count - center.square()).clamp_min(0.0).sqrt().float())


@dataclass(frozen=True)
class ReadTable:
    """Cached inputs of a head: 4 I bytes per crystal or atom.

    Attributes:
        values: [all crystals or atoms, I].
        begin: [crystals of the store] first row of each crystal, −1 for crystals that aren't cached.
        per_crystal: one row per crystal, else one per atom.
    """

    values: Tensor
    begin: Tensor
    per_crystal: bool

    @classmethod
    def of(cls, model: PropertyModel, data: CrystalDataModule, device: torch.device) -> ReadTable:
        """Compute the inputs for all crystals of a data module on a device."""
        rows, single = np.concatenate(list(data.rows.values())), model.head.per_crystal
        sizes = np.ones_like(rows) if single else data.store.crystals.sizes[rows]
        begin = torch.full((len(data.store),), -1)
        begin[torch.from_numpy(rows)] = torch.from_numpy(np.cumsum(sizes) - sizes)
        return cls(torch.cat(list(read_batches(model, data, rows, device))), begin.to(device), single)

    def __call__(self, batch: CrystalBatch) -> Tensor:
        """Return the head's inputs for a batch."""
        first = self.begin[batch.rows]
        if self.per_crystal:
            return self.values.index_select(0, first)
        first = first - batch.sizes.cumsum(0) + batch.sizes
        place = torch.arange(batch.num_atoms, device=first.device) + first.index_select(0, batch.crystal)
        return self.values.index_select(0, place)
