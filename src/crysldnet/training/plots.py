"""Plots of a run, written to its ``plots/`` folder, and plotting helpers for reports.

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
"""Above this number of points, plot their density."""


def read_curves(metrics: Path) -> Curves:
    """Return epochs and values of all validation metrics in a ``metrics.csv``, and of the training loss."""
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
    """Return the rows of a file with epochs counted from 1.

    Earlier versions counted from 0 and logged another validation of the best weights one step after the last; that row
    is dropped.
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
    """Plot a metric against epochs for one or several runs, with its baseline if available.

    Args:
        axis: matplotlib axis.
        name: metric name.
        runs: run title to curves; runs without the metric are skipped.
        colors: colors of the runs, cycled.
        legend: label the runs if there are several.
    """
    for i, (label, curves) in enumerate(runs.items()):
        if name not in curves:
            continue
        epochs, values = _by_epoch(curves[name])
        marker = "o" if len(epochs) == 1 else ""  # a single point needs a marker
        color, title = colors[i % len(colors)], drawable(label) if len(runs) > 1 else None
        axis.plot(epochs, values, linewidth=1.5, marker=marker, markersize=4, color=color, label=title)
        if f"{name}_baseline" in curves:
            baseline = "baseline" if len(runs) == 1 else None
            axis.plot(*curves[f"{name}_baseline"], color="0.5", linestyle="--", linewidth=1, label=baseline)
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize="small")
    axis.set(xlabel="epoch")
    axis.locator_params(axis="x", integer=True, min_n_ticks=1)
    axis.spines[["top", "right"]].set_visible(False)


def _by_epoch(curve: tuple[list[float], list[float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean per epoch; the training loss is logged several times per epoch."""
    epochs, place = np.unique(np.array(curve[0]), return_inverse=True)
    return epochs, np.bincount(place, np.array(curve[1])) / np.bincount(place)


def draw_parity(
    axis: Axes, true: NDArray[np.float64], predicted: NDArray[np.float64], unit: str, color: str | None = None
) -> None:
    """Plot predictions against true values, [n] each; as a density if there are many."""
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
    """Plot metrics of a ``metrics.csv`` against epochs, one panel each; missing metrics are skipped."""
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
    """Plot predictions against true values of one target, [n] each, with the MAE."""
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
    """Plot observed against nominal coverage for errors [n] as ``reliability_TARGET.png``; skipped below 4 errors."""
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
    axis.set(xlabel="expected share", ylabel="fraction of true values inside", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axis.set_title(drawable(f"{target}, {known.sum()} calibration crystals"), fontsize=10)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, folder / f"reliability_{file_name(target)}.png")


def _save(figure: Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        figure.savefig(partial, dpi=120, format="png")


def file_name(name: str) -> str:
    """Return a valid file name; the end of a long one is replaced by its hash."""
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    return safe if len(safe) <= 60 else f"{safe[:50]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
