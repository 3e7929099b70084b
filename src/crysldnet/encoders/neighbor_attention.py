"""Attention over padded neighbor slots: this project's own encoder, made for speed at equal error.

What the published encoders spend their time on is matrices of the full width applied to every edge. Here such matrices
are applied to atoms alone; an edge costs a narrow radial filter, additions, and reductions over its atom's slots.

    x⁰ = embedding(Z);    per layer, with y = LN(x),
    h_ij = SiLU(A y_i + B y_j + F_l φ(r_ij))                    A, B once an atom; φ a narrow radial basis
    m_i  = Σ_j w_ij h_ij,   w = softmax of heads over the neighbors
    V_i  = Σ_j u_ij Y(r̂_ij)                                     u from h_ij, Y the harmonics of l = 1, 2
    x_i ← x_i + W [m_i, |V_i,1|², |V_i,2|²];    x_i ← x_i + MLP(LN(x_i))

|V|² = Σ_jk u_ij u_ik P_l(cos θ_jik) (up to a constant): it holds the angles between all pairs of neighbors at the price
of a sum over neighbors, as in the atomic cluster expansion (R. Drautz, Phys. Rev. B 99, 014104 (2019)).

Edges lie in rows of K slots. An atom with more than K (ties at its k-th shell are never cut) has several rows; softmax
and sums are then put together over its rows. There is no batch statistic, so results don't depend on the batch.

Shapes: ``N`` atoms, ``E`` edges, ``R`` rows, ``K`` slots, ``C`` width, ``M`` message width, ``H`` heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from crysldnet.data.batch import CrystalBatch
from crysldnet.data.graph import GraphSpec
from crysldnet.encoders.bases import GaussianBasis, harmonics
from crysldnet.encoders.elements import N_SPECIES
from crysldnet.encoders.protocol import Encoder


class Slots(NamedTuple):
    """The graph in rows of K slots.

    Attributes:
        atom: [R] the atom of each row.
        source: [R, K] the neighbor in each slot; any where it is empty.
        filled: [R, K] 1 where there is a neighbor, else 0.
        basis: [R, K, n] radial functions.
        harmonics: [R, K, 8] of l = 1 and 2, zero where it is empty.
    """

    atom: Tensor
    source: Tensor
    filled: Tensor
    basis: Tensor
    harmonics: Tensor


class NeighborLayer(nn.Module):
    """One layer of :class:`NeighborAttention`.

    Args:
        width: C.
        messages: M.
        heads: H, the messages' channels are shared out among them.
        channels: of the angular part; 0 for none.
        n_basis: radial functions.
    """

    def __init__(self, width: int, messages: int, heads: int, channels: int, n_basis: int) -> None:
        super().__init__()
        self.heads, self.channels = heads, channels
        self.norm = nn.LayerNorm(width)
        self.ends = nn.Linear(width, 2 * messages)
        self.edge = nn.Linear(n_basis, messages, bias=False)
        self.weights = nn.Linear(messages, heads + channels)
        self.output = nn.Linear(messages + 2 * channels, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, slots: Slots) -> Tensor:
        """Map [N, C] to [N, C]."""
        rows, k = slots.source.shape
        as_target, as_source = self.ends(self.norm(x)).chunk(2, dim=-1)
        around = as_source.index_select(0, slots.source.flatten()).view(rows, k, -1)
        hidden = silu(as_target.index_select(0, slots.atom).unsqueeze(1) + around + self.edge(slots.basis))
        filled = slots.filled.unsqueeze(-1)
        weights = torch.exp(4.0 * torch.tanh(self.weights(hidden) / 4.0)) * filled
        attention, angular = weights.split([self.heads, self.channels], dim=-1)
        by_head = hidden.unflatten(-1, (self.heads, -1)).permute(0, 2, 3, 1)
        total = torch.matmul(by_head, attention.permute(0, 2, 1).unsqueeze(-1)).flatten(1)
        parts = [total, weights.sum(1)]
        if self.channels:
            parts.append(torch.bmm(angular.transpose(1, 2), slots.harmonics).flatten(1))
        summed = x.new_zeros(x.shape[0], sum(p.shape[1] for p in parts)).index_add(0, slots.atom, torch.cat(parts, -1).to(x.dtype))
        total, norm, turned = summed.split([total.shape[1], self.heads + self.channels, 8 * self.channels], dim=-1)
        norm = norm.unsqueeze(-1) + 1e-6
        found = [(total.unflatten(-1, (self.heads, -1)) / norm[:, : self.heads]).flatten(1)]
        if self.channels:
            y1, y2 = (turned.unflatten(-1, (self.channels, 8)) / norm[:, self.heads :]).split([3, 5], dim=-1)
            found += [y1.square().sum(-1), y2.square().sum(-1)]
        x = x + self.output(torch.cat(found, dim=-1))
        return x + self.mlp(x)


class NeighborAttention(Encoder):
    def __init__(
        self,
        *,
        width: int = 256,
        layers: int = 4,
        messages: int = 256,
        heads: int = 8,
        channels: int = 16,
        k: int = 12,
        slots: int = 16,
        n_basis: int = 32,
        tolerance: float = 1e-4,
    ) -> None:
        super().__init__()
        self.width = width
        self.graph = GraphSpec(k=k, tolerance=tolerance, slots=slots)
        self.species = nn.Embedding(N_SPECIES, width)
        self.basis = GaussianBasis(0.0, 8.0, n_basis)
        self.layers = nn.ModuleList(NeighborLayer(width, messages, heads, channels, n_basis) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, batch: CrystalBatch) -> Tensor:
        """Return [N, width]."""
        assert batch.slots is not None
        assert batch.slot_atom is not None
        empty = batch.edge_vec.new_zeros(1, 3)
        vector = torch.cat([batch.edge_vec, empty]).index_select(0, batch.slots.flatten()).view(*batch.slots.shape, 3)
        source = torch.cat([batch.edge_index[0], batch.edge_index.new_zeros(1)]).index_select(0, batch.slots.flatten())
        length = vector.norm(dim=-1)
        unit = vector / length.clamp_min(1e-6).unsqueeze(-1)
        slots = Slots(
            batch.slot_atom,
            source.view(batch.slots.shape),
            (length > 0).to(vector.dtype),
            self.basis(length),
            torch.cat(harmonics(unit), dim=-1),
        )
        x = self.species(batch.numbers)
        for layer in self.layers:
            x = layer(x, slots)
        return self.norm(x)
