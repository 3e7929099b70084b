"""Reconstruction objectives of the decoder.

Shapes: ``B`` crystals, ``N`` atoms, ``E`` edges, ``d`` width of the latent.

An objective defines how crystals are corrupted (``corruption``) and, called with latents and the batch, returns its
loss terms and metrics: sums and counts, to be divided at the end of an epoch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from crysldnet.build import Part
from crysldnet.encoders.bases import GaussianBasis
from crysldnet.encoders.elements import N_SPECIES
from crysldnet.encoders.layers import PairMLP
from crysldnet.encoders.scatter import scatter
from crysldnet.graphs.batch import CorruptionTargets, CrystalBatch
from crysldnet.graphs.corruption import Corruption
from crysldnet.graphs.geometry import lattice_parameters, undo_strain
from crysldnet.measures import Measure, register

Measures = dict[str, tuple[Tensor, Tensor]]
"""Name to (sum, count)."""


class Reconstruction(NamedTuple):
    """Result of an objective."""

    terms: dict[str, Tensor]
    """Weighted loss terms; their sum is the reconstruction loss."""
    measures: Measures


def _mean_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum and the number of [n] values, as a metric."""
    return values.detach().sum(), torch.tensor(float(len(values)), device=values.device)


def masked_species(logits: Tensor, undo: CorruptionTargets) -> tuple[Tensor, Measures]:
    """Return the cross-entropy on masked atoms, Σ mask · CE / Σ mask, and their accuracy.

    Args:
        logits: [N, 119].
        undo: true species and mask.
    """
    mask = undo.masked.to(logits.dtype)
    entropy = cross_entropy(logits, undo.numbers, reduction="none")
    right = (logits.argmax(-1) == undo.numbers).to(logits.dtype)
    loss = (entropy * mask).sum() / mask.sum().clamp_min(1.0)
    return loss, {"masked_accuracy": ((right * mask).detach().sum(), mask.sum())}


def lattice_measures(predicted: Tensor, true: Tensor, suffix: str = "") -> Measures:
    """Return the mean absolute errors of lattice lengths in Å and angles in degrees, from [B, 3, 3] lattices."""
    (lengths, angles), (true_lengths, true_angles) = lattice_parameters(predicted), lattice_parameters(true)
    return {
        f"lattice_length_error{suffix}": _mean_of((lengths - true_lengths).abs().mean(-1)),
        f"lattice_relative_error{suffix}": _mean_of((lengths / true_lengths - 1.0).abs().mean(-1)),
        f"lattice_angle_error{suffix}": _mean_of((angles - true_angles).abs().mean(-1)),
    }


CORRUPTED: dict[str, Any] = {"baseline": "as corrupted", "shown": True}
FOUND: dict[str, Any] = {"better": "higher", "form": "{:.3f}", "shown": True}
MEASURES = (
    Measure(
        "masked_accuracy",
        "masked species found",
        baseline="most common species",
        learned="species",
        plotted=True,
        **FOUND,
    ),
    Measure("coordinate_error", "coordinate error", "Å", form="{:.4f}", plotted=True, **CORRUPTED),
    Measure(
        "displacement_squared_error", "squared displacement error", form="{:.3f}", learned="displacements", **CORRUPTED
    ),
    Measure("lattice_length_error", "lattice length error", "Å", form="{:.4f}", plotted=True, **CORRUPTED),
    Measure("lattice_angle_error", "lattice angle error", "°", form="{:.3f}", **CORRUPTED),
    Measure("strain_squared_error", "squared strain error", form="{:.3f}", learned="strain", **CORRUPTED),
    Measure("masked_accuracy_conditioned", "species, given the crystal", **FOUND),
    Measure("coordinates", unit="Å"),
    Measure("lattice", unit="Å"),
)


