"""Scores of a task over its folds, as computed by the official package, beside the leaderboard of January 2024."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from crysldnet.console import print_table
from crysldnet.io import write_atomically
from crysldnet.tools.matbench.settings import FOLDS
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


def taken_names() -> set[str]:
    """Return the names of all entries, which a submission can't reuse."""
    return {name for task in load_leaderboard()["tasks"].values() for name, *_ in task["entries"]}


@cache
def load_leaderboard() -> dict[str, Any]:
    """Return the entries with their source and date."""
    return json.loads((Path(__file__).parent / "leaderboard.json").read_text())


@dataclass(frozen=True)
class Place:
    """A row of a task's leaderboard; ``own`` marks the submission."""

    rank: int
    algorithm: str
    mean: float
    std: float
    own: bool


def ranking(algorithm: str, scores: TaskScores) -> list[Place]:
    """Return the entries of a task including a submission, best first; on ties the entry comes first."""
    sign = 1 if scores.metric == "mae" else -1
    rows = [(*entry, False) for entry in load_leaderboard()["tasks"][scores.task]["entries"]]
    rows.append((algorithm, scores.mean(), scores.std(), True))
    rows.sort(key=lambda row: (sign * row[1], row[3]))
    return [Place(i, name, mean, std, own) for i, (name, mean, std, own) in enumerate(rows, 1)]


def place_of(algorithm: str, scores: TaskScores) -> str:
    """Return the rank of a submission, in words."""
    places = ranking(algorithm, scores)
    own = next(place for place in places if place.own)
    best = next(place for place in places if not place.own)
    return f"{own.rank} of {len(places)}; best entry {best.algorithm} {best.mean:.4f}"


def comparison(algorithm: str, scores: Sequence[TaskScores]) -> str:
    """Return the comparison as Markdown, one table per task."""
    board = load_leaderboard()
    lines = [f"# {algorithm} among the entries of Matbench v0.1", ""]
    for s in scores:
        title = "MAE" if s.metric == "mae" else "ROC-AUC of thresholded predictions"
        lines += [f"## {s.task}", "", f"| rank | algorithm | mean {title}{f' ({s.unit})' if s.unit else ''} | std |"]
        lines.append("|---|---|---|---|")
        for place in ranking(algorithm, s):
            mark = "**" if place.own else ""
            cells = (str(place.rank), place.algorithm, f"{place.mean:.4f}", f"{place.std:.4f}")
            lines.append("| " + " | ".join(f"{mark}{cell}{mark}" for cell in cells) + " |")
        lines += ["", f"Over the five folds. Data of {algorithm}: {s.targets}."]
        if s.true_auc:
            areas = ", ".join(f"{area:.4f}" for area in s.true_auc.values())
            mean = sum(s.true_auc.values()) / len(s.true_auc)
            lines.append(f"The area under the ROC curve of the probabilities themselves is {mean:.4f} ({areas}).")
        lines.append("")
    lines += [f"Entries: state of {board['state']}; {board['source']}.", ""]
    return "\n".join(lines)


def print_scores(title: str, algorithm: str, scores: TaskScores) -> None:
    """Print the scores of each fold, and the rank of a complete submission."""
    header, rows = scores.rows()
    rows.append(["true values", scores.targets])
    if len(scores.folds) == FOLDS:
        rows.append(["rank", place_of(algorithm, scores)])
    print_table(title, header, [[*row, *[""] * (len(header) - len(row))] for row in rows])


def write_comparison(folder: Path, algorithm: str, scores: Sequence[TaskScores]) -> Path:
    """Write ``comparison.md`` to a folder; return its path."""
    path = folder / "comparison.md"
    write_atomically(path, comparison(algorithm, scores))
    return path
