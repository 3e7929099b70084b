"""The tabular members of a hybrid: extremely randomized trees, boosted trees, and kernel ridge regression.

Shapes: ``n`` training crystals, ``D`` features, ``T`` outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from crysldnet.errors import DataError
from crysldnet.tabular.arrays import Model
from crysldnet.tabular.blend import group_folds, out_of_fold
from crysldnet.tabular.kernel import fit_kernel_ridge, relevance_of
from crysldnet.tabular.trees import Trees

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
        x: as in :func:`fit_models`, like ``y``, ``groups``, ``members`` and ``seed``.
        y: see there.
        groups: see there.
        members: see there.
        seed: see there.
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
