"""Run the trials of a sweep locally in separate processes, and stop pruned ones."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crysldnet.config import argument
from crysldnet.errors import ConfigError
from crysldnet.signals import noted
from crysldnet.tools.sweep.proposals import Sweep
from crysldnet.tools.sweep.study import Study, Trial
from crysldnet.training.processes import Environment, Job, end, is_free, own_command, start

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 120.0
"""How long a stopped run may take to exit."""
GIVE_UP = 5
"""After this many failed runs and none finished, no more are started, as in W&B's agent."""


def metrics_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the numeric metrics of a run's summary, with the stage in the name: ``vae/val/loss``."""
    found = dict(summary)
    for stage, own in summary.items():
        found |= {f"{stage}/{name}": value for name, value in own.items()} if isinstance(own, Mapping) else {}
    return {k: float(v) for k, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}


def read_history(run: Path, name: str) -> tuple[float, ...]:
    """Return the values of a metric logged so far.

    Args:
        run: run folder.
        name: metric name as in :func:`metrics_of`.
    """
    stage, _, rest = name.partition("/")
    staged = run / stage / "metrics.csv"
    path, column = (staged, rest) if staged.exists() else (run / "metrics.csv", name)
    if not path.exists():
        return ()
    with path.open(newline="") as file:
        values = [row.get(column) for row in csv.DictReader(file)]
    return tuple(float(value) for value in values if value)


@dataclass
class Running:
    """A process, and since when it is stopping, if it is."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    started: float
    stopped: float | None = None


class LocalRuns:
    """Propose, run, read the metric, propose again.

    Args:
        sweep: the sweep.
        folder: sweep folder.
        common: common arguments.
        study: records the runs.
        environments: one per concurrent run.
        changed: called with each finished trial after it is recorded.
    """

    def __init__(
        self,
        sweep: Sweep,
        folder: Path,
        common: Sequence[str],
        study: Study,
        environments: Sequence[Environment],
        changed: Callable[[Trial], None],
    ) -> None:
        self.sweep, self.folder, self.common, self.study = sweep, folder, common, study
        self.environments, self.changed = environments, changed
        self.running: dict[int, Running] = {}

    def run(self, count: int) -> None:
        """Run until there are ``count`` trials, a grid is complete, or the target is reached.

        Raises:
            Interrupted: this process was interrupted; the runs were stopped as well.
        """
        again = [name for name, t in self.study.trials().items() if t.state in ("running", "failed")]
        with noted() as stop_if_signalled:
            try:
                while self._begin(again, count):
                    stop_if_signalled()
                    time.sleep(POLL_SECONDS)
                    self._look()
            finally:
                end([running.process for running in self.running.values()])

    def _begin(self, again: list[str], count: int) -> bool:
        """Fill free workers; return whether any is running, or waiting for a process of an earlier sweep."""
        for place in set(range(len(self.environments))) - self.running.keys():
            if again and not is_free(self.folder / self.sweep.command / again[0]):
                return True
            trial = self.study.begin_again(again.pop(0)) if again else self._next(count)
            if trial is None:
                break
            own = self.folder / self.sweep.command / trial.name
            arguments = [*self.sweep.line(trial.values, self.common), f"name={trial.name}"]
            arguments.append(argument("runs", str(self.folder)))
            if (own / "config.yaml").exists():
                arguments.append("resume=last")
            command = [*self.sweep.launcher, *own_command(self.sweep.command, *arguments)]
            process = start(Job(trial.name, command, self.folder / f"{trial.name}.log"), self.environments[place])
            self.running[place] = Running(trial.name, own, process, time.monotonic())
        return bool(self.running)

    def _next(self, count: int) -> Trial | None:
        trials = list(self.study.trials().values())
        ended = [t.state for t in trials if t.state != "running"]
        hopeless = ended.count("failed") >= GIVE_UP and set(ended) == {"failed"}
        if len(trials) >= count or hopeless or any(self.sweep.metric.reached(t.metric) for t in trials):
            return None
        return self.study.propose()

    def _look(self) -> None:
        """Record finished runs, and stop pruned ones."""
        for place, running in list(self.running.items()):
            name, seconds = running.name, time.monotonic() - running.started
            over = running.process.poll() is not None
            if running.stopped is None:
                given_up = self.study.report(name, read_history(running.folder, self.sweep.metric.name))
                if over:
                    self._end(running, seconds)
                elif given_up:
                    running.stopped = time.monotonic()
                    running.process.terminate()
                    self.changed(self.study.end(name, "stopped", None, seconds))
            elif time.monotonic() - running.stopped > PATIENCE_SECONDS:
                running.process.kill()
            if over:
                del self.running[place]

    def _end(self, run: Running, seconds: float) -> None:
        path = run.folder / "summary.json"
        if not path.exists():  # only successful runs have one
            self.changed(self.study.end(run.name, "failed", None, seconds))
            return
        summary = json.loads(path.read_text())
        metrics = metrics_of(summary)
        metric = metrics.get(self.sweep.metric.name)
        trial = self.study.end(run.name, "failed" if metric is None else "finished", metric, summary["wall_time_s"])
        if metric is None:
            raise ConfigError(
                f"{path} has no {self.sweep.metric.name}, by which {self.sweep.path} chooses; it has "
                f"{', '.join(name for name in metrics if 'val/' in name)}. Name one of them in a copy of the sweep: "
                "sweep=FILE.yaml",
                "sweep",
            )
        self.changed(trial)
