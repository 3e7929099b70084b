"""iComFormer.

K. Yan, C. Fu, X. Qian, X. Qian, S. Ji, "Complete and Efficient Graph Transformers for Crystal Material Property
Prediction", ICLR 2024 (arXiv 2403.11857).

ComFormer convolutions on the k-nearest graph with edges along the frame v₁, v₂, v₃ of three short lattice vectors.
After the first convolution the edges include the angles ∠(v_m, r_ij):

    x⁰ = W t(Z),   e_ij = softplus(W RBF(−0.75 / r_ij)),   ℓ_m = the same of |v_m|
    ξ_m = W softplus(W RBF(cos ∠(v_m, r_ij)))
    K_m = MLP_k([W e_ij, W_k,m ℓ_m, ξ_m]),   M_m = MLP_m([W e_ij, W_v,m ℓ_m, ξ_m])
    e_ij ← softplus(e_ij + BN_E(Σ_m W(M_m ⊙ σ(BN((W e_ij) ⊙ K_m / √C)))))

The frame is right-handed, so a mirror image has different features: this encoder distinguishes enantiomers.

``published``: equal lattice vector lengths and right angles are resolved by rounding, self-images count twice, and an
unused, frozen embedding is kept so that sizes agree. ``corrected``: ties of the frame are broken by the integers of its
vectors, within a tolerance, which makes the features rotation-invariant regardless of rounding. In both variants the
frame depends on the given cell: if lattice vectors have equal lengths (cubic, tetragonal, hexagonal), and for centered
cells and supercells, another cell of the same crystal has different features. Reduce cells first if that matters.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu, softplus

from crysldnet.encoders.bases import ExponentialBasis
from crysldnet.encoders.elements import ElementTable
from crysldnet.encoders.layers import ComFormerConv, PairMLP, unused_parameters
from crysldnet.encoders.protocol import Encoder
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.spec import GraphSpec


class AngleLayer(nn.Module):
    """Update edges by the angles to the three vectors of the frame.

    Shapes: ``B`` crystals, ``E`` edges, ``C`` width, m = 1, 2, 3.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.length_key = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.length_value = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.angle = nn.Linear(width, width, bias=False)
        self.key_mlp = PairMLP(width)
        self.message_mlp = PairMLP(width)
        self.output = nn.Linear(width, width)
        self.gate_norm = nn.BatchNorm1d(width)
        self.edge_norm = nn.BatchNorm1d(width)

    def forward(self, edge: Tensor, lengths: Tensor, angles: Tensor, crystal: Tensor) -> Tensor:
        """Map edge features [E, C] to [E, C].

        Args:
            edge: [E, C].
            lengths: [3, B, C] embedded lengths of the frame's vectors.
            angles: [3, E, C] embedded angles to them.
            crystal: [E] the crystal of each edge.
        """
        keys = self._pair_map(self.key, self.length_key, self.key_mlp, edge, lengths, angles, crystal)
        messages = self._pair_map(self.value, self.length_value, self.message_mlp, edge, lengths, angles, crystal)
        gate = self.query(edge) * keys / math.sqrt(edge.shape[1])
        gate = torch.sigmoid(self.gate_norm(gate.flatten(0, 1)).view_as(gate))
        # The linear map follows the sum over m, with three times its bias.
        total = linear((messages * gate).sum(0), self.output.weight, 3.0 * self.output.bias)
        return softplus(edge + self.edge_norm(total))

    def _pair_map(
        self,
        own: nn.Linear,
        of_length: nn.ModuleList,
        mlp: PairMLP,
        edge: Tensor,
        lengths: Tensor,
        angles: Tensor,
        crystal: Tensor,
    ) -> Tensor:
        """Map edge, lengths and angles to [3, E, C]: lengths once per crystal, the edge once for all three."""
        a, b, f = mlp.first.weight.chunk(3, dim=1)
        of_edge = linear(edge, a @ own.weight, mlp.first.bias + a @ own.bias)
        of_lengths = torch.stack([linear(of_length[m](lengths[m]), b) for m in range(3)])
        hidden = of_lengths.index_select(1, crystal) + of_edge + linear(angles, f @ self.angle.weight)
        return mlp.second(silu(hidden))


class IComFormer(Encoder):
    """Encode atoms by ComFormer convolutions over edges with angles to a lattice frame.

    Args:
        width: C; 256 as published.
        layers: convolutions; 4 as published (the paper also reports 3).
        k: nearest neighbors; 25 as published.
        n_basis: radial and angular functions; 256 as published.
        variant: ``corrected`` or ``published``, see the module docstring.
        tolerance: Å, tolerance for distances within a shell and lattice vector lengths in the corrected variant.

    Symmetries: translation, rotation, order of atoms; not reflection, by design, and not choice of cell. Tests:
    ``tests/test_encoder_symmetry.py``.
    """

    def __init__(
        self,
        *,
        width: int = 256,
        layers: int = 4,
        k: int = 25,
        n_basis: int = 256,
        variant: Literal["corrected", "published"] = "corrected",
        tolerance: float = 1e-4,
    ) -> None:
        super().__init__()
        if layers < 2:
            raise ValueError("layers must be at least 2: the angles come in after the first convolution")
        published = variant == "published"
        self.width = width
        self.graph = GraphSpec(
            k=k,
            tolerance=0.0 if published else tolerance,
            symmetric=True,
            repeat_self_images=published,
            lattice_edges="frame",
            frame=True,
        )
        self.species = ElementTable(width)
        self.basis = ExponentialBasis(-4.0, 0.0, n_basis)
        self.edge = nn.Linear(n_basis, width)
        self.angle_basis = ExponentialBasis(-1.0, 1.0, n_basis)
        self.angle = nn.Linear(n_basis, width)
        self.convs = nn.ModuleList(ComFormerConv(width) for _ in range(layers))
        self.angle_layer = AngleLayer(width)
        self.unused = unused_parameters(74_080) if published else None

    def layer_of(self, name: str) -> int:
        """Return the layer of a parameter; ``angle_layer`` follows the first."""
        return 1 if name.startswith("angle_layer") else super().layer_of(name)

    def layer_features(self, batch: CrystalBatch) -> list[Tensor]:
        """Return [N, width] features of the species and after each layer."""
        assert batch.frame is not None
        source, target = batch.edge_index
        crystal = batch.crystal.index_select(0, target)
        lengths = batch.edge_vec.norm(dim=-1)
        frame_lengths = batch.frame.norm(dim=-1)
        unit = batch.frame / frame_lengths.unsqueeze(-1)
        direction = batch.edge_vec / lengths.unsqueeze(-1)
        cosines = torch.einsum("emi,ei->me", unit.index_select(0, crystal), direction).clamp(-1.0, 1.0)

        x = self.species(batch.numbers)
        edge = softplus(self.edge(self.basis(-0.75 / lengths)))
        of_frame = softplus(self.edge(self.basis(-0.75 / frame_lengths.T)))
        angles = softplus(self.angle(self.angle_basis(cosines)))
        layers = [x]
        for layer, conv in enumerate(self.convs):
            layers.append(conv(layers[-1], edge, source, target))
            if layer == 0:
                edge = self.angle_layer(edge, of_frame, angles, crystal)
        return layers
