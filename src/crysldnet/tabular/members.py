"""The tabular members of a hybrid: extremely randomized trees, boosted trees, and kernel ridge regression, and
nonnegative weights to combine them, fitted to out-of-fold predictions.

Shapes: ``n`` training crystals, ``D`` features, ``M`` members, ``T`` outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from crysldnet.errors import DataError
from crysldnet.tabular.kernel import KernelRidge, fit_kernel_ridge, relevance_of
from crysldnet.tabular.trees import Trees

Model = KernelRidge | Trees
MEMBERS = ("extra_trees", "boosted_trees", "kernel_ridge")
FEW = 1000
"""Up to this number of crystals, boosted trees are fitted without histograms."""
Baseline = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""Maps the rows to fit to [n, T] baseline predictions for every crystal; members learn the remainder."""


@dataclass(frozen=True)
class Members:
    """Fitted members.

    Attributes:
        models: models by name, fitted to all training crystals.
        out_of_fold: [n, T] out-of-fold predictions by name.
    """

    models: dict[str, Model]
    out_of_fold: dict[str, NDArray[np.float64]]


def fit_models(
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    groups: NDArray[np.int64],
    *,
    members: Sequence[str] = MEMBERS,
    seed: int = 0,
) -> dict[str, Model]:
    """Fit each member to the same crystals.

    Args:
        x: [n, D] finite features.
        y: [n, T] finite targets; for classes, one-hot columns.
        groups: [n] groups left out together when selecting the kernel's settings.
        members: names in :data:`MEMBERS`.
        seed: seed of the trees.

    Raises:
        DataError: scikit-learn isn't installed.
    """
    try:
        from sklearn.ensemble import ExtraTreesRegressor
    except ImportError as error:
        raise DataError(f"trees need scikit-learn, which isn't installed ({error}): pip install scikit-learn") from None
    x, y = np.ascontiguousarray(x, np.float32), np.asarray(y, np.float64)
    found: dict[str, Model] = {}
    forest = None
    if "extra_trees" in members or "kernel_ridge" in members:
        forest = ExtraTreesRegressor(100, max_features=0.33, random_state=seed).fit(x, y if y.shape[1] > 1 else y[:, 0])
    for name in members:
        if name == "extra_trees":
            found[name] = Trees.of_forest(forest)
        elif name == "kernel_ridge":
            assert forest is not None
            relevance = relevance_of(forest.feature_importances_)
            found[name] = fit_kernel_ridge(x, y, groups, relevance=relevance, seed=seed)
        else:
            found[name] = _boosted_trees(x, y, seed)
    return found


def _boosted_trees(x: NDArray[np.floating], y: NDArray[np.floating], seed: int) -> Trees:
    """Fit boosted trees to each output.

    Without histograms they take a third of the time for 300 crystals and had lower errors on three of three tasks; for
    thousands of crystals histograms are faster.
    """
    from sklearn.ensemble import GradientBoostingRegressor, HistGradientBoostingRegressor

    least = min(5, max(1, len(x) // 10))
    if len(x) <= FEW:
        small = partial(GradientBoostingRegressor, max_depth=4, max_features=0.15, subsample=0.7, n_estimators=200)
        grow = partial(small, learning_rate=0.07, min_samples_leaf=least, random_state=seed)
        return Trees.of_gradient_boosting([grow().fit(x, column) for column in y.T])
    large = partial(HistGradientBoostingRegressor, max_leaf_nodes=15, l2_regularization=1.0, max_features=0.3)
    grow = partial(large, max_iter=200, learning_rate=0.07, min_samples_leaf=least, early_stopping=False)
    return Trees.of_boosting([grow(random_state=seed).fit(x, column) for column in y.T])


def fit_members(
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    groups: NDArray[np.int64],
    *,
    members: Sequence[str] = MEMBERS,
    folds: NDArray[np.int64] | None = None,
    baseline: Baseline | None = None,
    seed: int = 0,
) -> Members:
    """Fit each member, and predict every training crystal out of fold.

    Args:
        x: descriptors, as in :func:`fit_models`.
        y: values, as there.
        groups: as there.
        members: as there.
        seed: as there.
        folds: [n] fold of each crystal, to share folds with other models; by default five grouped folds.
        baseline: refitted for each fold. The models predict the remainder; the out-of-fold predictions include both.
    """
    x, y = np.ascontiguousarray(x, np.float32), np.asarray(y, np.float64)
    folds = group_folds(groups, seed=seed) if folds is None else folds

    def fit_predict(rows: NDArray[np.int64], held: NDArray[np.int64]) -> NDArray[np.float64]:
        known = np.zeros_like(y) if baseline is None else baseline(rows)
        models = fit_models(x[rows], (y - known)[rows], groups[rows], members=members, seed=seed)
        return np.concatenate([models[name].predict(x[held]) + known[held] for name in members], axis=1)

    each = np.split(out_of_fold(fit_predict, folds), len(members), axis=1)
    rest = y if baseline is None else y - baseline(np.arange(len(y)))
    models = fit_models(x, rest, groups, members=members, seed=seed)
    return Members(models, dict(zip(members, each, strict=True)))


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
