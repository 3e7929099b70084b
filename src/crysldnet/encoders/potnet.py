"""PotNet.

Y. Lin, K. Yan, Y. Luo, Y. Liu, X. Qian, S. Ji, "Efficient Approximations of Complete Interatomic Potentials for
Crystal Property Prediction", ICML 2023 (arXiv 2306.10045).

Two sets of edges in one list: the k-nearest graph, and every ordered pair of a crystal's atoms, including an atom with
itself, which carries the lattice sum S_ij of the pair potential (:mod:`crysldnet.graphs.potentials`).

    local     e_ij = SiLU(W RBF(−0.75 / r_ij))
    infinite  e_ij = BN(softplus(W multiquadrics(S_ij)))
    x_i ← ReLU(x_i + BN_V(Σ_j σ(BN_E(MLP_g([x_i, x_j, e_ij]))) ⊙ MLP_m([x_i, x_j, e_ij])))

``published``: the lattice sums of the released code (truncated, the Pauli term's decay depending on the volume),
self-images twice, ties without tolerance. ``corrected`` fixes these. Neither is independent of the choice of cell: a
supercell has more pairs, each with a sum over a sparser lattice. The published head is ``head=potnet``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from crysldnet.encoders.bases import GaussianBasis, MultiquadricBasis
from crysldnet.encoders.elements import ElementTable
from crysldnet.encoders.layers import GatedConv
from crysldnet.encoders.protocol import Encoder
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.spec import GraphSpec


class PotNet(Encoder):
    """Encode atoms by gated convolutions over nearest neighbors and over potentials of all pairs.

    Args:
        width: C; 256 as published.
        layers: 3 as published.
        k: nearest neighbors; 16 as published.
        n_basis: radial functions; 256 as published.
        n_potential_basis: functions of the potential; 64 as published.
        variant: ``corrected`` or ``published``, see the module docstring.
        tolerance: Å, tolerance for distances within a shell in the corrected variant.

    Symmetries: translation, rotation, reflection, order of atoms; not choice of cell. Tests:
    ``tests/test_encoder_symmetry.py``.
    """

    def __init__(
        self,
        *,
        width: int = 256,
        layers: int = 3,
        k: int = 16,
        n_basis: int = 256,
        n_potential_basis: int = 64,
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
            potential=variant,
        )
        self.species = ElementTable(width)
        self.basis = GaussianBasis(-4.0, 4.0, n_basis, sharpness=1.0)
        self.edge = nn.Linear(n_basis, width)
        self.potential_basis = MultiquadricBasis(-4.0, 4.0, n_potential_basis)
        self.potential = nn.Linear(n_potential_basis, width)
        self.potential_norm = nn.BatchNorm1d(width)
        self.convs = nn.ModuleList(GatedConv(width, update="relu") for _ in range(layers))

    def layer_features(self, batch: CrystalBatch) -> list[Tensor]:
        """Return [N, width] features of the species and after each layer."""
        assert batch.pairs is not None
        assert batch.potential is not None
        local = silu(self.edge(self.basis(-0.75 / batch.edge_vec.norm(dim=-1))))
        infinite = self.potential_norm(softplus(self.potential(self.potential_basis(batch.potential))))
        edge = torch.cat([local, infinite])
        source, target = torch.cat([batch.edge_index, batch.pairs], dim=1)
        x = self.species(batch.numbers)
        layers = [x]
        for conv in self.convs:
            layers.append(conv(layers[-1], edge, source, target)[0])
        return layers
