"""What every model of properties offers: an encoder, targets of some kinds, and predictions in physical units.

Shapes: ``B`` crystals, ``T`` targets, ``C`` classes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
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
        value: [B, T] in physical units; of a classification the number of the likeliest class, see
            ``TargetModel.classes``.
        std: [B, T] standard deviations that the model itself predicts, in physical units, NaN for targets without one;
            None where no target has one.
        probability: [B, T, C] of the classes, C being the largest number of classes; 0 beyond a target's own classes,
            NaN for regressions; None where there is no classification.
    """

    value: Tensor
    std: Tensor | None
    probability: Tensor | None

    @classmethod
    def of(cls, estimates: Sequence[Estimate]) -> Prediction:
        """Put the estimates of T targets side by side."""
        value = torch.stack([e.value for e in estimates], dim=1)
        unknown = torch.full_like(value[:, 0], math.nan)
        spread = any(e.std is not None for e in estimates)
        std = torch.stack([unknown if e.std is None else e.std for e in estimates], dim=1) if spread else None
        return cls(value, std, stack_probabilities(estimates, value))

    def at(self, place: int) -> Estimate:
        """Return the prediction of the target at a place."""
        return Estimate(*(None if part is None else part[:, place] for part in self))  # type: ignore[arg-type]

    @classmethod
    def joined(cls, parts: Sequence[Prediction]) -> Prediction:
        """Put the predictions of several batches one after another."""
        columns = zip(*parts, strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]

    def to(self, place: torch.device | torch.dtype | str) -> Prediction:
        """Move it to a device, or change its type."""
        return Prediction(*(None if part is None else part.to(place) for part in self))  # type: ignore[arg-type]

    def divided(self, factors: Tensor | None) -> Prediction:
        """Return it with values and standard deviations divided by factors [B, T]; None for 1."""
        if factors is None:
            return self
        own = factors.to(self.value)
        return self._replace(value=self.value / own, std=None if self.std is None else self.std / own)


class TargetModel(nn.Module):
    """Base of the models that predict properties.

    Attributes:
        encoder: it says which graph a batch needs, and its features say how unlike the training set a crystal is.
        targets, units: [T].
        types: [T] what kind of target each is.
        std: [T] standard deviations of the training targets.
        descriptors: numbers of a crystal that are read beside its structure; None for none.
        per: what targets are learned per, by name; the others are learned as they stand.
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
        """Of each target: ``regression``, ``binary`` or ``multiclass``."""
        return [kind.kind for kind in self.types]

    @property
    def classes(self) -> list[list[str] | None]:
        """Names of the classes of each target; None for a regression."""
        return [kind.classes for kind in self.types]

    def factors(self, crystals: Crystals) -> NDArray[np.float64] | None:
        """Return [B, T] what values are multiplied by to be learned; None where all are learned as they stand.

        Raises:
            DataError: a crystal has no area, where that is asked for.
        """
        return factors_of(self.per, self.targets, self.units, crystals) if self.per else None

    def forward(self, batch: CrystalBatch) -> Tensor:
        """Return [B, T] in physical units."""
        return self.predict(batch).value

    @abstractmethod
    def predict(self, batch: CrystalBatch) -> Prediction:
        """Return values, and standard deviations and probabilities where the targets have them."""
