"""Run a sweep on this machine, without an account: propose, run, read the metric, propose again.

A sweep is a W&B sweep configuration whose parameters are keys of crysldnet; ``wandb sweep`` takes the same file. The
proposals come from W&B's own ``sweeps`` package. Every run is a process of its own, kept in the sweep's folder with its
output in run_N.log; results.csv lists them all. A run that fails is recorded as failed, and the sweep goes on.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from crysldnet.errors import ConfigError
from crysldnet.report import print_table
from crysldnet.sweep.proposals import Sweep, Trial, check_parameters, load_sweep, propose
from crysldnet.training.processes import Job, own_command, run_jobs
from crysldnet.training.run_folder import RunFolder, write_atomically


@dataclass(frozen=True, kw_only=True)
class SweepCommandConfig:
    """Every key of ``conf/sweep.yaml``."""

    sweep: str
    count: int
    args: str
    seed: int
    name: str | None
    runs: str
    resume: Literal["last"] | None


def find_metric(summary: Mapping[str, Any], name: str) -> float | None:
    """Return a metric of a run's summary, of the last stage where it has several; None where it isn't a number."""
    places = [stage for stage in summary.values() if isinstance(stage, Mapping)]
    found = [place[name] for place in [*places, summary] if name in place]
    return float(found[-1]) if found and math.isfinite(found[-1]) else None


def run_trial(sweep: Sweep, folder: Path, number: int, values: dict[str, Any], common: Sequence[str]) -> Trial:
    """Run one proposal to its end, or read the result where that was done before."""
    name = f"run_{number:03d}"
    line = [*sweep.line(values, common), f"name={name}", f"runs={folder}"]
    own = folder / sweep.command / name
    if (own / "config.yaml").exists():
        line.append("resume=last")
    started = time.monotonic()
    if not (own / "summary.json").exists():
        run_jobs([Job(name, own_command(sweep.command, *line), folder / f"{name}.log")], [{}])
    metric, seconds = None, time.monotonic() - started
    if (own / "summary.json").exists():  # a run that ended well has one, and no other
        summary = json.loads((own / "summary.json").read_text())
        metric, seconds = find_metric(summary, sweep.metric), summary["wall_time_s"]
    return Trial(name, values, metric, seconds)


def best_first(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """Sort by the metric, failed runs last."""
    sign = -1.0 if sweep.maximize else 1.0
    return sorted(trials, key=lambda t: (t.metric is None, 0.0 if t.metric is None else sign * t.metric))


def write_results(path: Path, sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Write all runs as CSV, in the order in which they were run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "state", sweep.metric, "seconds", *sweep.parameters])
    for t in trials:
        metric = "" if t.metric is None else repr(t.metric)
        writer.writerow(
            [t.name, t.state, metric, f"{t.seconds:.1f}", *(t.values.get(name, "") for name in sweep.parameters)]
        )
    write_atomically(path, text.getvalue())


def _keep_sweep(folder: RunFolder, sweep: Sweep, values: dict[str, Any]) -> None:
    """Save the sweep beside the command's configuration; a sweep that is resumed must be the same."""
    whole = {**values, "sweep_config": sweep.config}
    path = folder.path / "config.yaml"
    before = yaml.safe_load(path.read_text()) if path.exists() else whole
    for key in ("args", "seed", "sweep_config"):
        if before.get(key) != whole[key]:
            raise ConfigError(f"{folder.path} was begun with another {key}; choose another name", key)
    folder.save_config(whole)


def run(config: SweepCommandConfig, values: dict[str, Any]) -> int:
    """Run the sweep; return the exit status, 1 where every run failed.

    Args:
        config: the settings.
        values: the same as plain values, to be saved.
    """
    if config.count < 1:
        raise ConfigError(f"count={config.count}: at least 1", "count")
    sweep = load_sweep(config.sweep)
    common = shlex.split(config.args)
    first = propose(sweep, [], config.seed)
    assert first is not None
    check_parameters(sweep, first, common)
    folder = RunFolder(config.runs, "sweep", config.name, resume=config.resume is not None)
    _keep_sweep(folder, sweep, values)
    if "early_terminate" in sweep.config:
        _say("early_terminate is left to W&B; here every run goes to its end")
    trials: list[Trial] = []
    while len(trials) < config.count and (proposal := propose(sweep, trials, config.seed)) is not None:
        trial = run_trial(sweep, folder.path, len(trials) + 1, proposal, common)
        trials.append(trial)
        write_results(folder.path / "results.csv", sweep, trials)
        shown = " ".join(f"{name}={value}" for name, value in proposal.items())
        log = folder.path / f"{trial.name}.log"
        outcome = f"failed, see {log}" if trial.metric is None else f"{sweep.metric}={trial.metric:.6g}"
        _say(f"{trial.name}: {outcome} ({trial.seconds:.0f} s) {shown}")
        if _reached(sweep, trial):
            break
    return _finish(sweep, folder, trials, config)


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _reached(sweep: Sweep, trial: Trial) -> bool:
    target = sweep.config["metric"].get("target")
    if target is None or trial.metric is None:
        return False
    return trial.metric >= target if sweep.maximize else trial.metric <= target


def _finish(sweep: Sweep, folder: RunFolder, trials: Sequence[Trial], config: SweepCommandConfig) -> int:
    ranked = best_first(sweep, trials)
    ends = [name.rpartition(".")[2] for name in sweep.parameters]
    header = [end if ends.count(end) == 1 else name for end, name in zip(ends, sweep.parameters, strict=True)]
    rows = []
    for t in ranked:
        values = [t.values.get(name) for name in sweep.parameters]
        rows.append([t.name, _cell("failed" if t.metric is None else t.metric), *map(_cell, values)])
    print_table(f"{sweep.path.stem}, best first", ["run", sweep.metric, *header], rows)
    results = [["results", str(folder.path / "results.csv")]]
    best = ranked[0]
    if best.metric is not None:
        results.append(["best", str(folder.path / sweep.command / best.name)])
        folder.finish(
            {
                "command": "sweep",
                "sweep": str(config.sweep),
                "seed": config.seed,
                "metric": sweep.metric,
                "best": {"run": best.name, sweep.metric: best.metric, "values": best.values},
                "finished": sum(t.metric is not None for t in trials),
                "failed": sum(t.metric is None for t in trials),
            }
        )
    print_table("", ["written", ""], results)
    return 0 if best.metric is not None else 1
