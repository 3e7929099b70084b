"""Interface of target types: how outputs become predictions, what they are trained on, and how errors are measured.

Shapes: ``n`` values, ``B`` crystals, ``M`` models, ``O`` outputs of one target, ``C`` outputs for tabular models.

``center`` and ``scale`` are mean and standard deviation of the training targets on the scale of ``on_line``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from crysldnet.measures import MEASURES, Measure, register

Loss = Literal["l1", "mse", "huber", "laplace", "gaussian"]
Spread = Literal["laplace", "gaussian"]
Kind = Literal["regression", "binary", "multiclass"]
Floats = NDArray[np.float64]

TYPES: dict[str, type[TargetType]] = {}
"""All target types by name, including those of plugins."""


class Estimate(NamedTuple):
    """A prediction of one target: values [B] in physical units, standard deviations [B], probabilities [B, C]."""

    value: Tensor
    std: Tensor | None = None
    probability: Tensor | None = None


class TargetType(ABC):
    """A target type. A class with a ``name`` can be selected in ``target_types``; plugins can define more."""

    name: ClassVar[str]
    kind: Kind = "regression"
    measure: ClassVar[Measure] = MEASURES["mae"]
    """The error used to compare models, the mean of :meth:`errors`."""
    grows: ClassVar[bool] = False
    """Whether it can be extensive, a sum over atoms."""
    additive: ClassVar[bool] = True
    """Whether contributions of atoms and descriptors can sum to it."""
    relative: ClassVar[bool] = False
    """Whether errors and intervals refer to the logarithm."""
    spread: Spread | None = None
    """Distribution with a predicted scale; None for none."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            TYPES[cls.name] = cls
        register(cls.measure)

    @property
    def classes(self) -> list[str] | None:
        """Class names; None for a number."""
        return None

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Number of outputs O."""

    @property
    def bounds(self) -> tuple[float, float]:
        """Minimum and maximum possible value."""
        return -math.inf, math.inf

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the description for :func:`crysldnet.models.targets.make_target`."""

    @abstractmethod
    def wrong(self, values: Floats) -> tuple[NDArray[np.bool_], str]:
        """Return which values are invalid for training, and the requirement."""

    @abstractmethod
    def on_line(self, values: Floats) -> Floats:
        """Return the values from which center and scale are computed, NaN to ignore a value."""

    @abstractmethod
    def coordinate(self, values: Tensor) -> Tensor:
        """Return the values on the scale on which errors are measured."""

    @abstractmethod
    def loss(self, output: Tensor, true: Tensor, center: Tensor, scale: Tensor, kind: Loss) -> Tensor:
        """Return the loss [B] in normalized units for outputs [B, O] and known true values [B]."""

    @abstractmethod
    def estimate(self, output: Tensor, center: Tensor, scale: Tensor) -> Estimate:
        """Return the prediction for outputs [B, O]."""

    def entropy(self, values: Floats) -> float:
        """Return the baseline of the log loss for classes; 1 for numbers."""
        return 1.0

    @abstractmethod
    def combine(self, values: Tensor) -> Tensor:
        """Return the joint prediction [B] of values [M, B] from several models."""

    @abstractmethod
    def constant(self, values: Floats) -> float:
        """Return the best constant prediction for known values [n]."""

    @abstractmethod
    def errors(self, predicted: Floats, true: Floats) -> Floats:
        """Return the errors whose mean is :attr:`measure`."""

    @abstractmethod
    def table_outputs(self, values: NDArray[np.floating]) -> Floats:
        """Return the training targets [n, C] of tabular models for true values [n]."""

    @abstractmethod
    def as_table_outputs(self, found: Estimate) -> Floats:
        """Return the equivalent of a prediction [B] among the outputs [B, C] of tabular models."""

    @abstractmethod
    def from_table(self, outputs: Floats, spread: Floats) -> Estimate:
        """Return the prediction for outputs [B, C] of tabular models with standard deviation ``spread`` [B, C]."""


def stack_probabilities(estimates: Sequence[Estimate], like: Tensor) -> Tensor | None:
    """Return probabilities [B, T, C] for the largest C; 0 beyond a target's classes, NaN without classes."""
    widths = [0 if e.probability is None else e.probability.shape[1] for e in estimates]
    if not any(widths):
        return None
    whole = like.new_full((like.shape[0], len(estimates), max(widths)), math.nan)
    for place, estimate in enumerate(estimates):
        if estimate.probability is not None:
            whole[:, place] = 0.0
            whole[:, place, : widths[place]] = estimate.probability
    return whole
