"""Matformer.

K. Yan, Y. Liu, Y. Lin, S. Ji, "Periodic Graph Transformers for Crystal Material Property Prediction", NeurIPS 2022
(arXiv 2209.11807).

The k-nearest graph with edges along a, b, c, a + b, a + c, b + c of the given cell. With four heads, each of the
layer's width,

    α_ij = [q_i, q_i, q_i] ⊙ [k_i, k_j, ε_ij] / √(3C)
    m_ij = LN(W₂(W₁ [v_i, v_j, ε_ij] ⊙ σ(LN(α_ij))))
    x_i ← SiLU(BN_V(W Σ_j m_ij)) + W' x_i

There is no softmax. Norms, W₁ and W₂ are shared by the heads.

``published``: self-images count twice, ties are compared without tolerance, sparse crystals (a 12th neighbor beyond
8 Å) get no lattice edges, and two unused, frozen parts are kept so that sizes agree. ``corrected`` fixes these.
Both depend on the given cell through the lattice edges, unless ``lattice_edges`` is off; reduce cells first if that
matters. Edges much longer than 8 Å have no radial feature and carry a constant.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from crysldnet.encoders.bases import ExponentialBasis
from crysldnet.encoders.elements import ElementTable
from crysldnet.encoders.layers import unused_parameters
from crysldnet.encoders.protocol import Encoder
from crysldnet.encoders.scatter import scatter
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.spec import GraphSpec

LONGEST = 8.0
"""Å, the last center of the basis, and the radius in which the published code first searches for neighbors."""


class MatformerConv(nn.Module):
    """One layer of H heads, each of width C."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.query = nn.Linear(width, heads * width)
        self.key = nn.Linear(width, heads * width)
        self.value = nn.Linear(width, heads * width)
        self.edge = nn.Linear(width, heads * width, bias=False)
        self.expand = nn.Linear(3 * width, 3 * width)
        self.contract = nn.Linear(3 * width, width)
        self.gate_norm = nn.LayerNorm(3 * width)
        self.message_norm = nn.LayerNorm(width)
        self.output = nn.Linear(heads * width, width)
        self.node_norm = nn.BatchNorm1d(width)
        self.skip = nn.Linear(width, width)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.width))

    def forward(self, x: Tensor, edge: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Map [N, C] with edge features [E, C] to [N, C]."""
        q, k, e = self._heads(self.query(x)), self._heads(self.key(x)), self._heads(self.edge(edge))
        q_i, own = q.index_select(0, target), (q * k).index_select(0, target)
        alpha = torch.cat([own, q_i * k.index_select(0, source), q_i * e], dim=-1)
        expanded = self._expanded(x, edge, source, target)
        gate = torch.sigmoid(self.gate_norm(alpha / math.sqrt(3 * self.width)))
        messages = self.message_norm(self.contract(expanded * gate)).flatten(1)
        total = self.output(scatter(messages, target, x.shape[0], "sum"))
        return silu(self.node_norm(total)) + self.skip(x)

    def _expanded(self, x: Tensor, edge: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Return W₁ [v_i, v_j, ε_ij] + b₁ as [E, H, 3C], the value and edge maps of each head multiplied into W₁."""
        a, b, f = self.expand.weight.chunk(3, dim=1)
        value = self._by_head(self.value.weight)
        as_target = linear(x, (a @ value).flatten(0, 1))
        as_source = linear(x, (b @ value).flatten(0, 1))
        on_edge = linear(edge, (f @ self._by_head(self.edge.weight)).flatten(0, 1))
        bias = (self.value.bias.view(self.heads, self.width) @ (a + b).T + self.expand.bias).flatten()
        whole = (as_target + bias).index_select(0, target) + as_source.index_select(0, source) + on_edge
        return whole.unflatten(-1, (self.heads, 3 * self.width))

    def _by_head(self, weight: Tensor) -> Tensor:
        return weight.view(self.heads, self.width, self.width)


class Matformer(Encoder):
    """Encode atoms by gated attention over nearest neighbors and lattice vectors.

    Args:
        width: C; 128 as published.
        layers: 5 as published.
        heads: H; 4 as published.
        k: nearest neighbors; 12 as published.
        n_basis: radial functions; 128 as published.
        lattice_edges: connect atoms to their own images along the cell.
        variant: ``corrected`` or ``published``, see the module docstring.
        tolerance: Å, tolerance for distances within a shell in the corrected variant.

    Symmetries: translation, rotation, reflection, order of atoms; without lattice edges the corrected variant also
    choice of cell. Tests: ``tests/test_encoder_symmetry.py``.
    """

    def __init__(
        self,
        *,
        width: int = 128,
        layers: int = 5,
        heads: int = 4,
        k: int = 12,
        n_basis: int = 128,
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
            lattice_edges="cell" if lattice_edges else "none",
            lattice_edges_within=LONGEST if published else None,
        )
        self.species = ElementTable(width)
        self.basis = ExponentialBasis(0.0, LONGEST, n_basis)
        self.edge = nn.Sequential(nn.Linear(n_basis, width), nn.Softplus(), nn.Linear(width, width))
        self.convs = nn.ModuleList(MatformerConv(width, heads) for _ in range(layers))
        self.unused = unused_parameters(97_792) if published else None

    def layer_features(self, batch: CrystalBatch) -> list[Tensor]:
        """Return [N, width] features of the species and after each layer."""
        source, target = batch.edge_index
        x = self.species(batch.numbers)
        edge = self.edge(self.basis(batch.edge_vec.norm(dim=-1)))
        layers = [x]
        for conv in self.convs:
            layers.append(conv(layers[-1], edge, source, target))
        return layers
