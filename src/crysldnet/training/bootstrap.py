"""Confidence intervals of mean errors by resampling the test crystals, and the table of baselines with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crysldnet.measures import of_name

CONFIDENCE = 0.95

Floats = NDArray[np.float64]


def bootstrap(errors: Floats, resamples: int, seed: int) -> tuple[Floats, Floats, Floats]:
    """Return 95 % intervals of the mean errors and of their differences from the first row.

    Args:
        errors: [R, n] errors of R models on the same n crystals, n ≥ 2.
        resamples: number of resamples.
        seed: seed of the resampling.

    Returns:
        Lower and upper bounds, [2 R] each: of the means, then of the differences; and [R] the fraction of resamples in
        which the sign of the difference isn't the observed one.
    """
    from scipy import stats

    runs, n = errors.shape
    rows = np.concatenate([errors, errors - errors[0]])
    result = stats.bootstrap(
        (rows,),
        np.mean,
        axis=-1,
        n_resamples=resamples,
        batch=max(1, 4_000_000 // (2 * runs * n)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval, differences = result.confidence_interval, result.bootstrap_distribution[runs:]
    observed = np.sign(rows[runs:].mean(axis=1, keepdims=True))
    return interval.low, interval.high, (np.sign(differences) != observed).mean(axis=1)


TITLES = {"model": "model", "trees": "trees on descriptors", "constant": "constant"}


def baseline_header(found: Mapping[str, Any]) -> list[str]:
    """Return the table header for a target."""
    measure = of_name(found["measure"])
    unit = f" ({own})" if (own := measure.unit_in({"": found["unit"]})) else ""
    return ["", (measure.title or measure.name) + unit, "95 % interval", "above the model", "95 % interval"]


def baseline_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the table rows for a target."""

    def ends(interval: Sequence[float] | None, form: str) -> str:
        return "" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"

    titles = {**TITLES, "constant": of_name(found["measure"]).baseline or TITLES["constant"]}
    return [
        [
            titles[name],
            f"{own['error']:.4g}",
            ends(own["interval"], ".4g"),
            f"{own['difference']:+.3g}" if "difference" in own else "",
            ends(own.get("difference_interval"), "+.3g"),
        ]
        for name, own in ((name, found[name]) for name in TITLES if name in found)
    ]
