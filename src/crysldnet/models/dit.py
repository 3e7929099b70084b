"""The diffusion transformer that denoises the latents of a crystal.

W. Peebles & S. Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, with adaLN-Zero. One token per atom.

Shapes: ``B`` crystals, ``n`` atoms of the largest crystal (others are padded), ``d`` width of the latent, ``C`` width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from crysldnet.build import Part


def sinusoids(x: Tensor, n: int, base: float) -> Tensor:
    """Return cos and sin of x · base^(−m/n), m = 0 … n − 1, as [..., 2n]."""
    frequency = torch.exp(torch.arange(n, dtype=x.dtype, device=x.device) * (-math.log(base) / n))
    angle = x.unsqueeze(-1) * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the time embedding."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, u: Tensor, c: Tensor, padding: Tensor) -> Tensor:
        """Map tokens [B, n, C] with conditions c [B, C]; ``padding`` [B, n] marks padding."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(silu(c)).unsqueeze(1).chunk(6, dim=-1)
        x = self.norm1(u) * (1 + scale1) + shift1
        u = u + gate1 * self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return u + gate2 * self.mlp(self.norm2(u) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Predict clean latents from noisy ones and the time.

    Args:
        latent_dim: d.
        width: C; 768 as published.
        layers: 12 as published.
        heads: 12 as published.
        positional: ``none`` is equivariant to permutation of atoms; ``index`` adds the published sinusoids of the atom
            index, which make the result depend on the order.
        time_scale: factor of t in the sinusoidal embedding; 1 as published, for which most sinusoids hardly change.
        condition_dim: width of an atom or crystal condition; 0 for none.
    """

    def __init__(
        self,
        *,
        latent_dim: Part[int],
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        positional: Literal["none", "index"] = "none",
        time_scale: float = 1000.0,
        condition_dim: Part[int] = 0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} can't be divided by {heads} heads")
        self.width, self.positional, self.time_scale = width, positional, time_scale
        self.input = nn.Linear(latent_dim, width)
        self.time_in = nn.Linear(256, width)
        self.time_out = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, latent_dim)
        if condition_dim:
            self.condition_norm = nn.LayerNorm(condition_dim, elementwise_affine=False, eps=1e-6)
            self.condition = nn.Linear(condition_dim, width)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for time_map in (self.time_in, self.time_out):
            nn.init.normal_(time_map.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Block):
                nn.init.zeros_(module.modulation.weight)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.output.weight)

    def forward(self, z: Tensor, t: Tensor, valid: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the clean latents [B, n, d].

        Args:
            z: [B, n, d] noisy latents.
            t: [B] times between 0 (noise) and 1 (data).
            valid: [B, n] true for atoms, false for padding.
            condition: [B, n, condition_dim] per atom, or [B, condition_dim] per crystal.
        """
        u = self.input(z)
        if self.positional == "index":
            index = torch.arange(z.shape[1], device=z.device, dtype=z.dtype)
            cos, sin = sinusoids(index * math.pi, self.width // 2, 2048.0).chunk(2, dim=-1)
            u = u + torch.cat([sin, cos], dim=-1)
        c = self.time_out(silu(self.time_in(sinusoids(t * self.time_scale, 128, 10_000.0))))
        if condition is not None:
            told = self.condition(self.condition_norm(condition))
            u, c = (u + told, c) if told.ndim == 3 else (u, c + told)
        for block in self.blocks:
            u = block(u, c, ~valid)
        shift, scale = self.modulation(silu(c)).unsqueeze(1).chunk(2, dim=-1)
        return self.output(self.norm(u) * (1 + scale) + shift) * valid.unsqueeze(-1)
