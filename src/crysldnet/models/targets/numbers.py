"""Numeric targets: plain, bounded, logarithmic, or with many zeros.

Shapes as in :mod:`crysldnet.models.targets.base`.

A number may have one additional output, the logarithm of its error scale (``spread``); the loss is then the negative
log-likelihood of a Laplace or normal distribution (Nix and Weigend 1994; Kendall and Gal, arXiv 1703.04977).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, huber_loss, l1_loss, mse_loss

from crysldnet.models.targets.base import Estimate, Floats, Loss, Spread, TargetType

ERRORS: dict[str, Callable[..., Tensor]] = {"l1": l1_loss, "mse": mse_loss, "huber": huber_loss}
LARGEST_EXPONENT = 80.0
"""Logarithms are clipped here so that extreme predictions stay finite in single precision."""
LOG_SCALES = (-6.0, 4.0)
"""Bounds of a predicted log scale, in units of the target's standard deviation."""


@dataclass(frozen=True)
class Number(TargetType):
    """Any number, trained as (value − center) / scale.

    Attributes:
        spread: distribution with a predicted scale; None for none.
    """

    name: ClassVar[str] = "regression"
    grows: ClassVar[bool] = True
    spread: Spread | None = None

    @property
    def outputs(self) -> int:
        """Number of outputs O."""
        return 1 + (self.spread is not None)

    def describe(self) -> dict[str, Any]:
        """Return the description for :func:`make_target`."""
        return {"type": self.name, **asdict(self)}

    def wrong(self, values: Floats) -> tuple[NDArray[np.bool_], str]:
        """Return which values are invalid for training, and the requirement."""
        low, high = self.bounds
        said = f"{low:g} or more" if high == math.inf else f"{high:g} or less" if low == -math.inf else ""
        single = values.astype(np.float32)  # single precision columns hold the bound's neighbor
        wrong = (single < np.float32(low)) | (single > np.float32(high))
        return wrong, said or f"from {low:g} to {high:g}"

    def on_line(self, values: Floats) -> Floats:
        """Return the values transformed by :meth:`coordinate`."""
        return self.coordinate(torch.from_numpy(values)).numpy()

    def coordinate(self, values: Tensor) -> Tensor:
        """Return the values; a type on another scale overrides this, :meth:`from_line` and :meth:`slope`."""
        return values

    def from_line(self, line: Tensor) -> Tensor:
        """Return the values at coordinates, the inverse of :meth:`coordinate`."""
        return line

    def slope(self, values: Tensor) -> Tensor | float:
        """Return the derivative of values with respect to the coordinate, for standard deviations."""
        return 1.0

    def loss(self, output: Tensor, true: Tensor, center: Tensor, scale: Tensor, kind: Loss) -> Tensor:
        """Return the loss [B] in normalized units for outputs [B, O] and known true values [B]."""
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
        """Return the prediction for outputs [B, O]."""
        value, std = self.from_line(output[:, 0] * scale + center), self._std(output, scale)
        return Estimate(value, None if std is None else std * self.slope(value))

    def _std(self, output: Tensor, scale: Tensor) -> Tensor | None:
        if self.spread is None:
            return None
        factor = math.sqrt(2.0) if self.spread == "laplace" else 1.0
        return factor * scale * output[:, 1].clamp(*LOG_SCALES).exp()

    def combine(self, values: Tensor) -> Tensor:
        """Return the mean."""
        return values.mean(0)

    def constant(self, values: Floats) -> float:
        """Return the mean."""
        return float(values.mean())

    def errors(self, predicted: Floats, true: Floats) -> Floats:
        """Return the absolute errors."""
        return np.abs(predicted - true)

    def table_outputs(self, values: NDArray[np.floating]) -> Floats:
        """Return the values on the trained scale."""
        return self.coordinate(torch.from_numpy(np.asarray(values, np.float64))).numpy()[:, None]

    def as_table_outputs(self, found: Estimate) -> Floats:
        """Return the predicted values on the trained scale."""
        return self.coordinate(found.value.cpu().double()).numpy()[:, None]

    def from_table(self, outputs: Floats, spread: Floats) -> Estimate:
        """Return the values, clipped at the bounds."""
        value = self.from_line(torch.from_numpy(outputs[:, 0])).clamp(*self.bounds)
        return Estimate(value, torch.from_numpy(spread[:, 0]) * self.slope(value))


@dataclass(frozen=True)
class Bounded(Number):
    """A number with a lower or upper bound.

    Predictions are clipped at the bounds. If the true value equals a bound, predictions beyond it add no loss, so that
    exact values such as zeros can be learned.

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
        """Minimum and maximum possible value."""
        return -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high

    def describe(self) -> dict[str, Any]:
        """Return the description for :func:`make_target`."""
        if (self.low, self.high) == (0.0, None):
            return {"type": "non_negative", "spread": self.spread}
        return super().describe()

    def loss(self, output: Tensor, true: Tensor, center: Tensor, scale: Tensor, kind: Loss) -> Tensor:
        """Return the loss [B]."""
        (low, high), wanted, found = self.bounds, (true - center) / scale, output[:, 0]
        beyond = ((true <= low) & (found < wanted)) | ((true >= high) & (found > wanted))
        return self._error(output, torch.where(beyond, found, wanted), kind)

    def estimate(self, output: Tensor, center: Tensor, scale: Tensor) -> Estimate:
        """Return the number, clipped at the bounds."""
        value, std, _ = super().estimate(output, center, scale)
        return Estimate(value.clamp(*self.bounds), std)


class Log(Number):
    """A positive number, trained on its natural logarithm, so that relative errors count.

    The prediction is exp of the predicted logarithm: the median. Its standard deviation is first-order.
    """

    name = "log"
    grows = False
    relative = True

    @property
    def bounds(self) -> tuple[float, float]:
        """0 and infinity."""
        return 0.0, math.inf

    def wrong(self, values: Floats) -> tuple[NDArray[np.bool_], str]:
        """Return the values that have no logarithm."""
        return values <= 0, "over 0"

    def coordinate(self, values: Tensor) -> Tensor:
        """Return the logarithms."""
        return values.clamp_min(torch.finfo(torch.float32).tiny).log()

    def from_line(self, line: Tensor) -> Tensor:
        """Return exp."""
        return line.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp()

    def slope(self, values: Tensor) -> Tensor:
        """Return the values."""
        return values


class Hurdle(Number):
    """A number that is exactly 0 for many crystals and positive for others, such as a band gap.

    The first output is the logit of p, the probability of a positive value; the others are a number trained on positive
    values only. The prediction is gated: 0 if p < ½, else the number. The median minimizes the absolute error, and it
    is 0 if p < ½; p times the number would give metals a gap.
    """

    name = "hurdle"
    grows = False
    additive = False

    @property
    def outputs(self) -> int:
        """Number of outputs O."""
        return 1 + super().outputs

    @property
    def bounds(self) -> tuple[float, float]:
        """0 and infinity."""
        return 0.0, math.inf

    def on_line(self, values: Floats) -> Floats:
        """Return the positive values, if any."""
        return np.where(values > 0, values, np.nan) if (values > 0).any() else values

    def loss(self, output: Tensor, true: Tensor, center: Tensor, scale: Tensor, kind: Loss) -> Tensor:
        """Return the cross-entropy of the first part [B], plus the error of the second for positive values."""
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

    def combine(self, values: Tensor) -> Tensor:
        """Return 0 if most models predict 0, else the mean of the others."""
        over = (values != 0).sum(0)
        return torch.where(2 * over >= len(values), values.sum(0) / over.clamp_min(1), 0.0)
