"""Property heads: from atom features to properties.

Shapes: ``B`` crystals, ``N`` atoms, ``D`` width of the encoder, ``T`` targets, ``O`` total outputs, ``C`` classes,
``K`` descriptors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crysldnet.build import Part, build
from crysldnet.encoders.elements import N_SPECIES
from crysldnet.encoders.protocol import Encoder, features_of_layers
from crysldnet.encoders.scatter import scatter
from crysldnet.errors import DataError
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.crystals import Crystals
from crysldnet.models.descriptors import Descriptors
from crysldnet.models.per import Per
from crysldnet.models.predictor import Prediction, TargetModel
from crysldnet.models.readout import ACTIVATIONS, AttentionPooling, mean_and_spread
from crysldnet.models.references import fit_references
from crysldnet.models.targets import Estimate, Loss, Number, TargetType


class PropertyHead(nn.Module):
    """Readout over the atoms and MLP.

    ``mean``: MLP(mean of the features), ``attention``: MLP(weighted mean), ``atoms``: mean of MLP(features) over the
    atoms, all three for intensive properties. ``sum``: sum of MLP(features) over the atoms, for extensive properties.

    Args:
        width: width D of the encoder.
        outputs: O.
        depth: L, the number of the encoder's layers that can be read.
        descriptors: K, number of descriptors that the MLP reads in addition.
        readout: ``mean``, ``attention``, ``atoms`` or ``sum``.
        layers_read: ``last`` reads the encoder output. ``all`` reads all layers, concatenated, with ``mean`` also their
            standard deviation over the atoms, standardized by the training split.
        hidden: MLP width; the encoder width by default.
        layers: hidden layers.
        dropout: dropout after each hidden layer.
        activation: activation after each hidden layer.
        activate_first: activation before the first linear map.

    Attributes:
        center, scale: [I] mean and standard deviation of the input, if all layers are read.
        standardized: 1 once these have been set, else 0.
    """

    center: Tensor
    scale: Tensor
    standardized: Tensor

    def __init__(
        self,
        *,
        width: Part[int],
        outputs: Part[int],
        depth: Part[int] = 1,
        descriptors: Part[int] = 0,
        readout: Literal["mean", "attention", "atoms", "sum"] = "mean",
        layers_read: Literal["last", "all"] = "last",
        hidden: int | None = None,
        layers: int = 1,
        dropout: float = 0.0,
        activation: Literal["silu", "softplus", "shifted_softplus"] = "silu",
        activate_first: bool = False,
    ) -> None:
        super().__init__()
        self.readout, self.layers_read = readout, layers_read
        self.first = ACTIVATIONS[activation]() if activate_first else nn.Identity()
        hidden, inputs = hidden or width, width
        if layers_read == "all":
            inputs = width * depth * (2 if readout == "mean" else 1)
            self.register_buffer("center", torch.zeros(inputs))
            self.register_buffer("scale", torch.ones(inputs))
            self.register_buffer("standardized", torch.zeros(()))
        pooled, inputs = inputs, inputs + descriptors
        steps: list[nn.Module] = []
        for layer in range(layers):
            linear = nn.Linear(inputs if layer == 0 else hidden, hidden)
            steps += [linear, ACTIVATIONS[activation](), nn.Dropout(dropout)]
        self.mlp = nn.Sequential(*steps, nn.Linear(hidden if layers else inputs, outputs))
        self.attention = AttentionPooling(pooled) if readout == "attention" else None

    @property
    def per_crystal(self) -> bool:
        """Whether the input is one vector per crystal, not per atom."""
        return self.readout == "mean"

    def read(self, encoder: Encoder, batch: CrystalBatch) -> Tensor:
        """Return the input of the MLP before standardization: [B, I] for ``mean``, else [N, I]."""
        if self.layers_read == "last":
            features = encoder(batch)
            return scatter(features, batch.crystal, batch.num_crystals, "mean") if self.per_crystal else features
        layers = features_of_layers(encoder, batch)
        if self.per_crystal:
            return mean_and_spread(layers, batch.crystal, batch.num_crystals)
        return torch.cat(layers, dim=-1)

    def standardize(self, center: Tensor, scale: Tensor) -> None:
        """Set mean and standard deviation [I] of the input; constant columns keep the scale 1."""
        self.center.copy_(center)
        self.scale.copy_(torch.where(scale > 1e-6 * scale.max(), scale, 1.0))
        self.standardized.fill_(1.0)

    def forward(self, read: Tensor, crystal: Tensor, n_crystals: int, descriptors: Tensor | None = None) -> Tensor:
        """Map the result of :meth:`read` and normalized descriptors [B, K] to [B, O] in normalized units."""
        if self.layers_read == "all":
            read = (read - self.center) / self.scale
        if self.attention is not None:
            read = self.attention(read, crystal, n_crystals)
        single = self.per_crystal or self.attention is not None
        read = self.first(read)
        if descriptors is not None:
            beside = descriptors if single else descriptors.index_select(0, crystal)
            read = torch.cat([read, beside.to(read.dtype)], dim=-1)
        out = self.mlp(read)
        return out if single else scatter(out, crystal, n_crystals, self._reduce)

    @property
    def _reduce(self) -> Literal["sum", "mean"]:
        return "mean" if self.readout == "atoms" else "sum"


class PropertyModel(TargetModel):
    """Encoder, head and target normalization: predicts in physical units.

    Args:
        encoder: pretrained or untrained.
        head: with the number of outputs required by the target types.
        targets: names of the T targets.
        units: their units.
        types: target types; plain numbers by default.
        referenced: targets learned relative to atomic references, see :meth:`fit_normalisation`.
        descriptors: the K descriptors that the head also reads; None for none.
        per: targets learned per area, volume or formula unit.

    Attributes:
        mean, std: [T] statistics of the training targets; with the ``sum`` readout the mean is per atom.
        references: [T, 119] atomic references, if any.
        typical: [T] mean factor of the values, for targets learned per area, volume or formula unit.
        frozen: keep the encoder in evaluation mode, without dropout.
        cached: provides the head's input in place of a frozen encoder in training; None for none.
    """

    mean: Tensor
    references: Tensor | None
    typical: Tensor | None

    def __init__(
        self,
        *,
        encoder: Encoder,
        head: PropertyHead,
        targets: list[str],
        units: list[str],
        types: Sequence[TargetType] | None = None,
        referenced: Sequence[str] = (),
        descriptors: Descriptors | None = None,
        per: Mapping[str, Per] | None = None,
    ) -> None:
        super().__init__(
            encoder, targets, units, [Number() for _ in targets] if types is None else types, descriptors, per
        )
        self.head = head
        self.referenced = list(referenced)
        self.frozen = False
        self.cached: Callable[[CrystalBatch], Tensor] | None = None
        for name, kind in zip(targets, self.types, strict=True):
            if head.readout == "sum" and not kind.grows:
                raise ValueError(f"readout=sum adds up over atoms, which {name!r} as {kind.name!r} can't be")
            if name in self.referenced and not kind.grows:
                raise ValueError(f"atomic_references: {name!r} is treated as {kind.name!r}, not as a number")
            if name in self.per and (head.readout == "sum" or name in self.referenced):
                raise ValueError(
                    f"target_per: {name!r} can't be learned per {self.per[name]} with head=sum or atomic_references"
                )
        self.register_buffer("mean", torch.zeros(len(targets)))
        self.register_buffer("std", torch.ones(len(targets)))
        self.register_buffer("references", torch.zeros(len(targets), N_SPECIES) if self.referenced else None)
        self.register_buffer("typical", torch.ones(len(targets)) if self.per else None)

    @property
    def n_depths(self) -> int:
        """Number of successive parts: head, encoder layers, and what precedes them."""
        return self.encoder.n_layers + 2

    def depth_of(self, name: str) -> int:
        """Return how far a parameter is below the output: 0 for the head, 1 for the encoder's last layer, …"""
        part, _, rest = name.partition(".")
        return 0 if part != "encoder" else 1 + self.encoder.n_layers - self.encoder.layer_of(rest)

    def freeze_encoder(self) -> None:
        """Freeze the encoder: no gradients, dropout or batch statistics updates."""
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
        """Set mean, standard deviation and atomic references from the training rows only.

        Args:
            values: [n, T] in physical units, NaN if unknown.
            sizes: [n] number of atoms.
            crystals: the n crystals; needed for atomic references and for targets learned per area, volume or formula
                unit.

        Raises:
            DataError: a target has no value in the training rows.
        """
        if self.typical is not None:
            assert crystals is not None
            factors = self.factors(crystals)
            assert factors is not None
            values = values * factors
            self.typical.copy_(torch.from_numpy(factors.mean(axis=0)))
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
            self.std[place] = std if std > 1e-9 * abs(mean) else 1.0

    @property
    def error_scale(self) -> Tensor:
        """[T] standard deviations of the training targets in the units of the predictions."""
        return self.std if self.typical is None else self.std / self.typical

    def _factors(self, batch: CrystalBatch) -> Tensor | None:
        found = self.factors(batch.to_crystals()) if self.per else None
        return None if found is None else torch.from_numpy(found).to(self.mean.dtype).to(self.mean.device)

    def _prediction(self, outputs: list[Tensor], center: Tensor, factors: Tensor | None) -> Prediction:
        return Prediction.of(self._estimates(outputs, center)).divided(factors)

    def _center(self, batch: CrystalBatch) -> Tensor:
        """Return the zero of the normalized outputs, [B, T]."""
        total = self.head.readout == "sum"
        center = self.mean * batch.sizes.unsqueeze(1) if total else self.mean.expand(batch.num_crystals, -1)
        if self.references is None:
            return center
        energies = self.references.T.index_select(0, batch.numbers)
        return center + scatter(energies, batch.crystal, batch.num_crystals, "sum" if total else "mean")

    def _outputs(self, batch: CrystalBatch) -> list[Tensor]:
        """Return the head's outputs for each target, [B, O of the target]."""
        read = self.head.read(self.encoder, batch) if self.cached is None else self.cached(batch)
        beside = None if self.descriptors is None else self.descriptors(batch)
        whole = self.head(read, batch.crystal, batch.num_crystals, beside)
        return list(whole.to(self.mean.dtype).split([kind.outputs for kind in self.types], dim=1))

    def _estimates(self, outputs: list[Tensor], center: Tensor) -> list[Estimate]:
        return [
            kind.estimate(output, center[:, place], self.std[place])
            for place, (kind, output) in enumerate(zip(self.types, outputs, strict=True))
        ]

    def predict(self, batch: CrystalBatch) -> Prediction:
        """Return values, and standard deviations and probabilities if available."""
        return self._prediction(self._outputs(batch), self._center(batch), self._factors(batch))

    def losses(self, batch: CrystalBatch, kind: Loss) -> tuple[Tensor, Prediction]:
        """Return the loss of each value [B, T] in normalized units, 0 if unknown, and the predictions.

        Args:
            batch: with ``targets`` [B, T], NaN if unknown.
            kind: ``l1``, ``mse``, ``huber`` (δ = 1 standard deviation), or the negative log-likelihood of a ``laplace``
                or ``gaussian`` distribution; classes use cross-entropy.
        """
        assert batch.targets is not None
        outputs, center, factors = self._outputs(batch), self._center(batch), self._factors(batch)
        known = ~batch.targets.isnan()
        true = torch.where(known, batch.targets, 1.0).to(self.mean.dtype)
        true = true if factors is None else true * factors
        each = [
            kind_of.loss(output, true[:, place], center[:, place], self.std[place], kind)
            for place, (kind_of, output) in enumerate(zip(self.types, outputs, strict=True))
        ]
        losses = torch.where(known, torch.stack(each, dim=1), 0.0)
        return losses, self._prediction(outputs, center, factors)

    def loss(self, batch: CrystalBatch, kind: Loss) -> tuple[Tensor, Tensor]:
        """Return the mean loss over the known values, and the predictions [B, T]; see :meth:`losses`."""
        assert batch.targets is not None
        losses, predicted = self.losses(batch, kind)
        return losses.sum() / (~batch.targets.isnan()).sum().clamp_min(1), predicted.value


def build_network(
    encoder: Encoder,
    head: Mapping[str, Any],
    targets: list[str],
    units: list[str],
    types: Sequence[TargetType],
    *,
    referenced: Sequence[str],
    descriptors: Descriptors | None,
    per: Mapping[str, Per],
) -> PropertyModel:
    """Build a model with a head from its configuration; arguments as in :class:`PropertyModel`."""
    count = 0 if descriptors is None else len(descriptors.names)
    sizes = {"width": encoder.width, "depth": encoder.depth, "descriptors": count}
    sizes["outputs"] = sum(kind.outputs for kind in types)
    return PropertyModel(
        encoder=encoder,
        head=build(head, "head", kind=PropertyHead, **sizes),
        targets=targets,
        units=units,
        types=types,
        referenced=referenced,
        descriptors=descriptors,
        per=per,
    )
