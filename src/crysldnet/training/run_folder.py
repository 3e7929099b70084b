"""The folder of a run: configuration, metrics, checkpoints, exported model, summary.

``runs/<command>/<name>/`` is made when the run starts; ``summary.json`` is written last, so it marks a run that is
complete. ``runs/<command>/latest`` points to the newest complete one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only

from crysldnet import __version__
from crysldnet.errors import ConfigError

NAME_VARIABLE = "CRYSLDNET_RUN_NAME"
"""Carries the run's name to the processes that the first one starts; the first never reads it."""


def code_version() -> str:
    """Return the version, with the commit where the package lies in a git working tree."""
    tree = Path(__file__).parents[3]
    if not (tree / ".git").exists():  # installed: a repository that happens to hold the environment isn't ours
        return __version__
    try:
        commit = subprocess.run(
            ["git", "-C", str(tree), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=5,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return f"{__version__}+{commit}" if commit else __version__


def _free_name(base: Path) -> str:
    """Return the time, with a number where another run began in the same second."""
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    names = [now, *(f"{now}_{i}" for i in range(2, 100))]
    return next(name for name in names if not (base / name).exists())


def _unfinished(base: Path) -> list[Path]:
    runs = [p for p in base.glob("*") if (p / "config.yaml").exists() and not (p / "summary.json").exists()]
    return sorted(runs, key=lambda p: (p / "config.yaml").stat().st_mtime)


def saved_config(root: str, command: str, name: str | None) -> Path | None:
    """Return the saved configuration of the run that ``resume=last`` would continue, or None where there is none."""
    base = Path(root) / command
    name = (os.environ.get(NAME_VARIABLE) if getattr(rank_zero_only, "rank", 0) else None) or name
    runs = [base / name] if name is not None else _unfinished(base)[-1:]
    return next((run / "config.yaml" for run in runs if (run / "config.yaml").exists()), None)


class RunFolder:
    """Find or make the folder of a run.

    Args:
        root: usually ``runs``.
        command: pretrain or finetune.
        name: of the run; by default the name given by the process that started this one, the SLURM job, or the time.
        resume: continue the run of that name, or without a name the newest one that isn't complete.

    Raises:
        ConfigError: the name is taken, there is nothing to resume, or the folder can't be written.
    """

    def __init__(self, root: str, command: str, name: str | None, *, resume: bool) -> None:
        base = Path(root) / command
        child = os.environ.get(NAME_VARIABLE) if getattr(rank_zero_only, "rank", 0) else None
        if child is None and name is None and resume:
            unfinished = _unfinished(base)
            if not unfinished:
                raise ConfigError(f"resume=last: no run under {base} is unfinished; start one without resume", "resume")
            name = unfinished[-1].name
        if child is None and name is None and "SLURM_JOB_ID" in os.environ:
            name = f"slurm-{os.environ['SLURM_JOB_ID']}"
        self.name = child or name or _free_name(base)
        self.path = base / self.name
        self.started = time.time()
        if name is not None and Path(name).name != name:
            raise ConfigError(f"name={name}: a run's name can't hold a path", "name")
        if getattr(rank_zero_only, "rank", 0) == 0:
            self._claim(resume)
            os.environ[NAME_VARIABLE] = self.name

    def _claim(self, resume: bool) -> None:
        if self.complete:
            raise ConfigError(f"{self.path}: this run is complete; choose another name", "name")
        exists = (self.path / "config.yaml").exists()
        if resume and not exists:
            raise ConfigError(f"{self.path}: there is no run to resume", "resume")
        if exists and not resume:
            raise ConfigError(
                f"{self.path}: this run exists; continue it with resume=last or choose another name", "name"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"can't make the run folder {self.path}: {error.strerror}", "runs") from error

    @property
    def complete(self) -> bool:
        """Whether the run ended well."""
        return (self.path / "summary.json").exists()

    @rank_zero_only
    def save_config(self, config: dict[str, Any]) -> None:
        """Write the resolved configuration, before the first step."""
        write_atomically(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    @rank_zero_only
    def save_split(self, text: str) -> None:
        """Write which crystals were trained, validated and tested on, before the first step."""
        write_atomically(self.path / "split.json", text)

    @rank_zero_only
    def finish(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json`` and point ``latest`` here."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
        whole = {
            "status": "complete",
            "code_version": code_version(),
            "wall_time_s": round(time.time() - self.started, 1),
            "peak_memory_mb": round(peak),
            **summary,
        }
        write_atomically(self.path / "summary.json", json.dumps(_without_nan(whole), indent=1, allow_nan=False))
        latest = self.path.parent / "latest"
        with contextlib.suppress(OSError):  # a file system without links still has the run under its name
            link = self.path.parent / f".latest-{os.getpid()}"
            link.symlink_to(self.path.name)
            link.replace(latest)


def _without_nan(value: Any) -> Any:
    """Put null, which JSON has, in place of what isn't finite, which it hasn't."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is whole or not there."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
