"""Combine models with nonnegative weights fitted to out-of-fold predictions.

Shapes: ``n`` crystals, ``M`` members, ``T`` outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

FOLDS = 5
_ROUNDS = 30


def group_folds(groups: NDArray[np.int64], folds: int = FOLDS, *, seed: int = 0) -> NDArray[np.int64]:
    """Return [n] the fold of each crystal: groups stay together, and folds have similar sizes.

    Groups are assigned in random order, the largest first, each to the smallest fold.

    Raises:
        ValueError: there are fewer groups than folds.
    """
    names, of, count = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names) < folds:
        raise ValueError(f"{len(names)} groups can't make {folds} folds")
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-count[order], kind="stable")]
    filled = np.zeros(folds, np.int64)
    fold_of_group = np.empty(len(names), np.int64)
    for group in order:
        fold_of_group[group] = filled.argmin()
        filled[fold_of_group[group]] += count[group]
    return fold_of_group[of]


def out_of_fold(
    fit_predict: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]], folds: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return [n, T] predictions for each fold by a model fitted to the others.

    Args:
        fit_predict: maps the rows to fit and the rows to predict to predictions.
        folds: [n] fold of each crystal.
    """
    found: NDArray[np.float64] | None = None
    for fold in np.unique(folds):
        held = np.flatnonzero(folds == fold)
        predicted = fit_predict(np.flatnonzero(folds != fold), held)
        if found is None:
            found = np.full((len(folds), predicted.shape[1]), np.nan)
        found[held] = predicted
    assert found is not None
    return found


def blend_weights(
    predictions: NDArray[np.floating], y: NDArray[np.floating], *, absolute: bool = True, caution: float = 10.0
) -> NDArray[np.float64]:
    """Return [M] weights w ≥ 0 with Σ w = 1 for the best combination of members.

    They minimize Σ_i |y_i − Σ_m w_m p_im|^q + c · Σ_m (w_m − 1/M)² over the crystals with a label, in units of the
    typical error.

    Args:
        predictions: [n, M] finite out-of-fold predictions of one output.
        y: [n] labels, NaN if missing.
        absolute: q = 1, by iteratively reweighted least squares; else q = 2.
        caution: strength of the pull toward equal weights, as a number of crystals; 10 was best at 100 labels and has
            no effect at 1,000.
    """
    from scipy.optimize import nnls  # not needed for prediction

    known = np.isfinite(y)
    p, y = np.asarray(predictions, np.float64)[known], np.asarray(y, np.float64)[known]
    members = p.shape[1]
    weights = np.full(members, 1 / members)
    if members == 1 or not len(y):
        return weights
    typical = max(float(np.sqrt(np.mean((y - p.mean(axis=1)) ** 2))), 1e-12)
    p, y = (p - p.mean()) / typical, (y - p.mean()) / typical
    for _ in range(_ROUNDS if absolute else 1):
        residual = np.abs(y - p @ weights)
        root = 1 / np.sqrt(np.maximum(residual, 0.05)) if absolute else np.ones(len(y))
        matrix = np.concatenate([p * root[:, None], np.sqrt(caution) * np.eye(members), np.full((1, members), 1e4)])
        target = np.concatenate([y * root, np.full(members, np.sqrt(caution) / members), [1e4]])
        found, _ = nnls(matrix, target)
        found /= found.sum()
        change = float(np.abs(found - weights).max())
        weights = found
        if change < 1e-4:
            break
    return weights
