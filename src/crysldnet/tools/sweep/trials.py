"""Run the trials of a sweep on this machine, each a process of its own, and stop those that are given up."""

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
"""How long a run that is stopped may take to end."""
GIVE_UP = 5
"""When so many runs have failed and none has ended well, no more are begun, as W&B's agent does."""


def metrics_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a run's summary that are numbers, after the name of their stage: ``vae/val/loss``."""
    found = dict(summary)
    for stage, own in summary.items():
        found |= {f"{stage}/{name}": value for name, value in own.items()} if isinstance(own, Mapping) else {}
    return {k: float(v) for k, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}


def read_history(run: Path, name: str) -> tuple[float, ...]:
    """Return the values of a metric that a run has logged so far.

    Args:
        run: its folder.
        name: of the metric, as in :func:`metrics_of`.
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
    """A process, and since when it is to end, if it is."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    started: float
    stopped: float | None = None


class LocalRuns:
    """Propose, run, read the metric, propose again.

    Args:
        sweep: what is tried.
        folder: of the sweep.
        common: arguments of all runs.
        study: keeps what was run.
        environments: one for each run at the same time.
        changed: called with a trial that has ended, when it is recorded.
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
        """Run until there are ``count`` trials, a grid is done, or the target is reached.

        Raises:
            Interrupted: this process was told to stop; so were the runs, and they have ended.
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
        """Fill free workers; return whether any is running, or waits for a process of an earlier sweep."""
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
        """Record what ended, and stop what is given up."""
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
        if not path.exists():  # a run that ended well has one, and no other
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
