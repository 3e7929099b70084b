"""TensorBoard: the metrics of a run as event files in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from crysldnet.training.wandb_run import with_epoch_from_one


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
