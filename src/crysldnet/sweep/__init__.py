"""Run a sweep, on this machine without an account, or on W&B.

A sweep is a W&B sweep configuration whose parameters are keys of crysldnet. With backend=local the proposals and the
early termination come from W&B's own ``sweeps`` package; every run is a process of its own, kept in the sweep's folder
with its output in run_N.log. results.csv lists them all, sweep.html shows them. A run that fails is recorded as failed,
and the sweep goes on. With backend=wandb the sweep is created on W&B, and its agents run here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from crysldnet.config import split_words
from crysldnet.errors import ConfigError
from crysldnet.sweep.agents import run_agents, sweep_id
from crysldnet.sweep.proposals import Sweep, Trial, check_parameters, load_sweep, propose
from crysldnet.sweep.results import finish, write_results
from crysldnet.sweep.trials import LocalRuns
from crysldnet.training.processes import places, visible_gpus
from crysldnet.training.run_folder import RunFolder

__all__ = ["SweepCommandConfig", "check_parameters", "load_sweep", "propose", "run"]


@dataclass(frozen=True, kw_only=True)
class SweepCommandConfig:
    """Every key of ``conf/sweep.yaml``."""

    sweep: str
    backend: Literal["local", "wandb"]
    count: int
    parallel: int | None
    args: str
    entity: str | None
    seed: int
    name: str | None
    runs: str
    resume: Literal["last"] | None

    def __post_init__(self) -> None:
        if self.count < 1 or (self.parallel is not None and self.parallel < 1):
            raise ValueError(f"count={self.count} and parallel={self.parallel} must be at least 1")


def _keep_sweep(folder: RunFolder, sweep: Sweep, values: dict[str, Any]) -> None:
    """Save the sweep beside the command's configuration; a sweep that is resumed must be the same."""
    whole = {**values, "sweep_config": sweep.config}
    path = folder.path / "config.yaml"
    before = yaml.safe_load(path.read_text()) if path.exists() else whole
    for key in ("backend", "args", "seed", "sweep_config"):
        if before.get(key) != whole[key]:
            raise ConfigError(f"{folder.path} was begun with another {key}; choose another name", key)
    folder.save_config(whole)


def _environments(parallel: int | None) -> list[dict[str, str]]:
    """Return what is added to the environment of the runs that go on at the same time: a GPU for each."""
    gpus = visible_gpus()
    count = parallel if parallel is not None else max(1, len(gpus))
    return [{}] if count == 1 else places(count, "cuda" if gpus else "cpu")


def run(config: SweepCommandConfig, values: dict[str, Any]) -> int:
    """Run the sweep; return the exit status, 1 where no run finished, or an agent failed.

    Args:
        config: the settings.
        values: the same as plain values, to be saved.
    """
    sweep = load_sweep(config.sweep)
    common = split_words(config.args, "args")
    first = propose(sweep, [], config.seed)
    assert first is not None
    check_parameters(sweep, first, common)
    environments = _environments(config.parallel)
    if config.backend == "wandb":
        return _run_online(sweep, config, common, values, environments)
    folder = RunFolder(config.runs, "sweep", config.name, resume=config.resume is not None, extend=True)
    _keep_sweep(folder, sweep, values)

    def changed(trial: Trial) -> None:
        write_results(folder.path, sweep, list(runs.trials.values()))
        _tell(sweep, folder.path, trial)

    runs = LocalRuns(sweep, folder.path, common, config.seed, environments, changed)
    trials = runs.run(config.count)
    write_results(folder.path, sweep, trials)
    return finish(sweep, folder, trials, config.seed)


def _run_online(
    sweep: Sweep, config: SweepCommandConfig, common: list[str], values: dict[str, Any], places: list[dict[str, str]]
) -> int:
    """Create the sweep on W&B, unless that was done, and run agents; every task of a SLURM job runs its own."""
    folder = RunFolder(config.runs, "sweep", config.name, resume=config.resume is not None)
    _keep_sweep(folder, sweep, values)
    name = sweep_id(sweep, folder.path, common, config.count, config.entity)
    return run_agents(name, folder.path, places)


def _tell(sweep: Sweep, folder: Path, trial: Trial) -> None:
    """Say how a run ended."""
    shown = " ".join(f"{name}={value}" for name, value in trial.values.items())
    metric = "" if trial.metric is None else f" {sweep.metric}={trial.metric:.6g}"
    why = f", see {folder / f'{trial.name}.log'}" if trial.state == "failed" else ""
    print(f"{trial.name}: {trial.state}{metric}{why} ({trial.seconds:.0f} s) {shown}", file=sys.stderr)  # noqa: T201
