"""CGCNN.

T. Xie, J. C. Grossman, "Crystal Graph Convolutional Neural Networks for an Accurate and Interpretable Prediction of
Material Properties", Phys. Rev. Lett. 120, 145301 (2018).

    x⁰ = W t(Z),   e_ij = Gaussians of r_ij
    [y₁, y₂] = BN_E(W [x_i, x_j, e_ij] + b)
    x_i ← softplus(x_i + BN_V(Σ_j σ(y₁) ⊙ softplus(y₂)))

``published``: exactly 12 edges per atom; ties are cut in the order of enumeration, and neighbors beyond 8 Å are
replaced by edges from the crystal's first atom at 9 Å, which still send messages. ``corrected`` keeps whole shells and
adds no edges. PyG's ``CGConv`` is a different function, without normalization of the gate or outer softplus. The
published head is ``head=cgcnn``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from crysldnet.encoders.bases import GaussianBasis
from crysldnet.encoders.elements import ElementTable
from crysldnet.encoders.protocol import Encoder
from crysldnet.encoders.scatter import scatter
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.spec import GraphSpec

LONGEST = 8.0
"""Å, the last center of the basis and, as published, the longest edge."""
CENTERS = 41


class CGCNNConv(nn.Module):
    """One convolution, gate and message in one linear map.

    Args:
        width: C.
        edge_width: width of the edge features.
    """

    def __init__(self, width: int, edge_width: int) -> None:
        super().__init__()
        self.widths = (width, width, edge_width)
        self.linear = nn.Linear(sum(self.widths), 2 * width)
        self.edge_norm, self.node_norm = nn.BatchNorm1d(2 * width), nn.BatchNorm1d(width)

    def forward(self, x: Tensor, edge: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Map [N, C] with edge features [E, 41] to [N, C]."""
        a, b, f = self.linear.weight.split(self.widths, dim=1)
        as_target = linear(x, a, self.linear.bias).index_select(0, target)
        y = as_target + linear(x, b).index_select(0, source) + linear(edge, f)
        y1, y2 = self.edge_norm(y).chunk(2, dim=-1)
        total = scatter(torch.sigmoid(y1) * softplus(y2), target, x.shape[0], "sum")
        return softplus(x + self.node_norm(total))


class CGCNN(Encoder):
    """Encode atoms by gated convolutions over their nearest neighbors.

    Args:
        width: C; 64 as published.
        layers: 3 as published.
        k: neighbors per atom; 12 as published.
        variant: ``corrected`` or ``published``, see the module docstring.
        tolerance: Å, tolerance for distances within a shell in the corrected variant.

    Symmetries: translation, rotation, reflection; the corrected variant also order of atoms and choice of cell.
    Tests: ``tests/test_encoder_symmetry.py``.
    """

    def __init__(
        self,
        *,
        width: int = 64,
        layers: int = 3,
        k: int = 12,
        variant: Literal["corrected", "published"] = "corrected",
        tolerance: float = 1e-4,
    ) -> None:
        super().__init__()
        self.width = width
        if variant == "published":
            self.graph = GraphSpec(k=k, tolerance=0.0, cut_beyond=LONGEST)
        else:
            self.graph = GraphSpec(k=k, tolerance=tolerance)
        self.species = ElementTable(width)
        self.basis = GaussianBasis(0.0, LONGEST, CENTERS, sharpness=1.0)
        self.convs = nn.ModuleList(CGCNNConv(width, CENTERS) for _ in range(layers))

    def layer_features(self, batch: CrystalBatch) -> list[Tensor]:
        """Return [N, width] features of the species and after each layer."""
        source, target = batch.edge_index
        x = self.species(batch.numbers)
        edge = self.basis(batch.edge_vec.norm(dim=-1))
        layers = [x]
        for conv in self.convs:
            layers.append(conv(layers[-1], edge, source, target))
        return layers
