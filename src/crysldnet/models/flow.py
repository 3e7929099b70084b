"""Flow matching on the atom latents of a crystal.

Y. Lipman et al., "Flow Matching for Generative Modeling", ICLR 2023, with the straight path z_t = (1 − t) z_0 + t z_1
from noise z_0 to data z_1 and a denoiser that predicts z_1.

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
    """Return the mean of clean latents given noisy ones, for standard normal clean latents."""
    return time / _spread(time).square() * zt


class FlowOutput(NamedTuple):
    """The diffusion loss and its metrics: sums and counts over crystals."""

    loss: Tensor
    measures: dict[str, tuple[Tensor, Tensor]]


class LatentFlow(nn.Module):
    """Latent diffusion model with loss and sampler.

    Args:
        denoiser: maps (z_t, t, valid, condition) to the clean latents.
        latent_dim: d.
        target: what the denoiser predicts. ``joint``: the encoder's own latent, with gradients through both sides;
            ``joint_target_only``: the same, with the gradient only through the target; ``ema``: the latent of a moving
            average of the encoder; ``frozen``: that of the encoder at the start of this stage; ``clean``: that of the
            moving average for the clean crystal.
        condition: ``none`` diffuses the encoder's latents, so the loss depends only on their distribution. ``atoms``
            and ``crystal`` diffuse the teacher's latents and condition the denoiser on the encoder's features of each
            atom, or on one pooled vector per crystal (mean and spread of all layers): the gradient reaches the encoder
            through the condition. Both need a teacher (``ema``, ``frozen`` or ``clean``).
        noise: use diffusion; otherwise predict the target from the condition only.
        skip: predict D = t / s² · z_t + (1 − t) / s · F with s² = (1 − t)² + t² and denoiser F, which starts at the
            optimum for standard normal latents instead of at zero (after EDM, arXiv 2206.00364).
        times: sample t uniformly, or as the logistic of a normal number (arXiv 2403.03206), within t_min and t_max.
        latent: diffuse ``posterior`` samples, or the encoder's ``features`` before the latent map, as published.
        reconstruction: keep the first stage's loss in addition to the diffusion loss. Without it and with a joint
            target, as published, a constant encoder is a global minimum.
        weight: weight of the diffusion loss; 1 as published. For uniform times the weighted error of an uninformed
            denoiser without skip is about 19, so a weight of 1 dominates the reconstruction.
        ema_decay: decay of the moving average per step.
        t_min, t_max: bounds of the times.
        min_gap: the loss is divided by max(1 − t, min_gap)². With 1 − t_max or less it is the loss of the velocity.
        center_noise: subtract the mean of z_0 over the crystal's atoms (``atoms``), over the padded axis as in the
            published code (``padded``), or not (``none``).
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
        """Whether the target comes from a teacher, not from the encoder itself."""
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
        """Return the clean latents [B, n, d] for noisy ones; arguments as in the denoiser's ``forward``."""
        found = self.denoiser(zt, t, valid) if condition is None else self.denoiser(zt, t, valid, condition)
        if not self.skip:
            return found
        time = t.view(-1, 1, 1)
        return gaussian_guess(zt, time) + (1 - time) / _spread(time) * found

    def forward(
        self, z: Tensor, target: Tensor, crystal: Tensor, sizes: Tensor, largest: int, condition: Tensor | None = None
    ) -> FlowOutput:
        """Return the loss, averaged over crystals: mean_atoms,channels ‖target − ẑ_1‖² / max(1 − t, min_gap)².

        The metrics are this error and that of the optimal prediction for standard normal latents.

        Args:
            z: [N, d] clean latents z_1, to which noise is added.
            target: [N, d] target of the denoiser, z itself or a teacher's latent.
            crystal: [N] the crystal of each atom.
            sizes: [B] number of atoms.
            largest: maximum of ``sizes``, to avoid synchronizing with the device.
            condition: [N, c] per atom or [B, c] per crystal, if any.
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
        """Sample latents [N, d] of crystals with these numbers of atoms, by Euler steps of (ẑ_1 − z) / (1 − t)."""
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
