"""From atom features to properties.

Shapes: ``B`` crystals, ``N`` atoms, ``D`` width of the encoder, ``T`` targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import huber_loss, l1_loss, mse_loss
from torch_geometric.utils import scatter

from crysldnet.build import Part
from crysldnet.data.batch import CrystalBatch
from crysldnet.encoders.protocol import Encoder
from crysldnet.errors import DataError

LOSSES: dict[str, Callable[..., Tensor]] = {"l1": l1_loss, "mse": mse_loss, "huber": huber_loss}


class ShiftedSoftplus(nn.Softplus):
    """softplus(x) − ln 2."""

    def forward(self, input: Tensor) -> Tensor:
        """Keep the shape."""
        return super().forward(input) - math.log(2.0)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "shifted_softplus": ShiftedSoftplus,
}


class PropertyHead(nn.Module):
    """Readout over a crystal's atoms and an MLP.

    ``mean``: MLP(mean of the features), for properties of the material. ``atoms``: mean of MLP(features) over the
    atoms, likewise. ``sum``: sum of MLP(features) over the atoms, for properties that grow with the cell.

    Args:
        width: D of the encoder.
        outputs: T.
        readout: ``mean``, ``atoms`` or ``sum``.
        hidden: width of the MLP; the encoder's by default.
        layers: hidden layers.
        dropout: after each hidden layer.
        activation: after each hidden layer.
        activate_first: before the first map too.
    """

    def __init__(
        self,
        *,
        width: Part[int],
        outputs: Part[int],
        readout: Literal["mean", "atoms", "sum"] = "mean",
        hidden: int | None = None,
        layers: int = 1,
        dropout: float = 0.0,
        activation: Literal["silu", "softplus", "shifted_softplus"] = "silu",
        activate_first: bool = False,
    ) -> None:
        super().__init__()
        self.readout = readout
        self.first = ACTIVATIONS[activation]() if activate_first else nn.Identity()
        hidden = hidden or width
        steps: list[nn.Module] = []
        for layer in range(layers):
            linear = nn.Linear(width if layer == 0 else hidden, hidden)
            steps += [linear, ACTIVATIONS[activation](), nn.Dropout(dropout)]
        self.mlp = nn.Sequential(*steps, nn.Linear(hidden if layers else width, outputs))

    def forward(self, features: Tensor, crystal: Tensor, n_crystals: int) -> Tensor:
        """Map features [N, D] to [B, T], in normalised units."""
        if self.readout == "mean":
            return self.mlp(self.first(scatter(features, crystal, 0, n_crystals, "mean")))
        reduce = "mean" if self.readout == "atoms" else "sum"
        return scatter(self.mlp(self.first(features)), crystal, 0, n_crystals, reduce)


class PropertyModel(nn.Module):
    """Encoder, head and the normalisation of the targets: predicts in physical units.

    Args:
        encoder: fresh or pretrained.
        head: with T outputs.
        targets: names of the T targets.
        units: their units.

    Attributes:
        mean, std: [T] of the training targets; with the ``sum`` readout the mean is per atom.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, encoder: Encoder, head: PropertyHead, targets: list[str], units: list[str]) -> None:
        super().__init__()
        self.encoder, self.head, self.targets, self.units = encoder, head, targets, units
        self.register_buffer("mean", torch.zeros(len(targets)))
        self.register_buffer("std", torch.ones(len(targets)))

    def fit_normalisation(self, values: NDArray[np.float64], sizes: NDArray[np.int64]) -> None:
        """Set mean and standard deviation from the training rows, and nothing else.

        Args:
            values: [n, T] in physical units, NaN where unknown.
            sizes: [n] atoms of each crystal.

        Raises:
            DataError: a target has no value in the training rows.
        """
        empty = np.isnan(values).all(axis=0)
        if empty.any():
            raise DataError(f"target {self.targets[int(empty.argmax())]!r} has no value in the training split")
        atoms = sizes[:, None].astype(np.float64)
        mean = np.nanmean(values / atoms if self.head.readout == "sum" else values, axis=0)
        rest = values - (mean * atoms if self.head.readout == "sum" else mean)
        std = np.nanstd(rest, axis=0)
        self.mean.copy_(torch.from_numpy(mean))
        self.std.copy_(torch.from_numpy(np.where(std > 1e-9 * np.maximum(1.0, np.abs(mean)), std, 1.0)))

    def _center(self, batch: CrystalBatch) -> Tensor:
        return self.mean * batch.sizes.unsqueeze(1) if self.head.readout == "sum" else self.mean

    def forward(self, batch: CrystalBatch) -> Tensor:
        """Return [B, T] in physical units."""
        return self._normalised(batch) * self.std + self._center(batch)

    def _normalised(self, batch: CrystalBatch) -> Tensor:
        return self.head(self.encoder(batch), batch.crystal, batch.num_crystals)

    def loss(self, batch: CrystalBatch, kind: Literal["l1", "mse", "huber"]) -> tuple[Tensor, Tensor]:
        """Return the loss over the targets that are known, in normalised units, and the predictions [B, T].

        Args:
            batch: with ``targets`` [B, T], NaN where unknown.
            kind: ``l1``, ``mse`` or ``huber`` (δ = 1 standard deviation).
        """
        assert batch.targets is not None
        output, center = self._normalised(batch), self._center(batch)
        known = ~batch.targets.isnan()
        wanted = torch.where(known, (batch.targets - center) / self.std, output.detach())
        loss = LOSSES[kind](output, wanted, reduction="sum") / known.sum().clamp_min(1)
        return loss, output * self.std + center