class Objective(nn.Module, ABC):
    """Base of all objectives.

    Attributes:
        measures: definitions of the returned metrics.
        corruption: how the data module corrupts the crystals.
        condition: ``crystal`` to condition the latents on one pooled vector of the clean crystal.
        condition_share: fraction of conditioned crystals in training.
    """

    measures: ClassVar[tuple[Measure, ...]] = ()
    corruption: Corruption
    condition: Literal["none", "crystal"] = "none"
    condition_share: float = 0.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register(*cls.measures)

    @abstractmethod
    def forward(self, z: Tensor, batch: CrystalBatch) -> Reconstruction:
        """Reconstruct from latents [N, d]; ``batch.undo`` has the targets."""


class Denoising(Objective):
    """Predict masked species, displacements and strain along the edges of the corrupted crystal.

    With unit vectors r̂_ij and, from a pair map of (z_i, z_j, |r_ij|), scalars u_ij, s_ij, p_ij,
        displacement_i = mean_j u_ij r̂_ij,    strain = mean_ij (s_ij r̂_ij r̂_ijᵀ + p_ij 1),
    which rotate with the crystal, so that the targets can be inferred from the input. Losses are mean squared errors in
    units of the corruption's standard deviation: that of all crystals or, if it is sampled from a range, of each
    crystal (at least the lower bound), so that small displacements count as much as large ones.

    Args:
        latent_dim: d.
        hidden: width of the decoder.
        corruption: how crystals are corrupted; a term without displacement or strain is left out, so both at 0 gives
            the objective with masked species only.
        species_weight, displacement_weight, strain_weight: weights of the three terms.
        condition: ``crystal`` also encodes the clean crystal and adds a linear map of its pooled features (mean and
            spread of all layers) to the latents: self-conditioned denoising. The pooled vector then learns what the
            corrupted crystal lacks. ``none`` leaves the latents unchanged.
        condition_share: fraction of conditioned crystals in training; the others are denoised as before.
    """

    measures = MEASURES

    def __init__(
        self,
        *,
        latent_dim: Part[int],
        hidden: int = 128,
        corruption: Corruption,
        species_weight: float = 1.0,
        displacement_weight: float = 1.0,
        strain_weight: float = 1.0,
        condition: Literal["none", "crystal"] = "none",
        condition_share: float = 0.5,
    ) -> None:
        super().__init__()
        if not 0.0 < condition_share <= 1.0:
            raise ValueError(f"condition_share must be over 0 and at most 1, not {condition_share}")
        self.corruption, self.condition, self.condition_share = corruption, condition, condition_share
        self.largest = {name: corruption.highest(name) for name in ("displacement", "strain")}
        self.weights = {"species": species_weight, "displacement": displacement_weight, "strain": strain_weight}
        self.species = nn.Sequential(nn.Linear(latent_dim, hidden), nn.SiLU(), nn.Linear(hidden, N_SPECIES))
        self.geometric = any(largest > 0 for largest in self.largest.values())
        if self.geometric:
            self.node = nn.Linear(latent_dim, hidden)
            self.basis = GaussianBasis(0.0, 8.0, 32)
            self.edge = nn.Linear(32, hidden)
            self.pair = PairMLP(hidden, out=3)

    def forward(self, z: Tensor, batch: CrystalBatch) -> Reconstruction:
        """Reconstruct from latents [N, d]."""
        undo = batch.undo
        assert undo is not None
        loss, measures = masked_species(self.species(z), undo)
        terms = {"species": self.weights["species"] * loss}
        if self.geometric:
            displacement, strain = self.undo_geometry(z, batch)
            if self.largest["displacement"] > 0:
                unit = self._unit("displacement", undo.levels[:, 0], batch.crystal)
                loss, found = self._squared_error("displacement", displacement, undo.displacement, unit)
                terms["displacement"], measures = loss, measures | found
                measures["coordinate_error"] = _mean_of((displacement - undo.displacement).norm(dim=-1))
                measures["coordinate_error_baseline"] = _mean_of(undo.displacement.norm(dim=-1))
            if self.largest["strain"] > 0:
                unit = self._unit("strain", undo.levels[:, 1])
                loss, found = self._squared_error("strain", strain, undo.strain, unit)
                terms["strain"], measures = loss, measures | found
                true = undo_strain(batch.lattice, undo.strain)
                measures |= lattice_measures(undo_strain(batch.lattice, strain.detach()), true)
                measures |= lattice_measures(batch.lattice, true, "_baseline")
        return Reconstruction(terms, measures)

    def _unit(self, name: Literal["displacement", "strain"], levels: Tensor, owner: Tensor | None = None) -> Any:
        """Return the unit of the errors: a number, or one per crystal [B] or atom."""
        lowest = self.corruption.lowest(name)
        if lowest is None:
            return self.largest[name]
        unit = levels.clamp_min(lowest)
        return unit if owner is None else unit.index_select(0, owner)

    def _squared_error(self, name: str, found: Tensor, true: Tensor, unit: Any) -> tuple[Tensor, Measures]:
        """Return the weighted mean squared error in its units, and the metrics with and without denoising."""
        if isinstance(unit, Tensor):
            unit = unit.view(-1, *[1] * (true.ndim - 1))
        error = (found - true) / unit
        measures = {
            f"{name}_squared_error": _mean_of(error.square().flatten(1).mean(1)),
            f"{name}_squared_error_baseline": _mean_of((true / unit).square().flatten(1).mean(1)),
        }
        return self.weights[name] * error.square().mean(), measures

    def undo_geometry(self, z: Tensor, batch: CrystalBatch) -> tuple[Tensor, Tensor]:
        """Return the displacement [N, 3] in Å and the strain [B, 3, 3] predicted from the corrupted crystal."""
        source, target = batch.edge_index
        length = batch.edge_vec.norm(dim=-1, keepdim=True)
        unit = batch.edge_vec / length
        node = self.node(z)
        u, s, p = self.pair(node, node, self.edge(self.basis(length.squeeze(-1))), source, target).split(1, dim=-1)
        displacement = scatter(u * unit, target, batch.num_atoms, "mean")
        displacement = displacement * self.largest["displacement"]
        outer = (unit.unsqueeze(-1) * unit.unsqueeze(-2)).flatten(1)
        eye = torch.eye(3, dtype=z.dtype, device=z.device).flatten()
        strain = scatter(s * outer + p * eye, batch.crystal.index_select(0, target), batch.num_crystals, "mean")
        return displacement, strain.view(-1, 3, 3) * self.largest["strain"]


