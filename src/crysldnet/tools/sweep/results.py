"""Output of a sweep: all runs as CSV and HTML, and a table of the best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crysldnet.console import csv_text, print_table
from crysldnet.io import write_atomically
from crysldnet.tools.sweep.parallel_coordinates import shown, write_page
from crysldnet.tools.sweep.proposals import Sweep
from crysldnet.tools.sweep.study import Trial
from crysldnet.training.run_folder import RunFolder

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
