"""Ensembles of networks and tabular models.

Tabular models read descriptors of composition and geometry and, with a pretrained encoder, the principal components of
the features of all its layers. Each target has its own members and weights.

Shapes: ``B`` crystals, ``T`` targets, ``D`` features, ``C`` outputs of a target: one for a number or two classes, else
one per class. ``log`` targets are predicted and combined on the logarithm, and targets learned per area, volume or
formula unit on that scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crysldnet.descriptors import Features, crystal_descriptors, side_by_side
from crysldnet.descriptors.composition import amounts_of
from crysldnet.encoders.protocol import Encoder, features_of_layers
from crysldnet.errors import DataError
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.crystals import Crystals
from crysldnet.models.descriptors import Descriptors
from crysldnet.models.head import PropertyModel
from crysldnet.models.per import Per
from crysldnet.models.predictor import Prediction, TargetModel, predict_batch
from crysldnet.models.readout import mean_and_spread
from crysldnet.models.targets import TargetType
from crysldnet.tabular.kernel import KernelRidge, Projection
from crysldnet.tabular.stack import Stack, from_arrays, to_arrays

Floats = NDArray[np.float64]
NETWORK = "network"
"""Name of the networks among the members."""


@dataclass(frozen=True)
class TabularPart:
    """The tabular members of a model.

    Attributes:
        descriptors: names of the input columns, in this order.
        projection: projection of the embedding, whose components follow the descriptors; None for none.
        stacks: [T] one per target.
    """

    descriptors: tuple[str, ...]
    projection: Projection | None
    stacks: list[Stack]

    def features(self, found: Features, embedding: NDArray[np.floating] | None) -> Floats:
        """Return [B, D] the input columns.

        Raises:
            DataError: this version doesn't know a descriptor.
        """
        place = {name: i for i, name in enumerate(found.names)}
        if unknown := [name for name in self.descriptors if name not in place]:
            raise DataError(f"the model reads the descriptor {unknown[0]!r}, which this version of crysldnet lacks")
        columns = found.values[:, [place[name] for name in self.descriptors]]
        if self.projection is None or embedding is None:
            return columns
        return np.concatenate([columns, self.projection(embedding)], axis=1)

    def check(self) -> None:
        """Check that the members read the existing columns and have consistent outputs.

        Raises:
            DataError: naming the first inconsistent member.
        """
        width = len(self.descriptors) + (0 if self.projection is None else self.projection.axes.shape[1])
        for place, stack in enumerate(self.stacks):
            sizes = {name: model.sizes for name, model in stack.models.items()}
            for name, (columns, outputs) in sizes.items():
                exact = isinstance(stack.models[name], KernelRidge)
                if columns > width or (exact and columns < width) or outputs != next(iter(sizes.values()))[1]:
                    raise DataError(f"its part '{place}.{name}' doesn't fit {width} columns, or the other members")

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the content to store: tensors by name, and plain values."""
        arrays: dict[str, NDArray] = {}
        plain: dict[str, Any] = {"descriptors": list(self.descriptors), "projection": None, "targets": []}
        if self.projection is not None:
            arrays, plain["projection"] = to_arrays(self.projection, "projection.")
        for place, stack in enumerate(self.stacks):
            own, values = stack.to_arrays(f"{place}.")
            arrays |= own
            plain["targets"].append(values)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, plain

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> TabularPart:
        """Return the inverse of :meth:`to_file`.

        Raises:
            DataError: something is missing or inconsistent.
        """
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        try:
            known = plain["projection"]
            projection = None if known is None else from_arrays(arrays, known, "projection.")
            stacks = [Stack.from_arrays(arrays, own, f"{place}.") for place, own in enumerate(plain["targets"])]
            whole = cls(tuple(plain["descriptors"]), projection, stacks)  # type: ignore[arg-type]
            whole.check()
            return whole
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"its tabular members are damaged ({error}); export it again") from error


