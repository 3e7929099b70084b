"""Scores of a task over its folds, as computed by the official package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crysldnet.tools.matbench.tasks import task_metadata


@dataclass(frozen=True)
class TaskScores:
    """Scores of a task.

    Attributes:
        task: task name.
        folds: official scores of each fold.
        true_auc: area under the ROC curve of the probabilities per fold; empty for a regression. The package thresholds
            them first, so its ``rocauc`` equals the balanced accuracy.
        targets: source of the true values.
    """

    task: str
    folds: dict[int, dict[str, float]]
    true_auc: dict[int, float]
    targets: str

    @property
    def metric(self) -> str:
        """The leaderboard score: ``mae``, lower is better, or ``rocauc``."""
        return "mae" if task_metadata(self.task).task_type == "regression" else "rocauc"

    @property
    def unit(self) -> str:
        """Unit of the metric, or empty."""
        return (task_metadata(self.task).unit or "") if self.metric == "mae" else ""

    def mean(self, metric: str | None = None) -> float:
        """Return the mean over the folds."""
        return float(np.mean([scores[metric or self.metric] for scores in self.folds.values()]))

    def std(self, metric: str | None = None) -> float:
        """Return the standard deviation over the folds, as on the leaderboard."""
        return float(np.std([scores[metric or self.metric] for scores in self.folds.values()]))

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and rows of a human-readable table."""
        second = "rmse" if self.metric == "mae" else "balanced_accuracy"
        titles = {"mae": "MAE", "rmse": "RMSE", "rocauc": "ROC-AUC of labels", "balanced_accuracy": "balanced accuracy"}
        unit = f" ({self.unit})" if self.unit else ""
        header = ["", *(titles[m] + unit for m in (self.metric, second))]
        columns: list[Mapping[int, float]] = [
            {fold: scores[m] for fold, scores in self.folds.items()} for m in (self.metric, second)
        ]
        if self.true_auc:
            header.append("true ROC-AUC")
            columns.append(self.true_auc)
        rows = [[f"fold {fold}", *(f"{column[fold]:.4f}" for column in columns)] for fold in self.folds]
        rows.append(["mean ± std", *(_mean_and_std(list(column.values())) for column in columns)])
        if self.metric == "mae":
            rows.append(["MAD of the targets", f"{task_metadata(self.task).mad:.4f}", ""])
        return header, rows


def _mean_and_std(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4f} ± {np.std(values):.4f}"


def official_scores(task: str, true: Sequence[Any], predicted: Sequence[float]) -> dict[str, float]:
    """Return the scores of a fold as computed by the package."""
    from matbench.data_ops import score_array

    return {name: float(value) for name, value in score_array(true, predicted, task_metadata(task).task_type).items()}


def true_roc_auc(true: Sequence[Any], predicted: Sequence[float]) -> float:
    """Return the area under the ROC curve of probabilities; NaN if only one class occurs."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(true, predicted)) if len(set(true)) == 2 else float("nan")
