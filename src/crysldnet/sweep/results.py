"""What a sweep leaves: all runs as CSV and as a page, the best ones as a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crysldnet.console import print_table
from crysldnet.sweep.parallel_coordinates import write_page
from crysldnet.sweep.proposals import Sweep, Trial
from crysldnet.training.run_folder import RunFolder, write_atomically

ORDER = ("finished", "stopped", "running", "failed")


def best_first(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """Sort by the metric: finished runs first, then stopped ones, failed ones last."""
    sign = -1.0 if sweep.maximize else 1.0

    def place(t: Trial) -> tuple[int, bool, float]:
        return ORDER.index(t.state), t.metric is None, 0.0 if t.metric is None else sign * t.metric

    return sorted(trials, key=place)


def write_results(folder: Path, sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Write all runs as ``results.csv``, in the order in which they were begun, and as ``sweep.html``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "state", sweep.metric, "seconds", *sweep.parameters])
    for t in trials:
        metric = "" if t.metric is None else repr(t.metric)
        writer.writerow(
            [t.name, t.state, metric, f"{t.seconds:.1f}", *(t.values.get(name, "") for name in sweep.parameters)]
        )
    write_atomically(folder / "results.csv", text.getvalue())
    write_page(folder / "sweep.html", sweep, best_first(sweep, trials), short_names(sweep.parameters))


def short_names(parameters: Sequence[str]) -> list[str]:
    """Return the last part of each parameter's name where that tells it from the others."""
    ends = [name.rpartition(".")[2] for name in parameters]
    return [end if ends.count(end) == 1 else name for end, name in zip(ends, parameters, strict=True)]


def cell(value: Any) -> str:
    """Return a value as it is shown."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def finish(sweep: Sweep, folder: RunFolder, trials: Sequence[Trial], seed: int) -> int:
    """Print the table and write the summary; return the exit status, 1 where no run finished."""
    ranked = best_first(sweep, trials)
    rows = []
    for t in ranked:
        shown = t.state if t.metric is None else cell(t.metric) + (" (stopped)" if t.state == "stopped" else "")
        rows.append([t.name, shown, *(cell(t.values.get(name)) for name in sweep.parameters)])
    header = ["run", sweep.metric, *short_names(sweep.parameters)]
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
                "metric": sweep.metric,
                "best": {"run": best.name, sweep.metric: best.metric, "values": best.values},
                **{state: sum(t.state == state for t in trials) for state in ("finished", "stopped", "failed")},
            }
        )
    print_table("", ["written", ""], written)
    return 0 if best is not None else 1
