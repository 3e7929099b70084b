"""Radial bases and spherical harmonics, all fixed.

Shapes: ``E`` edges, ``n`` basis functions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import threshold

NEGLIGIBLE = 1e-20


def flushed_exp(x: Tensor) -> Tensor:
    """Return exp(x), with values below 1e-20 set to 0.

    Values near 1e-40 are subnormal, and processors take a hundred times as long to multiply them.
    """
    return threshold(torch.exp(x), NEGLIGIBLE, 0.0)


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

    As in the published code of Matformer, ComFormer and PDDFormer, γ isn't squared, which makes the functions very
    smooth.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map [E] to [E, n]."""
        return flushed_exp(-self.gamma * self.offsets(x).square())


class GaussianBasis(Basis):
    """exp(−sharpness (γ (x − μ))²).

    Sharpness ½ makes the standard deviation equal to the spacing. CGCNN and PotNet use 1. In coGN the variance is
    numerically the spacing, so that sharpness is half of the spacing.
    """

    def __init__(self, low: float, high: float, n: int, sharpness: float = 0.5) -> None:
        super().__init__(low, high, n)
        self.sharpness = sharpness

    def forward(self, x: Tensor) -> Tensor:
        """Map [E] to [E, n]."""
        return flushed_exp(-self.sharpness * (self.gamma * self.offsets(x)).square())


class MultiquadricBasis(Basis):
    """√(1 + (γ (x − μ))²), for PotNet's potentials."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [P] to [P, n]."""
        return torch.sqrt(1.0 + (self.gamma * self.offsets(x)).square())


def cosine_cutoff(length: Tensor, radius: float) -> Tensor:
    """Return ½ (cos(π d / R) + 1) where d < R, else 0."""
    return torch.where(length < radius, 0.5 * (torch.cos(length * (math.pi / radius)) + 1.0), 0.0)


class ExponentialNormalBasis(nn.Module):
    """cutoff(d) · exp(−β (exp(−5 d / R) − μ)²), n centers μ evenly from exp(−R) to 1, as in PhysNet and CartNet."""

    def __init__(self, radius: float, n: int) -> None:
        super().__init__()
        self.radius, self.n = radius, n
        self.beta = (2.0 / n * (1.0 - math.exp(-radius))) ** -2

    def forward(self, length: Tensor) -> Tensor:
        """Map [E] in Å to [E, n]."""
        centers = torch.linspace(math.exp(-self.radius), 1.0, self.n, dtype=length.dtype, device=length.device)
        x = torch.exp(length * (-5.0 / self.radius)).unsqueeze(-1)
        return cosine_cutoff(length, self.radius).unsqueeze(-1) * flushed_exp(-self.beta * (x - centers).square())


def harmonics(unit: Tensor) -> tuple[Tensor, Tensor]:
    """Return Y₁ [..., 3] and Y₂ [..., 5] of unit vectors [..., 3], normalized so that |Y_l|² = 2l + 1."""
    x, y, z = unit.unbind(-1)
    root3 = math.sqrt(3.0)
    second = [root3 * x * z, root3 * x * y, y * y - 0.5 * (x * x + z * z), root3 * y * z, 0.5 * root3 * (z * z - x * x)]
    return root3 * unit, math.sqrt(5.0) * torch.stack(second, dim=-1)
