"""Plots of a run, written into its ``plots/`` folder, and what other pages draw alike.

Shapes: ``n`` crystals.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crysldnet.artifacts.calibration import curves_of
from crysldnet.console import drawable
from crysldnet.io import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = dict[str, tuple[list[float], list[float]]]
"""Name of a metric to epochs and values."""
MANY = 2000
"""With more points than these their density is drawn."""


def read_curves(metrics: Path) -> Curves:
    """Return epochs and values of everything that a ``metrics.csv`` holds on validation, and of the training loss."""
    curves: Curves = {}
    with metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("epoch")]
    for row in _counted_from_one(rows):
        for name, value in row.items():
            if value and name and (name.startswith("val/") or name == "train/loss"):
                epochs, values = curves.setdefault(name, ([], []))
                epochs.append(float(row["epoch"]))
                values.append(float(value))
    return curves


def _counted_from_one(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows of a file with epochs from 1.

    Files of earlier versions have them from 0, and after the last one a second validation of the best weights, a step
    after the last: it is left out.
    """
    if not rows or min(float(row["epoch"]) for row in rows) > 0:
        return rows
    validated = [row for row in rows if any(value and name.startswith("val/") for name, value in row.items() if name)]
    again = len(validated) > 1 and int(validated[-1]["step"]) == int(validated[-2]["step"]) + 1
    kept = [row for row in rows if not (again and row is validated[-1])]
    return [{**row, "epoch": str(float(row["epoch"]) + 1)} for row in kept]


def draw_curves(
    axis: Axes, name: str, runs: Mapping[str, Curves], colors: Sequence[str], *, legend: bool = True
) -> None:
    """Draw a metric over the epochs, of one or several runs, with its baseline where there is one.

    Args:
        axis: to draw on.
        name: of the metric.
        runs: title of a run to its curves; those without the metric are left out.
        colors: of the runs, taken in turn.
        legend: name the runs where there are several.
    """
    for i, (label, curves) in enumerate(runs.items()):
        if name not in curves:
            continue
        epochs, values = _by_epoch(curves[name])
        marker = "o" if len(epochs) == 1 else ""  # a line of one point isn't seen
        color, title = colors[i % len(colors)], drawable(label) if len(runs) > 1 else None
        axis.plot(epochs, values, linewidth=1.5, marker=marker, markersize=4, color=color, label=title)
        if f"{name}_baseline" in curves:
            baseline = "baseline" if len(runs) == 1 else None
            axis.plot(*curves[f"{name}_baseline"], color="0.5", linestyle="--", linewidth=1, label=baseline)
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize="small")
    axis.set(xlabel="epoch")
    axis.locator_params(axis="x", integer=True)
    axis.spines[["top", "right"]].set_visible(False)


def _by_epoch(curve: tuple[list[float], list[float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean of what was logged in each epoch; the training loss is logged several times in one."""
    epochs, place = np.unique(np.array(curve[0]), return_inverse=True)
    return epochs, np.bincount(place, np.array(curve[1])) / np.bincount(place)


def draw_parity(
    axis: Axes, true: NDArray[np.float64], predicted: NDArray[np.float64], unit: str, color: str | None = None
) -> None:
    """Draw predictions over true values, [n] each; the density of many."""
    low, high = float(min(true.min(), predicted.min())), float(max(true.max(), predicted.max()))
    axis.plot([low, high], [low, high], color="0.6", linewidth=1)
    if len(true) > MANY:
        axis.hexbin(true, predicted, gridsize=50, bins="log", mincnt=1, cmap="viridis", linewidths=0.1)
    else:
        axis.scatter(true, predicted, s=10, alpha=0.6, edgecolors="none", color=color)
    suffix = drawable(f" ({unit})") if unit else ""
    axis.set(xlabel=f"true{suffix}", ylabel=f"predicted{suffix}", aspect="equal")
    axis.spines[["top", "right"]].set_visible(False)


def learning_curves(metrics: Path, out: Path, names: Sequence[str], title: str) -> None:
    """Draw some metrics of a ``metrics.csv`` over the epochs, each in a panel of its own; those absent are left out."""
    from matplotlib.figure import Figure

    curves = read_curves(metrics)
    shown = [name for name in names if name in curves]
    if not shown:
        return
    figure = Figure(figsize=(3.6 * len(shown), 2.8), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, name in zip(axes, shown, strict=True):
        draw_curves(axis, name, {title: curves}, ["C0"])
        axis.set_title(drawable(name))
    figure.suptitle(drawable(title))
    _save(figure, out)


def parity(true: NDArray[np.float64], predicted: NDArray[np.float64], out: Path, target: str, unit: str) -> None:
    """Draw predictions over true values of one target, [n] each, with the MAE."""
    from matplotlib.figure import Figure

    known = ~np.isnan(true)
    true, predicted = true[known], predicted[known]
    if not len(true):
        return
    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    axis = figure.subplots()
    draw_parity(axis, true, predicted, unit)
    suffix = f" ({unit})" if unit else ""
    title = f"{target}, test split: MAE {np.abs(true - predicted).mean():.3g}{suffix}"
    axis.set_title(drawable(title), fontsize=10)
    _save(figure, out)


def reliability(errors: NDArray[np.float64], std: NDArray[np.float64] | None, folder: Path, target: str) -> None:
    """Draw how many errors [n] lie inside intervals of every level, as ``reliability_TARGET.png``; nothing below 4."""
    from matplotlib.figure import Figure

    known = np.isfinite(errors)
    if known.sum() < 4:
        return
    levels = np.linspace(0.02, 0.98, 49)
    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    styles = {"conformal": ("C0", "-"), "model": ("C1", "--"), "scaled": ("C1", "-")}
    names = {"conformal": "conformal intervals", "model": "std of the model", "scaled": "std, scaled"}
    for name, shares in curves_of(errors, std, levels, 20).items():
        color, line = styles[name]
        axis.plot(levels, shares, color=color, linestyle=line, linewidth=1.5, label=names[name])
    axis.set(xlabel="expected share", ylabel="share of true values inside", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axis.set_title(drawable(f"{target}, {known.sum()} calibration crystals"), fontsize=10)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, folder / f"reliability_{file_name(target)}.png")


def _save(figure: Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        figure.savefig(partial, dpi=120, format="png")


def file_name(name: str) -> str:
    """Return a name with nothing in it that a file's name can't have; the end of a long one becomes its hash."""
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    return safe if len(safe) <= 60 else f"{safe[:50]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
