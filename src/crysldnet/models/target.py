"""Kinds of properties: how the outputs of a head become a prediction, and what they are trained on.

Shapes: ``B`` crystals, ``O`` outputs of one target, ``C`` classes. ``center`` and ``scale`` are mean and standard
deviation of the training targets (of their logarithms for :class:`Log`, of the values over 0 for :class:`TwoPart`).

A regression may have one output more, the logarithm of the scale of its own error (``spread``); the loss is then the
negative log-likelihood of a Laplace or normal distribution (Nix and Weigend 1994; Kendall and Gal, arXiv 1703.04977).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber_loss,
    l1_loss,
    mse_loss,
    one_hot,
)

Loss = Literal["l1", "mse", "huber", "laplace", "gaussian"]
Spread = Literal["laplace", "gaussian"]
Kind = Literal["regression", "binary", "multiclass"]

ERRORS: dict[str, Callable[..., Tensor]] = {"l1": l1_loss, "mse": mse_loss, "huber": huber_loss}
LARGEST_EXPONENT = 80.0
"""Logarithms are cut there, so that a wild prediction stays finite in single precision."""
LOG_SCALES = (-6.0, 4.0)
"""Bounds of a predicted log scale, in units of the target's standard deviation."""


class Estimate(NamedTuple):
    """A prediction of one target: values [B] in physical units, standard deviations [B], probabilities [B, C]."""

    value: Tensor
    std: Tensor | None = None
    probability: Tensor | None = None


