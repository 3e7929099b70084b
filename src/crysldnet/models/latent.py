"""The latent space of the variational autoencoder, and diagnostics of its collapse.

Shapes: ``N`` atoms, ``D`` width of the encoder, ``d`` width of the latent.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crysldnet.build import Part
from crysldnet.encoders.scatter import scatter
from crysldnet.models.exact_metric import ExactMetric
from crysldnet.platforms import double

LOG_VARIANCE_RANGE = (-30.0, 20.0)


class Latent(NamedTuple):
    """A diagonal Gaussian per atom and a sample from it."""

    mean: Tensor
    """[N, d]."""
    log_variance: Tensor
    """[N, d]."""
    sample: Tensor
    """[N, d]."""


class Posterior(nn.Module):
    """q(z | crystal): one diagonal Gaussian per atom.

    Args:
        width: width D of the encoder.
        latent_dim: d; 256 as published, 8 was sufficient in ADiT.
        kl_weight: weight of KL(q ‖ N(0, 1)), the mean over atoms of the sum over channels; 1e-5 as published.
        log_variance_init: initial offset of the log-variance; 0 as published. A low value exposes the mean to the
            decoder from the first step.
        normalize: give each channel of the mean zero mean and unit variance (batch statistics in training, running
            ones otherwise), so that the latent has a fixed scale that the encoder can't shrink. Not as published.
        noise: standard deviation of the posterior, the same for every atom and channel; null to learn it, as
            published. If learned, it falls to about 0.02, and the space is variational in name only.
        covariance_weight: weight of Σ_{i≠j} C_ij² / d with the covariance C of the channels over the atoms of a batch,
            which preserves the effective rank (the covariance term of VICReg, arXiv 2105.04906).
        agreement_weight: weight of the variance of each channel within a crystal, averaged over atoms and channels,
            which pulls the atoms of a crystal together.
    """

    def __init__(
        self,
        *,
        width: Part[int],
        latent_dim: int,
        kl_weight: float = 1e-5,
        log_variance_init: float = 0.0,
        normalize: bool = True,
        noise: float | None = None,
        covariance_weight: float = 0.0,
        agreement_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if noise is not None and not noise > 0:
            raise ValueError(f"noise must be over 0, or null to learn it, not {noise}")
        self.noise, self.covariance_weight, self.agreement_weight = noise, covariance_weight, agreement_weight
        self.latent_dim, self.kl_weight, self.log_variance_init = latent_dim, kl_weight, log_variance_init
        self.map = nn.Linear(width, 2 * latent_dim, bias=False)
        self.norm = nn.BatchNorm1d(latent_dim, affine=False) if normalize else nn.Identity()

    def forward(self, features: Tensor) -> Latent:
        """Map features [N, D] to a Gaussian per atom and sample from it."""
        mean, log_variance = self.map(features).chunk(2, dim=-1)
        mean = self.norm(mean)
        if self.noise is None:
            log_variance = (log_variance + self.log_variance_init).clamp(*LOG_VARIANCE_RANGE)
        else:
            log_variance = torch.full_like(log_variance, 2.0 * math.log(self.noise))
        return Latent(mean, log_variance, mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean))

    @staticmethod
    def kl(latent: Latent) -> Tensor:
        """Return KL(q ‖ N(0, 1)) = ½ Σ_d (μ² + s² − 1 − log s²), averaged over atoms."""
        mean, log_variance = latent.mean, latent.log_variance
        return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(dim=-1).mean()

    def penalties(self, latent: Latent, crystal: Tensor, n_crystals: int) -> dict[str, Tensor]:
        """Return the enabled penalties, weighted.

        Args:
            latent: latent of N atoms.
            crystal: [N] the crystal of each.
            n_crystals: B.
        """
        terms: dict[str, Tensor] = {}
        if self.covariance_weight:
            centered = latent.mean - latent.mean.mean(0)
            covariance = centered.T @ centered / max(len(centered) - 1, 1)
            others = covariance.square().sum() - covariance.diagonal().square().sum()
            terms["covariance"] = self.covariance_weight * others / self.latent_dim
        if self.agreement_weight:
            mean = scatter(latent.mean, crystal, n_crystals, "mean").index_select(0, crystal)
            terms["agreement"] = self.agreement_weight * (latent.mean - mean).square().mean()
        return terms


class LatentStatistics(ExactMetric):
    """Spread and effective rank of features over a whole split, summed over all ranks.

    spread: the mean standard deviation per dimension. Effective rank: exp of the entropy of the covariance's normalized
    eigenvalues (Roy & Vetterli 2007), between 1 and D. A collapse in scale appears in the spread while the rank may
    rise; a collapse onto few directions appears in the rank.
    """

    full_state_update = False
    count: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Add features [N, D]."""
        x = double(features.detach())
        self.count += len(x)
        self.total += x.sum(0)
        self.outer += x.T @ x

    def compute(self) -> dict[str, Tensor]:
        """Return ``spread`` and ``rank``."""
        mean = self.total / self.count
        covariance = self.outer / self.count - torch.outer(mean, mean)
        if not bool(covariance.isfinite().all()):
            return {"spread": covariance.new_tensor(torch.nan), "rank": covariance.new_tensor(torch.nan)}
        eigenvalues = torch.linalg.eigvalsh(covariance).clamp_min(0.0)
        share = eigenvalues / eigenvalues.sum().clamp_min(1e-300)
        entropy = -torch.special.xlogy(share, share).sum()
        return {"spread": covariance.diagonal().clamp_min(0.0).sqrt().mean(), "rank": entropy.exp()}
