"""Training progress: one bar in a terminal, or occasional lines in a log."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from crysldnet.console import note

SHOWN = ("val/mae", "val/accuracy", "val/loss")
"""Metrics to show, the first that was logged; with several targets ``val/mae`` is their mean."""
LINES = 10
"""A log gets one line per this fraction of the training."""


class RunProgress(Callback):
    """Show the stage, the epoch, the last validation, and estimated end.

    Args:
        stage: name such as ``stage 1 of 2 (vae)``.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._bar: Progress | None = None
        self._begun = time.monotonic()
        self._first = self._printed = 0
        self._validated = ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar; a resumed run starts where it stopped."""
        if not trainer.is_global_zero:
            return
        self._begun, self._first = time.monotonic(), self._done(trainer)
        self._printed = self._first * LINES // self._total(trainer)
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[end]}"),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._bar.add_task(self._text(trainer), total=self._total(trainer), completed=self._first, end="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar."""
        if self._bar is not None:
            done = self._done(trainer)
            self._bar.update(
                self._bar.task_ids[0], completed=done, description=self._text(trainer), end=self._end(trainer)
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the validation metric."""
        name = next((name for name in SHOWN if name in trainer.callback_metrics), None)
        if name is not None:
            self._validated = f", {name} {float(trainer.callback_metrics[name]):.4g}"

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print a line if no terminal shows the bar."""
        done, total = self._done(trainer), self._total(trainer)
        part = done * LINES // total
        if trainer.is_global_zero and self._bar is None and self._printed < part and done < total:
            self._printed = part
            note(f"{self._text(trainer)}, {100 * done // total} %{self._end(trainer)}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar so that it doesn't overwrite the message."""
        self.on_train_end(trainer, pl_module)

    def _total(self, trainer: pl.Trainer) -> int:
        return max(int(trainer.num_training_batches) * (trainer.max_epochs or 1), 1)

    def _done(self, trainer: pl.Trainer) -> int:
        return trainer.fit_loop.epoch_loop.total_batch_idx + 1

    def _text(self, trainer: pl.Trainer) -> str:
        return f"{self.stage}: epoch {trainer.current_epoch + 1} of {trainer.max_epochs}{self._validated}"

    def _end(self, trainer: pl.Trainer) -> str:
        """Return the estimated end of the stage, or an empty string."""
        done = self._done(trainer)
        if done <= self._first:
            return ""
        left = (time.monotonic() - self._begun) / (done - self._first) * (self._total(trainer) - done)
        end = datetime.now() + timedelta(seconds=left)
        return f", ends about {end:{'%H:%M' if left < 86_400 else '%Y-%m-%d %H:%M'}}"
