"""All runs of a sweep on one page that needs no network: a line a run across one axis a parameter, and their table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from crysldnet.page import facts, page
from crysldnet.sweep.proposals import Sweep, Trial
from crysldnet.training.run_folder import write_atomically

TOP, HEIGHT, STEP, SIDE = 34.0, 300.0, 124.0, 62.0
"""Where the axes begin, their length, their distance from each other and from the sides, in pixels."""
TICKS = 5
STYLE = """
:root { --good: #14735a; --poor: #e08a2b; }
@media (prefers-color-scheme: dark) { :root { --good: #5fd3ae; --poor: #b0602a; } }
svg.lines { overflow: visible; }
svg.lines .run { fill: none; stroke-width: 2; opacity: 0.8; cursor: pointer; }
svg.lines .stopped { stroke-dasharray: 6 4; }
svg.lines .none { stroke: var(--soft); stroke-dasharray: 2 4; opacity: 0.6; }
svg.lines text { fill: var(--text); font-size: 12px; paint-order: stroke; stroke: var(--back); stroke-width: 4px;
  stroke-linejoin: round; }
svg.lines .title { font-weight: 600; }
svg.lines .axisline { stroke: var(--line); stroke-width: 1.5; }
body.chosen svg.lines .run { opacity: 0.1; }
body.chosen svg.lines .run.chosen { opacity: 1; stroke-width: 4; }
tr.chosen td { background: var(--card); font-weight: 600; }
.runs th { white-space: nowrap; } .runs td { white-space: nowrap; }
.key { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin: 0.25rem 0 0.75rem; }
.key i { display: inline-block; width: 2.2rem; border-top: 3px solid; vertical-align: middle; margin-right: 0.4rem; }
"""
SCRIPT = """
const parts = document.querySelectorAll('[data-run]');
function choose(run) {
  document.body.classList.toggle('chosen', run !== null);
  parts.forEach(part => part.classList.toggle('chosen', part.dataset.run === run));
}
parts.forEach(part => {
  part.addEventListener('mouseenter', () => choose(part.dataset.run));
  part.addEventListener('mouseleave', () => choose(null));
});
"""
"""Lets a run stand out in charts and table while the pointer is on it; without it the page is the same, less that."""


@dataclass(frozen=True)
class Axis:
    """One axis: where a value lies on it, from 0 at the bottom to 1, and what is written beside it."""

    title: str
    place: Callable[[Any], float]
    ticks: list[tuple[float, str]]


def make_axis(title: str, values: Sequence[Any], *, logarithmic: bool = False) -> Axis:
    """Return the axis of some values; those that aren't all numbers are names, in the order in which they come."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values) or not numbers:
        names = list(dict.fromkeys(str(v) for v in values))
        where = {name: (i + 0.5) / len(names) for i, name in enumerate(names)}
        return Axis(title, lambda value: where[str(value)], [(place, name) for name, place in where.items()])
    low, high = min(numbers), max(numbers)
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    first, span = scale(low), scale(high) - scale(low)

    def place(value: Any) -> float:
        return (scale(value) - first) / span if span > 0 else 0.5

    different = sorted(set(numbers))
    if len(different) <= TICKS:
        return Axis(title, place, [(place(value), f"{value:.4g}") for value in different])
    marks = [first + i * span / (TICKS - 1) for i in range(TICKS)]
    shown = [10.0**mark if logarithmic else mark for mark in marks]
    return Axis(title, place, [(i / (TICKS - 1), f"{value:.3g}") for i, value in enumerate(shown)])


def _color(sweep: Sweep, trials: Sequence[Trial], metric: float) -> str:
    """Return the color of a run by the rank of its metric."""
    ranks = sorted((t.metric for t in trials if t.metric is not None), reverse=sweep.maximize)
    share = 100 * ranks.index(metric) / max(len(ranks) - 1, 1)
    return f"stroke: color-mix(in oklab, var(--poor) {share:.0f}%, var(--good))"


def _line(sweep: Sweep, trials: Sequence[Trial], trial: Trial, points: Sequence[tuple[float, float]], told: str) -> str:
    where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    state = "none" if trial.metric is None else trial.state
    style = "" if trial.metric is None else f' style="{_color(sweep, trials, trial.metric)}"'
    name = escape(trial.name)
    return (
        f'<polyline class="run {state}" data-run="{name}" points="{where}"{style}>'
        f"<title>{escape(told)}</title></polyline>"
    )


def _told(sweep: Sweep, trial: Trial) -> str:
    """Return what is said of a run where the pointer is on it."""
    metric = "" if trial.metric is None else f", {sweep.metric} {trial.metric:.5g}"
    return "\n".join(
        [f"{trial.name}: {trial.state}{metric}", *(f"{name} = {_text(value)}" for name, value in trial.values.items())]
    )


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parallel_coordinates(sweep: Sweep, trials: Sequence[Trial], titles: Sequence[str]) -> str:
    """Return the chart; the metric is the last axis, its better end at the top.

    Args:
        sweep: what was tried.
        trials: its runs.
        titles: of the parameters.
    """
    axes = [
        make_axis(title, [t.values[name] for t in trials], logarithmic=sweep.is_logarithmic(name))
        for title, name in zip(titles, sweep.parameters, strict=True)
    ]
    measured = [t.metric for t in trials if t.metric is not None]
    axes.append(make_axis(sweep.metric, measured or ["none"]))
    xs = [SIDE + i * STEP for i in range(len(axes))]
    width, height = xs[-1] + SIDE, TOP + HEIGHT + 14

    def y(place: float, axis: int) -> float:
        upside_down = axis == len(axes) - 1 and not sweep.maximize
        return TOP + HEIGHT * (place if upside_down else 1 - place)

    drawn = []
    for i, (axis, x) in enumerate(zip(axes, xs, strict=True)):
        title = axis.title if len(axis.title) <= 17 else axis.title[:16] + "…"
        drawn.append(f'<line class="axisline" x1="{x}" x2="{x}" y1="{TOP}" y2="{TOP + HEIGHT}"/>')
        drawn.append(
            f'<text class="title" x="{x}" y="16" text-anchor="middle">{escape(title)}'
            f"<title>{escape(axis.title)}</title></text>"
        )
        drawn += [
            f'<text x="{x + 6}" y="{y(place, i) + 4:.1f}">{escape(label[:14])}</text>' for place, label in axis.ticks
        ]
    lines = []
    for trial in reversed(trials):  # the best is drawn last, over the others
        places = [axis.place(trial.values[name]) for axis, name in zip(axes, sweep.parameters, strict=False)]
        places += [] if trial.metric is None else [axes[-1].place(trial.metric)]
        points = [(xs[i], y(place, i)) for i, place in enumerate(places)]
        lines.append(_line(sweep, trials, trial, points, _told(sweep, trial)))
    label, box = escape(f"Parallel coordinates of {len(trials)} runs"), f"0 0 {width:.0f} {height:.0f}"
    return (
        f'<div class="scroll"><svg class="lines" role="img" aria-label="{label}" viewBox="{box}" '
        f'style="min-width: {width:.0f}px; max-width: {1.5 * width:.0f}px">{"".join(lines)}{"".join(drawn)}</svg></div>'
    )


def histories(sweep: Sweep, trials: Sequence[Trial]) -> str:
    """Return the metric of every run over its validations, nothing where no run has two."""
    shown = [t for t in trials if len(t.history) > 1]
    if not shown:
        return ""
    longest, values = max(len(t.history) for t in shown), [v for t in shown for v in t.history]
    axis, width, left = make_axis(sweep.metric, values), 640.0, 60.0

    def point(i: int, value: float) -> tuple[float, float]:
        return left + (width - left - 20) * i / (longest - 1), 10 + 200 * (1 - axis.place(value))

    lines = [
        _line(sweep, trials, t, [point(i, v) for i, v in enumerate(t.history)], _told(sweep, t))
        for t in reversed(shown)
    ]
    ticks = [
        f'<text x="{left - 8}" y="{10 + 200 * (1 - place) + 4:.1f}" text-anchor="end">{label}</text>'
        for place, label in axis.ticks
    ]
    ends = [
        f'<text x="{point(i, values[0])[0]:.1f}" y="230" text-anchor="middle">{i + 1}</text>' for i in (0, longest - 1)
    ]
    label = escape(f"{sweep.metric} over validations")
    return (
        f"<h2>{label}</h2>"
        f'<div class="scroll"><svg class="lines" role="img" aria-label="{label}" viewBox="0 0 {width:.0f} 240" '
        f'style="min-width: 480px; max-width: 900px">{"".join(lines)}{"".join(ticks)}{"".join(ends)}</svg></div>'
    )


def _table(sweep: Sweep, trials: Sequence[Trial], titles: Sequence[str]) -> str:
    header = ["run", "state", sweep.metric, "seconds", *titles]
    rows = []
    for t in trials:
        metric = "" if t.metric is None else f"{t.metric:.5g}"
        values = [_text(t.values.get(name, "")) for name in sweep.parameters]
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in [t.name, t.state, metric, f"{t.seconds:.0f}", *values])
        rows.append(f'<tr data-run="{escape(t.name)}">{cells}</tr>')
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    return f'<div class="scroll"><table class="runs"><tr>{head}</tr>{"".join(rows)}</table></div>'


def write_page(path: Path, sweep: Sweep, trials: Sequence[Trial], titles: Sequence[str]) -> None:
    """Write the page.

    Args:
        path: of the file.
        sweep: what was tried.
        trials: its runs, the best first.
        titles: of the parameters.
    """
    best = next((t for t in trials if t.metric is not None), None)
    numbers = [(state, str(sum(t.state == state for t in trials))) for state in ("finished", "stopped", "failed")]
    cards = [
        (f"best {sweep.metric}", "none" if best is None else f"{best.metric:.5g}"),
        ("best run", "none" if best is None else best.name),
        *numbers,
        ("hours of all runs", f"{sum(t.seconds for t in trials) / 3600:.2f}"),
    ]
    key = (
        '<div class="key soft"><span><i style="border-color: var(--good)"></i>best</span>'
        '<span><i style="border-color: var(--poor)"></i>worst</span>'
        '<span><i style="border-color: var(--text); border-top-style: dashed"></i>stopped early</span>'
        '<span><i style="border-color: var(--soft); border-top-style: dotted"></i>failed</span></div>'
    )
    body = [
        facts(cards),
        "<h2>Parameters and result</h2>",
        key,
        parallel_coordinates(sweep, trials, titles) if trials else "",
        histories(sweep, trials),
        "<h2>Runs, best first</h2>",
        _table(sweep, trials, titles),
        f"<script>{SCRIPT}</script>",
    ]
    title = f"Sweep {sweep.config.get('name', sweep.path.stem)}"
    write_atomically(path, page(title, body, STYLE))
