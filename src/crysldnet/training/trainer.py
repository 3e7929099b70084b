"""The Lightning Trainer, made from settings."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only
from rich import get_console
from torch import distributed, nn

from crysldnet import signals
from crysldnet.console import note
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.errors import CheckpointError, DataError, DeviceError, Interrupted
from crysldnet.platforms import is_out_of_memory, no_gpu
from crysldnet.training.averaging import AverageOfLast, moving_average
from crysldnet.training.batch_watch import BatchWatch
from crysldnet.training.checkpoint_file import BEST, CheckpointFile, check_best
from crysldnet.training.checkpointing import SaveAndStop, check_position
from crysldnet.training.diagnostics import Diagnostics
from crysldnet.training.loggers import MetricsFile
from crysldnet.training.nan_guard import RefuseNonFinite
from crysldnet.training.strategies import (
    SHARDED,
    FirstRanksBuffers,
    check_combination,
    environment,
    name_of,
    timeout_of,
)
from crysldnet.training.watchdog import RankWatch, of_a_collective

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Of mallopt(3)."""
KEPT = 1 << 30
"""Bytes that may stay free at the top of the heap."""


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """Where and how a run is executed.

    Attributes:
        accelerator: ``auto`` takes GPUs where there are any, else the CPU.
        devices: number of devices a node.
        nodes: number of nodes.
        precision: as in Lightning: 32-true, bf16-mixed, 16-mixed, 64-true.
        compile: compile the encoder (torch.compile); the first steps take a minute or more.
        activation_checkpointing: compute the encoder's layers again in the backward pass instead of keeping what they
            computed: less memory, more time.
        accumulate: batches per optimizer step; ``data.batch_size`` is divided over them.
        average_last: average the weights of this last share of the steps (SWA), which validates and is exported; null
            for none.
        ema_decay: keep an exponential moving average of the weights, which validates and is exported; null for none.
            It begins shorter: the decay of step n is at most (1 + n) / (10 + n).
        deterministic: refuse operations that aren't reproducible on this device.
        progress_bar: show one.
        log_every: steps between two logged training losses; a run of fewer steps logs its last one.
        checkpoint_every_steps: optimizer steps between two checkpoints within an epoch; null for none. The end of every
            epoch has one.
        checkpoint_every_minutes: minutes after which the next step saves one; null for none.
        keep_checkpoints: how many of the last checkpoints to keep.
        time_limit_minutes: minutes since the start after which the run saves a checkpoint and stops as unfinished; null
            for no limit.
        max_bad_steps: optimizer steps of a stage that may be skipped because their loss or gradient isn't finite.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    nodes: int = 1
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"
    compile: bool = False
    activation_checkpointing: bool = False
    accumulate: int = 1
    ema_decay: float | None = None
    average_last: float | None = None
    deterministic: bool = False
    progress_bar: bool = True
    log_every: int = 10
    checkpoint_every_steps: int | None = None
    checkpoint_every_minutes: float | None = 10.0
    keep_checkpoints: int = 2
    time_limit_minutes: float | None = None
    max_bad_steps: int = 0

    def __post_init__(self) -> None:
        if min(self.devices, self.nodes, self.accumulate, self.log_every) < 1:
            raise ValueError("devices, nodes, accumulate and log_every must be at least 1")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must lie between 0 and 1, not {self.ema_decay}")
        if self.average_last is not None and not 0.0 < self.average_last < 1.0:
            raise ValueError(f"average_last must lie between 0 and 1, not {self.average_last}")
        if self.average_last is not None and self.ema_decay is not None:
            raise ValueError("ema_decay and average_last both average the weights; set one of them to null")
        for name in ("checkpoint_every_steps", "checkpoint_every_minutes", "time_limit_minutes", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be over 0, not {value}")
        if self.max_bad_steps < 0:
            raise ValueError(f"max_bad_steps must be 0 or more, not {self.max_bad_steps}")

    def check(self, strategy: Strategy | str) -> None:
        """Check that this machine and the strategy can do what is asked, before anything is written.

        Raises:
            DeviceError: there are fewer devices than asked for.
            ConfigError: settings don't go together, or another number of processes was started.
        """
        check_combination(strategy, self, self.resolve_accelerator())

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.devices * self.nodes

    def resolve_accelerator(self) -> Literal["cpu", "gpu"]:
        """Return what to run on.

        Raises:
            DeviceError: there are fewer devices than asked for.
        """
        gpus = torch.cuda.device_count()
        if self.accelerator == "cpu" or (self.accelerator == "auto" and gpus == 0):
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            if self.devices > cores:
                raise DeviceError(
                    f"trainer.devices={self.devices}: there is no GPU here, and {self.devices} CPU processes need more "
                    f"than the {cores} cores of this machine; ask for at most {cores}"
                )
            return "cpu"
        if not gpus:
            raise DeviceError(f"trainer.accelerator=gpu: {no_gpu()}; or leave it out, to compute on the CPU")
        if self.devices > gpus:
            raise DeviceError(f"trainer.devices={self.devices}: this machine has {gpus} GPU(s); ask for at most {gpus}")
        return "gpu"


class SeedEveryBatch(Callback):
    """Seed torch before every batch from (seed, epoch, number of the batch in the epoch).

    Random numbers then don't depend on what was drawn before, so a resumed run draws the same ones as one that was
    never interrupted, and a batch draws the same ones whichever rank it falls to. Validation batches draw the same
    ones every epoch.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _seed(self, trainer: pl.Trainer, epoch: int, batch_idx: int) -> None:
        number = batch_idx * trainer.world_size + trainer.global_rank
        torch.manual_seed(int(np.random.SeedSequence([self.seed, epoch, number]).generate_state(1, np.uint64)[0] >> 1))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Seed by epoch and batch."""
        self._seed(trainer, trainer.current_epoch + 1, batch_idx)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed by batch alone."""
        self._seed(trainer, 0, batch_idx)


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed, for the next step needs them again.

    By default it hands every block over some megabytes back to the system, and each step on a CPU spends a good part
    of its time in having the pages of its activations zeroed. Elsewhere than on Linux with glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(MMAP_MAX, 0)
        library.mallopt(TRIM_THRESHOLD, KEPT)


