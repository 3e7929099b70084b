"""Base of all property models: an encoder, typed targets, and predictions in physical units.

Shapes: ``B`` crystals, ``T`` targets, ``C`` classes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crysldnet.encoders.protocol import Encoder
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.crystals import Crystals
from crysldnet.models.descriptors import Descriptors
from crysldnet.models.per import Per, factors_of
from crysldnet.models.targets import Estimate, Kind, TargetType, stack_probabilities


class Prediction(NamedTuple):
    """Predictions of B crystals.

    Attributes:
        value: [B, T] in physical units; for classification the index of the most likely class, see
            ``TargetModel.classes``.
        std: [B, T] standard deviations predicted by the model, in physical units, NaN for targets without one; None if
            no target has one.
        probability: [B, T, C] class probabilities for the largest number of classes C; 0 beyond a target's own classes,
            NaN for regressions; None without classification.
    """

    value: Tensor
    std: Tensor | None
    probability: Tensor | None

    @classmethod
    def of(cls, estimates: Sequence[Estimate]) -> Prediction:
        """Stack the estimates of T targets."""
        value = torch.stack([e.value for e in estimates], dim=1)
        unknown = torch.full_like(value[:, 0], math.nan)
        spread = any(e.std is not None for e in estimates)
        std = torch.stack([unknown if e.std is None else e.std for e in estimates], dim=1) if spread else None
        return cls(value, std, stack_probabilities(estimates, value))

    def at(self, place: int) -> Estimate:
        """Return the prediction of the target at an index."""
        return Estimate(*(None if part is None else part[:, place] for part in self))  # type: ignore[arg-type]

    @classmethod
    def joined(cls, parts: Sequence[Prediction]) -> Prediction:
        """Concatenate the predictions of several batches."""
        columns = zip(*parts, strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]

    def to(self, place: torch.device | torch.dtype | str) -> Prediction:
        """Move to a device or change the type."""
        return Prediction(*(None if part is None else part.to(place) for part in self))  # type: ignore[arg-type]

    def divided(self, factors: Tensor | None) -> Prediction:
        """Return the prediction with values and standard deviations divided by factors [B, T]; None for 1."""
        if factors is None:
            return self
        own = factors.to(self.value)
        return self._replace(value=self.value / own, std=None if self.std is None else self.std / own)


class TargetModel(nn.Module):
    """Base of property models.

    Attributes:
        encoder: defines the graph, and its features measure the distance from the training set.
        targets, units: [T] names and units.
        types: [T] target types.
        std: [T] standard deviations of the training targets.
        descriptors: descriptors to read in addition to the structure; None for none.
        per: area, volume or formula unit by target name; other targets are learned directly.
    """

    std: Tensor

    def __init__(
        self,
        encoder: Encoder,
        targets: list[str],
        units: list[str],
        types: Sequence[TargetType],
        descriptors: Descriptors | None = None,
        per: Mapping[str, Per] | None = None,
    ) -> None:
        super().__init__()
        self.descriptors, self.per = descriptors, dict(per or {})
        self.encoder, self.targets, self.units, self.types = encoder, targets, units, list(types)
        for name, kind in zip(targets, self.types, strict=True):
            scalable = kind.classes is None and kind.bounds[1] == math.inf and kind.bounds[0] in (0, -math.inf)
            if name in self.per and not scalable:
                raise ValueError(
                    f"target_per: {name!r} can't be learned per {self.per[name]} as classes or with bounds other than 0"
                )

    @property
    def kinds(self) -> list[Kind]:
        """Kind of each target: ``regression``, ``binary`` or ``multiclass``."""
        return [kind.kind for kind in self.types]

    @property
    def classes(self) -> list[list[str] | None]:
        """Class names of each target; None for a regression."""
        return [kind.classes for kind in self.types]

    def factors(self, crystals: Crystals) -> NDArray[np.float64] | None:
        """Return [B, T] factors of the values for training; None if all are learned directly.

        Raises:
            DataError: a required area is missing.
        """
        return factors_of(self.per, self.targets, self.units, crystals) if self.per else None

    def forward(self, batch: CrystalBatch) -> Tensor:
        """Return [B, T] in physical units."""
        return self.predict(batch).value

    @abstractmethod
    def predict(self, batch: CrystalBatch) -> Prediction:
        """Return values, and standard deviations and probabilities if available."""


def combine(predictions: Sequence[Prediction], types: Sequence[TargetType]) -> Prediction:
    """Return the mean of the members' predictions and their joint standard deviation.

    The standard deviation is that of the mixture of the members' distributions, std² = mean(value² + std²) −
    mean(value)² (Lakshminarayanan et al., arXiv 1612.01474); members without a standard deviation count as exact. The
    target type defines how values are combined. Probabilities are averaged, and the most likely class of the average is
    predicted.

    Args:
        predictions: predictions of the M members for the same B crystals.
        types: types of the T targets.

    Returns:
        ``std`` [B, T] is NaN for classifications.
    """
    values = torch.stack([p.value for p in predictions])
    mean = torch.stack([kind.combine(values[:, :, place]) for place, kind in enumerate(types)], dim=1)
    variance = values.var(0, correction=0)
    if all(p.std is not None for p in predictions):
        within = torch.stack([p.std for p in predictions if p.std is not None])
        variance = variance + within.nan_to_num(0.0).square().mean(0)
    std = variance.sqrt()
    if predictions[0].probability is None:
        return Prediction(mean, std, None)
    probability = torch.stack([p.probability for p in predictions if p.probability is not None]).mean(0)
    classified = ~probability[:, :, 0].isnan()
    likeliest = probability.nan_to_num(0.0).argmax(-1).to(mean.dtype)
    return Prediction(torch.where(classified, likeliest, mean), std.masked_fill(classified, torch.nan), probability)


def predict_batch(models: Sequence[TargetModel], batch: CrystalBatch) -> Prediction:
    """Return the prediction of one model, or of an ensemble, for a batch on its device."""
    each = [model.predict(batch) for model in models]
    return combine(each, models[0].types) if len(each) > 1 else each[0]


@torch.inference_mode()
def predict(models: Sequence[TargetModel], batches: Iterable[CrystalBatch]) -> Prediction:
    """Return the predictions for all crystals of some batches, on the CPU."""
    parts = [predict_batch(models, batch.to(models[0].std.device)).to("cpu") for batch in batches]
    return Prediction.joined(parts) if parts else Prediction(torch.empty(0, len(models[0].targets)), None, None)
