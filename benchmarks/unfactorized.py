"""Layers of the published encoders, computed as their released code does: linear maps once per edge.

The functions and parameters are those of the package's layers, which apply maps to atoms before gathering. Tests
compare the two; the benchmark of encoders measures the difference in cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, silu, softplus

from crysldnet.encoders.bases import harmonics
from crysldnet.encoders.cgcnn import CGCNNConv
from crysldnet.encoders.cogn import Block
from crysldnet.encoders.ecomformer import EquivariantBlock
from crysldnet.encoders.icomformer import AngleLayer
from crysldnet.encoders.layers import ComFormerConv, GatedConv, PairMLP
from crysldnet.encoders.matformer import MatformerConv
from crysldnet.encoders.scatter import scatter
from crysldnet.graphs.batch import CrystalBatch


def unfactorize(module: nn.Module) -> None:
    """Compute every layer in a module as published, from now on."""
    for part in module.modules():
        if type(part) in PUBLISHED:
            part.forward = MethodType(PUBLISHED[type(part)], part)


def _pairs(x_target: Tensor, x_source: Tensor, edge: Tensor, source: Tensor, target: Tensor) -> Tensor:
    return torch.cat([x_target.index_select(0, target), x_source.index_select(0, source), edge], dim=-1)


def _pair_mlp(
    self: PairMLP, x_target: Tensor, x_source: Tensor, edge: Tensor, source: Tensor, target: Tensor
) -> Tensor:
    return self.second(silu(self.first(_pairs(x_target, x_source, edge, source, target))))


def _gated(
    self: GatedConv, x: Tensor, edge: Tensor, source: Tensor, target: Tensor, envelope: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(self.edge_norm(self.gate_mlp(x, x, edge, source, target)))
    message = self.message_mlp(x, x, edge, source, target)
    if envelope is not None:
        gate = gate * envelope
    total = self.node_norm(scatter(gate * message, target, x.shape[0], "sum"))
    return (relu(x + total) if self.update == "relu" else x + silu(total)), gate


def _comformer(self: ComFormerConv, h: Tensor, edge: Tensor, source: Tensor, target: Tensor) -> Tensor:
    k, v, e = self.key(h), self.value(h), self.edge(edge)
    keys, messages = self.key_mlp(k, k, e, source, target), self.message_mlp(v, v, e, source, target)
    query = self.query(h).index_select(0, target)
    gate = torch.sigmoid(self.edge_norm(query * keys / math.sqrt(h.shape[1])))
    return softplus(h + self.node_norm(self.output(scatter(messages * gate, target, h.shape[0], "sum"))))


def _matformer(self: MatformerConv, x: Tensor, edge: Tensor, source: Tensor, target: Tensor) -> Tensor:
    q, k, v, e = (
        part.unflatten(-1, (self.heads, self.width))
        for part in (self.query(x), self.key(x), self.value(x), self.edge(edge))
    )
    alpha = q.index_select(0, target).repeat(1, 1, 3) * _pairs(k, k, e, source, target)
    gate = torch.sigmoid(self.gate_norm(alpha / math.sqrt(3 * self.width)))
    expanded = self.expand(_pairs(v, v, e, source, target))
    messages = self.message_norm(self.contract(expanded * gate)).flatten(1)
    total = self.output(scatter(messages, target, x.shape[0], "sum"))
    return silu(self.node_norm(total)) + self.skip(x)


def _cgcnn(self: CGCNNConv, x: Tensor, edge: Tensor, source: Tensor, target: Tensor) -> Tensor:
    y1, y2 = self.edge_norm(self.linear(_pairs(x, x, edge, source, target))).chunk(2, dim=-1)
    total = scatter(torch.sigmoid(y1) * softplus(y2), target, x.shape[0], "sum")
    return softplus(x + self.node_norm(total))


def _cogn(self: Block, x: Tensor, basis: Tensor, embed: nn.Linear, source: Tensor, target: Tensor) -> Tensor:
    parts = [embed(basis), x.index_select(0, target), x.index_select(0, source)]
    message = silu(self.first(torch.cat(parts, dim=-1)))
    for layer in self.rest:
        message = silu(layer(message))
    return x + silu(self.node(scatter(message, target, x.shape[0], "sum")))


def _angles(self: AngleLayer, edge: Tensor, lengths: Tensor, angles: Tensor, crystal: Tensor) -> Tensor:
    def mapped(own: nn.Linear, of_length: nn.ModuleList, mlp: PairMLP) -> Tensor:
        repeated = lengths.index_select(1, crystal)
        parts = [torch.cat([own(edge), of_length[m](repeated[m]), self.angle(angles[m])], dim=-1) for m in range(3)]
        return mlp.second(silu(mlp.first(torch.stack(parts))))

    keys = mapped(self.key, self.length_key, self.key_mlp)
    messages = mapped(self.value, self.length_value, self.message_mlp)
    gate = self.query(edge) * keys / math.sqrt(edge.shape[1])
    gate = torch.sigmoid(self.gate_norm(gate.flatten(0, 1)).view_as(gate))
    return softplus(edge + self.edge_norm(self.output(messages * gate).sum(0)))


def _equivariant(self: EquivariantBlock, x: Tensor, edge: Tensor, batch: CrystalBatch) -> Tensor:
    receiver, neighbor = batch.edge_index
    y1, y2 = (y.unsqueeze(1) for y in harmonics(batch.edge_vec / batch.edge_vec.norm(dim=-1, keepdim=True)))
    n, v = self.scalars, self.vectors

    def mean(values: Tensor) -> Tensor:
        return scatter(values, receiver, x.shape[0], "mean")

    def product(weights: Tensor, features: Tensor) -> Tensor:
        return torch.einsum("eio,ei->eo", weights.view(len(edge), features.shape[1], -1), features)

    h = self.input(x)
    weights = self.first.outer(self.first.hidden(edge)).split([n * n, n * v, n * v], dim=1)
    to_s, to_v, to_t = (product(own, h.index_select(0, neighbor)) for own in weights)
    s = h + mean(to_s) / math.sqrt(n)
    vectors, tensors = mean(to_v.unsqueeze(-1) * y1) / math.sqrt(n), mean(to_t.unsqueeze(-1) * y2) / math.sqrt(n)
    along = [
        (vectors.index_select(0, neighbor) * y1).sum(-1) / math.sqrt(3.0),
        (tensors.index_select(0, neighbor) * y2).sum(-1) / math.sqrt(5.0),
    ]
    weights = self.second.outer(self.second.hidden(edge)).split([n * n, 2 * v * n], dim=1)
    message = product(weights[0], s.index_select(0, neighbor)) + product(weights[1], torch.cat(along, -1))
    o = mean(message) / math.sqrt(n + 2 * v)
    return softplus(self.output(softplus(self.norm(o)))) + self.skip(x)


PUBLISHED: dict[type[nn.Module], Callable[..., Any]] = {
    PairMLP: _pair_mlp,
    GatedConv: _gated,
    ComFormerConv: _comformer,
    MatformerConv: _matformer,
    CGCNNConv: _cgcnn,
    Block: _cogn,
    AngleLayer: _angles,
    EquivariantBlock: _equivariant,
}
