"""Radial bases, none of them trained.

Shapes: ``E`` edges, ``n`` basis functions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Basis(nn.Module):
    """n functions with centers μ evenly from ``low`` to ``high``; γ = 1 / spacing."""

    def __init__(self, low: float, high: float, n: int) -> None:
        super().__init__()
        self.low, self.high, self.n = low, high, n
        self.gamma = (n - 1) / (high - low)

    def offsets(self, x: Tensor) -> Tensor:
        """Return x − μ, [..., n]."""
        return x.unsqueeze(-1) - torch.linspace(self.low, self.high, self.n, dtype=x.dtype, device=x.device)


class ExponentialBasis(Basis):
    """exp(−γ (x − μ)²).

    γ isn't squared in the published code of Matformer, ComFormer and PDDFormer, which makes the functions very
    smooth; it is kept.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map [E] to [E, n]."""
        return torch.exp(-self.gamma * self.offsets(x).square())


class GaussianBasis(Basis):
    """exp(−sharpness (γ (x − μ))²).

    Sharpness ½ makes the standard deviation equal to the spacing. CGCNN and PotNet have 1. In coGN the variance is
    numerically the spacing, so that sharpness is half of the spacing.
    """

    def __init__(self, low: float, high: float, n: int, sharpness: float = 0.5) -> None:
        super().__init__(low, high, n)
        self.sharpness = sharpness

    def forward(self, x: Tensor) -> Tensor:
        """Map [E] to [E, n]."""
        return torch.exp(-self.sharpness * (self.gamma * self.offsets(x)).square())


class MultiquadricBasis(Basis):
    """√(1 + (γ (x − μ))²), of PotNet's potentials."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [P] to [P, n]."""
        return torch.sqrt(1.0 + (self.gamma * self.offsets(x)).square())


def cosine_cutoff(length: Tensor, radius: float) -> Tensor:
    """Return ½ (cos(π d / R) + 1) where d < R, else 0."""
    return torch.where(length < radius, 0.5 * (torch.cos(length * (math.pi / radius)) + 1.0), 0.0)


class ExponentialNormalBasis(nn.Module):
    """cutoff(d) · exp(−β (exp(−5 d / R) − μ)²), n centers μ evenly from exp(−R) to 1, of PhysNet and CartNet."""

    def __init__(self, radius: float, n: int) -> None:
        super().__init__()
        self.radius, self.n = radius, n
        self.beta = (2.0 / n * (1.0 - math.exp(-radius))) ** -2

    def forward(self, length: Tensor) -> Tensor:
        """Map [E] in Å to [E, n]."""
        centers = torch.linspace(math.exp(-self.radius), 1.0, self.n, dtype=length.dtype, device=length.device)
        x = torch.exp(length * (-5.0 / self.radius)).unsqueeze(-1)
        return cosine_cutoff(length, self.radius).unsqueeze(-1) * torch.exp(-self.beta * (x - centers).square())