def make_trainer(
    settings: TrainerSettings,
    strategy: Strategy | str,
    *,
    folder: Path,
    epochs: int,
    seed: int,
    gradient_clip: float | None,
    owner: Mapping[str, Any],
    resume: bool = False,
    loggers: Sequence[Logger] = (),
    monitor: str | None = None,
    validate_every: int = 1,
    patience: int | None = None,
) -> pl.Trainer:
    """Make the Trainer of one stage.

    Args:
        settings: devices, precision and so on.
        strategy: how the run is spread over devices.
        folder: gets ``metrics.csv`` and ``checkpoints/``.
        epochs: number of epochs.
        seed: of every random number drawn in training.
        gradient_clip: largest norm of the gradient; None for no clipping.
        owner: command, stage and model, as plain values, that the checkpoints belong to.
        resume: go on from the last checkpoint, where there is one.
        loggers: besides the CSV.
        monitor: metric whose lowest value on validation chooses ``best.ckpt``; None keeps the last alone.
        validate_every: epochs from one validation, and one checkpoint, to the next.
        patience: validations without a lower value of ``monitor`` after which training stops; None for none.

    Raises:
        CheckpointError: none of the checkpoints can be resumed from, that of the best epoch is damaged, or there is no
            place for them.
    """
    accelerator = settings.resolve_accelerator()
    if accelerator == "cpu":
        keep_freed_memory()
    checkpoints = folder / "checkpoints"
    if checkpoints.exists() and not checkpoints.is_dir():
        raise CheckpointError(f"{checkpoints}: there is a file where the checkpoints' folder belongs; move it away")
    files = CheckpointFile(owner, settings.keep_checkpoints)
    start = files.newest(checkpoints) if resume else None
    if start is not None and monitor is not None:
        check_best(checkpoints)  # now, not after days
    save_and_stop = SaveAndStop(
        checkpoints,
        every_steps=settings.checkpoint_every_steps,
        every_minutes=settings.checkpoint_every_minutes,
        limit_minutes=settings.time_limit_minutes,
        every_epochs=validate_every,
        start=start,
    )
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=settings.devices,
        num_nodes=settings.nodes,
        strategy=strategy,
        precision=settings.precision,
        max_epochs=epochs,
        check_val_every_n_epoch=validate_every,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=gradient_clip,
        deterministic=settings.deterministic,
        callbacks=[*_callbacks(settings, strategy, folder, seed, monitor, patience), save_and_stop],
        logger=[MetricsFile(folder / "metrics.csv", start[1]["step"] if start is not None else 0), *loggers],
        log_every_n_steps=settings.log_every,
        enable_progress_bar=settings.progress_bar,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        plugins=[files, *environment()],
    )
    _heed_signals(trainer)
    return trainer


