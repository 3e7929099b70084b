"""Run folder: configuration, metrics, checkpoints, exported model, summary.

``runs/<command>/<name>/`` is created when the run starts; ``summary.json`` is written last and marks a complete run.
``runs/<command>/latest`` points to the newest complete one. A process working in a folder holds a lock on its
``.lock``, which the system releases when the process exits.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TextIO

from lightning.pytorch.utilities import rank_zero_only

from crysldnet import __version__
from crysldnet.build import to_yaml
from crysldnet.console import note
from crysldnet.errors import ConfigError
from crysldnet.io import write_atomically
from crysldnet.platforms import lock, peak_memory_mb
from crysldnet.signals import RUN_NAME, started_by_the_first
from crysldnet.training.checkpointing import started
from crysldnet.training.inputs import INPUTS, plugin_hashes, refuse_other_inputs

LATEST = "latest"
"""Link to the newest complete run of a command."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that every training run has."""

    plugins: list[str] = field(default_factory=list)
    seed: int
    name: str | None
    runs: str
    resume: Literal["last"] | None
    data: dict[str, Any]
    encoder: dict[str, Any]
    optimizer: dict[str, Any]
    trainer: dict[str, Any]
    strategy: dict[str, Any]
    logger: dict[str, Any]

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, not {self.seed}")


def code_version() -> str:
    """Return the version, with the commit if the package is in a git working tree."""
    tree = Path(__file__).parents[3]
    if not (tree / ".git").exists():  # installed: ignore a repository that happens to contain the environment
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
    """Return the time, with a number appended if another run started in the same second."""
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    names = [now, *(f"{now}_{i}" for i in range(2, 100))]
    return next(name for name in names if not (base / name).exists())


def _runs(base: Path) -> list[Path]:
    runs = [p for p in base.glob("*") if (p / "config.yaml").exists() and not p.is_symlink()]
    return sorted(runs, key=lambda p: (p / "config.yaml").stat().st_mtime)


def is_complete(run: Path) -> bool:
    """Return whether a run is complete."""
    return (run / "summary.json").exists()


def check_name(name: str | None) -> None:
    """Reject invalid run names.

    Raises:
        ConfigError: it is empty, hidden, a path, or the name of the link to the newest run.
    """
    if name is None:
        return
    if not isinstance(name, str):
        raise ConfigError(f"name={name!r}: a run's name is text; put it into two pairs of quotes", "name")
    if not name.strip() or name.startswith(".") or name == LATEST or not name.isprintable() or {*name} & {*"/\\"}:
        raise ConfigError(
            f"name={name!r}: a run's name is its folder's: not empty, no path, not {LATEST!r}, no dot at its start and "
            "no control characters",
            "name",
        )


def find_run(root: str, command: str, name: str | None) -> Path | None:
    """Return the folder for ``resume=last``.

    This is the run of that name; without a name, the newest incomplete run, or the newest if all are complete. None if
    there is no such run.
    """
    check_name(name)
    base = Path(root) / command
    name = _given_name() or name
    if name is not None:
        return base / name if (base / name / "config.yaml").exists() else None
    runs = _runs(base)
    unfinished = [run for run in runs if not is_complete(run)]
    return next(reversed(unfinished or runs), None)


def _given_name() -> str | None:
    """Return the run name passed on by the first process, if it started this one.

    A name passed to another process, which also started this one's rank 0, is ignored.
    """
    name = os.environ.get(RUN_NAME, "").partition(":")[2]
    return name if _rank() and name and started_by_the_first() else None


def _rank() -> int:
    return getattr(rank_zero_only, "rank", 0)


