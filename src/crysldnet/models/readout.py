"""Readouts: from atom features to crystal features.

Shapes: ``B`` crystals, ``N`` atoms, ``D`` features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crysldnet.encoders.scatter import scatter, softmax


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


class AttentionPooling(nn.Module):
    """Weighted mean over the atoms, Σ_i softmax(w·h_i) h_i, with learned weights.

    It starts as the mean and, like the mean, doesn't change when the cell is repeated.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, features: Tensor, crystal: Tensor, n_crystals: int) -> Tensor:
        """Map [N, D] to [B, D]."""
        weight = softmax(self.score(features), crystal, n_crystals)
        return scatter(weight * features, crystal, n_crystals, "sum")


def mean_and_spread(layers: Sequence[Tensor], crystal: Tensor, n_crystals: int) -> Tensor:
    """Return the mean and the standard deviation over a crystal's atoms of every layer, [B, 2 · layers · D].

    Args:
        layers: [N, D] each.
        crystal: [N] the crystal of each atom.
        n_crystals: B.
    """
    features = torch.cat(list(layers), dim=-1)
    mean = scatter(features, crystal, n_crystals, "mean")
    variance = scatter((features - mean.index_select(0, crystal)).square(), crystal, n_crystals, "mean")
    return torch.cat([mean, (variance + SMALLEST_VARIANCE).sqrt()], dim=-1)


SMALLEST_VARIANCE = 1e-6
"""Keeps the gradient of a standard deviation finite if all atoms of a crystal are alike."""
