"""Flow matching on the latents of a crystal's atoms.

Y. Lipman et al., "Flow Matching for Generative Modeling", ICLR 2023, with the straight path
z_t = (1 − t) z_0 + t z_1 from noise z_0 to data z_1 and a denoiser that predicts z_1.

Shapes: ``B`` crystals, ``N`` atoms, ``n`` atoms of the largest crystal, ``d`` width of the latent.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from crysldnet.build import Part


class LatentFlow(nn.Module):
    """The latent diffusion model: its loss and its sampler.

    Args:
        denoiser: maps (z_t, t, valid) to the clean latents.
        latent_dim: d.
        target: what the denoiser has to predict. ``joint``: the encoder's own latent, gradient flowing through both
            sides; ``ema``: the latent of a slow average of the encoder; ``frozen``: that of the encoder as it was when
            this stage began.
        latent: diffuse ``posterior`` samples, or the encoder's ``features`` before the latent map, as published.
        reconstruction: keep the first stage's loss beside the diffusion loss. Without it and with a joint target a
            constant encoder is a global minimum, which is the published recipe.
        weight: of the diffusion loss beside the others; 1 as published. Over uniform times the weighted error of an
            uninformed denoiser is about 19, so 1 lets it drown the reconstruction.
        ema_decay: of the slow average, a step.
        t_min, t_max: times are drawn uniformly between them.
        min_gap: the loss is divided by max(1 − t, min_gap)².
        center_noise: subtract the mean of z_0 over the crystal's atoms (``atoms``), over the padded axis as the
            published code does (``padded``), or not (``none``).
    """

    def __init__(
        self,
        *,
        denoiser: nn.Module,
        latent_dim: Part[int],
        target: Literal["joint", "ema", "frozen"] = "joint",
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
        self.denoiser, self.latent_dim = denoiser, latent_dim
        self.target, self.latent, self.reconstruction = target, latent, reconstruction
        self.weight = weight
        self.ema_decay = 1.0 if target == "frozen" else ema_decay
        self.t_min, self.t_max, self.min_gap, self.center_noise = t_min, t_max, min_gap, center_noise

    def _noise(self, like: Tensor, valid: Tensor) -> Tensor:
        noise = torch.randn_like(like)
        weight = valid.unsqueeze(-1).to(noise.dtype)
        if self.center_noise == "atoms":
            noise = noise - (noise * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        elif self.center_noise == "padded":
            noise = noise - noise.mean(1, keepdim=True)
        return noise * weight

    def forward(self, z: Tensor, target: Tensor, crystal: Tensor, sizes: Tensor, largest: int) -> Tensor:
        """Return the loss, averaged over crystals: mean_atoms,channels ‖target − ẑ_1‖² / max(1 − t, min_gap)².

        Args:
            z: [N, d] clean latents z_1.
            target: [N, d] what the denoiser has to predict, z itself or a teacher's.
            crystal: [N] the crystal of each atom.
            sizes: [B] atoms of each crystal.
            largest: their maximum, known without asking the device.
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
        t = self.t_min + (self.t_max - self.t_min) * torch.rand(len(sizes), dtype=z.dtype, device=z.device)
        time = t.view(-1, 1, 1)
        zt = ((1 - time) * self._noise(z1, valid) + time * z1) * valid.unsqueeze(-1)
        error = ((wanted - self.denoiser(zt, t, valid)) * valid.unsqueeze(-1)).square().sum(dim=(1, 2))
        return (error / (1 - t).clamp_min(self.min_gap).square() / (sizes * self.latent_dim)).mean()

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
            clean = self.denoiser(z, now.expand(len(sizes)), valid)
            z = z + (then - now) / (1 - now) * (clean - z)
        return z[valid]