class HybridModel(TargetModel):
    """Networks, tabular members, and the weights between them.

    Args:
        encoder: embeds crystals for the tabular members and for the comparison with the training set.
        networks: finetuned models that are one member together; empty for tabular members only.
        targets, units, types: as for every model.
        referenced: targets that tabular members learn relative to atomic references.
        descriptors: descriptors to read in addition to the structure; None for none.
        per: area, volume or formula unit by target name.

    Raises:
        ValueError: a target type doesn't support ``per``.

    Attributes:
        references: [T, 119] atomic references, 0 for other targets.
        tabular: the tabular members, after fitting.
    """

    references: Tensor
    tabular: TabularPart

    def __init__(
        self,
        *,
        encoder: Encoder,
        networks: Sequence[PropertyModel],
        targets: list[str],
        units: list[str],
        types: Sequence[TargetType],
        referenced: Sequence[str] = (),
        descriptors: Descriptors | None = None,
        per: Mapping[str, Per] | None = None,
    ) -> None:
        super().__init__(encoder, targets, units, types, descriptors, per)
        if both := sorted({*referenced} & {*self.per}):
            raise ValueError(f"{both[0]!r} can't be in target_per and in atomic_references")
        self.networks = nn.ModuleList(networks)
        self.referenced = list(referenced)
        self.register_buffer("std", torch.ones(len(targets)))
        self.register_buffer("references", torch.zeros(len(targets), 119, dtype=torch.float64))

    def read(self, batch: CrystalBatch) -> tuple[Features, NDArray[np.float32]]:
        """Return descriptors and the pooled features of all layers, [B, 2 · layers · width]."""
        layers = features_of_layers(self.encoder, batch)
        pooled = mean_and_spread(layers, batch.crystal, batch.num_crystals)
        found = crystal_descriptors(batch.to_crystals())
        if self.descriptors is not None:
            own = self.descriptors(batch).cpu().double().numpy()
            found = side_by_side([found, Features(tuple(f"column {name}" for name in self.descriptors.names), own)])
        return found, pooled.float().cpu().numpy()

    def predict(self, batch: CrystalBatch) -> Prediction:
        """Return values, their spread between members, and class probabilities if any."""
        found, embedding = self.read(batch)
        x, crystals = self.tabular.features(found, embedding), batch.to_crystals()
        amounts, factors = amounts_of(crystals), self.factors(crystals)
        baseline = amounts / amounts.sum(axis=1, keepdims=True) @ self.references.cpu().numpy().T
        network = self.table_outputs(self.predict_networks(batch), crystals) if len(self.networks) else None
        estimates = []
        for place, (kind, stack) in enumerate(zip(self.types, self.tabular.stacks, strict=True)):
            members = {} if network is None else {NETWORK: network[place]}
            members |= {name: own + baseline[:, [place]] for name, own in stack.predict(x).items()}
            estimates.append(kind.from_table(*stack.combine(members)))
        whole = Prediction.of(estimates).divided(None if factors is None else torch.from_numpy(factors))
        return whole.to(torch.float32).to(batch.positions.device)

    def table_outputs(self, found: Prediction, crystals: Crystals) -> list[Floats]:
        """Return [T] the equivalents of predictions among the outputs [B, C] of tabular models."""
        factors = self.factors(crystals)
        scaled = found if factors is None else found.divided(1 / torch.from_numpy(factors))
        return [kind.as_table_outputs(scaled.at(place)) for place, kind in enumerate(self.types)]

    def predict_networks(self, batch: CrystalBatch) -> Prediction:
        """Return the joint prediction of the networks only."""
        return predict_batch(list(self.networks), batch)  # type: ignore[arg-type]

    def fit_scale(self, values: Floats) -> None:
        """Set the standard deviations of the targets from training values [n, T], NaN if unknown."""
        for place, kind in enumerate(self.types):
            known = values[~np.isnan(values[:, place]), place]
            spread = float(kind.table_outputs(known).std()) if kind.classes is None else 1.0
            self.std[place] = spread if spread > 0 and math.isfinite(spread) else 1.0
