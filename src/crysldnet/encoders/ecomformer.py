"""eComFormer.

K. Yan, C. Fu, X. Qian, X. Qian, S. Ji, "Complete and Efficient Graph Transformers for Crystal Material Property
Prediction", ICLR 2024 (arXiv 2403.11857).

iComFormer's graph; after the first convolution a block of two tensor products with spherical harmonics Y_l(r̂), l = 0,
1, 2, whose weights depend on the edge. With h = W x (n scalars), v channels of vectors V and of rank-2 tensors T and,
at an atom s, means over its edges to neighbors t (r̂ from s to t),

    s = h + mean W₀(e)ᵀ h_t / √n,   V = mean W₁(e)ᵀ h_t ⊗ Y₁ / √n,   T = mean W₂(e)ᵀ h_t ⊗ Y₂ / √n
    o = mean [U₀(e)ᵀ s_t + U₁(e)ᵀ (V_t · Y₁) / √3 + U₂(e)ᵀ (T_t · Y₂) / √5] / √(n + 2v)
    x ← softplus(W softplus(BN_V(o))) + W x

Each W_l(e), U_l(e) is a slice of one linear map F of u = softplus(W e): 5,120 numbers per edge. Factorized, W₀ᵀ h_t =
Σ_k u_k (F_kᵀ h_t): the inner sum is computed once per atom, and the outer one as a matrix product over the edges of
an atom, arranged in slots.

Only lengths of r_ij and invariant contractions reach the output, so mirror images aren't distinguished. The released
default has n = 64, half the size of the paper's; n = 128 has 12.46 M parameters. ``published`` and ``corrected``
differ in the graph as for iComFormer.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from crysldnet.encoders.bases import ExponentialBasis, harmonics
from crysldnet.encoders.elements import ElementTable
from crysldnet.encoders.layers import ComFormerConv
from crysldnet.encoders.protocol import Encoder
from crysldnet.encoders.scatter import scatter
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.spec import GraphSpec

SLOTS = 32
"""Edges per row of the padded layout; k = 25 and its reverse edges mostly fit into one or two."""


class EdgeWeights(nn.Module):
    """u = softplus(W e) and the linear map from it to the weights of a tensor product."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, count)

    def hidden(self, edge: Tensor) -> Tensor:
        """Return u [E, C]."""
        return softplus(self.inner(edge))


class EquivariantBlock(nn.Module):
    """Two tensor products with the edges' spherical harmonics, scalars in and out.

    Args:
        width: C.
        scalars: n.
        vectors: v, channels of vectors, and as many of rank-2 tensors.
    """

    def __init__(self, width: int, scalars: int, vectors: int) -> None:
        super().__init__()
        self.scalars, self.vectors = scalars, vectors
        self.input = nn.Linear(width, scalars)
        self.skip = nn.Linear(width, width)
        count = scalars * (scalars + 2 * vectors)
        self.first = EdgeWeights(width, count)
        self.second = EdgeWeights(width, count)
        self.norm = nn.BatchNorm1d(scalars)
        self.output = nn.Linear(scalars, width)

    def forward(self, x: Tensor, edge: Tensor, batch: CrystalBatch) -> Tensor:
        """Map [N, C] with edge features [E, C] to [N, C]."""
        # An edge passes the features of its target, its "neighbor", to its source.
        receiver, neighbor = batch.edge_index
        y1, y2 = harmonics(batch.edge_vec / batch.edge_vec.norm(dim=-1, keepdim=True))
        n, v = self.scalars, self.vectors
        h = self.input(x)

        def mean(values: Tensor) -> Tensor:
            return scatter(values, receiver, x.shape[0], "mean")

        first = [(0, n), (n * n, v), (n * n + n * v, v)]
        to_s, to_v, to_t = self._product(self.first, edge, h, neighbor, batch, first)
        scale = 1.0 / math.sqrt(n)
        s = h + mean(to_s) * scale
        vectors = mean(to_v.unsqueeze(-1) * y1.unsqueeze(1)) * scale
        tensors = mean(to_t.unsqueeze(-1) * y2.unsqueeze(1)) * scale

        along = (vectors.index_select(0, neighbor) * y1.unsqueeze(1)).sum(-1) / math.sqrt(3.0)
        along = torch.cat([along, (tensors.index_select(0, neighbor) * y2.unsqueeze(1)).sum(-1) / math.sqrt(5.0)], -1)
        (message,) = self._product(self.second, edge, s, neighbor, batch, [(0, n)])
        outer = self.second.outer
        weights = linear(self.second.hidden(edge), outer.weight[n * n :], outer.bias[n * n :])
        message = message + torch.einsum("eio,ei->eo", weights.view(-1, 2 * v, n), along)
        o = mean(message) / math.sqrt(n + 2 * v)
        return softplus(self.output(softplus(self.norm(o)))) + self.skip(x)

    def _product(
        self,
        maps: EdgeWeights,
        edge: Tensor,
        h: Tensor,
        neighbor: Tensor,
        batch: CrystalBatch,
        parts: list[tuple[int, int]],
    ) -> list[Tensor]:
        """Return Σ_i F(u_e)[i, o] h[i] of each edge's neighbor, for each part (its first row in F, its outputs).

        Σ_k u_k P[k, o] with P[k, o] = Σ_i F_k[i, o] h[i], once per atom. The edges of an atom are arranged in rows of
        slots, so the sum over k is one matrix product per row.
        """
        assert batch.slots is not None
        assert batch.slot_atom is not None
        hidden = maps.hidden(edge)
        width, n = hidden.shape[1], self.scalars
        weight, bias = maps.outer.weight, maps.outer.bias
        per_atom, constant = [], []
        for begin, outputs in parts:
            rows = slice(begin, begin + n * outputs)
            per_atom.append(torch.einsum("iok,ni->nko", weight[rows].view(n, outputs, width), h))
            constant.append(h @ bias[rows].view(n, outputs))
        table = torch.cat(per_atom, dim=-1).index_select(0, batch.slot_atom)
        filled = torch.cat([hidden, hidden.new_zeros(1, width)]).index_select(0, batch.slots.flatten())
        product = torch.bmm(filled.view(*batch.slots.shape, width), table).flatten(0, 1)
        place = edge_places(batch.slots, len(edge))
        found = product.index_select(0, place) + torch.cat(constant, dim=-1).index_select(0, neighbor)
        return list(found.split([outputs for _, outputs in parts], dim=-1))


