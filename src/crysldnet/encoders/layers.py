"""Layers shared by several encoders.

Shapes: ``N`` atoms, ``E`` directed edges, ``C`` width. i is an edge's target, j its source.

Published code applies linear maps to [x_i, x_j, e_ij] once per edge. With W = [A | B | F] this equals A x_i + B x_j + F
e_ij: A and B are applied once per atom and gathered, and successive linear maps without a nonlinearity in between are
multiplied first. It is the same function of the same parameters, up to rounding, at a third to half of the cost. The
layers as published are in ``benchmarks/unfactorized.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu, silu, softplus

from crysldnet.encoders.scatter import scatter


def unused_parameters(count: int) -> nn.Parameter:
    """Return unused frozen parameters that a released model has, so that sizes agree."""
    return nn.Parameter(torch.zeros(count), requires_grad=False)


class PairMLP(nn.Module):
    """W₂ SiLU(W₁ [x_i, x_j, e] + b₁) + b₂."""

    def __init__(self, width: int, out: int | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(3 * width, width)
        self.second = nn.Linear(width, width if out is None else out)

    def forward(self, x_target: Tensor, x_source: Tensor, edge: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Map node features [N, C] (as target, as source) and edge features [E, C] to [E, out]."""
        a, b, f = self.first.weight.chunk(3, dim=1)
        hidden = linear(x_target, a, self.first.bias).index_select(0, target)
        hidden = hidden + linear(x_source, b).index_select(0, source) + linear(edge, f)
        return self.second(silu(hidden))


def joint_hidden(
    x: Tensor,
    edge: Tensor,
    source: Tensor,
    target: Tensor,
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the hidden layers [E, C] of two pair maps of the same input, with combined matrix products.

    Args:
        x: [N, C] node features.
        edge: [E, C] edge features.
        source, target: [E] ends of the edges.
        weights: A, B and F of each map.
        biases: bias of each map.
    """
    a, b, f = (torch.cat(part) for part in zip(*weights, strict=True))
    as_target = linear(x, a, torch.cat(tuple(biases)))
    as_source, on_edge = linear(x, b), linear(edge, f)
    hidden = silu(as_target.index_select(0, target) + as_source.index_select(0, source) + on_edge)
    one, two = hidden.chunk(2, dim=-1)
    return one, two


class GatedConv(nn.Module):
    """Σ_j gate_ij ⊙ M_ij with gate and message two pair maps, as in PotNet and CartNet.

    gate_ij = c_ij σ(BN_E(MLP_g([x_i, x_j, e]))), M_ij = MLP_m([x_i, x_j, e]), BN_E over all edges of the batch.

    Args:
        width: C.
        update: ``relu``: x' = ReLU(x + BN_V(Σ)), as in PotNet; ``silu``: x' = x + SiLU(BN_V(Σ)), as in CartNet.
    """

    def __init__(self, width: int, update: str) -> None:
        super().__init__()
        self.gate_mlp, self.message_mlp = PairMLP(width), PairMLP(width)
        self.edge_norm, self.node_norm = nn.BatchNorm1d(width), nn.BatchNorm1d(width)
        self.update = update

    def forward(
        self, x: Tensor, edge: Tensor, source: Tensor, target: Tensor, envelope: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return node features [N, C] and the gates [E, C]; ``envelope`` [E, 1] is c."""
        first = (self.gate_mlp.first, self.message_mlp.first)
        weights, biases = [own.weight.chunk(3, dim=1) for own in first], [own.bias for own in first]
        hidden_gate, hidden_message = joint_hidden(x, edge, source, target, weights, biases)
        gate, message = self.gate_mlp.second(hidden_gate), self.message_mlp.second(hidden_message)
        gate = torch.sigmoid(self.edge_norm(gate))
        if envelope is not None:
            gate = gate * envelope
        total = self.node_norm(scatter(gate * message, target, x.shape[0], "sum"))
        return (relu(x + total) if self.update == "relu" else x + silu(total)), gate


class ComFormerConv(nn.Module):
    """The convolution of ComFormer (Yan et al., ICLR 2024), also used by PDDFormer.

    With q, k, v and ε linear in the nodes and the edge,
        K_ij = MLP_k([k_i, k_j, ε_ij]),  M_ij = MLP_m([v_i, v_j, ε_ij]),
        g_ij = σ(BN_E(q_i ⊙ K_ij / √C)),
        h_i' = softplus(h_i + BN_V(W Σ_j M_ij ⊙ g_ij)).
    The gate is one sigmoid per channel, not a softmax; the sum isn't normalized. BN_E runs over all edges of the batch.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.edge = nn.Linear(width, width)
        self.key_mlp = PairMLP(width)
        self.message_mlp = PairMLP(width)
        self.output = nn.Linear(width, width)
        self.edge_norm = nn.BatchNorm1d(width)
        self.node_norm = nn.BatchNorm1d(width)

    def forward(self, h: Tensor, edge: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Map [N, C] with edge features [E, C] to [N, C]."""
        query = self.query(h).index_select(0, target)
        hidden_key, hidden_message = self._hidden(h, edge, source, target)
        keys, messages = self.key_mlp.second(hidden_key), self.message_mlp.second(hidden_message)
        gate = torch.sigmoid(self.edge_norm(query * keys / math.sqrt(h.shape[1])))
        total = scatter(messages * gate, target, h.shape[0], "sum")
        return softplus(h + self.node_norm(self.output(total)))

    def _hidden(self, h: Tensor, edge: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden layers of both pair maps, with the key, value and edge maps multiplied into their first
        layers.
        """
        weights, biases = [], []
        for inner, mlp in ((self.key, self.key_mlp), (self.value, self.message_mlp)):
            a, b, f = mlp.first.weight.chunk(3, dim=1)
            weights.append((a @ inner.weight, b @ inner.weight, f @ self.edge.weight))
            biases.append(mlp.first.bias + (a + b) @ inner.bias + f @ self.edge.bias)
        return joint_hidden(h, edge, source, target, weights, biases)
