"""Output of a sweep: all runs as CSV, a table of the best, and an offline page with parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from crysldnet.console import csv_text, print_table
from crysldnet.html.page import facts, page, table
from crysldnet.io import write_atomically
from crysldnet.tools.sweep.proposals import Sweep
from crysldnet.tools.sweep.study import Trial
from crysldnet.training.run_folder import RunFolder

TOP, HEIGHT, STEP, SIDE = 34.0, 300.0, 124.0, 62.0
"""Start of the axes, their length, their spacing, and the side margins, in pixels."""
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
th, td { white-space: nowrap; }
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
"""Highlights a run in charts and table under the pointer; the page also works without it."""
KEY = """
<div class="key soft"><span><i style="border-color: var(--good)"></i>best</span>
<span><i style="border-color: var(--poor)"></i>worst</span>
<span><i style="border-color: var(--text); border-top-style: dashed"></i>stopped early</span>
<span><i style="border-color: var(--soft); border-top-style: dotted"></i>failed</span></div>
"""


@dataclass(frozen=True)
class Axis:
    """An axis: maps a value to a position from 0 at the bottom to 1, and to a label."""

    title: str
    place: Callable[[Any], float]
    ticks: list[tuple[float, str]]


def make_axis(title: str, values: Sequence[Any], *, logarithmic: bool = False) -> Axis:
    """Return the axis for some values; unless all are numbers, they are categories in order of appearance."""
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


def shown(value: Any) -> str:
    """Return a value as displayed."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _attributes(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, tuple[str, str, str]]:
    """Return the attributes and tooltip of each run's line, colored by rank."""
    ranks = sorted((t.metric for t in trials if t.metric is not None), reverse=sweep.metric.maximize)
    found = {}
    for t in trials:
        title = [f"{t.name}: {t.state}", *(f"{name} = {shown(value)}" for name, value in t.values.items())]
        state, style = "none", ""
        if t.metric is not None:
            share = 100 * ranks.index(t.metric) / max(len(ranks) - 1, 1)
            title[0] += f", {sweep.metric.name} {t.metric:.5g}"
            state, style = t.state, f' style="stroke: color-mix(in oklab, var(--poor) {share:.0f}%, var(--good))"'
        found[t.name] = f'class="run {state}" data-run="{escape(t.name)}"', style, escape("\n".join(title))
    return found


def _chart(label: str, size: tuple[float, float], widths: tuple[float, float], parts: Sequence[str]) -> str:
    return (
        f'<div class="scroll"><svg class="lines" role="img" aria-label="{escape(label)}" '
        f'viewBox="0 0 {size[0]:.0f} {size[1]:.0f}" style="min-width: {widths[0]:.0f}px; max-width: {widths[1]:.0f}px">'
        f"{''.join(parts)}</svg></div>"
    )


def _line(points: Sequence[tuple[float, float]], attributes: tuple[str, str, str]) -> str:
    where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    identity, style, title = attributes
    return f'<polyline {identity} points="{where}"{style}><title>{title}</title></polyline>'


