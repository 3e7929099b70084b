"""Radial bases, none of them trained.

Shapes: ``E`` edges, ``n`` basis functions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ExponentialBasis(nn.Module):
    """exp(−γ (x − μ)²) with n centres μ evenly from ``low`` to ``high`` and γ = 1 / spacing.

    γ isn't squared in the published code of Matformer, ComFormer and PDDFormer, which makes the functions very
    smooth; it is kept.
    """

    def __init__(self, low: float, high: float, n: int) -> None:
        super().__init__()
        self.low, self.high, self.n = low, high, n
        self.gamma = (n - 1) / (high - low)

    def forward(self, x: Tensor) -> Tensor:
        """Map [E] to [E, n]."""
        centers = torch.linspace(self.low, self.high, self.n, dtype=x.dtype, device=x.device)
        return torch.exp(-self.gamma * (x.unsqueeze(-1) - centers) ** 2)


class GaussianBasis(nn.Module):
    """exp(−((x − μ) / spacing)² / 2) with n centres μ evenly from ``low`` to ``high``."""

    def __init__(self, low: float, high: float, n: int) -> None:
        super().__init__()
        self.low, self.high, self.n = low, high, n
        self.spacing = (high - low) / (n - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [E] to [E, n]."""
        centers = torch.linspace(self.low, self.high, self.n, dtype=x.dtype, device=x.device)
        return torch.exp(-0.5 * ((x.unsqueeze(-1) - centers) / self.spacing) ** 2)
