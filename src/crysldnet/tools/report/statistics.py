"""Statistics of a report: errors by element and size, calibration, and the difference between runs.

Shapes: ``n`` crystals, ``R`` runs.

A difference between two runs is tested by the paired bootstrap (B. Efron and R. Tibshirani, An Introduction to the
Bootstrap, 1993, chapters 13 and 16): the common test crystals are resampled with replacement, identically for both, and
the 2.5 % and 97.5 % quantiles of the difference are its interval. This covers the variation between samples of test
crystals, but not between training seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crysldnet.artifacts.calibration import LEVELS, reliability
from crysldnet.build import TARGET
from crysldnet.config.values import flat
from crysldnet.data.elements import SYMBOLS, element_pairs
from crysldnet.errors import DataError
from crysldnet.graphs.crystals import Crystals
from crysldnet.tools.report.predictions import Predictions
from crysldnet.tools.report.run_files import Run
from crysldnet.training.bootstrap import Floats, bootstrap

ONLY_NAMES = "seed name runs resume logger trainer strategy parallel algorithm authors out".split()
"""Settings that don't distinguish experiments."""


def metrics(p: Predictions) -> dict[str, float]:
    """Return MAE, RMSE and R², or the accuracy of classes, over known values; empty if none is known."""
    known = ~np.isnan(p.true)
    if not known.any():
        return {}
    if p.classes is not None:
        return {"accuracy": 1.0 - float(p.errors[known].mean())}
    errors = (p.predicted - p.true)[known]
    spread = float(((p.true[known] - p.true[known].mean()) ** 2).sum())
    found = {"MAE": float(np.abs(errors).mean()), "RMSE": float(np.sqrt((errors**2).mean()))}
    return found | ({"R²": 1.0 - float((errors**2).sum()) / spread} if spread > 0 else {})


def errors_by_element(errors: Floats, crystals: Crystals) -> dict[str, tuple[float, int]]:
    """Return for each element the mean error and number of the crystals that contain it.

    Args:
        errors: [n] errors, NaN if unknown.
        crystals: n crystals.
    """
    crystal, element = element_pairs(crystals)
    known = ~np.isnan(errors[crystal])
    counts = np.bincount(element[known], minlength=len(SYMBOLS))
    sums = np.bincount(element[known], errors[crystal][known], minlength=len(SYMBOLS))
    return {SYMBOLS[z]: (float(sums[z] / counts[z]), int(counts[z])) for z in np.flatnonzero(counts).tolist()}


@dataclass(frozen=True)
class SizeGroup:
    """Crystals of similar size: range of atoms, count, mean error and its standard error."""

    low: int
    high: int
    count: int
    mean: float
    standard_error: float


def errors_by_size(errors: Floats, sizes: NDArray[np.int64], groups: int = 8) -> list[SizeGroup]:
    """Return the errors of crystals in groups of similar size by number of atoms.

    Args:
        errors: [n] errors, NaN if unknown.
        sizes: [n] numbers of atoms.
        groups: maximum number of groups.
    """
    known = ~np.isnan(errors)
    errors, sizes = errors[known], sizes[known]
    if not len(errors):
        return []
    bounds = np.unique(np.quantile(sizes, np.linspace(0, 1, groups + 1)[1:], method="lower"))
    group = np.searchsorted(bounds, sizes)
    found = []
    for g in np.unique(group).tolist():
        own, of = errors[group == g], sizes[group == g]
        error = float(own.std(ddof=1) / np.sqrt(len(own))) if len(own) > 1 else float("nan")
        found.append(SizeGroup(int(of.min()), int(of.max()), len(own), float(own.mean()), error))
    return found


@dataclass(frozen=True)
class CalibrationOfRun:
    """Calibration of standard deviations: expected and observed fractions, area between them, coverage, sizes."""

    expected: Floats
    observed: Floats
    area: float
    coverage: dict[float, float]
    mean_std: float
    rmse: float
    count: int

    @classmethod
    def of(cls, p: Predictions) -> CalibrationOfRun | None:
        """Compute the calibration; None without standard deviations or known truth."""
        if p.std is None:
            return None
        known = ~np.isnan(p.true) & ~np.isnan(p.std)
        if not known.any():
            return None
        errors, std = (p.predicted - p.true)[known], p.std[known]
        expected = np.linspace(0.005, 0.995, 100)
        observed = reliability(errors, std, expected)
        covered = reliability(errors, std, np.array(LEVELS))
        return cls(
            expected,
            observed,
            float(np.abs(observed - expected).mean()),
            dict(zip(LEVELS, covered.tolist(), strict=True)),
            float(std.mean()),
            float(np.sqrt((errors**2).mean())),
            int(known.sum()),
        )


