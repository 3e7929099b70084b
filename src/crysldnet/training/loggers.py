"""Loggers in addition to the run folder's CSV."""

from __future__ import annotations

import csv as csv_module
import io
import os
import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from crysldnet.build import Part
from crysldnet.console import csv_text, note
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.errors import ConfigError, DataError
from crysldnet.io import write_atomically
from crysldnet.training.run_folder import code_version
from crysldnet.training.wandb_run import WandbRun, with_epoch_from_one

SERVICE_WAIT_S = 120
"""Timeout for starting W&B's own process; W&B's default is too short on a busy machine."""


class MetricsFile(Logger):
    """Write metrics to a CSV file, one row per logging call; epochs are counted from 1.

    Rows are written immediately. A new column rewrites the whole file atomically, so a killed run loses no row.

    Args:
        path: output file.
        steps: number of optimizer steps of the resumed run whose rows are kept.
    """

    def __init__(self, path: Path, steps: int = 0) -> None:
        super().__init__()
        self.path = path
        self._columns: list[str] = []
        self._take_over(steps)

    @property
    def name(self) -> str:
        """Empty: the run folder has a name."""
        return ""

    @property
    def version(self) -> str:
        """Empty."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the run or of its stage."""
        return str(self.path.parent)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``config.yaml`` has them."""

    @rank_zero_only
    def _take_over(self, steps: int) -> None:
        if not self.path.exists():
            return
        kept = [row for row in self._rows() if int(row["step"]) < steps]
        epochs = [int(row["epoch"]) for row in kept if row.get("epoch", "").isdigit()]
        if epochs and min(epochs) == 0:  # an earlier version, which counted from 0
            kept = [{**row, "epoch": str(int(row["epoch"]) + 1) if row["epoch"] else ""} for row in kept]
        if kept:
            self._columns = list(kept[0])
            self._write_all(kept)
        else:
            self.path.unlink()

    def _rows(self) -> list[dict[str, str]]:
        """Return the rows written so far, without a truncated last row."""
        with self.path.open(newline="") as file:
            text = file.read()
        rows = list(csv_module.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
        return [row for row in rows if None not in row.values() and row.get("step", "").isdigit()]

    def _write_all(self, rows: list[dict[str, str]]) -> None:
        write_atomically(self.path, csv_text([self._columns, *map(self._cells, rows)]))

    def _cells(self, row: Mapping[str, str]) -> list[str]:
        return [row.get(name, "") for name in self._columns]

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append a row.

        Raises:
            DataError: the file can't be written.
        """
        row = {name: str(value) for name, value in with_epoch_from_one(metrics).items()} | {"step": str(step)}
        try:
            if not row.keys() <= set(self._columns):
                rows = self._rows() if self.path.exists() else []
                self._columns = sorted({*self._columns, *row})
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._write_all([*rows, row])
                return
            with self.path.open("a", newline="") as file:
                file.write(csv_text([self._cells(row)]))
        except OSError as error:
            raise DataError(
                f"can't write {self.path}: {error.strerror}; the checkpoints are intact, continue with resume=last"
            ) from error


def _run_id(folder: Path) -> str:
    """Return the W&B id stored in a run folder, or a new one."""
    file = folder / "wandb_id"
    if file.exists():
        return file.read_text().strip()
    new = secrets.token_hex(4)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        write_atomically(file, new)
    return new


def describe_data(data: CrystalDataModule) -> dict[str, Any]:
    """Return the data hash and target units for loggers."""
    return {"data_sha256": data.store.hash, "target_units": dict(zip(data.targets, data.units, strict=True))}


def csv(*, folder: Part[Path], name: Part[str], config: Part[dict[str, Any]]) -> list[Logger]:
    """Log only to the run folder's ``metrics.csv``, which every run writes."""
    del folder, name, config
    return []


def tensorboard(*, folder: Part[Path], name: Part[str], config: Part[dict[str, Any]]) -> list[Logger]:
    """Also write event files for TensorBoard to the run folder.

    Raises:
        ConfigError: tensorboard isn't installed.
    """
    del name, config
    if find_spec("tensorboard") is None:
        text = "logger=tensorboard needs the tensorboard package: pip install 'crysldnet[tensorboard]'"
        raise ConfigError(text, "logger")
    return [TensorBoardRun(folder)]


def _begin(logger: WandbRun, config: dict[str, Any]) -> None:
    """Start the W&B run; if the environment names a W&B process that has exited, start one."""
    try:
        logger.log_hyperparams(config)
    except Exception as error:
        if type(error).__name__ != "WandbServiceConnectionError" or os.environ.pop("WANDB_SERVICE", None) is None:
            raise
        note("the W&B process that WANDB_SERVICE names is gone; this run starts its own")
        logger.log_hyperparams(config)


def wandb(
    *,
    folder: Part[Path],
    name: Part[str],
    config: Part[dict[str, Any]],
    project: str = "crysldnet",
    entity: str | None = None,
    group: str | None = None,
    tags: list[str] | None = None,
    notes: str | None = None,
    mode: Literal["online", "offline", "disabled"] | None = None,
) -> list[Logger]:
    """Also log to Weights & Biases; a resumed run uses the id in the ``wandb_id`` file of its folder.

    Args:
        folder, name: run folder and name.
        config: run configuration and further values to log; ``target_units`` are the units of the errors.
        project, entity, group, tags, notes: as in W&B.
        mode: ``offline`` needs no account and no network (``wandb sync`` later); default: WANDB_MODE.

    Raises:
        ConfigError: wandb isn't installed or can't start a run.
    """
    try:
        import wandb as library
    except ImportError:
        raise ConfigError("logger=wandb needs the wandb package: pip install 'crysldnet[wandb]'", "logger") from None
    logger = WandbRun(
        target_units=config.get("target_units", {}),
        name=name,
        id=_run_id(folder),
        resume="allow",
        save_dir=folder,
        project=project,
        entity=entity,
        group=group,
        tags=tags,
        notes=notes,
        mode=mode,
        settings=library.Settings(console="off"),
    )
    os.environ.setdefault("WANDB__SERVICE_WAIT", str(SERVICE_WAIT_S))
    try:
        _begin(logger, {**config, "code_version": code_version()})
    except library.errors.Error as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        remote = isinstance(error, library.errors.CommError) or "API key" in reason
        hint = "; logger.mode=offline needs neither account nor network" if remote else ""
        raise ConfigError(f"W&B can't begin a run: {reason}{hint}", "logger") from error
    return [logger]


class TensorBoardRun(TensorBoardLogger):
    """Write event files to ``tensorboard/`` in the run folder, for pretraining in a folder for each stage.

    A resumed run hides what an interrupted one logged beyond the checkpoint.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="tensorboard", default_hp_metric=False)

    def begin_stage(self, stage: str) -> None:
        """Write subsequent metrics to the folder of a stage."""
        self._sub_dir, self._experiment = stage, None
        self._kwargs.pop("purge_step", None)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``config.yaml`` has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log values at a step."""
        self._kwargs.setdefault("purge_step", step)
        super().log_metrics(with_epoch_from_one(metrics), step)
        self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged to disk."""
        self.experiment.flush()
