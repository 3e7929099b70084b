"""From atom features to properties.

Shapes: ``B`` crystals, ``N`` atoms, ``D`` width of the encoder, ``T`` targets, ``O`` outputs of all of them together,
``C`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch_geometric.utils import scatter

from crysldnet.build import Part
from crysldnet.data.batch import CrystalBatch
from crysldnet.data.crystals import Crystals
from crysldnet.encoders.elements import N_SPECIES
from crysldnet.encoders.protocol import Encoder
from crysldnet.errors import DataError
from crysldnet.models.readout import AttentionPooling
from crysldnet.models.references import fit_references
from crysldnet.models.target import Classes, Estimate, Kind, Loss, Number, TargetType, stack_probabilities


class ShiftedSoftplus(nn.Softplus):
    """softplus(x) − ln 2."""

    def forward(self, input: Tensor) -> Tensor:
        """Keep the shape."""
        return super().forward(input) - math.log(2.0)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "shifted_softplus": ShiftedSoftplus,
}


class PropertyHead(nn.Module):
    """Readout over a crystal's atoms and an MLP.

    ``mean``: MLP(mean of the features), for properties of the material. ``attention``: MLP(weighted mean), likewise.
    ``atoms``: mean of MLP(features) over the atoms, likewise. ``sum``: sum of MLP(features) over the atoms, for
    properties that grow with the cell.

    Args:
        width: D of the encoder.
        outputs: O.
        readout: ``mean``, ``attention``, ``atoms`` or ``sum``.
        hidden: width of the MLP; the encoder's by default.
        layers: hidden layers.
        dropout: after each hidden layer.
        activation: after each hidden layer.
        activate_first: before the first map too.
    """

    def __init__(
        self,
        *,
        width: Part[int],
        outputs: Part[int],
        readout: Literal["mean", "attention", "atoms", "sum"] = "mean",
        hidden: int | None = None,
        layers: int = 1,
        dropout: float = 0.0,
        activation: Literal["silu", "softplus", "shifted_softplus"] = "silu",
        activate_first: bool = False,
    ) -> None:
        super().__init__()
        self.readout = readout
        self.first = ACTIVATIONS[activation]() if activate_first else nn.Identity()
        hidden = hidden or width
        steps: list[nn.Module] = []
        for layer in range(layers):
            linear = nn.Linear(width if layer == 0 else hidden, hidden)
            steps += [linear, ACTIVATIONS[activation](), nn.Dropout(dropout)]
        self.mlp = nn.Sequential(*steps, nn.Linear(hidden if layers else width, outputs))
        self.attention = AttentionPooling(width) if readout == "attention" else None

    def forward(self, features: Tensor, crystal: Tensor, n_crystals: int) -> Tensor:
        """Map features [N, D] to [B, O], in normalised units."""
        if self.attention is not None:
            return self.mlp(self.first(self.attention(features, crystal, n_crystals)))
        if self.readout == "mean":
            return self.mlp(self.first(scatter(features, crystal, 0, n_crystals, "mean")))
        reduce = "mean" if self.readout == "atoms" else "sum"
        return scatter(self.mlp(self.first(features)), crystal, 0, n_crystals, reduce)


class Prediction(NamedTuple):
    """What a property model says of B crystals.

    Attributes:
        value: [B, T] in physical units; of a classification the number of the likeliest class, see
            ``PropertyModel.classes``.
        std: [B, T] standard deviations that the model itself predicts, in physical units, NaN for targets without one;
            None where no target has one.
        probability: [B, T, C] of the classes, C being the largest number of classes; 0 beyond a target's own classes,
            NaN for regressions; None where there is no classification.
    """

    value: Tensor
    std: Tensor | None
    probability: Tensor | None


class PropertyModel(nn.Module):
    """Encoder, head and the normalisation of the targets: predicts in physical units.

    Args:
        encoder: fresh or pretrained.
        head: with as many outputs as the kinds of targets need.
        targets: names of the T targets.
        units: their units.
        types: what kind of target each is; plain numbers by default.
        referenced: targets that are learned relative to energies of the elements, :meth:`fit_normalisation`.

    Attributes:
        mean, std: [T] of the training targets; with the ``sum`` readout the mean is per atom.
        references: [T, 119] energies of the elements, where there are referenced targets.
        frozen: keep the encoder in evaluation mode, without dropout.
        cached: gives the features [N, D] in place of the encoder while a frozen one is trained with; None for none.
    """

    mean: Tensor
    std: Tensor
    references: Tensor | None

    def __init__(
        self,
        *,
        encoder: Encoder,
        head: PropertyHead,
        targets: list[str],
        units: list[str],
        types: Sequence[TargetType] | None = None,
        referenced: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.targets, self.units = encoder, head, targets, units
        self.types = list(types) if types is not None else [Number() for _ in targets]
        self.referenced = list(referenced)
        self.frozen = False
        self.cached: Callable[[CrystalBatch], Tensor] | None = None
        for name, kind in zip(targets, self.types, strict=True):
            if head.readout == "sum" and not kind.grows:
                raise ValueError(f"readout=sum adds up over atoms, which {name!r} as {kind.name!r} can't be")
            if name in self.referenced and type(kind) is not Number:
                raise ValueError(f"element_references: {name!r} is treated as {kind.name!r}, not as a number")
        self.register_buffer("mean", torch.zeros(len(targets)))
        self.register_buffer("std", torch.ones(len(targets)))
        self.register_buffer("references", torch.zeros(len(targets), N_SPECIES) if self.referenced else None)

    @property
    def kinds(self) -> list[Kind]:
        """Of each target: ``regression``, ``binary`` or ``multiclass``."""
        return [kind.kind for kind in self.types]

    @property
    def classes(self) -> list[list[str] | None]:
        """Names of the classes of each target; None for a regression."""
        return [list(kind.labels) if isinstance(kind, Classes) else None for kind in self.types]

    @property
    def n_depths(self) -> int:
        """Number of parts that follow one another: head, the encoder's layers, and what comes before those."""
        return self.encoder.n_layers + 2

    def depth_of(self, name: str) -> int:
        """Return how far below the output a parameter lies: 0 for the head, 1 for the encoder's last layer, …"""
        part, _, rest = name.partition(".")
        return 0 if part != "encoder" else 1 + self.encoder.n_layers - self.encoder.layer_of(rest)

    def freeze_encoder(self) -> None:
        """Keep the encoder as it is: no gradients, no dropout, no statistics of batches."""
        self.encoder.requires_grad_(False)
        self.frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> PropertyModel:
        """Set training or evaluation mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def fit_normalisation(
        self, values: NDArray[np.float64], sizes: NDArray[np.int64], crystals: Crystals | None = None
    ) -> None:
        """Set mean, standard deviation and element energies from the training rows, and nothing else.

        Args:
            values: [n, T] in physical units, NaN where unknown.
            sizes: [n] atoms of each crystal.
            crystals: the n crystals; needed for referenced targets.

        Raises:
            DataError: a target has no value in the training rows.
        """
        for place, (name, kind) in enumerate(zip(self.targets, self.types, strict=True)):
            known = ~np.isnan(values[:, place])
            if not known.any():
                raise DataError(f"target {name!r} has no value in the training split")
            line, n = kind.on_line(values[known, place]), np.ones(int(known.sum()))
            total = self.head.readout == "sum"
            if name in self.referenced:
                assert crystals is not None
                assert self.references is not None
                energies = fit_references(crystals.take(np.flatnonzero(known)), line, total=total)
                self.references[place] = torch.from_numpy(energies.of_element)
                line = line - energies.of_crystal
            if total:
                n = sizes[known].astype(np.float64)
            mean = float(np.nanmean(line / n))
            std = float(np.nanstd(line - mean * n))
            self.mean[place] = mean
            self.std[place] = std if std > 1e-9 * max(1.0, abs(mean)) else 1.0

    def _center(self, batch: CrystalBatch) -> Tensor:
        """Return what the normalised outputs are relative to, [B, T]."""
        total = self.head.readout == "sum"
        center = self.mean * batch.sizes.unsqueeze(1) if total else self.mean.expand(batch.num_crystals, -1)
        if self.references is None:
            return center
        energies = self.references.T.index_select(0, batch.numbers)
        return center + scatter(energies, batch.crystal, 0, batch.num_crystals, "sum" if total else "mean")

    def _outputs(self, batch: CrystalBatch) -> list[Tensor]:
        """Return the head's outputs of each target, [B, O of the target]."""
        features = self.encoder(batch) if self.cached is None else self.cached(batch)
        whole = self.head(features, batch.crystal, batch.num_crystals)
        return list(whole.to(self.mean.dtype).split([kind.outputs for kind in self.types], dim=1))

    def _estimates(self, outputs: list[Tensor], center: Tensor) -> list[Estimate]:
        return [
            kind.estimate(output, center[:, place], self.std[place])
            for place, (kind, output) in enumerate(zip(self.types, outputs, strict=True))
        ]

    def forward(self, batch: CrystalBatch) -> Tensor:
        """Return [B, T] in physical units."""
        return self.predict(batch).value

    def predict(self, batch: CrystalBatch) -> Prediction:
        """Return values, and standard deviations and probabilities where the targets have them."""
        return self._prediction(self._estimates(self._outputs(batch), self._center(batch)))

    @staticmethod
    def _prediction(estimates: list[Estimate]) -> Prediction:
        value = torch.stack([e.value for e in estimates], dim=1)
        unknown = torch.full_like(value[:, 0], math.nan)
        spread = any(e.std is not None for e in estimates)
        std = torch.stack([unknown if e.std is None else e.std for e in estimates], dim=1) if spread else None
        return Prediction(value, std, stack_probabilities(estimates, value))

    def losses(self, batch: CrystalBatch, kind: Loss) -> tuple[Tensor, Prediction]:
        """Return the loss of each value [B, T] in normalised units, 0 where unknown, and the predictions.

        Args:
            batch: with ``targets`` [B, T], NaN where unknown.
            kind: ``l1``, ``mse``, ``huber`` (δ = 1 standard deviation), or the negative log-likelihood of a ``laplace``
                or ``gaussian`` distribution; classes have their cross-entropy.
        """
        assert batch.targets is not None
        outputs, center = self._outputs(batch), self._center(batch)
        known = ~batch.targets.isnan()
        true = torch.where(known, batch.targets, 1.0).to(self.mean.dtype)
        each = [
            kind_of.loss(output, true[:, place], center[:, place], self.std[place], kind)
            for place, (kind_of, output) in enumerate(zip(self.types, outputs, strict=True))
        ]
        losses = torch.where(known, torch.stack(each, dim=1), 0.0)
        return losses, self._prediction(self._estimates(outputs, center))

    def loss(self, batch: CrystalBatch, kind: Loss) -> tuple[Tensor, Tensor]:
        """Return the mean loss over the values that are known, and the predictions [B, T]; see :meth:`losses`."""
        assert batch.targets is not None
        losses, predicted = self.losses(batch, kind)
        return losses.sum() / (~batch.targets.isnan()).sum().clamp_min(1), predicted.value
