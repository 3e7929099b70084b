"""Confidence intervals of mean errors by resampling the test crystals."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
