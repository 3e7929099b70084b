"""Figures of a report. matplotlib draws each once, as SVG in the page's colors, and as PNG on request.

The same functions draw the plots in a run's own folder. An interactive library would add megabytes of script to a page
that should be small enough to send.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from crysldnet.console import drawable
from crysldnet.html.page import LIGHT, SERIES
from crysldnet.tools.report.predictions import Predictions
from crysldnet.tools.report.statistics import CalibrationOfRun, Comparison, SizeGroup
from crysldnet.training.plots import Curves, draw_curves, draw_parity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (4.4, 3.3)
"""inches"""
COLUMN = 3.35
"""Inches (85 mm), the width of a column in most journals."""
_COLORS = {
    "text.color": "text",
    "axes.labelcolor": "text",
    "axes.edgecolor": "soft",
    "xtick.color": "soft",
    "ytick.color": "soft",
    "grid.color": "line",
}


def _new(size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: Any = {key: LIGHT[color] for key, color in _COLORS.items()} | {"font.size": 10.0}
    with rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.subplots()


def svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an SVG element in the page's colors.

    Args:
        figure: matplotlib figure.
        name: unique name of the figure on the page, from which inner ids are derived.
        label: text for screen readers.
    """
    from html import escape

    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()[out.getvalue().index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"font: (\S+) 'DejaVu Sans'[^;\"]*", r"font-size: \1; font-family: inherit", text)
    text = re.sub(r"font-family: [^;\"]*DejaVu Sans[^;\"]*", "font-family: inherit", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace("xlink:href", "href")
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    head = f'<svg class="plot" viewBox="{box[1]}" role="img" aria-label="{escape(label)}">'
    text = head + text[text.index(">") + 1 :]
    names = {LIGHT[key]: key for key in ("text", "soft", "line")} | {c: f"series{i}" for i, c in enumerate(SERIES)}
    return re.sub(r"#[0-9a-f]{6}", lambda m: f"var(--{names[m[0]]})" if m[0] in names else m[0], text)


def png(figure: Figure, title: str) -> bytes:
    """Return a figure as PNG on white, with a title, which is added permanently."""
    out = io.BytesIO()
    figure.suptitle(drawable(title), fontsize="medium", color=LIGHT["text"])
    figure.savefig(out, format="png", dpi=150, facecolor="white")
    return out.getvalue()


def for_print(figure: Figure, kind: str) -> bytes:
    """Return a figure as ``pdf`` or ``svg`` at the width of a journal's column; the figure stays as it was.

    Texts are 7.5 points, and fonts are embedded (PDF) or outlines (SVG).
    """
    from matplotlib import rc_context
    from matplotlib.text import Text

    width, height = figure.get_size_inches()
    texts = [(text, float(text.get_fontsize())) for text in figure.findobj(Text)]
    out = io.BytesIO()
    figure.set_size_inches(COLUMN, COLUMN * height / width)
    for text, size in texts:
        text.set_fontsize(0.75 * size)
    dates = {"pdf": "CreationDate", "svg": "Date"}
    with rc_context({"pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "crysldnet"}):
        figure.savefig(out, format=kind, facecolor="white", metadata={dates[kind]: None})
    figure.set_size_inches(width, height)
    for text, size in texts:
        text.set_fontsize(size)
    return out.getvalue()


def curves(name: str, runs: Mapping[str, Curves], *, legend: bool, unit: str = "") -> Figure:
    """Plot a metric against epochs."""
    figure, axis = _new()
    draw_curves(axis, name, runs, SERIES, legend=legend)
    axis.set(ylabel=drawable(f"{name.partition('/')[2]} ({unit})") if unit else "")
    return figure


def parity(p: Predictions, color: str) -> Figure:
    """Plot predictions against true values."""
    figure, axis = _new()
    known = ~np.isnan(p.true)
    draw_parity(axis, p.true[known], p.predicted[known], p.unit, color)
    return figure


def error_histogram(p: Predictions, color: str) -> Figure:
    """Plot a histogram of signed errors; those beyond the 1 % and 99 % quantiles are in the end bins."""
    figure, axis = _new()
    errors = (p.predicted - p.true)[~np.isnan(p.true)]
    low, high = np.quantile(errors, [0.01, 0.99]).tolist() if len(errors) >= 100 else (errors.min(), errors.max())
    axis.hist(errors.clip(low, high), bins=40 if len(errors) >= 200 else 20, color=color)
    axis.axvline(0, color=LIGHT["soft"], linewidth=1)
    axis.set(xlabel=drawable(f"predicted − true{p.suffix}"), ylabel="crystals")
    axis.locator_params(axis="y", integer=True, min_n_ticks=1)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def confusion(p: Predictions, color: str) -> Figure:
    """Plot the confusion matrix."""
    from matplotlib.colors import LinearSegmentedColormap

    assert p.classes is not None
    figure, axis = _new()
    known = ~np.isnan(p.true)
    n = len(p.classes)
    counts = np.zeros((n, n), np.int64)
    np.add.at(counts, (p.true[known].astype(int), p.predicted[known].astype(int)), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    colors = LinearSegmentedColormap.from_list("", [(*_rgb(color), 0.05), (*_rgb(color), 0.6)])
    axis.pcolormesh(shares, cmap=colors, vmin=0, vmax=1)
    axis.invert_yaxis()
    if n <= 10:
        for i, j in np.ndindex(n, n):
            axis.text(j + 0.5, i + 0.5, f"{counts[i, j]:,}", ha="center", va="center", color=LIGHT["text"])
        names = [drawable(name) for name in p.classes]
        axis.set_xticks(np.arange(n) + 0.5, names, rotation=0 if n <= 4 else 60)
        axis.set_yticks(np.arange(n) + 0.5, names)
    axis.set(xlabel="predicted", ylabel="true")
    return figure


def _rgb(color: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(color)


def errors_by_size(groups: Sequence[SizeGroup], title: str, color: str) -> Figure:
    """Plot the mean error by number of atoms, with its standard error."""
    figure, axis = _new()
    places = np.arange(len(groups))
    axis.bar(places, [g.mean for g in groups], color=color, width=0.75)
    bars = np.nan_to_num([g.standard_error for g in groups])
    axis.errorbar(places, [g.mean for g in groups], bars, fmt="none", ecolor=LIGHT["soft"], capsize=2, linewidth=1)
    labels = [f"{g.low}" if g.low == g.high else f"{g.low}–{g.high}" for g in groups]
    axis.set_xticks(places, labels, rotation=0 if sum(map(len, labels)) < 26 else 40)
    axis.set(xlabel="atoms in the cell", ylabel=drawable(title), ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def reliability(found: CalibrationOfRun, color: str) -> Figure:
    """Plot the observed fraction of true values inside central intervals against the expected one."""
    figure, axis = _new()
    axis.plot([0, 1], [0, 1], color=LIGHT["soft"], linewidth=1, linestyle="--")
    axis.plot(found.expected, found.observed, color=color)
    axis.fill_between(found.expected, found.expected, found.observed, color=color, alpha=0.2, linewidth=0)
    axis.set(xlabel="expected coverage", ylabel="observed coverage", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def comparison(c: Comparison, names: Sequence[str]) -> Figure:
    """Plot each run's mean error with its interval."""
    figure, axis = _new((SIZE[0], 1.1 + 0.32 * len(c.runs)))
    suffix = f" ({c.unit})" if c.unit else ""
    for place, run in enumerate(c.runs):
        low, high = run.interval
        color = SERIES[run.run % len(SERIES)]
        axis.plot([low, high], [place, place], color=color, linewidth=2)
        axis.plot([run.mean], [place], "o", color=color, markersize=6)
    axis.set_yticks(range(len(c.runs)), [drawable(names[run.run]) for run in c.runs])
    axis.invert_yaxis()
    axis.margins(y=0.15)
    axis.set(xlabel=drawable(f"{c.measure}{suffix}"))
    axis.grid(axis="x", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    return figure
