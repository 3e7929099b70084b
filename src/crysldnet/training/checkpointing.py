"""When a run saves checkpoints, when it stops, and how it resumes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import distributed

from crysldnet import signals
from crysldnet.data.sampler import ORDER
from crysldnet.errors import CheckpointError, Interrupted
from crysldnet.training.checkpoint_file import HEADER, LAST
from crysldnet.training.strategies import SHARDED, name_of

SIGNALS = (*signals.SIGNALS, signal.SIGINT)
"""Signals that stop a run at its next optimizer step."""
AGREE_MS = 100
"""Minimum milliseconds between synchronizations of the ranks if steps are shorter."""
TIME_LIMIT = 1
"""Reason to stop, in addition to signal numbers."""


@cache
def started() -> float:
    """Return when this process first called this function, on the monotonic clock, as the start of the run."""
    return time.monotonic()


class PreemptionCheckpoint(Checkpoint):
    """Save checkpoints regularly and before stopping, between two optimizer steps.

    A checkpoint is taken before the first batch of an optimizer step, when everything in the previous step (moving
    averages, the teacher, the row in ``metrics.csv``) is complete, or at the end of an epoch, after validation. All
    ranks save and stop at the same step. They synchronize at the end of an epoch, and within one about every tenth of a
    second: a GPU step takes milliseconds, too short for a network message before each.

    Args:
        folder: checkpoint folder.
        every_epochs: epochs between end-of-epoch checkpoints.
        every_steps: optimizer steps between checkpoints within an epoch; None for none.
        every_minutes: minutes between checkpoints; None for none.
        limit_minutes: minutes after the start of the process when the run stops; it takes at least one step, so that
            restarted runs eventually finish; None for no limit.
        start: checkpoint to resume from and its header.

    Raises:
        Interrupted: after the checkpoint, if a signal or the limit stops the run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every_steps: int | None,
        every_minutes: float | None,
        limit_minutes: float | None,
        every_epochs: int = 1,
        start: tuple[Path, dict[str, Any]] | None = None,
    ) -> None:
        self.path, self.start = folder / LAST, start
        self.every_epochs, self.every_steps = every_epochs, every_steps
        self.every_minutes, self.limit_minutes = every_minutes, limit_minutes
        self._signal = 0
        self._began_at = 0
        self._saved_step: int | None = None
        self._inside_epoch = False
        self._saved_at = time.monotonic()
        self._agreed = (0, time.monotonic())
        """Step and time of the last synchronization of the ranks."""
        self._agree_at = 0
        self._group: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set up communication with the other ranks that doesn't wait for a GPU."""
        if stage == "fit" and trainer.world_size > 1 and distributed.get_backend() != "gloo":
            self._group = distributed.new_group(backend="gloo")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace Lightning's signal handlers, which would exit without a checkpoint; restored at the end."""
        self._saved_at, self._began_at = time.monotonic(), trainer.global_step
        self._agreed, self._agree_at = (trainer.global_step, self._saved_at), trainer.global_step
        self._saved_step = None if self.start is None else trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._note_signal)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal:  # second Ctrl-C: don't wait for the end of the step
            raise KeyboardInterrupt
        self._signal = number

    def stop_if_signalled(self, where: str, trainer: pl.Trainer | None = None) -> None:
        """Raise ``Interrupted`` if a signal arrived, given the Trainer to any process, and hasn't been handled."""
        reason = self._signal if trainer is None else self._agree(trainer)[0]
        if reason not in (0, TIME_LIMIT):
            self._stop(reason, where)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Save or stop before an optimizer step."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        reason, due = self._agree(trainer, now=False)
        step = trainer.global_step
        if batch_idx > 0 and (reason or due):
            self._save(trainer, inside_epoch=True)
        if reason and step in (
            self._saved_step,
            self._began_at,
        ):  # otherwise an epoch is unsaved: stop one step later
            self._stop(reason, f"in epoch {trainer.current_epoch + 1}, after {batch_idx} batches (step {step})")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, and stop if requested."""
        reason, due = self._agree(trainer)
        done = trainer.current_epoch + 1
        if reason or due or trainer.should_stop or done % self.every_epochs == 0 or done == trainer.max_epochs:
            self._save(trainer, inside_epoch=False)
        if reason:
            self._stop(reason, f"after epoch {trainer.current_epoch + 1} of {trainer.max_epochs}")

    def _agree(self, trainer: pl.Trainer, *, now: bool = True) -> tuple[int, bool]:
        """Return the reason to stop on any rank (0 for none) and whether a checkpoint is due.

        Args:
            trainer: Trainer of this rank.
            now: synchronize in any case; otherwise only when due. All ranks get the same answer.
        """
        clock, step = time.monotonic(), trainer.global_step
        every, saved = self.every_steps, self._saved_step
        due = every is not None and step > 0 and step % every == 0 and step != saved  # identical on all ranks
        if trainer.world_size > 1 and not now and step < self._agree_at:
            return 0, due
        over = self.limit_minutes is not None and clock - started() >= 60.0 * self.limit_minutes
        reason = self._signal or (TIME_LIMIT if over and step > self._began_at else 0)
        due |= self.every_minutes is not None and clock - self._saved_at >= 60.0 * self.every_minutes
        if trainer.world_size == 1:
            return reason, due
        before, since = self._agreed
        step_ms = max(1, round(1000.0 * (clock - since) / max(1, step - before)))
        wishes = torch.tensor([reason, due, step_ms], dtype=torch.int32)
        distributed.all_reduce(wishes, distributed.ReduceOp.MAX, group=self._group)
        self._agreed, self._agree_at = (step, time.monotonic()), step + max(1, AGREE_MS // int(wishes[2]))
        return int(wishes[0]), bool(wishes[1])

    def _save(self, trainer: pl.Trainer, *, inside_epoch: bool) -> None:
        self._inside_epoch = inside_epoch
        trainer.save_checkpoint(self.path, weights_only=False)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def _stop(self, reason: int, where: str) -> NoReturn:
        signals.mark_signal()
        why = "the time limit" if reason == TIME_LIMIT else signal.Signals(reason).name
        raise Interrupted(f"stopped by {why} {where}; continue with resume=last")

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find the best epoch's file in the current run folder; Lightning loses it if the folder was moved."""
        for state in checkpoint.get("callbacks", {}).values():
            if not isinstance(state, dict) or "best_model_path" not in state:
                continue
            old, new = state["dirpath"], str(self.path.parent.absolute())
            for key, value in state.items():
                if isinstance(value, str):
                    state[key] = value.replace(old, new)
            state["best_k_models"] = {path.replace(old, new): score for path, score in state["best_k_models"].items()}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Record the position of the run, and set Lightning's counters to a point between two batches."""
        inside = self._inside_epoch
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        checkpoint[HEADER] = {
            "epoch": trainer.current_epoch + (0 if inside else 1),
            "batch": progress.completed if inside else 0,
            "step": trainer.global_step,
            "world_size": trainer.world_size,
            "accumulate": trainer.accumulate_grad_batches,
            "steps_per_epoch": int(trainer.num_training_batches) // trainer.accumulate_grad_batches,
            "epochs": trainer.max_epochs,
            "strategy": name_of(trainer.strategy),
            "order": ORDER,
            "finished": not inside and (trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs),
            "stopped_early": not inside and trainer.should_stop,
        }
        # outside the header, which must fit into a zip archive comment: many targets have hundreds of metrics
        checkpoint["metrics"] = {} if inside else {name: float(v) for name, v in trainer.callback_metrics.items()}
        if inside:
            # The next batch has been fetched but not started, and is fetched again on resume. For Lightning's loop,
            # four equal counters mean that everything so far is complete.
            counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            for part in ("total", "current"):
                counts[part] = {**counts[part], "ready": counts[part]["completed"]}
            counts["is_last_batch"] = False


