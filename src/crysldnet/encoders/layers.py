"""Layers shared by several encoders.

Shapes: ``N`` atoms, ``E`` directed edges, ``C`` width. i is an edge's target, j its source.

Published code applies linear maps to [x_i, x_j, e_ij] once per edge. With W = [A | B | F] this equals A x_i + B x_j + F
e_ij: A and B are applied once per atom and gathered, and successive linear maps without a nonlinearity in between are
multiplied first. It is the same function of the same parameters, up to rounding, at a third to half of the cost. Every
layer supports both; ``factorised`` selects.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu, silu, softplus

from crysldnet.encoders.scatter import scatter


class Factorised(nn.Module):
    """Base of layers that can be computed as published or factorized."""

    factorised = True
    """Apply maps to atoms before gathering; the result is the same."""


def set_factorised(module: nn.Module, factorised: bool) -> None:
    """Set this mode for every layer in a module; for tests and benchmarks."""
    for part in module.modules():
        if isinstance(part, Factorised):
            part.factorised = factorised


def unused_parameters(count: int) -> nn.Parameter:
    """Return unused frozen parameters that a released model has, so that sizes agree."""
    return nn.Parameter(torch.zeros(count), requires_grad=False)


class PairMLP(Factorised):
    """W₂ SiLU(W₁ [x_i, x_j, e] + b₁) + b₂."""

    def __init__(self, width: int, out: int | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(3 * width, width)
        self.second = nn.Linear(width, width if out is None else out)

    def forward(self, x_target: Tensor, x_source: Tensor, edge: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Map node features [N, C] (as target, as source) and edge features [E, C] to [E, out]."""
        if not self.factorised:
            pair = torch.cat([x_target.index_select(0, target), x_source.index_select(0, source), edge], dim=-1)
            return self.second(silu(self.first(pair)))
        a, b, f = self.first.weight.chunk(3, dim=1)
        hidden = linear(x_target, a, self.first.bias).index_select(0, target)
        hidden = hidden + linear(x_source, b).index_select(0, source) + linear(edge, f)
        return self.second(silu(hidden))


def joint_hidden(
    mlps: tuple[PairMLP, PairMLP], x: Tensor, edge: Tensor, source: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the hidden layers [E, C] of two pair maps of the same input, with combined matrix products."""
    parts = [mlp.first.weight.chunk(3, dim=1) for mlp in mlps]
    bias = torch.cat([mlp.first.bias for mlp in mlps])
    as_target = linear(x, torch.cat([a for a, _, _ in parts]), bias)
    as_source = linear(x, torch.cat([b for _, b, _ in parts]))
    on_edge = linear(edge, torch.cat([f for _, _, f in parts]))
    hidden = silu(as_target.index_select(0, target) + as_source.index_select(0, source) + on_edge)
    one, two = hidden.chunk(2, dim=-1)
    return one, two


class GatedConv(Factorised):
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
        if self.factorised:
            hidden_gate, hidden_message = joint_hidden((self.gate_mlp, self.message_mlp), x, edge, source, target)
            gate, message = self.gate_mlp.second(hidden_gate), self.message_mlp.second(hidden_message)
        else:
            gate = self.gate_mlp(x, x, edge, source, target)
            message = self.message_mlp(x, x, edge, source, target)
        gate = torch.sigmoid(self.edge_norm(gate))
        if envelope is not None:
            gate = gate * envelope
        total = self.node_norm(scatter(gate * message, target, x.shape[0], "sum"))
        return (relu(x + total) if self.update == "relu" else x + silu(total)), gate


class ComFormerConv(Factorised):
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
        if self.factorised:
            hidden_key, hidden_message = self._hidden(h, edge, source, target)
            keys, messages = self.key_mlp.second(hidden_key), self.message_mlp.second(hidden_message)
        else:
            k, v, e = self.key(h), self.value(h), self.edge(edge)
            keys = self.key_mlp(k, k, e, source, target)
            messages = self.message_mlp(v, v, e, source, target)
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
        as_target = linear(h, torch.cat([w[0] for w in weights]), torch.cat(biases))
        as_source = linear(h, torch.cat([w[1] for w in weights]))
        on_edge = linear(edge, torch.cat([w[2] for w in weights]))
        hidden = silu(as_target.index_select(0, target) + as_source.index_select(0, source) + on_edge)
        one, two = hidden.chunk(2, dim=-1)
        return one, two
