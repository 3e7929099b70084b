"""Attention over padded neighbor slots: our own encoder, designed for speed at equal error.

Published encoders spend most of their time applying full-width matrices to every edge. Here such matrices are only
applied to atoms; an edge costs a narrow radial filter, additions, and its share of a weighted sum.

    x⁰ = embedding(Z);   in each layer, with y = LN(x),
    h_ij = SiLU(A y_i + B y_j + F φ(r_ij))                A, B once per atom; φ a narrow radial basis
    w_ij = exp(clip(W h_ij))                              H heads for the messages, c channels for the angles
    m_i  = Σ_j w_ij h_ij / Σ_j w_ij                       head by head
    V_i  = Σ_j w_ij Y(r̂_ij) / Σ_j w_ij                    channel by channel; Y the harmonics of l = 1 and 2
    x_i ← x_i + W [m_i, |V_i,1|², |V_i,2|²];   x_i ← x_i + MLP(LN(x_i))

The result is LN(x). |V_i,l|² = Σ_jk w_ij w_ik P_l(cos θ_jik), up to a constant, contains the angles between all pairs
of neighbors at the cost of a sum over neighbors. With learned weights these are the bond-order parameters of P. J.
Steinhardt, D. R. Nelson, M. Ronchetti, Phys. Rev. B 28, 784 (1983). Dividing the weights by their sum keeps them
bounded; unbounded, they increased validation errors by a third.

With ``fade``, an edge longer than the distance d_k of its atom's k-th neighbor has its weights multiplied by u²(3 −
2u), u = 1 − (r − d_k) / fade, and edges longer than d_k + fade are dropped. d_k is a continuous function of the
positions, so the features are too. Without it, features jump when the k-th neighbor and the next change places.

Edges are stored in rows of K slots. Ties at the k-th shell are never cut, so an atom may have more than K edges and
several rows, over which its sums are combined. There are no batch statistics, so a crystal's features don't depend on
the rest of the batch, and padding has no effect: compiled layers see a few bucketed shapes and aren't recompiled.

Shapes: ``N`` atoms, ``E`` edges, ``R`` rows, ``K`` slots, ``C`` width, ``M`` width of messages, ``H`` heads, ``c``
channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from crysldnet.encoders.bases import GaussianBasis, harmonics
from crysldnet.encoders.elements import N_SPECIES
from crysldnet.encoders.protocol import Encoder
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.spec import GraphSpec

LONGEST = 8.0
"""Å, the last center of the radial basis."""
CLIP = 4.0
"""Attention logits are clipped to ± this value, so their exponentials don't need a maximum subtracted."""
N_HARMONICS = 8
"""3 for l = 1 and 5 for l = 2."""