def check_position(path: Path, header: Mapping[str, Any], trainer: pl.Trainer, steps_per_epoch: int) -> None:
    """Check that a run can resume from a checkpoint with its current processes.

    Raises:
        CheckpointError: it is within an epoch whose batches were divided differently; an epoch would have a different
            number of steps; or weights are sharded differently.
    """
    before, strategy = header.get("strategy"), name_of(trainer.strategy)
    if before is not None and before != strategy and {before, strategy} & set(SHARDED):
        raise CheckpointError(
            f"{path}: the run was started with strategy={before}, and the optimizer state has another form with "
            f"strategy={strategy}, because one of them shards it. Continue with strategy={before}"
        )
    if header["batch"] and header.get("order", 1) != ORDER:
        raise CheckpointError(
            f"{path}: the run stopped inside epoch {header['epoch'] + 1} under an earlier version, which ordered its "
            "batches otherwise. Go on with that version to the end of the epoch, or start another run"
        )
    planned, epochs = header.get("steps_per_epoch", steps_per_epoch), header.get("epochs", trainer.max_epochs)
    off = abs(planned - steps_per_epoch)
    if not header["finished"] and (off > 0.02 * planned or (off and epochs != trainer.max_epochs)):
        raise CheckpointError(
            f"{path}: an epoch had {planned} steps and would have {steps_per_epoch} now, because atoms or edges bound "
            "its batches (data.batch_atoms, data.max_atoms, data.max_edges), which are packed otherwise for another "
            "number of processes; the learning rates were planned for the former. Go on with "
            f"{header['world_size']} process(es) × trainer.accumulate_grad_batches={header['accumulate']}"
        )
    then = (header["world_size"], header["accumulate"])
    now = (trainer.world_size, trainer.accumulate_grad_batches)
    if header["batch"] and then != now:
        raise CheckpointError(
            f"{path}: the run stopped inside epoch {header['epoch'] + 1}, whose batches are shared by {then[0]} "
            f"process(es) × trainer.accumulate_grad_batches={then[1]}; the rest of them can't be shared by {now[0]} "
            f"× {now[1]}. Go "
            "on with as many as before; their number may change at the end of an epoch"
        )
