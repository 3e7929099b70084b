"""Uncertainty of predictions: conformal intervals, calibrated standard deviations, and checks of both.

Shapes: ``n`` calibration crystals, ``B`` crystals, ``T`` targets.

Split conformal prediction (Vovk, Gammerman and Shafer 2005; Lei et al., JASA 113, 2018): the scores of held-out
crystals are ``|y − ŷ| / σ``, or ``|y − ŷ|`` if the model has no σ. With the ⌈(n + 1) · level⌉-th smallest score q,
``ŷ ± q · σ`` contains the true value of a new crystal with at least that probability, for any model and distribution,
provided that new and calibration crystals are exchangeable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = (0.5, 0.8, 0.95)
"""Levels of the intervals whose coverage is reported."""
ENOUGH = 40
"""number of calibration crystals above which standard deviations set the interval widths"""
SMALLEST_STD = 1e-12
"""Relative to the largest one; a standard deviation of 0 would make an infinite score."""

Floats = NDArray[np.float64]


def conformal_quantile(scores: Floats, level: float) -> float:
    """Return the half-width, in units of the score, that covers a new score with probability ``level`` or more.

    Infinite with fewer than ``level / (1 − level)`` scores.

    Args:
        scores: [n] scores of held-out crystals.
        level: coverage between 0 and 1.
    """
    rank = math.ceil(round((len(scores) + 1) * level, 9))
    if rank > len(scores):
        return math.inf
    return float(np.partition(scores, rank - 1)[rank - 1])


def reliability(errors: Floats, std: Floats, expected: Floats) -> Floats:
    """Return the fraction of errors inside central normal intervals for each expected fraction.

    Args:
        errors: [n] differences from the truth.
        std: [n] standard deviations; for 0, only an error of 0 counts as inside.
        expected: fractions between 0 and 1, exclusive.
    """
    widths = np.array([NormalDist().inv_cdf((1 + share) / 2) for share in expected])
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = np.sort(np.nan_to_num(np.abs(errors) / std, nan=0.0, posinf=np.inf))
    return np.searchsorted(scores, widths, side="right") / len(scores)


def miscalibration_area(errors: Floats, std: Floats) -> float:
    """Return the area between the reliability curve and the diagonal, from 0 (calibrated) to 0.5."""
    expected = np.linspace(0.005, 0.995, 100)
    return float(np.abs(reliability(errors, std, expected) - expected).mean())


@dataclass(frozen=True)
class TargetCalibration:
    """Error statistics of one target.

    A model's standard deviation σ becomes ``scale · √(σ² + floor²)``: without a floor, the few crystals on which an
    ensemble happens to agree would determine the scale.

    Attributes:
        scores: [n] ascending scores of the calibration crystals; may be empty.
        scale: factor on standard deviations, NaN if the model has none.
        floor: minimum in the target's unit.
        normalised: whether the scores are errors divided by √(σ² + floor²).
        relative: whether errors and standard deviations refer to the natural logarithm, so that intervals reach the
            same factor above and below a value.
    """

    scores: Floats
    scale: float = math.nan
    floor: float = 0.0
    normalised: bool = False
    relative: bool = False

    @classmethod
    def of(cls, errors: Floats, std: Floats | None, *, relative: bool = False) -> TargetCalibration:
        """Fit to the errors [n] of the calibration crystals, and their standard deviations [n] if available.

        From 40 crystals on, a random half fits the floor and the other half provides the scores, because fitted
        crystals can't be scored. With fewer, scores are plain errors.
        """
        errors, std = _known(errors, std)
        if std is None or not len(errors):
            return cls(np.sort(np.abs(errors)), relative=relative)
        order = np.random.default_rng(0).permutation(len(errors))
        normalised = len(errors) >= ENOUGH
        fitted, scored = (order[::2], order[1::2]) if normalised else (order, order)
        floor = _fit_floor(errors[fitted], std[fitted])
        spread = np.hypot(std, floor)
        scale = float(np.sqrt(np.mean((errors / spread) ** 2)))
        scores = np.abs(errors / spread if normalised else errors)
        return cls(np.sort(scores[scored]), scale, floor, normalised, relative)

    def std(self, std: Floats, value: Floats) -> Floats:
        """Return calibrated standard deviations [B] for predicted values [B]."""
        unit = value if self.relative else np.ones_like(value)
        return unit * np.hypot(_positive(std / unit), self.floor) * self.scale

    def interval(self, level: float, value: Floats, std: Floats) -> tuple[Floats, Floats]:
        """Return lower and upper bounds of the conformal intervals of B crystals, NaN if n is too small.

        Args:
            level: coverage between 0 and 1.
            value: [B] predicted values.
            std: [B] raw standard deviations, NaN if unavailable.
        """
        half = self.half_width(level, std / value if self.relative else std, len(value))
        half = np.where(np.isfinite(half), half, np.nan)
        return (value * np.exp(-half), value * np.exp(half)) if self.relative else (value - half, value + half)

    def half_width(self, level: float, std: Floats | None, count: int) -> Floats:
        """Return half the width of the conformal intervals of ``count`` crystals, infinite if n is too small.

        Args:
            level: coverage between 0 and 1.
            std: [B] raw standard deviations; required if used in the calibration.
            count: number of crystals B.
        """
        width = conformal_quantile(self.scores, level)
        if not self.normalised:
            return np.full(count, width)
        assert std is not None
        return width * np.hypot(_positive(std), self.floor)


def _fit_floor(errors: Floats, std: Floats) -> float:
    """Return the floor that maximizes the likelihood of normal errors; the scale follows from it."""
    typical = float(np.sqrt(np.mean(std**2)))
    floors = [0.0, *(typical * np.geomspace(1e-3, 1e3, 61))]
    spreads = [np.hypot(std, floor) for floor in floors]
    losses = [np.log(spread).mean() + 0.5 * np.log(np.mean((errors / spread) ** 2) + 1e-300) for spread in spreads]
    return float(floors[int(np.argmin(losses))])


@dataclass(frozen=True)
class Calibration:
    """The calibration of every target, [T]; classes have no scores."""

    targets: list[TargetCalibration]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store."""
        import torch  # imported here because reports need the rest without torch

        scores = {f"scores.{place}": torch.from_numpy(target.scores) for place, target in enumerate(self.targets)}
        numbers = [
            [target.scale, target.floor, float(target.normalised), float(target.relative)] for target in self.targets
        ]
        return {"spread": torch.tensor(numbers, dtype=torch.float64), **scores}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Calibration:
        """Return the calibration from stored tensors.

        Raises:
            ValueError: a tensor is missing or has invalid values.
        """
        spread = tensors.get("spread")
        if spread is None or spread.ndim != 2 or spread.shape[1] not in (3, 4):  # 3 in earlier files: all absolute
            raise ValueError("calibration.spread must be [targets, 4]")
        if lacks := {"spread", *(f"scores.{i}" for i in range(len(spread)))} ^ tensors.keys():
            raise ValueError(f"calibration has other targets than its spread ({', '.join(sorted(lacks))})")
        for name, tensor in tensors.items():
            if name != "spread" and not (tensor.ndim == 1 and bool((tensor >= 0).all())):
                raise ValueError(f"calibration.{name} can't be used: errors are numbers from 0 on")
        numbers = spread.tolist()
        return cls(
            [
                TargetCalibration(tensors[f"scores.{i}"].numpy(), scale, floor, *map(bool, signs))
                for i, (scale, floor, *signs) in enumerate(numbers)
            ]
        )