class Slots(NamedTuple):
    """The graph in rows of K slots.

    Attributes:
        atom: [R] the atom of each row.
        source: [R, K] the neighbor in each slot; arbitrary if empty.
        filled: [R, K, 1] weight of the neighbor: 1, less if it fades, 0 if empty.
        basis: [R, K, n] radial functions.
        harmonics: [R, K, 8] spherical harmonics.
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
        heads: H; the message channels are divided among them.
        channels: c.
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
        as_target, as_source = self.ends(self.norm(x)).chunk(2, dim=-1)
        # Not in place: adding to a view makes the backward pass copy gradients, and autocast doesn't cast for addmm_.
        around = as_source.index_select(0, slots.source.flatten())
        around = torch.addmm(around, slots.basis.flatten(0, 1), self.edge.weight.T).unflatten(0, slots.source.shape)
        hidden = silu(around + as_target.index_select(0, slots.atom).unsqueeze(1))
        weights = torch.exp(CLIP * torch.tanh(self.weights(hidden) / CLIP)) * slots.filled
        x = x + self.output(torch.cat(self._means(hidden, weights, slots, x.shape[0]), dim=-1))
        return x + self.mlp(x)

    def _means(self, hidden: Tensor, weights: Tensor, slots: Slots, n_atoms: int) -> list[Tensor]:
        """Return the weighted means of messages [N, M], and |V|² of l = 1 and l = 2, [N, c] each."""
        attention, angular = weights.split([self.heads, self.channels], dim=-1)
        # Every head weights all channels and keeps its own: more products, but no copy of a [R, K, M] tensor.
        messages = torch.bmm(attention.transpose(1, 2), hidden).unflatten(-1, (self.heads, -1))
        messages = messages.diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1)
        turned = torch.bmm(angular.transpose(1, 2), slots.harmonics.to(angular.dtype)).flatten(1)
        rows = torch.cat([messages, turned, weights.sum(1)], dim=-1)
        sums = rows.new_zeros(n_atoms, rows.shape[1]).index_add(0, slots.atom, rows)
        messages, turned, total = sums.split([messages.shape[1], turned.shape[1], weights.shape[2]], dim=-1)
        share = 1.0 / (total.unsqueeze(-1) + 1e-6)
        mean = messages.unflatten(-1, (self.heads, -1)) * share[:, : self.heads]
        vector, tensor = (turned.unflatten(-1, (self.channels, N_HARMONICS)) * share[:, self.heads :]).split([3, 5], -1)
        return [mean.flatten(1), vector.square().sum(-1), tensor.square().sum(-1)]


class NeighborAttention(Encoder):
    """Encode atoms by attention over their nearest neighbors, distances and angles between them.

    Args:
        width: C.
        layers: number of layers.
        messages: M, message width; the feature width by default.
        heads: H message heads.
        channels: c channels of the angular part.
        k: nearest neighbors.
        slots: K; at k = 12, fourteen slots hold all ties of 95 % of atoms; the others take another row.
        n_basis: radial functions.
        tolerance: Å, tolerance for distances within a shell; unused with ``fade``.
        fade: Å beyond the k-th distance over which edges fade out; 0 for a sharp cutoff.

    Symmetries: translation, rotation, reflection, order of atoms, choice of cell. Tests:
    ``tests/test_encoder_symmetry.py``.
    """

    exportable = True

    def __init__(
        self,
        *,
        width: int = 256,
        layers: int = 4,
        messages: int | None = None,
        heads: int = 8,
        channels: int = 16,
        k: int = 12,
        slots: int = 14,
        n_basis: int = 32,
        tolerance: float = 1e-4,
        fade: float = 0.0,
    ) -> None:
        super().__init__()
        messages = width if messages is None else messages
        if messages % heads:
            raise ValueError(f"messages={messages} can't be divided among {heads} heads")
        self.width = width
        self.graph = GraphSpec(k=k, tolerance=fade or tolerance, slots=slots)
        self.smooth = fade > 0.0
        self.species = nn.Embedding(N_SPECIES, width)
        self.basis = GaussianBasis(0.0, LONGEST, n_basis)
        self.layers = nn.ModuleList(NeighborLayer(width, messages, heads, channels, n_basis) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self._compiled = False
        self._run = self._encode

    def compile_layers(self) -> None:
        """Compile for a few padded shapes."""
        self._compiled = True
        self._run = torch.compile(self._encode, dynamic=False)

    def layer_features(self, batch: CrystalBatch) -> list[Tensor]:
        """Return [N, width] features of the species and after each layer."""
        assert batch.slots is not None
        assert batch.slot_atom is not None
        flat = batch.slots.flatten()  # an empty slot points to an extra last edge: from atom 0, of zero length
        vector = pad(batch.edge_vec, (0, 0, 0, 1)).index_select(0, flat).unflatten(0, batch.slots.shape)
        source = pad(batch.edge_index[0], (0, 1)).index_select(0, flat).unflatten(0, batch.slots.shape)
        cut = batch.cut.index_select(0, batch.slot_atom)
        if not self._compiled:
            return self._run(batch.numbers, batch.slot_atom, source, vector, cut)
        n, rows = batch.num_atoms, len(source)
        more_atoms, more_rows = bucket(n + 1) - n, bucket(rows) - rows
        numbers = pad(batch.numbers, (0, more_atoms))
        atom = pad(batch.slot_atom, (0, more_rows), value=n)  # padding rows belong to the first padding atom
        source, vector = pad(source, (0, 0, 0, more_rows)), pad(vector, (0, 0, 0, 0, 0, more_rows))
        cut = pad(cut, (0, more_rows))
        return [layer[:n] for layer in self._run(numbers, atom, source, vector, cut)]

    def _encode(self, numbers: Tensor, atom: Tensor, source: Tensor, vector: Tensor, cut: Tensor) -> list[Tensor]:
        """Map atomic numbers [N] and slots (atom [R], source, vector and cut) to [N, C] of each layer.

        source: [R, K]; vector: [R, K, 3]; cut: [R] in Å.
        """
        length = vector.norm(dim=-1)
        unit = vector / length.clamp_min(1e-6).unsqueeze(-1)
        filled = (length > 0).to(vector.dtype).unsqueeze(-1)
        if self.smooth:
            filled = filled * smooth_step((cut.unsqueeze(1) - length) / self.graph.tolerance).unsqueeze(-1)
        slots = Slots(atom, source, filled, self.basis(length), torch.cat(harmonics(unit), dim=-1))
        layers = [self.species(numbers)]
        for layer in self.layers:
            layers.append(layer(layers[-1], slots))
        return [*layers[:-1], self.norm(layers[-1])]


def smooth_step(x: Tensor) -> Tensor:
    """Rise smoothly from 0 at x ≤ 0 to 1 at x ≥ 1, 3x² − 2x³."""
    x = x.clamp(0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def bucket(n: int) -> int:
    """Round up to one of eight sizes per octave, so that batches of similar size share shapes."""
    step = max(8, 1 << max(0, (n - 1).bit_length() - 4))
    return -(-n // step) * step
