"""Run a sweep on W&B: create it once, and run its agents on this machine, each with its own GPU."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from crysldnet.console import print_table
from crysldnet.errors import ConfigError
from crysldnet.io import write_atomically
from crysldnet.tools.sweep.proposals import Sweep
from crysldnet.training.processes import Environment, Job, run_jobs

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