def check(errors: Floats, std: Floats | None, levels: Sequence[float] = LEVELS, rounds: int = 20) -> dict[str, float]:
    """Check a calibration on its own crystals by repeated halving.

    Each round calibrates on a random half and evaluates the other half.

    Args:
        errors: [n] errors, NaN if unknown.
        std: [n] standard deviations, or None.
        levels: levels of the intervals.
        rounds: number of halvings.

    Returns:
        ``crystals``: n. ``coverage_50`` and so on: fraction of true values inside the conformal intervals. With
        standard deviations also ``std_scale``, their factor, and ``miscalibration_area`` and
        ``miscalibration_area_scaled``, before and after scaling. Means over the rounds; only ``crystals`` if n is below
        4.
    """
    errors, std = _known(errors, std)
    about = {"crystals": float(len(errors))}
    if len(errors) < 4:
        return about
    curves = curves_of(errors, std, levels, rounds)
    about |= {f"coverage_{100 * level:g}": float(y) for level, y in zip(levels, curves["conformal"], strict=True)}
    if std is not None:
        expected = np.linspace(0.005, 0.995, 100)
        scaled = curves_of(errors, std, expected, rounds)["scaled"]
        about["std_scale"] = TargetCalibration.of(errors, std).scale
        about["miscalibration_area"] = miscalibration_area(errors, std)
        about["miscalibration_area_scaled"] = float(np.abs(scaled - expected).mean())
    return about


def curves_of(errors: Floats, std: Floats | None, levels: Sequence[float] | Floats, rounds: int) -> dict[str, Floats]:
    """Return the fractions of errors inside intervals of some levels, for a reliability plot.

    Returns:
        ``conformal``: for conformal intervals; ``model`` and ``scaled``: for normal distributions with raw and scaled
        standard deviations. Parameters are fitted on one half and evaluated on the other.
    """
    errors, std = _known(errors, std)
    n, levels = len(errors), np.asarray(levels)
    rng = np.random.default_rng(0)
    conformal, scaled = [], []
    for _ in range(rounds):
        order = rng.permutation(n)
        one, other = order[: n // 2], order[n // 2 :]
        spread = None if std is None else std[other]
        fitted = TargetCalibration.of(errors[one], None if std is None else std[one])
        halves = [fitted.half_width(float(level), spread, len(other)) for level in levels]
        conformal.append([(np.abs(errors[other]) <= half).mean() for half in halves])
        if spread is not None:
            scaled.append(reliability(errors[other], fitted.std(spread, np.ones_like(spread)), levels))
    curves = {"conformal": np.mean(conformal, axis=0)}
    if std is not None:
        curves |= {"model": reliability(errors, std, levels), "scaled": np.mean(scaled, axis=0)}
    return curves


def _positive(std: Floats) -> Floats:
    largest = float(np.max(std, initial=0.0))
    return np.maximum(std, SMALLEST_STD * largest if largest > 0 else SMALLEST_STD)


def _known(errors: Floats, std: Floats | None) -> tuple[Floats, Floats | None]:
    if std is None:
        return errors[np.isfinite(errors)], None
    known = np.isfinite(errors) & np.isfinite(std)
    return errors[known], _positive(std[known])
