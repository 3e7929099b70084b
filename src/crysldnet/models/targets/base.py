"""What every kind of property defines: how outputs become predictions, what they are trained on, how errors count.

Shapes: ``n`` values, ``B`` crystals, ``M`` models, ``O`` outputs of one target, ``C`` outputs for models on tables.

``center`` and ``scale`` are mean and standard deviation of the training targets as ``on_line`` gives them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Loss = Literal["l1", "mse", "huber", "laplace", "gaussian"]
Spread = Literal["laplace", "gaussian"]
Kind = Literal["regression", "binary", "multiclass"]
Floats = NDArray[np.float64]

TYPES: dict[str, type[TargetType]] = {}
"""Every kind of target by its name, those of plugins too."""


class Estimate(NamedTuple):
    """A prediction of one target: values [B] in physical units, standard deviations [B], probabilities [B, C]."""

    value: Tensor
    std: Tensor | None = None
    probability: Tensor | None = None


class TargetType(ABC):
    """A kind of target. A class with a ``name`` can be chosen in ``target_types``; a plugin may define one."""

    name: ClassVar[str]
    kind: Kind = "regression"
    measure: ClassVar[str] = "mae"
    """The error that models are compared by."""
    grows: ClassVar[bool] = False
    """Whether it can be a sum over atoms."""
    additive: ClassVar[bool] = True
    """Whether contributions of atoms and descriptors can add up to it."""
    relative: ClassVar[bool] = False
    """Whether errors and intervals are those of the logarithm."""
    spread: Spread | None = None
    """The distribution whose scale is predicted too; None for none."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            TYPES[cls.name] = cls

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes; None for a number."""
        return None

    @property
    @abstractmethod
    def outputs(self) -> int:
        """O."""

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest value there can be."""
        return -math.inf, math.inf

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what :func:`crysldnet.models.targets.make_target` makes this from."""

    @abstractmethod
    def wrong(self, values: Floats) -> tuple[NDArray[np.bool_], str]:
        """Return which values this can't be trained on, and what is asked of them."""

    @abstractmethod
    def on_line(self, values: Floats) -> Floats:
        """Return what center and scale are taken of, NaN where a value doesn't count."""

    @abstractmethod
    def coordinate(self, values: Tensor) -> Tensor:
        """Return where values lie on the line on which errors are compared with the scale."""

    @abstractmethod
    def loss(self, output: Tensor, true: Tensor, center: Tensor, scale: Tensor, kind: Loss) -> Tensor:
        """Return the loss [B], in normalised units, of outputs [B, O] where the true values [B] are known."""

    @abstractmethod
    def estimate(self, output: Tensor, center: Tensor, scale: Tensor) -> Estimate:
        """Return the prediction that outputs [B, O] stand for."""

    def entropy(self, values: Floats) -> float:
        """Return what the log loss of classes is compared with; 1 for numbers."""
        return 1.0

    @abstractmethod
    def combine(self, values: Tensor) -> Tensor:
        """Return the joint prediction [B] of the values [M, B] that models predict."""

    @abstractmethod
    def constant(self, values: Floats) -> float:
        """Return the best constant prediction after known values [n]."""

    @abstractmethod
    def errors(self, predicted: Floats, true: Floats) -> Floats:
        """Return the errors whose mean is :attr:`measure`."""

    @abstractmethod
    def table_outputs(self, values: NDArray[np.floating]) -> Floats:
        """Return what models on tables are fitted to, [n, C], for true values [n]."""

    @abstractmethod
    def as_table_outputs(self, found: Estimate) -> Floats:
        """Return what stands for a prediction [B] among the outputs [B, C] of models on tables."""

    @abstractmethod
    def from_table(self, outputs: Floats, spread: Floats) -> Estimate:
        """Return the prediction that outputs [B, C] of models on tables stand for, ``spread`` [B, C] its deviation."""


def stack_probabilities(estimates: Sequence[Estimate], like: Tensor) -> Tensor | None:
    """Return probabilities [B, T, C] for the largest C; 0 beyond a target's classes, NaN where it has none."""
    widths = [0 if e.probability is None else e.probability.shape[1] for e in estimates]
    if not any(widths):
        return None
    whole = like.new_full((len(like), len(estimates), max(widths)), math.nan)
    for place, estimate in enumerate(estimates):
        if estimate.probability is not None:
            whole[:, place] = 0.0
            whole[:, place, : widths[place]] = estimate.probability
    return whole