class Published(Objective):
    """Reconstruct masked species, absolute Cartesian coordinates and the lattice matrix, as in the released code.

    The last two change under rotation and translation while the latents don't: they can't be inferred from the input,
    so their loss has a floor. The lattice target is transposed, as in the released code. L1 for both.

    Args:
        latent_dim: d.
        corruption: masking only.
    """

    def __init__(self, *, latent_dim: Part[int], corruption: Corruption) -> None:
        super().__init__()
        self.corruption = corruption
        self.species = nn.Linear(latent_dim, N_SPECIES)
        self.coordinates = nn.Linear(latent_dim, 3)
        self.lattice = nn.Linear(latent_dim, 9)

    def forward(self, z: Tensor, batch: CrystalBatch) -> Reconstruction:
        """Reconstruct from latents [N, d]."""
        assert batch.undo is not None
        species, measures = masked_species(self.species(z), batch.undo)
        coordinates = self.coordinates(z)
        lattice = self.lattice(scatter(z, batch.crystal, batch.num_crystals, "mean")).view(-1, 3, 3)
        terms = {
            "species": species,
            "coordinates": (coordinates - batch.positions).abs().mean(),
            "lattice": (lattice - batch.lattice.transpose(1, 2)).abs().mean(),
        }
        measures["coordinate_error"] = _mean_of((coordinates - batch.positions).norm(dim=-1))
        measures |= lattice_measures(lattice.transpose(1, 2), batch.lattice)
        return Reconstruction(terms, measures)
