"""Run the trials of a sweep: locally in separate processes, with pruning, or by agents of W&B."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from crysldnet.config import argument
from crysldnet.console import print_table
from crysldnet.errors import ConfigError
from crysldnet.io import write_atomically
from crysldnet.signals import noted
from crysldnet.tools.sweep.proposals import Sweep
from crysldnet.tools.sweep.study import Study, Trial
from crysldnet.training.processes import Environment, Job, end, is_free, own_command, run_jobs, start

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


RUNS_VARIABLE = "CRYSLDNET_SWEEP_RUNS"
WAIT_SECONDS = 300.0
AGENT = (
    "import runpy; from crysldnet.signals import end_with_the_parent; end_with_the_parent(); "
    "runpy.run_module('wandb', run_name='__main__', alter_sys=True)"
)
"""W&B's command line, exiting with this process."""


def online_config(sweep: Sweep, common: Sequence[str], count: int) -> dict[str, Any]:
    """Return the sweep for W&B: with this interpreter, the common arguments, and at most ``count`` runs.

    Every agent has its own runs folder, because runs that start in the same second would get the same name.
    """
    program = ["${env}", *sweep.launcher, sys.executable, "-m", "crysldnet", sweep.command]
    words = [*program, *sweep.arguments, *common, f"runs=${{envvar:{RUNS_VARIABLE}}}"]
    return {**sweep.config, "command": words, "run_cap": count}


def agent_environment(environment: Mapping[str, str], runs: Path) -> Environment:
    """Return the environment of an agent. Its runs are single processes, so it removes SLURM's task variables."""
    slurm = dict.fromkeys((name for name in os.environ if name.startswith("SLURM_")), None)
    return {**slurm, **environment, RUNS_VARIABLE: str(runs)}


def sweep_id(sweep: Sweep, folder: Path, common: Sequence[str], count: int, entity: str | None) -> str:
    """Return the W&B id of a folder's sweep; the first process creates it, and the others wait for it.

    Raises:
        ConfigError: there is no account, W&B rejects the sweep, or the first process didn't create it.
    """
    file = folder / "sweep_id"
    if not file.exists() and getattr(rank_zero_only, "rank", 0) == 0:
        import wandb

        if wandb.api.api_key is None:
            raise ConfigError(
                "backend=wandb needs an account: wandb login; backend=local (make sweep LOCAL=1) needs none", "backend"
            )
        project = sweep.config.get("project")
        try:
            number = wandb.sweep(online_config(sweep, common, count), entity=entity, project=project)
        except (wandb.Error, OSError) as error:
            raise ConfigError(f"W&B can't create the sweep: {error}", "backend") from error
        write_atomically(file, "/".join(part for part in (entity, project, number) if part))
    started = time.monotonic()
    while not file.exists():
        if time.monotonic() - started > WAIT_SECONDS:
            raise ConfigError(f"{file}: the first process hasn't created the sweep", "backend")
        time.sleep(1.0)
    return file.read_text()


def run_agents(name: str, folder: Path, environments: Sequence[Mapping[str, str]]) -> int:
    """Run agents until W&B has no more runs; return the exit status, 1 if one failed.

    Args:
        name: sweep name for ``wandb agent``.
        folder: sweep folder, where agents write.
        environments: one per agent.
    """
    rank = getattr(rank_zero_only, "rank", 0)
    folders = [folder / f"agent_{rank}_{number}" for number in range(len(environments))]
    for own in folders:
        own.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", AGENT, "agent", "--forward-signals", name]
    jobs = [Job(own.name, command, own / "agent.log") for own in folders]
    places = [agent_environment(environment, own) for environment, own in zip(environments, folders, strict=True)]
    statuses = run_jobs(jobs, places)
    rows = [[job.name, f"status {statuses[job.name]}", str(job.log)] for job in jobs]
    print_table(f"agents of {name}", ["", "", ""], rows)
    return 1 if any(statuses.values()) else 0
