"""Fitted trees as flat arrays, independent of the library.

Shapes: ``R`` trees, ``M`` nodes in total, ``T`` outputs, ``D`` features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crysldnet.graphs.compiled import njit


@dataclass(frozen=True)
class Trees:
    """A sum of regression trees over features in single precision.

    A node sends a row to ``left`` if its feature is at most ``threshold``, else to ``right``; a leaf, with feature −1,
    adds ``value``.

    Attributes:
        roots: [R] int32, the first node of each tree.
        feature: [M] int32.
        threshold: [M] float64.
        left, right: [M] int32, child nodes, which follow their parent.
        value: [M, T] float64.
        base: [T] float64, constant to which the trees are added.
    """

    roots: NDArray[np.int32]
    feature: NDArray[np.int32]
    threshold: NDArray[np.float64]
    left: NDArray[np.int32]
    right: NDArray[np.int32]
    value: NDArray[np.float64]
    base: NDArray[np.float64]

    def __post_init__(self) -> None:
        lists = (self.roots, self.feature, self.threshold, self.left, self.right, self.base)
        if any(array.ndim != 1 for array in lists):
            raise ValueError("these arrays aren't trees: they are lists of numbers")
        nodes = np.arange(len(self.feature))
        inner = self.feature >= 0
        children = np.stack([self.left[inner], self.right[inner]])
        if (
            not len(self.feature) == len(self.threshold) == len(self.left) == len(self.right) == len(self.value)
            or self.value.shape[1:] != self.base.shape
            or ((self.roots < 0) | (self.roots >= len(nodes))).any()
            or (children <= nodes[inner]).any()
            or (children >= len(nodes)).any()
        ):
            raise ValueError("these arrays aren't trees: a node's children must exist and come after it")

    @property
    def sizes(self) -> tuple[int, int]:
        """Minimum number of features, and the number of outputs."""
        return int(self.feature.max(initial=-1)) + 1, len(self.base)

    def predict(self, x: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return predictions [B, T] for features [B, D]."""
        x = np.ascontiguousarray(x, np.float32)
        if x.shape[1] <= self.feature.max(initial=-1):
            raise ValueError(f"{x.shape[1]} features, but the trees ask for number {self.feature.max()}")
        return _sum_of_leaves(x, self.roots, self.feature, self.threshold, self.left, self.right, self.value, self.base)

    @classmethod
    def of_forest(cls, forest: Any) -> Trees:
        """Convert scikit-learn's RandomForestRegressor or ExtraTreesRegressor, whose trees are averaged."""
        grown = [estimator.tree_ for estimator in forest.estimators_]
        parts = [
            (
                np.where(tree.children_left < 0, -1, tree.feature),
                tree.threshold,
                tree.children_left,
                tree.children_right,
                tree.value[:, :, 0] / len(grown),
            )
            for tree in grown
        ]
        return _joined(parts, np.zeros(parts[0][4].shape[1]))

    @classmethod
    def of_gradient_boosting(cls, models: Sequence[Any]) -> Trees:
        """Convert scikit-learn's GradientBoostingRegressor, one per output, starting from a constant."""
        parts = []
        for output, model in enumerate(models):
            for tree in (estimator.tree_ for estimator in model.estimators_[:, 0]):
                value = np.zeros((tree.node_count, len(models)))
                value[:, output] = model.learning_rate * tree.value[:, 0, 0]
                feature = np.where(tree.children_left < 0, -1, tree.feature)
                parts.append((feature, tree.threshold, tree.children_left, tree.children_right, value))
        return _joined(parts, np.array([float(np.ravel(model.init_.constant_)[0]) for model in models]))

    @classmethod
    def of_boosting(cls, models: Sequence[Any]) -> Trees:
        """Convert scikit-learn's HistGradientBoostingRegressor, one per output.

        Their nodes are only available from private attributes; a test compares the predictions.
        """
        parts = []
        for output, model in enumerate(models):
            for (predictor,) in model._predictors:
                nodes = predictor.nodes
                leaf = nodes["is_leaf"].astype(bool)
                value = np.zeros((len(nodes), len(models)))
                value[:, output] = np.where(leaf, nodes["value"], 0.0)
                feature = np.where(leaf, -1, nodes["feature_idx"].astype(np.int64))
                parts.append((feature, nodes["num_threshold"], nodes["left"], nodes["right"], value))
        base = np.array([float(np.ravel(model._baseline_prediction)[0]) for model in models])
        return _joined(parts, base)


def _joined(parts: Sequence[tuple[NDArray, ...]], base: NDArray[np.float64]) -> Trees:
    """Concatenate single trees."""
    sizes = [len(part[0]) for part in parts]
    roots = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    shift = np.repeat(roots, sizes)
    feature, threshold, left, right, value = (np.concatenate(column) for column in zip(*parts, strict=True))
    inner = feature >= 0
    return Trees(
        roots=roots.astype(np.int32),
        feature=feature.astype(np.int32),
        threshold=np.where(inner, threshold, 0.0).astype(np.float64),
        left=np.where(inner, left.astype(np.int64) + shift, 0).astype(np.int32),
        right=np.where(inner, right.astype(np.int64) + shift, 0).astype(np.int32),
        value=np.where(inner[:, None], 0.0, value),
        base=base,
    )


@njit(cache=True, nogil=True, error_model="numpy")
def _sum_of_leaves(x, roots, feature, threshold, left, right, value, base):
    out = np.empty((x.shape[0], base.shape[0]))
    for row in range(x.shape[0]):
        for t in range(base.shape[0]):
            out[row, t] = base[t]
        for root in roots:
            node = root
            while feature[node] >= 0:
                if x[row, feature[node]] <= threshold[node]:
                    node = left[node]
                else:
                    node = right[node]
            for t in range(base.shape[0]):
                out[row, t] += value[node, t]
    return out
