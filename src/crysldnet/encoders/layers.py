"""Layers that several encoders share.

Shapes: ``N`` atoms, ``E`` directed edges, ``C`` width. i is an edge's target, j its source.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus
from torch_geometric.utils import scatter


class PairMLP(nn.Module):
    """W₂ SiLU(W₁ [x_i, x_j, e] + b₁) + b₂, the first map applied to nodes and edges before they meet.

    With W₁ = [A | B | F] the sum A x_i + B x_j + F e is computed once a node for A and B and gathered, which is the
    same function of the same parameters: exact up to rounding, at a third to half of the work.
    """

    def __init__(self, width: int, out: int | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(3 * width, width)
        self.second = nn.Linear(width, width if out is None else out)

    def forward(self, x_target: Tensor, x_source: Tensor, edge: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Map node features [N, C] (as target, as source) and edge features [E, C] to [E, out]."""
        a, b, f = self.first.weight.chunk(3, dim=1)
        hidden = linear(x_target, a, self.first.bias).index_select(0, target)
        hidden = hidden + linear(x_source, b).index_select(0, source) + linear(edge, f)
        return self.second(nn.functional.silu(hidden))

    def unfactorised(self, x_target: Tensor, x_source: Tensor, edge: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Compute the same as published, on the concatenation; for tests and benchmarks."""
        pair = torch.cat([x_target[target], x_source[source], edge], dim=-1)
        return self.second(nn.functional.silu(self.first(pair)))


class ComFormerConv(nn.Module):
    """The convolution of ComFormer (Yan et al., ICLR 2024), which PDDFormer uses too.

    With q, k, v and ε linear in the nodes and the edge,
        K_ij = MLP_k([k_i, k_j, ε_ij]),  M_ij = MLP_m([v_i, v_j, ε_ij]),
        g_ij = σ(BN_E(q_i ⊙ K_ij / √C)),
        h_i' = softplus(h_i + BN_V(W Σ_j M_ij ⊙ g_ij)).
    The gate is one sigmoid a channel, not a softmax; the sum isn't normalised. BN_E runs over all edges of the batch.
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
        self.factorised = True
        """Whether pair maps are applied to nodes first; the result is the same."""

    def forward(self, h: Tensor, edge: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Map [N, C] with edge features [E, C] to [N, C]."""
        key_of = self.key_mlp if self.factorised else self.key_mlp.unfactorised
        message_of = self.message_mlp if self.factorised else self.message_mlp.unfactorised
        k, v, e = self.key(h), self.value(h), self.edge(edge)
        keys = key_of(k, k, e, source, target)
        gate = torch.sigmoid(self.edge_norm(self.query(h).index_select(0, target) * keys / math.sqrt(h.shape[1])))
        messages = message_of(v, v, e, source, target)
        total = scatter(messages * gate, target, 0, h.shape[0], "sum")
        return softplus(h + self.node_norm(self.output(total)))