def _words(x: float, y: float, text: str, rest: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{rest}>{escape(text)}</text>'


def parallel_coordinates(sweep: Sweep, trials: Sequence[Trial], titles: Sequence[str]) -> str:
    """Return the chart; the metric is the last axis, its better end at the top.

    Args:
        sweep: the sweep.
        trials: its runs, best first.
        titles: parameter titles.
    """
    axes = [
        make_axis(title, [t.values[name] for t in trials], logarithmic=parameter.logarithmic)
        for title, (name, parameter) in zip(titles, sweep.parameters.items(), strict=True)
    ]
    axes.append(make_axis(sweep.metric.name, [t.metric for t in trials if t.metric is not None] or ["none"]))
    xs = [SIDE + i * STEP for i in range(len(axes))]
    width, height = xs[-1] + SIDE, TOP + HEIGHT + 14

    def y(place: float, axis: int) -> float:
        upside_down = axis == len(axes) - 1 and not sweep.metric.maximize
        return TOP + HEIGHT * (place if upside_down else 1 - place)

    parts, attributes = [], _attributes(sweep, trials)
    for trial in reversed(trials):  # the best is drawn last, on top
        places = [axis.place(trial.values[name]) for axis, name in zip(axes, sweep.parameters, strict=False)]
        places += [] if trial.metric is None else [axes[-1].place(trial.metric)]
        parts.append(_line([(xs[i], y(place, i)) for i, place in enumerate(places)], attributes[trial.name]))
    for i, (axis, x) in enumerate(zip(axes, xs, strict=True)):
        title = axis.title if len(axis.title) <= 17 else axis.title[:16] + "…"
        parts.append(f'<line class="axisline" x1="{x}" x2="{x}" y1="{TOP}" y2="{TOP + HEIGHT}"/>')
        hint = f"<g><title>{escape(axis.title)}</title>"
        parts.append(hint + _words(x, 16, title, ' class="title" text-anchor="middle"') + "</g>")
        parts += [_words(x + 6, y(place, i) + 4, label[:14]) for place, label in axis.ticks]
    return _chart(f"Parallel coordinates of {len(trials)} runs", (width, height), (width, 1.5 * width), parts)


def histories(sweep: Sweep, trials: Sequence[Trial]) -> str:
    """Return the metric of every run against validations; empty if no run has two."""
    drawn = [t for t in trials if len(t.history) > 1]
    if not drawn:
        return ""
    longest, attributes = max(len(t.history) for t in drawn), _attributes(sweep, trials)
    axis, left, width = make_axis(sweep.metric.name, [v for t in drawn for v in t.history]), 60.0, 560.0

    def point(i: int, value: float) -> tuple[float, float]:
        return left + width * i / (longest - 1), 10 + 200 * (1 - axis.place(value))

    parts = [_line([point(i, v) for i, v in enumerate(t.history)], attributes[t.name]) for t in reversed(drawn)]
    parts += [_words(left - 8, 214 - 200 * place, label, ' text-anchor="end"') for place, label in axis.ticks]
    parts += [_words(left + width * i, 230, n, ' text-anchor="middle"') for i, n in ((0, "1"), (1, str(longest)))]
    label = f"{sweep.metric.name} over validations"
    return f"<h2>{escape(label)}</h2>" + _chart(label, (640, 240), (480, 900), parts)


def write_page(path: Path, sweep: Sweep, trials: Sequence[Trial], titles: Sequence[str]) -> None:
    """Write the page.

    Args:
        path: output file.
        sweep: the sweep.
        trials: its runs, best first.
        titles: parameter titles.
    """
    best = next((t for t in trials if t.metric is not None), None)
    cards = [
        (f"best {sweep.metric.name}", "none" if best is None else f"{best.metric:.5g}"),
        ("best run", "none" if best is None else best.name),
        *((state, str(sum(t.state == state for t in trials))) for state in ("finished", "stopped", "failed")),
        ("hours of all runs", f"{sum(t.seconds for t in trials) / 3600:.2f}"),
    ]
    rows = []
    for t in trials:
        metric = "" if t.metric is None else f"{t.metric:.5g}"
        rows.append(
            [t.name, t.state, metric, f"{t.seconds:.0f}", *(shown(t.values[name]) for name in sweep.parameters)]
        )
    runs = [{"data-run": t.name} for t in trials]
    body = [
        facts(cards),
        "<h2>Parameters and result</h2>",
        KEY,
        parallel_coordinates(sweep, trials, titles) if trials else "",
        histories(sweep, trials),
        "<h2>Runs, best first</h2>",
        table(["run", "state", sweep.metric.name, "seconds", *titles], rows, attributes=runs),
        f"<script>{SCRIPT}</script>",
    ]
    write_atomically(path, page(f"Sweep {sweep.config.get('name', sweep.path.stem)}", body, STYLE))


ORDER = ("finished", "stopped", "running", "failed")


def best_first(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """Sort by the metric: finished runs first, then stopped ones, failed ones last."""
    sign = -1.0 if sweep.metric.maximize else 1.0

    def place(t: Trial) -> tuple[int, bool, float]:
        return ORDER.index(t.state), t.metric is None, 0.0 if t.metric is None else sign * t.metric

    return sorted(trials, key=place)


def write_results(folder: Path, sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Write all runs in starting order to ``results.csv``, and as ``sweep.html``."""
    rows: list[list[object]] = [["run", "state", sweep.metric.name, "seconds", *sweep.parameters]]
    for t in trials:
        metric = "" if t.metric is None else repr(t.metric)
        rows.append(
            [t.name, t.state, metric, f"{t.seconds:.1f}", *(t.values.get(name, "") for name in sweep.parameters)]
        )
    write_atomically(folder / "results.csv", csv_text(rows))
    write_page(folder / "sweep.html", sweep, best_first(sweep, trials), short_names(list(sweep.parameters)))


def short_names(parameters: Sequence[str]) -> list[str]:
    """Return the last part of each parameter's name if unique."""
    ends = [name.rpartition(".")[2] for name in parameters]
    return [end if ends.count(end) == 1 else name for end, name in zip(ends, parameters, strict=True)]


def finish(sweep: Sweep, folder: RunFolder, trials: Sequence[Trial], seed: int) -> int:
    """Print the table and write the summary; return the exit status, 1 if no run finished."""
    ranked = best_first(sweep, trials)
    rows = []
    for t in ranked:
        metric = t.state if t.metric is None else shown(t.metric) + (" (stopped)" if t.state == "stopped" else "")
        rows.append([t.name, metric, *(shown(t.values[name]) for name in sweep.parameters)])
    header = ["run", sweep.metric.name, *short_names(list(sweep.parameters))]
    print_table(f"{sweep.path.stem}, best first", header, rows)
    written = [[name, str(folder.path / name)] for name in ("results.csv", "sweep.html")]
    best = ranked[0] if ranked and ranked[0].state == "finished" else None
    if best is not None:
        written.append(["best", str(folder.path / sweep.command / best.name)])
        folder.finish(
            {
                "command": "sweep",
                "sweep": str(sweep.path),
                "seed": seed,
                "metric": sweep.metric.name,
                "best": {"run": best.name, sweep.metric.name: best.metric, "values": best.values},
                **{state: sum(t.state == state for t in trials) for state in ("finished", "stopped", "failed")},
            }
        )
    print_table("", ["written", ""], written)
    return 0 if best is not None else 1