@dataclass(frozen=True)
class Number:
    """Any number, trained as (value − center) / scale.

    Attributes:
        spread: the distribution whose scale is predicted too; None for none.
    """

    name: ClassVar[str] = "number"
    kind: ClassVar[Kind] = "regression"
    grows: ClassVar[bool] = True
    """Whether it can be a sum over atoms."""
    spread: Spread | None = None

    @property
    def outputs(self) -> int:
        """O."""
        return 1 + (self.spread is not None)

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest value there can be."""
        return -math.inf, math.inf

    def describe(self) -> dict[str, Any]:
        """Return what :func:`make_target` makes this from."""
        return {"type": self.name, **asdict(self)}

    def wrong(self, values: NDArray[np.float64]) -> tuple[NDArray[np.bool_], str]:
        """Return which values this can't be trained on, and what is asked of them."""
        low, high = self.bounds
        said = f"{low:g} or more" if high == math.inf else f"{high:g} or less" if low == -math.inf else ""
        single = values.astype(np.float32)  # columns in single precision hold the bound's neighbour
        wrong = (single < np.float32(low)) | (single > np.float32(high))
        return wrong, said or f"from {low:g} to {high:g}"

    def on_line(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what center and scale are taken of, NaN where a value doesn't count."""
        return values

    def coordinate(self, values: Tensor) -> Tensor:
        """Return where values lie on the line on which errors are compared with the scale."""
        return values

    def loss(self, output: Tensor, true: Tensor, center: Tensor, scale: Tensor, kind: Loss) -> Tensor:
        """Return the loss [B], in normalised units, of outputs [B, O] where the true values [B] are known."""
        return self._error(output, (self.coordinate(true) - center) / scale, kind)

    def _error(self, output: Tensor, wanted: Tensor, kind: Loss) -> Tensor:
        found = output[:, 0]
        if self.spread is not None:
            return -self._log_density(found - wanted, output[:, 1].clamp(*LOG_SCALES), self.spread)
        return ERRORS[kind](found, wanted, reduction="none")

    @staticmethod
    def _log_density(residual: Tensor, log_scale: Tensor, kind: Spread) -> Tensor:
        if kind == "laplace":
            return -residual.abs() * (-log_scale).exp() - log_scale - math.log(2.0)
        return -0.5 * (residual * (-log_scale).exp()).square() - log_scale - 0.5 * math.log(2.0 * math.pi)

    def estimate(self, output: Tensor, center: Tensor, scale: Tensor) -> Estimate:
        """Return the prediction that outputs [B, O] stand for."""
        return Estimate(output[:, 0] * scale + center, self._std(output, scale))

    def _std(self, output: Tensor, scale: Tensor) -> Tensor | None:
        if self.spread is None:
            return None
        factor = math.sqrt(2.0) if self.spread == "laplace" else 1.0
        return factor * scale * output[:, 1].clamp(*LOG_SCALES).exp()


@dataclass(frozen=True)
class Bounded(Number):
    """A number that is never below a bound, or over one.

    Predictions beyond a bound are cut. Where the true value lies on it a prediction beyond it costs nothing, so that
    one model can learn values that are exactly there, such as zeros.

    Attributes:
        low, high: the bounds; None for none.
    """

    name = "bounded"
    grows = False
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not low < high or (low, high) == (-math.inf, math.inf):
            raise ValueError(f"bounds must be two numbers, the lower first, or a number and null, not {low}, {high}")

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest value there can be."""
        return -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high

    def describe(self) -> dict[str, Any]:
        """Return what :func:`make_target` makes this from."""
        if (self.low, self.high) == (0.0, None):
            return {"type": "non_negative", "spread": self.spread}
        return super().describe()

    def loss(self, output: Tensor, true: Tensor, center: Tensor, scale: Tensor, kind: Loss) -> Tensor:
        """Return the loss [B]."""
        (low, high), wanted, found = self.bounds, (true - center) / scale, output[:, 0]
        beyond = ((true <= low) & (found < wanted)) | ((true >= high) & (found > wanted))
        return self._error(output, torch.where(beyond, found, wanted), kind)

    def estimate(self, output: Tensor, center: Tensor, scale: Tensor) -> Estimate:
        """Return the number, cut at the bounds."""
        value, std, _ = super().estimate(output, center, scale)
        return Estimate(value.clamp(*self.bounds), std)


class Log(Number):
    """A number over 0, trained on its natural logarithm, so that relative errors count.

    The prediction is exp of the predicted logarithm: the median. Its standard deviation is to first order.
    """

    name = "log"
    grows = False

    @property
    def bounds(self) -> tuple[float, float]:
        """0 and infinity."""
        return 0.0, math.inf

    def wrong(self, values: NDArray[np.float64]) -> tuple[NDArray[np.bool_], str]:
        """Return the values that have no logarithm."""
        return values <= 0, "over 0"

    def on_line(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the logarithms."""
        return np.log(values)

    def coordinate(self, values: Tensor) -> Tensor:
        """Return the logarithms."""
        return values.clamp_min(torch.finfo(values.dtype).tiny).log()

    def estimate(self, output: Tensor, center: Tensor, scale: Tensor) -> Estimate:
        """Return exp of the predicted logarithm."""
        value = (output[:, 0] * scale + center).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp()
        std = self._std(output, scale)
        return Estimate(value, None if std is None else value * std)


class TwoPart(Number):
    """A number that is exactly 0 for many and over 0 for the others, such as a band gap.

    The first output is the logit of p, the probability of a value over 0, the others are a number trained on the
    values over 0 alone. The prediction is gated: 0 where p < ½, else the number. The absolute error is smallest at the
    median, and that is 0 where p < ½; p times the number would give metals a gap.
    """

    name = "two_part"
    grows = False

    @property
    def outputs(self) -> int:
        """O."""
        return 1 + super().outputs

    @property
    def bounds(self) -> tuple[float, float]:
        """0 and infinity."""
        return 0.0, math.inf

    def on_line(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the values over 0, if there are any."""
        return np.where(values > 0, values, np.nan) if (values > 0).any() else values

    def loss(self, output: Tensor, true: Tensor, center: Tensor, scale: Tensor, kind: Loss) -> Tensor:
        """Return cross-entropy of the first part [B], and the error of the second where the true value is over 0."""
        over = true > 0
        first = binary_cross_entropy_with_logits(output[:, 0], over.to(output.dtype), reduction="none")
        second = self._error(output[:, 1:], (true - center) / scale, kind)
        return first + torch.where(over, second, 0.0)

    def estimate(self, output: Tensor, center: Tensor, scale: Tensor) -> Estimate:
        """Return the gated number; its variance is that of the mixture of 0 and the number."""
        p = output[:, 0].sigmoid()
        value, std, _ = super().estimate(output[:, 1:], center, scale)
        value = value.clamp_min(0.0)
        gated = torch.where(p >= 0.5, value, 0.0)
        if std is None:
            return Estimate(gated)
        return Estimate(gated, (p * (std.square() + value.square()) - (p * value).square()).clamp_min(0.0).sqrt())


@dataclass(frozen=True)
class Classes:
    """One of several classes, given as 0 … C − 1; the value that is predicted is the likeliest class.

    Attributes:
        labels: names of the C classes.
    """

    name: ClassVar[str] = "classes"
    grows: ClassVar[bool] = False
    labels: tuple[str, ...]

    @property
    def kind(self) -> Kind:
        """Whether there are two classes or more."""
        return "binary" if len(self.labels) == 2 else "multiclass"

    @property
    def outputs(self) -> int:
        """Return O: one logit for two classes, else one for each."""
        return 1 if self.kind == "binary" else len(self.labels)

    def describe(self) -> dict[str, Any]:
        """Return what :func:`make_target` makes this from."""
        return {"type": self.name, "labels": list(self.labels)}

    def wrong(self, values: NDArray[np.float64]) -> tuple[NDArray[np.bool_], str]:
        """Return the values that are no class."""
        return ~np.isin(values, np.arange(len(self.labels))), f"one of {len(self.labels)} classes"

    def on_line(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return zeros: classes aren't normalised."""
        return np.zeros_like(values)

    def coordinate(self, values: Tensor) -> Tensor:
        """Return the classes."""
        return values

    def loss(self, output: Tensor, true: Tensor, center: Tensor, scale: Tensor, kind: Loss) -> Tensor:
        """Return the cross-entropy [B]."""
        if self.kind == "binary":
            return binary_cross_entropy_with_logits(output[:, 0], true.to(output.dtype), reduction="none")
        return cross_entropy(output, true.long(), reduction="none")

    def estimate(self, output: Tensor, center: Tensor, scale: Tensor) -> Estimate:
        """Return the likeliest class and the probabilities of all."""
        if self.kind == "binary":
            p = output[:, 0].sigmoid()
            return Estimate((p > 0.5).to(p.dtype), None, torch.stack([1.0 - p, p], dim=1))
        return Estimate(output.argmax(dim=1).to(output.dtype), None, output.softmax(dim=1))

    def entropy(self, values: NDArray[np.float64]) -> float:
        """Return the cross-entropy of guessing by the frequencies of these values alone."""
        counts = one_hot(torch.from_numpy(values[~np.isnan(values)]).long(), len(self.labels)).sum(0).double()
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * shares.log()).sum())


TargetType = Number | Classes
NUMBERS: dict[str, type[Number]] = {kind.name: kind for kind in (Number, Bounded, Log, TwoPart)}
Named = Literal["number", "non_negative", "log", "two_part", "classes"] | list[float | None]
"""How a configuration names a kind: by a word, or a bounded number by its two bounds."""


def make_number(named: Named, spread: Spread | None) -> Number:
    """Make the kind of number that a configuration names.

    Raises:
        ValueError: the bounds aren't two.
    """
    if named == "non_negative":
        named = [0.0, None]
    if isinstance(named, list):
        if len(named) != 2:
            raise ValueError(f"bounds are two, as in [0, 1] or [0, null], not {named}")
        return Bounded(spread, *named)
    return NUMBERS[named](spread)


def make_target(description: Mapping[str, Any]) -> TargetType:
    """Make a kind of target from what it says of itself.

    Raises:
        KeyError: there is no such kind.
    """
    values = dict(description)
    kind = values.pop("type")
    if kind == Classes.name:
        return Classes(tuple(values["labels"]))
    return make_number(kind, **values) if kind == "non_negative" else NUMBERS[kind](**values)


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