def _heed_signals(trainer: pl.Trainer) -> None:
    """Let signals be heeded at once wherever this Trainer isn't training; Lightning's handler has ranks wait there."""
    connector = trainer._signal_connector
    register = connector.register_signal_handlers

    def register_and_heed() -> None:
        register()
        signals.heed_again()

    connector.register_signal_handlers = register_and_heed  # type: ignore[method-assign]


def _callbacks(
    settings: TrainerSettings,
    strategy: Strategy | str,
    folder: Path,
    seed: int,
    monitor: str | None,
    patience: int | None,
) -> list[Callback]:
    """Return the callbacks of a stage, in the order in which they are called; what saves and stops comes after them."""
    callbacks: list[Callback] = [
        RefuseNonFinite(folder, settings.max_bad_steps),
        SeedEveryBatch(seed),
        BatchWatch(),
        FirstRanksBuffers(),
        RankWatch(timeout_of(strategy)),
    ]
    if settings.average_last is not None:
        callbacks.append(AverageOfLast(settings.average_last))
    if settings.ema_decay is not None:
        callbacks.append(moving_average(settings.ema_decay))
    if settings.progress_bar:
        bar = TQDMProgressBar if get_console().is_jupyter else RichProgressBar
        callbacks.append(bar(leave=False))
    callbacks += [LearningRateMonitor(logging_interval="epoch"), Diagnostics()]
    if monitor is not None:
        callbacks.append(
            ModelCheckpoint(
                folder / "checkpoints",
                filename=Path(BEST).stem,
                monitor=monitor,
                mode="min",
                enable_version_counter=False,
            )
        )
        if patience is not None:
            callbacks.append(EarlyStopping(monitor, patience=patience, mode="min", check_finite=False))
    return callbacks


def total_steps(trainer: pl.Trainer) -> int:
    """Return the optimizer steps of a whole run, counted by the sampler itself."""
    data: CrystalDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return data.steps_per_epoch(trainer.world_size, trainer.accumulate_grad_batches) * (trainer.max_epochs or 1)


@rank_zero_only
def announce(stage: str, trainer: pl.Trainer, model: nn.Module, data: CrystalDataModule) -> None:
    """Print once what is about to run: crystals, parameters, devices, and what was left out."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    device = f"{trainer.world_size} × {trainer.accelerator.__class__.__name__.removesuffix('Accelerator')}"
    note(
        f"{stage}: {len(data.rows['train']):,} training and {len(data.rows['val']):,} validation crystals of "
        f"{data.store.name}, {trainable:,} parameters, {trainer.max_epochs} epochs on {device}"
    )
    for reason, count in data.left_out.items():
        note(f"{count:,} crystals left out: {reason}")


def _no_meeting(error: BaseException, nodes: int) -> str:
    """Say why the processes of a run don't come together, and what mends it."""
    reason = str(error).splitlines()[0].rstrip(".")
    if "in use" in reason:
        mend = f"set MASTER_PORT to a free one{', or leave it unset' if nodes == 1 else ''}"
    else:
        mend = "where one of them isn't there, its own error stands further up"
    place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    return f"the processes of this run can't meet at {place}: {reason}; {mend}"


