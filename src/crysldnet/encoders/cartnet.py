"""CartNet.

À. Solé, A. Mosella-Montoro, J. Cardona, S. Gómez-Coca, D. Aravena, E. Ruiz, J. Ruiz-Hidalgo, "A Cartesian encoding
graph neural network for crystal structure property prediction: application to thermal ellipsoid estimation", Digital
Discovery, 2025 (arXiv 2501.18369).

    x⁰ = SiLU(W SiLU(embedding(Z) + b)),   e_ij = SiLU(W SiLU(W [ExpNormal(r_ij), r̂_ij]))
    s_ij = c(r_ij) σ(BN_E(MLP_g([x_i, x_j, e_ij]))),   c the cosine cutoff
    x_i ← x_i + SiLU(BN_V(Σ_j s_ij ⊙ MLP_m([x_i, x_j, e_ij])))
    e_ij ← e_ij + s_ij

r̂_ij points from the source to the target, in the frame in which the crystal is stored: **the features change when a
crystal is rotated**. ``augment`` applies random rotations in training, so that invariance is learned approximately;
``invariant`` drops r̂, which makes the features invariant.

``published``: no augmentation, as in the released runs on JARVIS and Materials Project, and the radial basis ends at 5
Å for any radius. ``corrected``: augmentation is on, and the basis ends at the radius. An atom without neighbors within
the radius has no edges. The published head is ``head=cartnet``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from crysldnet.encoders.bases import ExponentialNormalBasis, cosine_cutoff
from crysldnet.encoders.elements import N_SPECIES
from crysldnet.encoders.layers import GatedConv
from crysldnet.encoders.protocol import Encoder
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.geometry import random_rotations
from crysldnet.graphs.spec import GraphSpec

PUBLISHED_RADIUS = 5.0


class CartNet(Encoder):
    """Encode atoms by gated convolutions over all neighbors within a radius, edge directions in Cartesian coordinates.

    Args:
        width: C; 256 as published.
        layers: 4 as published.
        radius: of the graph in Å; 5 as published.
        n_basis: radial functions; 64 as published.
        invariant: ignore edge directions.
        augment: random rotations in training; by default on in the corrected variant unless invariant.
        variant: ``corrected`` or ``published``, see the module docstring.

    Symmetries: translation, order of atoms, choice of cell; rotation and reflection only with ``invariant``.
    Tests: ``tests/test_encoder_symmetry.py``.
    """

    def __init__(
        self,
        *,
        width: int = 256,
        layers: int = 4,
        radius: float = 5.0,
        n_basis: int = 64,
        invariant: bool = False,
        augment: bool | None = None,
        variant: Literal["corrected", "published"] = "corrected",
    ) -> None:
        super().__init__()
        self.width, self.radius, self.invariant = width, radius, invariant
        self.augment = variant == "corrected" if augment is None else augment
        self.graph = GraphSpec(radius=radius)
        self.smooth = True
        self.species = nn.Embedding(N_SPECIES, 2 * width)
        nn.init.xavier_uniform_(self.species.weight)
        self.species_bias = nn.Parameter(torch.zeros(2 * width))
        self.node = nn.Linear(2 * width, width)
        self.basis = ExponentialNormalBasis(PUBLISHED_RADIUS if variant == "published" else radius, n_basis)
        inputs = n_basis if invariant else n_basis + 3
        self.edge = nn.Sequential(nn.Linear(inputs, 2 * width), nn.SiLU(), nn.Linear(2 * width, width), nn.SiLU())
        self.convs = nn.ModuleList(GatedConv(width, update="silu") for _ in range(layers))

    def layer_features(self, batch: CrystalBatch) -> list[Tensor]:
        """Return [N, width] features of the species and after each layer."""
        source, target = batch.edge_index
        length = batch.edge_vec.norm(dim=-1)
        inputs = self.basis(length)
        if not self.invariant:
            direction = batch.edge_vec / length.unsqueeze(-1)
            if self.training and self.augment:
                turns = random_rotations(batch.num_crystals, like=direction)
                owner = batch.crystal.index_select(0, target)
                direction = torch.einsum("ei,eij->ej", direction, turns.index_select(0, owner))
            inputs = torch.cat([inputs, direction], dim=-1)
        edge = self.edge(inputs)
        envelope = cosine_cutoff(length, self.radius).unsqueeze(-1)
        x = silu(self.node(silu(self.species(batch.numbers) + self.species_bias)))
        layers = [x]
        for layer, conv in enumerate(self.convs):
            x, gate = conv(x, edge, source, target, envelope)
            layers.append(x)
            if layer + 1 < len(self.convs):
                edge = edge + gate
        return layers
