"""Flow matching on the latents of a crystal's atoms.

Y. Lipman et al., "Flow Matching for Generative Modeling", ICLR 2023, with the straight path
z_t = (1 − t) z_0 + t z_1 from noise z_0 to data z_1 and a denoiser that predicts z_1.

Shapes: ``B`` crystals, ``N`` atoms, ``n`` atoms of the largest crystal, ``d`` width of the latent.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from crysldnet.build import Part

Target = Literal["joint", "joint_target_only", "ema", "frozen", "clean"]


def _spread(time: Tensor) -> Tensor:
    return ((1 - time).square() + time.square()).sqrt()


def gaussian_guess(zt: Tensor, time: Tensor) -> Tensor:
    """Return the mean of clean latents given noisy ones, where the clean ones are normal with unit variance."""
    return time / _spread(time).square() * zt


class FlowOutput(NamedTuple):
    """The diffusion loss, and what a person reads: sums and counts over crystals."""

    loss: Tensor
    measures: dict[str, tuple[Tensor, Tensor]]


class LatentFlow(nn.Module):
    """The latent diffusion model: its loss and its sampler.

    Args:
        denoiser: maps (z_t, t, valid, condition) to the clean latents.
        latent_dim: d.
        target: what the denoiser has to predict. ``joint``: the encoder's own latent, gradient flowing through both
            sides; ``joint_target_only``: the same, through the target alone; ``ema``: the latent of a slow average of
            the encoder; ``frozen``: that of the encoder as it was when this stage began; ``clean``: that of the slow
            average, which sees the crystal before it was corrupted.
        condition: ``none`` diffuses the encoder's latents, so the loss depends on their distribution alone. ``atoms``
            and ``crystal`` diffuse the teacher's, and the denoiser is told the encoder's features of each atom, or one
            pooled vector of each crystal (mean and spread of all layers): the gradient reaches the encoder through
            what the denoiser has to be told. Both need a teacher (``ema``, ``frozen`` or ``clean``).
        noise: diffuse; without, the target is predicted from the condition alone.
        skip: predict D = t / s² · z_t + (1 − t) / s · F with s² = (1 − t)² + t², F being the denoiser: it starts at
            the optimum for Gaussian latents of unit variance, not at zero (after EDM, arXiv 2206.00364).
        times: draw t uniformly, or as the logistic of a normal number (arXiv 2403.03206), within t_min and t_max.
        latent: diffuse ``posterior`` samples, or the encoder's ``features`` before the latent map, as published.
        reconstruction: keep the first stage's loss beside the diffusion loss. Without it and with a joint target a
            constant encoder is a global minimum, which is the published recipe.
        weight: of the diffusion loss beside the others; 1 as published. Over uniform times the weighted error of an
            uninformed denoiser without skip is about 19, so 1 lets it drown the reconstruction.
        ema_decay: of the slow average, a step.
        t_min, t_max: bounds of the times.
        min_gap: the loss is divided by max(1 − t, min_gap)². With 1 − t_max or less it is the loss of the velocity.
        center_noise: subtract the mean of z_0 over the crystal's atoms (``atoms``), over the padded axis as the
            published code does (``padded``), or not (``none``).
    """

    def __init__(
        self,
        *,
        denoiser: nn.Module,
        latent_dim: Part[int],
        target: Target = "joint",
        condition: Literal["none", "atoms", "crystal"] = "none",
        noise: bool = True,
        skip: bool = False,
        times: Literal["uniform", "logit_normal"] = "uniform",
        latent: Literal["posterior", "features"] = "posterior",
        reconstruction: bool = True,
        weight: float = 0.1,
        ema_decay: float = 0.999,
        t_min: float = 0.01,
        t_max: float = 0.99,
        min_gap: float = 0.1,
        center_noise: Literal["none", "atoms", "padded"] = "none",
    ) -> None:
        super().__init__()
        if condition != "none" and target.startswith("joint"):
            raise ValueError(f"condition={condition} needs a teacher's latents: set target to clean, ema or frozen")
        if not noise and (condition == "none" or skip):
            raise ValueError("noise=false predicts from the condition: set condition=atoms or crystal, skip=false")
        self.denoiser, self.latent_dim = denoiser, latent_dim
        self.target, self.condition, self.latent, self.reconstruction = target, condition, latent, reconstruction
        self.noise, self.skip, self.times, self.weight = noise, skip, times, weight
        self.ema_decay = 1.0 if target == "frozen" else ema_decay
        self.t_min, self.t_max, self.min_gap, self.center_noise = t_min, t_max, min_gap, center_noise

    @property
    def has_teacher(self) -> bool:
        """Whether the target isn't the encoder's own."""
        return not self.target.startswith("joint")

    def _noise(self, like: Tensor, valid: Tensor) -> Tensor:
        noise = torch.randn_like(like)
        weight = valid.unsqueeze(-1).to(noise.dtype)
        if self.center_noise == "atoms":
            noise = noise - (noise * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        elif self.center_noise == "padded":
            noise = noise - noise.mean(1, keepdim=True)
        return noise * weight

    def _draw_times(self, like: Tensor, n_crystals: int) -> Tensor:
        if not self.noise:
            return like.new_zeros(n_crystals)
        if self.times == "uniform":
            return self.t_min + (self.t_max - self.t_min) * torch.rand(n_crystals, dtype=like.dtype, device=like.device)
        return torch.randn(n_crystals, dtype=like.dtype, device=like.device).sigmoid().clamp(self.t_min, self.t_max)

    def denoise(self, zt: Tensor, t: Tensor, valid: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the clean latents [B, n, d] of noisy ones, as the denoiser's ``forward`` takes them."""
        found = self.denoiser(zt, t, valid) if condition is None else self.denoiser(zt, t, valid, condition)
        if not self.skip:
            return found
        time = t.view(-1, 1, 1)
        return gaussian_guess(zt, time) + (1 - time) / _spread(time) * found

    def forward(
        self, z: Tensor, target: Tensor, crystal: Tensor, sizes: Tensor, largest: int, condition: Tensor | None = None
    ) -> FlowOutput:
        """Return the loss, averaged over crystals: mean_atoms,channels ‖target − ẑ_1‖² / max(1 − t, min_gap)².

        Its measures are the same error, and that of the guess that is best for Gaussian latents of unit variance.

        Args:
            z: [N, d] clean latents z_1, that noise is added to.
            target: [N, d] what the denoiser has to predict, z itself or a teacher's.
            crystal: [N] the crystal of each atom.
            sizes: [B] atoms of each crystal.
            largest: their maximum, known without asking the device.
            condition: [N, c] of the atoms or [B, c] of the crystals, where there is one.
        """
        first = sizes.cumsum(0) - sizes
        place = (
            torch.arange(len(z), device=z.device)
            + (torch.arange(len(sizes), device=z.device) * largest - first)[crystal]
        )
        valid = torch.arange(largest, device=z.device) < sizes.unsqueeze(1)

        def padded(atoms: Tensor) -> Tensor:
            flat = atoms.new_zeros(len(sizes) * largest, atoms.shape[1]).index_copy(0, place, atoms)
            return flat.view(len(sizes), largest, -1)

        z1 = padded(z)
        wanted = z1 if target is z else padded(target)
        t = self._draw_times(z, len(sizes))
        time = t.view(-1, 1, 1)
        zt = torch.zeros_like(z1)
        if self.noise:
            zt = ((1 - time) * self._noise(z1, valid) + time * z1) * valid.unsqueeze(-1)
        told = padded(condition) if condition is not None and self.condition == "atoms" else condition

        def weighted(found: Tensor) -> Tensor:
            error = ((wanted - found) * valid.unsqueeze(-1)).square().sum(dim=(1, 2))
            return error / (1 - t).clamp_min(self.min_gap).square() / (sizes * self.latent_dim)

        errors = weighted(self.denoise(zt, t, valid, told))
        count = torch.tensor(float(len(sizes)), device=z.device)
        with torch.no_grad():
            baseline = weighted(gaussian_guess(zt, time))
        measures = {"diffusion_error": (errors.detach().sum(), count)}
        if self.latent == "posterior":
            measures["diffusion_error_baseline"] = (baseline.sum(), count)
        return FlowOutput(errors.mean(), measures)

    @torch.no_grad()
    def sample(self, sizes: Tensor, steps: int = 100) -> Tensor:
        """Draw latents [N, d] of crystals with these numbers of atoms, by Euler steps of (ẑ_1 − z) / (1 − t)."""
        n = int(sizes.max())
        parameter = next(self.denoiser.parameters())
        valid = torch.arange(n, device=parameter.device) < sizes.to(parameter.device).unsqueeze(1)
        like = torch.empty(len(sizes), n, self.latent_dim, dtype=parameter.dtype, device=parameter.device)
        z = self._noise(like, valid)
        grid = torch.linspace(self.t_min, 1.0, steps + 1, dtype=z.dtype, device=z.device)
        for now, then in pairwise(grid):
            clean = self.denoise(z, now.expand(len(sizes)), valid)
            z = z + (then - now) / (1 - now) * (clean - z)
        return z[valid]
