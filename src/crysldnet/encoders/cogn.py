"""coGN.

R. Ruff, P. Reiser, J. Stühmer, P. Friederich, "Connectivity optimized nested line graph networks for crystal
structures", Digital Discovery 3 (2024) 594–601 (arXiv 2302.14102); without the nesting, as in its Matbench submission.

    x⁰ = W [embedding(Z), mass, radius, electronegativity, ionization energy, oxidation states]
    e_ij = W RBF(r_ij)          linear, the same in all blocks
    m_ij = MLP₅([e_ij, x_i, x_j]), SiLU after every layer
    x_i ← x_i + SiLU(W Σ_j m_ij)

Each atom receives from its 24 nearest neighbors and all that tie with the 24th; no reverse edges are added.
Messages end at each atom's own neighbors, so equivalent atoms have equal features: with ``asymmetric_unit`` (as
published), messages are computed for one atom per equivalent set and shared by the others.

``published``: asymmetric unit, and ties within 1e-9 Å. ``corrected``: all atoms, independent of a symmetry search and
its tolerance, and ties by tolerance. The published head is ``head=linear``; weights are initialized Glorot-uniform with
zero biases.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from crysldnet.encoders.bases import GaussianBasis
from crysldnet.encoders.elements import N_PUBCHEM, N_SPECIES, pubchem_table
from crysldnet.encoders.protocol import Encoder
from crysldnet.encoders.scatter import scatter
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.spec import GraphSpec

CENTERS = 32
SPACING = 0.25
"""Å between centers, and also the variance."""


class Block(nn.Module):
    """One round of messages.

    Args:
        width: C.
        depth: linear maps of the message, SiLU after each.
    """

    def __init__(self, width: int, depth: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(3 * width, width)
        self.rest = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.node = nn.Linear(width, width)

    def forward(self, x: Tensor, basis: Tensor, embed: nn.Linear, source: Tensor, target: Tensor) -> Tensor:
        """Map [N, C] to [N, C]; the edge features are ``embed(basis)``, ``basis`` [E, 32]."""
        f, a, b = self.first.weight.chunk(3, dim=1)
        hidden = linear(x, a, self.first.bias + f @ embed.bias).index_select(0, target)
        hidden = hidden + linear(x, b).index_select(0, source) + linear(basis, f @ embed.weight)
        message = silu(hidden)
        for layer in self.rest:
            message = silu(layer(message))
        return x + silu(self.node(scatter(message, target, x.shape[0], "sum")))


class CoGN(Encoder):
    """Encode atoms by deep messages from their nearest neighbors.

    Args:
        width: C; 128 as published.
        layers: blocks; 5 as published.
        k: nearest neighbors; 24 as published.
        asymmetric_unit: compute one atom per symmetry-equivalent set; on in the published variant by default.
        variant: ``corrected`` or ``published``, see the module docstring.
        tolerance: Å, tolerance for distances within a shell in the corrected variant.

    Symmetries: translation, rotation, reflection, order of atoms, choice of cell. Tests:
    ``tests/test_encoder_symmetry.py``.
    """

    properties: Tensor

    def __init__(
        self,
        *,
        width: int = 128,
        layers: int = 5,
        k: int = 24,
        asymmetric_unit: bool | None = None,
        variant: Literal["corrected", "published"] = "corrected",
        tolerance: float = 1e-4,
    ) -> None:
        super().__init__()
        published = variant == "published"
        self.width = width
        self.graph = GraphSpec(
            k=k,
            tolerance=1e-9 if published else tolerance,
            asymmetric_unit=published if asymmetric_unit is None else asymmetric_unit,
        )
        self.register_buffer("properties", torch.from_numpy(pubchem_table()), persistent=False)
        self.species = nn.Embedding(N_SPECIES, width)
        self.node = nn.Linear(width + N_PUBCHEM, width)
        self.basis = GaussianBasis(SPACING, SPACING * CENTERS, CENTERS, sharpness=0.5 * SPACING)
        self.edge = nn.Linear(CENTERS, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    def layer_features(self, batch: CrystalBatch) -> list[Tensor]:
        """Return [N, width] features of the species and after each layer."""
        source, target = batch.edge_index
        elements = self.node(torch.cat([self.species.weight, self.properties], dim=-1))
        x = elements.index_select(0, batch.numbers)
        basis = self.basis(batch.edge_vec.norm(dim=-1))
        layers = [x]
        for block in self.blocks:
            layers.append(block(layers[-1], basis, self.edge, source, target))
        if batch.representative is None:
            return layers
        return [layer.index_select(0, batch.representative) for layer in layers]