def edge_places(slots: Tensor, n_edges: int) -> Tensor:
    """Return [E] the slot of each edge, counted through all rows."""
    place = torch.arange(slots.numel(), device=slots.device)
    return torch.zeros(n_edges + 1, dtype=place.dtype, device=place.device).scatter(0, slots.flatten(), place)[:-1]


class EComFormer(Encoder):
    """Encode atoms by ComFormer convolutions and one equivariant block.

    Args:
        width: C; 256 as published.
        layers: convolutions; 3 as published.
        scalars, vectors: channels of the equivariant block; 64 and 8 as released, 128 and 8 in the paper's size.
        k: nearest neighbors; 25 as published.
        n_basis: radial functions; 256 as published.
        lattice_edges: connect atoms to their own images along the frame.
        variant: ``corrected`` or ``published``, see the module docstring.
        tolerance: Å, tolerance for distances within a shell and lattice vector lengths in the corrected variant.

    Symmetries: translation, rotation, reflection, order of atoms; without lattice edges, which depend on the
    given cell, the corrected variant also choice of cell. Tests: ``tests/test_encoder_symmetry.py``.
    """

    def __init__(
        self,
        *,
        width: int = 256,
        layers: int = 3,
        scalars: int = 64,
        vectors: int = 8,
        k: int = 25,
        n_basis: int = 256,
        lattice_edges: bool = True,
        variant: Literal["corrected", "published"] = "corrected",
        tolerance: float = 1e-4,
    ) -> None:
        super().__init__()
        published = variant == "published"
        self.width = width
        self.graph = GraphSpec(
            k=k,
            tolerance=0.0 if published else tolerance,
            symmetric=True,
            repeat_self_images=published,
            lattice_edges="frame" if lattice_edges else "none",
            slots=SLOTS,
        )
        self.species = ElementTable(width)
        self.basis = ExponentialBasis(-4.0, 0.0, n_basis)
        self.edge = nn.Linear(n_basis, width)
        self.convs = nn.ModuleList(ComFormerConv(width) for _ in range(layers))
        self.equivariant = EquivariantBlock(width, scalars, vectors)

    def layer_of(self, name: str) -> int:
        """Return the layer of a parameter; ``equivariant`` follows the first."""
        return 1 if name.startswith("equivariant") else super().layer_of(name)

    def layer_features(self, batch: CrystalBatch) -> list[Tensor]:
        """Return [N, width] features of the species and after each layer."""
        source, target = batch.edge_index
        x = self.species(batch.numbers)
        edge = softplus(self.edge(self.basis(-0.75 / batch.edge_vec.norm(dim=-1))))
        layers = [x]
        for layer, conv in enumerate(self.convs):
            x = conv(x, edge, source, target)
            if layer == 0:
                x = self.equivariant(x, edge, batch)
            layers.append(x)
        return layers
