"""Run commands in parallel processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from crysldnet.console import note
from crysldnet.errors import UNFINISHED, ConfigError, CrysldnetError, Interrupted
from crysldnet.signals import PARENT_HOLDS_STDIN, RUN_NAME, noted
from crysldnet.training.run_folder import owner_of

POLL_SECONDS = 0.05
PROGRAM = [sys.executable, "-m", "crysldnet"]
Environment = Mapping[str, str | None]
"""Variables to add to this process's environment, or to remove if None."""


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        name: for messages.
        command: command line.
        log: file to which output is appended.
    """

    name: str
    command: list[str]
    log: Path


def own_command(*arguments: str) -> list[str]:
    """Return the command line of a ``crysldnet`` command with the current interpreter."""
    return [*PROGRAM, *arguments]


def places(count: int, device: str) -> list[dict[str, str]]:
    """Return the environments of ``count`` concurrent processes.

    On ``cuda`` each sees one GPU, assigned in turn; on ``cpu`` each uses one thread.
    """
    if device == "cuda":
        gpus = visible_gpus()
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(count)]
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
    return [dict(threads) for _ in range(count)]


def visible_gpus() -> list[str]:
    """Return the GPUs available to this process, as in CUDA_VISIBLE_DEVICES."""
    import torch

    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return listed.split(",") if listed else [str(i) for i in range(torch.cuda.device_count())]


def run_jobs(
    jobs: Sequence[Job], environments: Sequence[Environment], ended: Callable[[Job, int], None] = lambda *_: None
) -> dict[str, int]:
    """Run jobs, one at a time in each environment; return their exit statuses.

    Args:
        jobs: commands in starting order. A job waits while another process works in the folder of its log.
        environments: additions to this process's environment; their number is that of concurrent jobs.
        ended: called with each finished job and its status.

    Raises:
        Interrupted: this process was interrupted; the jobs were stopped as well.
    """
    waiting, statuses = list(jobs), {}
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    with noted() as stop_if_signalled:
        try:
            while waiting or running:
                stop_if_signalled()
                for place in range(len(environments)):
                    if place not in running and waiting and is_free(waiting[0].log.parent):
                        job = waiting.pop(0)
                        running[place] = job, start(job, environments[place])
                time.sleep(POLL_SECONDS)
                for place, (job, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[place]
                        statuses[job.name] = process.returncode
                        ended(job, process.returncode)
        finally:
            end([process for _, process in running.values()])
    return statuses


def run_all(jobs: Sequence[Job], environments: Sequence[Environment], what: str) -> None:
    """Run jobs and print the end of each.

    Args:
        jobs, environments: as in :func:`run_jobs`.
        what: what the jobs are, in the plural.

    Raises:
        Interrupted: some were stopped.
        CrysldnetError: some failed; the others finished.
    """
    statuses = run_jobs(jobs, environments, _tell)
    logs = {job.name: job.log for job in jobs}
    failed = [name for name, status in statuses.items() if status not in (0, UNFINISHED)]
    if failed:
        shown = "; ".join(f"{name}, see {logs[name]}" for name in failed)
        raise CrysldnetError(f"{len(failed)} of {len(jobs)} {what} failed: {shown}. The others are saved: resume=last")
    if any(statuses.values()):
        raise Interrupted(f"{what} were stopped; continue with resume=last")


def _tell(job: Job, status: int) -> None:
    print(f"{job.name}: {'done' if status == 0 else f'ended with status {status}, see {job.log}'}", file=sys.stderr)  # noqa: T201


def check_parallel(parallel: int, trainer: Mapping[str, Any], what: str) -> None:
    """Reject a number of concurrent jobs that the devices of each rule out.

    Args:
        parallel: the number.
        trainer: the Trainer settings of each job.
        what: what a job is.

    Raises:
        ConfigError: it is below 1, or each job has several devices.
    """
    if parallel < 1:
        raise ConfigError(f"parallel={parallel}: at least 1", "parallel")
    processes = trainer.get("devices", 1) * trainer.get("num_nodes", 1)
    if parallel > 1 and processes > 1:
        raise ConfigError(
            f"parallel={parallel} gives each {what} a device of its own, and trainer.devices and trainer.num_nodes "
            f"give each {processes}; set one of them to 1",
            "parallel",
        )


def is_free(folder: Path) -> bool:
    """Return whether no other process works in a folder, such as one that is exiting because its parent was killed."""
    owner = owner_of(folder)
    if owner is not None:
        _note_once(f"{folder}: {owner} is using this folder; waiting until it ends")
    return owner is None


def wait_until_free(folder: Path) -> None:
    """Wait while another process works in a folder."""
    while not is_free(folder):
        time.sleep(POLL_SECONDS)


@cache
def _note_once(text: str) -> None:
    note(text)


@cache
def _held_open() -> int:
    """Return a pipe that closes when this process exits in any way; jobs have it as standard input."""
    return os.pipe()[0]


def start(job: Job, environment: Environment) -> subprocess.Popen[bytes]:
    """Start a job. Commands of this package exit with this process, see ``signals.end_with_the_parent``."""
    whole = {**os.environ, RUN_NAME: None, "WANDB_SERVICE": None, **environment}  # of this process's own run
    whole[PARENT_HOLDS_STDIN] = "1"
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        return subprocess.Popen(
            job.command,
            stdin=_held_open(),
            stdout=log,
            stderr=subprocess.STDOUT,
            env={key: value for key, value in whole.items() if value is not None},
        )


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop processes and wait until they have exited."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()