def fit(trainer: pl.Trainer, module: pl.LightningModule, data: CrystalDataModule) -> dict[str, float]:
    """Train to the end, from the checkpoint that the Trainer was made to resume; return the last value of each metric.

    Raises:
        Interrupted: the run was stopped before its last epoch.
        CheckpointError: it can't go on from the checkpoint with the processes or the strategy that there are now.
        DataError: a process that builds batches died.
        DeviceError: the processes of the run can't meet, or memory ran out.
    """
    path: Path | None = None
    header: dict[str, Any] = {"epoch": 0, "batch": 0, "finished": False}
    save_and_stop = next(c for c in trainer.callbacks if isinstance(c, SaveAndStop))  # type: ignore[attr-defined]
    steps = data.steps_per_epoch(trainer.world_size, trainer.accumulate_grad_batches)
    if save_and_stop.start is not None:
        path, header = save_and_stop.start
        check_position(path, header, trainer, steps)
    # A run of fewer steps than log_every has a training loss too.
    trainer.log_every_n_steps = min(trainer.log_every_n_steps, steps * (trainer.max_epochs or 1))  # type: ignore[attr-defined]
    data.start = (header["epoch"], header["batch"])
    at_end = header["epoch"] >= (trainer.max_epochs or 0)
    stopped_early = header["finished"] and header.get("stopped_early", not at_end)
    trained = header["finished"] and (stopped_early or at_end)
    try:
        if not stopped_early:
            with contextlib.suppress(SystemExit):  # Lightning exits by itself on the second Ctrl-C
                trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            watch = next(c for c in trainer.callbacks if isinstance(c, BatchWatch))  # type: ignore[attr-defined]
            raise watch.error(trainer.accumulate_grad_batches) from error
        if trainer.world_size > 1 and of_a_collective(error) and not distributed.is_initialized():
            signals.children[:] = getattr(trainer.strategy.launcher, "procs", [])
            signals.end_children()  # they would wait, and come to the meeting of the next run at that place
            raise DeviceError(_no_meeting(error, trainer.num_nodes)) from error
        if "DataLoader worker" not in str(error):
            raise
        save_and_stop.stop_if_told("where it can't go on without its workers; the last checkpoint stands")
        raise DataError(
            f"a process that builds batches died ({str(error).splitlines()[0]}); if memory ran out, lower "
            "data.num_workers or data.batch_size, and go on with resume=last"
        ) from error
    enough = any(isinstance(c, EarlyStopping) and c.stopped_epoch for c in trainer.callbacks)  # type: ignore[attr-defined]
    unfinished = trainer.current_epoch < (trainer.max_epochs or 0) and not enough and not stopped_early
    if trainer.interrupted or unfinished:
        raise Interrupted(
            f"stopped after epoch {trainer.current_epoch} of {trainer.max_epochs}; continue with resume=last"
        )
    if not stopped_early:
        save_and_stop.stop_if_told("after training", trainer)
    # The averaged weights are in the module now. The callback would swap them out again in a later validation, and
    # load the unaveraged ones for a test.
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
    if path is not None and trained:  # to its end, before
        saved = torch.load(path, weights_only=True, map_location="cpu")
        if stopped_early or name_of(trainer.strategy) not in SHARDED:  # else Lightning has given each rank its share
            module.load_state_dict(saved["state_dict"])
        return saved["metrics"] if "metrics" in saved else header["metrics"]
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