@dataclass(frozen=True)
class Compared:
    """One run in a comparison on common crystals.

    Attributes:
        run: index of the run.
        mean: mean error on the common crystals.
        interval: 95 % interval of the mean.
        difference: difference of the mean from the first run's; 0 for the first.
        difference_interval: 95 % interval from the paired bootstrap.
        other_sign: fraction of resamples in which the difference has the opposite sign or is 0.
    """

    run: int
    mean: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    other_sign: float


@dataclass(frozen=True)
class Comparison:
    """Comparison of runs on one target: number of common crystals, number per run, and results."""

    target: str
    unit: str
    measure: str
    common: int
    of: list[int]
    runs: list[Compared]


def compare(target: str, runs: Sequence[tuple[int, Predictions]], resamples: int, seed: int) -> Comparison:
    """Compare predictions of the same target by several runs.

    Args:
        target: target name.
        runs: index and predictions of each run; the others are compared with the first.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        DataError: they can't be compared: different units, true values or types, duplicate ids, or no common crystal.
    """
    first = runs[0][1]
    tables = []
    for _, p in runs:
        if p.unit != first.unit or (p.classes is None) != (first.classes is None):
            raise DataError(
                f"{target} is in {p.unit or 'no unit'} in one run and in {first.unit or 'no unit'} in another"
            )
        tables.append({id_: i for i, id_ in enumerate(p.ids) if not np.isnan(p.true[i])})
        if len(set(p.ids)) < len(p.ids):
            raise DataError(f"{target}: test crystals with the same id can't be distinguished")
    common = [id_ for id_ in tables[0] if all(id_ in table for table in tables)]
    if len(common) < 2:
        raise DataError(f"{target}: the runs have {len(common)} test crystals in common, so they can't be compared")
    at = [np.array([table[id_] for id_ in common]) for table in tables]
    _refuse_other_truth(target, common, [(p, rows) for (_, p), rows in zip(runs, at, strict=True)])
    errors = np.stack([p.errors[rows] for (_, p), rows in zip(runs, at, strict=True)])
    low, high, other_sign = bootstrap(errors, resamples, seed)
    means, count = errors.mean(axis=1), len(runs)
    compared = [
        Compared(
            place,
            float(means[i]),
            (float(low[i]), float(high[i])),
            float(means[i] - means[0]),
            (float(low[count + i]), float(high[count + i])),
            float(other_sign[i]),
        )
        for i, (place, _) in enumerate(runs)
    ]
    return Comparison(target, first.unit, first.measure, len(common), [len(t) for t in tables], compared)


def _refuse_other_truth(target: str, ids: Sequence[str], runs: Sequence[tuple[Predictions, NDArray[np.int64]]]) -> None:
    def truth(p: Predictions, rows: NDArray[np.int64]) -> Any:
        return p.true[rows] if p.classes is None else np.array([p.classes[int(i)] for i in p.true[rows]])

    first = truth(*runs[0])
    for p, rows in runs[1:]:
        other = truth(p, rows)
        wrong = np.flatnonzero(first != other)
        if len(wrong):
            i = int(wrong[0])
            raise DataError(
                f"{target} of {ids[i]} is {first[i]} in one run and {other[i]} in another, "
                "so they aren't of the same data"
            )


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings that differ between runs, as text; a dash if a run lacks one."""
    settings = []
    for run in runs:
        own = {key: value for key, value in flat(run.config) if key not in ("name", "runs", "resume")}
        own |= {key: value[:32] for key, value in run.data.items()}
        if "code_version" in run.summary:
            own["code_version"] = run.summary["code_version"]
        settings.append(dict(_as_text(key, value) for key, value in own.items()))
    keys = dict.fromkeys(key for own in settings for key in own)
    table = {key: [own.get(key, "–") for own in settings] for key in keys}
    return {key: values for key, values in table.items() if len(set(values)) > 1}


def _as_text(key: str, value: Any) -> tuple[str, str]:
    """Return key and value as configured, for a part its class."""
    if key.endswith(f".{TARGET}"):
        return key.removesuffix(f".{TARGET}"), str(value).rpartition(".")[2]
    return key, "null" if value is None else str(value)


def same_but_seed(runs: Sequence[Run]) -> list[list[int]]:
    """Return groups of run indices whose settings differ only in the seed, in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        settings = {k: v for k, v in flat(run.config) if k.split(".")[0] not in ONLY_NAMES}
        key = repr((run.command, sorted(settings.items(), key=lambda item: item[0]), run.data))
        groups.setdefault(key, []).append(place)
    return list(groups.values())
