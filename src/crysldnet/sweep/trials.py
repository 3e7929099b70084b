"""Run the trials of a sweep on this machine, each a process of its own, and stop those that Hyperband gives up."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from crysldnet.errors import ConfigError
from crysldnet.stopping import noted
from crysldnet.sweep.proposals import Sweep, Trial, propose, to_stop
from crysldnet.training.processes import Environment, Job, end, own_command, start
from crysldnet.training.run_folder import write_atomically

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 120.0
"""How long a run that is stopped may take to end."""
GIVE_UP = 5
"""When so many runs have failed and none has ended well, no more are begun, as W&B's agent does."""


def find_metric(summary: Mapping[str, Any], name: str) -> float | None:
    """Return a metric of a run's summary; None where it isn't a number.

    Args:
        summary: the content of ``summary.json``.
        name: of the metric, after the name of its stage where the run has several: ``vae/val/loss``.
    """
    stage, _, rest = name.partition("/")
    own = summary.get(stage)
    value = own.get(rest) if isinstance(own, Mapping) else summary.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def metrics_of(summary: Mapping[str, Any]) -> list[str]:
    """Return the names that :func:`find_metric` finds, of validation."""
    names = [name for name in summary if "/" in name]
    names += [f"{stage}/{name}" for stage, own in summary.items() if isinstance(own, Mapping) for name in own]
    return [name for name in names if "val/" in name and find_metric(summary, name) is not None]


def read_history(run: Path, name: str) -> tuple[float, ...]:
    """Return the values of a metric that a run has logged so far.

    Args:
        run: its folder.
        name: of the metric, as for :func:`find_metric`.
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
    process: subprocess.Popen[bytes]
    started: float
    stopped: float | None = None


class LocalRuns:
    """Propose, run, read the metric, propose again; what was run is kept in the sweep's folder.

    Args:
        sweep: what is tried.
        folder: of the sweep.
        common: arguments of all runs.
        seed: of the proposals.
        environments: one for each run at the same time.
        changed: called with a trial that has ended, when it is recorded.
    """

    def __init__(
        self,
        sweep: Sweep,
        folder: Path,
        common: Sequence[str],
        seed: int,
        environments: Sequence[Environment],
        changed: Callable[[Trial], None],
    ) -> None:
        self.sweep, self.folder, self.common, self.seed = sweep, folder, common, seed
        self.environments, self.changed = environments, changed
        self.running: dict[int, Running] = {}
        path = folder / "trials.json"
        kept = json.loads(path.read_text()) if path.exists() else []
        self.trials = {t["name"]: Trial(**{**t, "history": tuple(t["history"])}) for t in kept}
        """By name, in the order in which they were begun."""

    def run(self, count: int) -> list[Trial]:
        """Run until there are ``count`` trials, a grid is done, or the target is reached; return all.

        Raises:
            Interrupted: this process was told to stop; so were the runs, and they have ended.
        """
        again = [t for t in self.trials.values() if t.state not in ("finished", "stopped")]
        with noted() as stop_if_told:
            try:
                while self._begin(again, count):
                    stop_if_told()
                    time.sleep(POLL_SECONDS)
                    self._look()
            finally:
                end([running.process for running in self.running.values()])
        return list(self.trials.values())

    def own_folder(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.folder / self.sweep.command / name

    def _begin(self, again: list[Trial], count: int) -> bool:
        """Start what there is place for; say whether anything runs."""
        for place in set(range(len(self.environments))) - self.running.keys():
            trial = again.pop(0) if again else self._next(count)
            if trial is None:
                break
            self.trials[trial.name] = replace(trial, state="running", metric=None)
            self._save()
            arguments = [*self.sweep.line(trial.values, self.common), f"name={trial.name}", f"runs={self.folder}"]
            if (self.own_folder(trial.name) / "config.yaml").exists():
                arguments.append("resume=last")
            job = Job(trial.name, own_command(self.sweep.command, *arguments), self.folder / f"{trial.name}.log")
            self.running[place] = Running(trial.name, start(job, self.environments[place]), time.monotonic())
        return bool(self.running)

    def _next(self, count: int) -> Trial | None:
        trials = list(self.trials.values())
        ended = [t.state for t in trials if t.state != "running"]
        hopeless = ended.count("failed") >= GIVE_UP and set(ended) == {"failed"}
        if len(trials) >= count or hopeless or any(self.sweep.reaches(t.metric) for t in trials):
            return None
        values = propose(self.sweep, trials, self.seed)
        return None if values is None else Trial(f"run_{len(trials) + 1:03d}", values, "running", None, 0.0)

    def _look(self) -> None:
        """Record what ended, and stop what Hyperband gives up."""
        for place, running in list(self.running.items()):
            seconds = time.monotonic() - running.started
            over = running.process.poll() is not None
            history = read_history(self.own_folder(running.name), self.sweep.metric)
            trial = replace(self.trials[running.name], history=history, seconds=seconds)
            self.trials[running.name] = trial
            if over:
                del self.running[place]
                self._end(trial, stopped=running.stopped is not None)
            elif running.stopped is not None and time.monotonic() - running.stopped > PATIENCE_SECONDS:
                running.process.kill()
        names = to_stop(self.sweep, list(self.trials.values()))
        for running in self.running.values():
            if running.name in names and running.stopped is None:
                running.stopped = time.monotonic()
                running.process.terminate()

    def _end(self, trial: Trial, *, stopped: bool) -> None:
        path = self.own_folder(trial.name) / "summary.json"
        if path.exists():  # a run that ended well has one, and no other
            summary = json.loads(path.read_text())
            metric = find_metric(summary, self.sweep.metric)
            trial = replace(trial, state="failed" if metric is None else "finished", metric=metric)
            trial = replace(trial, seconds=summary["wall_time_s"])
            if metric is None:
                self.trials[trial.name] = trial
                self._save()
                raise ConfigError(
                    f"{path} has no {self.sweep.metric}, by which {self.sweep.path} chooses; it has "
                    f"{', '.join(metrics_of(summary))}. Name one of them in a copy of the sweep: sweep=FILE.yaml",
                    "sweep",
                )
        else:
            trial = replace(trial, state="stopped" if stopped else "failed")
            if stopped and trial.history:
                trial = replace(trial, metric=(max if self.sweep.maximize else min)(trial.history))
        self.trials[trial.name] = trial
        self._save()
        self.changed(trial)

    def _save(self) -> None:
        whole = [asdict(trial) for trial in self.trials.values()]
        write_atomically(self.folder / "trials.json", json.dumps(whole, indent=1))
