"""Compare scores with the included leaderboard of January 2024."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from crysldnet.console import print_table
from crysldnet.io import write_atomically
from crysldnet.tools.matbench.scores import TaskScores
from crysldnet.tools.matbench.settings import FOLDS


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