def _agreed_name(base: Path) -> str:
    """Return a free name, the same on every rank.

    Raises:
        ConfigError: the launcher provides no way to agree on a name.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from torch.distributed import TCPStore

        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        key = f"{RUN_NAME}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{base}"
        if _rank() == 0:
            store.set(key, _free_name(base))
        return store.get(key).decode()
    if _rank() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("these processes can't agree on a name for their run; give it one, name=NAME", "name")
    return _free_name(base)


def _lock(file: TextIO) -> str | None:
    """Lock a file until this process closes it; return the other process that holds the lock, if any."""
    if lock(file):
        return None
    file.seek(0)
    return file.read().strip() or "another process"


def owner_of(run: Path) -> str | None:
    """Return the other process that works in a run folder; None if none is known."""
    with contextlib.suppress(OSError), (run / ".lock").open("r+") as file:
        return _lock(file)
    return None


class RunFolder:
    """Find or create a run folder.

    Args:
        root: usually ``runs``.
        command: pretrain or finetune.
        name: run name; by default that passed on by the parent process, the SLURM job, or the time.
        resume: continue the run of that name, or without a name the newest incomplete one.
        extend: also continue a complete run that has more to do now. Its summary stays until replaced.
        part: subfolder for this process if others work on other parts of the run; by default the whole folder.

    Raises:
        ConfigError: the name is taken, there is nothing to resume, another process uses the folder, or it isn't
            writable.
    """

    def __init__(
        self, root: str, command: str, name: str | None, *, resume: bool, extend: bool = False, part: Path | None = None
    ) -> None:
        check_name(name)
        base = Path(root) / command
        given = _given_name() or name
        if given is None and resume:
            run = find_run(root, command, None)
            if run is None:
                raise ConfigError(f"resume=last: there is no run under {base}; start one without resume", "resume")
            given = run.name
        if given is None and "SLURM_JOB_ID" in os.environ:
            given = f"slurm-{os.environ['SLURM_JOB_ID']}"
        self.name = given or _agreed_name(base)
        self.path = base / self.name
        self.started = time.time()
        started()
        if _rank() == 0:
            self._claim(resume, resume and extend, part or self.path)
            os.environ[RUN_NAME] = f"{os.getpid()}:{self.name}"

    def _claim(self, resume: bool, extend: bool, part: Path) -> None:
        exists = (self.path / "config.yaml").exists()
        if resume and not exists:
            raise ConfigError(f"{self.path}: there is no run to resume", "resume")
        if self.complete and not extend:
            raise ConfigError(f"{self.path}: this run is complete; choose another name", "name")
        try:
            part.mkdir(parents=True, exist_ok=True)
            self._lock = (part / ".lock").open("a+")
        except OSError as error:
            raise ConfigError(f"can't make the run folder {part}: {error.strerror}", "runs") from error
        self._take_lock(part)
        if exists and not resume:
            raise ConfigError(
                f"{self.path}: this run exists; continue it with resume=last or choose another name", "name"
            )

    def _take_lock(self, part: Path) -> None:
        """Lock the folder for this process; forked workers don't hold the lock, so none outlives it."""
        try:
            owner = _lock(self._lock)
        except OSError:
            note(f"{part}: its file system doesn't support locks; make sure that no other run uses this folder")
            return
        if owner is not None:
            raise ConfigError(f"{part}: {owner} is using this folder; choose another name", "name")
        try:
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._lock.flush()
        except OSError as error:
            raise ConfigError(f"can't write {part / '.lock'}: {error.strerror}", "runs") from error

    @property
    def _begun(self) -> bool:
        return (self.path / "config.yaml").exists()

    @property
    def complete(self) -> bool:
        """Whether the run is complete."""
        return is_complete(self.path)

    @rank_zero_only
    def save_config(self, config: dict[str, Any], choices: Mapping[str, Any] | None = None) -> None:
        """Write the resolved configuration and its source files before the first step.

        It is written last among the initial files, so its presence means that the run has started.
        """
        whole = {**({"defaults": dict(choices)} if choices else {}), **config}
        self._write("config.yaml", to_yaml(whole))

    @rank_zero_only
    def save_inputs(self, inputs: dict[str, Any], plugins: Sequence[str]) -> None:
        """Write the content of the inputs, and that of the configured plugins, before the first step.

        Raises:
            ConfigError: a resumed run has different inputs.
        """
        file, inputs = self.path / INPUTS, {**inputs, "plugins": plugin_hashes(plugins)}
        if self._begun and file.exists():
            refuse_other_inputs(self.path, json.loads(file.read_text()), inputs)
        self._write(INPUTS, json.dumps(inputs, indent=1))

    @rank_zero_only
    def save_split(self, text: str) -> None:
        """Write the training, validation and test crystals before the first step.

        Raises:
            ConfigError: a resumed run has a different split.
        """
        file = self.path / "split.json"
        if self._begun and file.exists():
            before, now = json.loads(file.read_text()), json.loads(text)
            if any(before.get(key) != now[key] for key in ("store_sha256", "sha256")):
                raise ConfigError(
                    f"{self.path} was started with other data: {before['counts']} crystals of {before['store']} then, "
                    f"{now['counts']} now, or other values; restore the data, or start another run",
                    "data",
                )
        self._write("split.json", text)

    def _write(self, name: str, text: str) -> None:
        try:
            write_atomically(self.path / name, text)
        except OSError as error:
            raise ConfigError(f"can't write {self.path / name}: {error.strerror}", "runs") from error

    @rank_zero_only
    def finish(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json`` and point ``latest`` here."""
        peak = peak_memory_mb()
        whole = {
            "status": "complete",
            "code_version": code_version(),
            "wall_time_s": round(time.time() - self.started, 1),
            "peak_memory_mb": None if math.isnan(peak) else round(peak),
            **summary,
        }
        self._write("summary.json", json.dumps(_without_nan(whole), indent=1, allow_nan=False))
        latest = self.path.parent / LATEST
        with contextlib.suppress(OSError):  # a file system without links still has the run under its name
            link = self.path.parent / f".latest-{os.getpid()}"
            link.symlink_to(self.path.name)
            link.replace(latest)


def _without_nan(value: Any) -> Any:
    """Replace non-finite floats by null; JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
