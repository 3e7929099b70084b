"""PDDFormer as the encoder of CrysLDNet.

X. Shen et al., "PDDFormer: Pairwise Distance Distribution Graph Transformer for Crystal Material Property
Prediction", IJCAI 2025 (arXiv 2408.12984), as used by S. Mukherjee et al., "Latent Diffusion Pretraining for Crystal
Property Prediction" (arXiv 2606.00776).

ComFormer convolutions on the k-nearest graph, mixed after each but the last with the pairwise distance
distribution of every atom: its 92 nearest distances and its weight Z_i / ΣZ.

    h⁰ = W onehot(Z),   e_ij = softplus(W RBF(−0.75 / r_ij)),   a⁰ = W [weight, d_1 … d_92]
    h = Conv_l(h, e);   h, a = Mix_l(h, a)

Two variants:

``published`` has the quirks of the released code: self-image edges count twice, ties are compared without tolerance,
and the weight is Z_i / ΣZ, which decreases with repetitions of the cell. ``corrected`` counts each neighbor once, keeps
whole shells by tolerance, and multiplies the weight by the number of atoms, so that features don't depend on the choice
of cell. Masked atoms have the weight 0 and are left out of ΣZ in both. The corrected weight uses the number of unmasked
atoms, n_seen · Z_i / ΣZ. The released loader drops neighbors closer than 0.15 Å; here such crystals are rejected on
import.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, softplus

from crysldnet.encoders.bases import ExponentialBasis
from crysldnet.encoders.elements import OneHotSpecies
from crysldnet.encoders.layers import ComFormerConv
from crysldnet.encoders.protocol import Encoder
from crysldnet.encoders.scatter import scatter
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.spec import GraphSpec


class DistanceMixing(nn.Module):
    """Mix atom features h with the distance features a (the "Zeo" block).

    a' = a + h;  [u₁, u₂] = W₁ BN_V(a');  h' = h + W₃(W₂ u₁ ⊙ dropout(GELU(u₂))).
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.expand = nn.Linear(width, 2 * width)
        self.gate = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return h' and a', both [N, C]."""
        a = a + h
        u1, u2 = self.expand(self.norm(a)).chunk(2, dim=-1)
        return h + self.output(self.gate(u1) * self.dropout(gelu(u2))), a


class PDDFormer(Encoder):
    """Encode the atoms of a crystal by ComFormer convolutions and pairwise distance distributions.

    Args:
        width: C; 256 as published.
        layers: number of convolutions; 4 as published.
        k: nearest neighbors of the graph; 25 as published.
        n_distances: length of the distance distribution; 92 as published.
        n_basis: radial functions; 256 as published.
        dropout: in the mixing blocks; 0.1 as published.
        variant: ``corrected`` or ``published``, see the module docstring.
        tolerance: Å, tolerance for distances within a shell in the corrected variant.

    Symmetries: translation, rotation, reflection, order of atoms; the corrected variant also choice of cell. Only
    distances enter, so mirror images aren't distinguished. Tests: ``tests/test_symmetry.py``.
    """

    def __init__(
        self,
        *,
        width: int = 256,
        layers: int = 4,
        k: int = 25,
        n_distances: int = 92,
        n_basis: int = 256,
        dropout: float = 0.1,
        variant: Literal["corrected", "published"] = "corrected",
        tolerance: float = 1e-4,
    ) -> None:
        super().__init__()
        if layers < 2:
            raise ValueError("layers must be at least 2: the distances are mixed in between two convolutions")
        published = variant == "published"
        self.width = width
        self.graph = GraphSpec(
            k=k,
            tolerance=0.0 if published else tolerance,
            symmetric=True,
            repeat_self_images=published,
            n_distances=n_distances,
        )
        self.weight_per_cell = published
        self.species = OneHotSpecies(width)
        self.basis = ExponentialBasis(-4.0, 0.0, n_basis)
        self.edge = nn.Linear(n_basis, width)
        self.distances = nn.Linear(n_distances + 1, width)
        self.convs = nn.ModuleList(ComFormerConv(width) for _ in range(layers))
        self.mixing = nn.ModuleList(DistanceMixing(width, dropout) for _ in range(layers - 1))

    def distribution(self, batch: CrystalBatch) -> Tensor:
        """Return [N, 1 + n_distances]: each atom's weight and its nearest distances in Å."""
        z = batch.numbers.to(batch.distances.dtype)
        total = scatter(z, batch.crystal, batch.num_crystals, "sum")
        weight = z / total.clamp_min(1.0).index_select(0, batch.crystal)
        if not self.weight_per_cell:
            seen = scatter((z > 0).to(z.dtype), batch.crystal, batch.num_crystals, "sum")
            weight = weight * seen.index_select(0, batch.crystal)
        return torch.cat([weight.unsqueeze(-1), batch.distances], dim=-1)

    def layer_features(self, batch: CrystalBatch) -> list[Tensor]:
        """Return [N, width] features of the species and after each layer."""
        source, target = batch.edge_index
        h = self.species(batch.numbers)
        edge = softplus(self.edge(self.basis(-0.75 / batch.edge_vec.norm(dim=-1))))
        a = self.distances(self.distribution(batch))
        layers = [h]
        for layer, conv in enumerate(self.convs):
            h = conv(h, edge, source, target)
            if layer < len(self.mixing):
                h, a = self.mixing[layer](h, a)
            layers.append(h)
        return layers
