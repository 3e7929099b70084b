"""Create the Lightning Trainer from settings."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from rich import get_console

from crysldnet import signals
from crysldnet.build import build
from crysldnet.encoders.protocol import Encoder
from crysldnet.errors import CheckpointError, DeviceError
from crysldnet.platforms import no_gpu
from crysldnet.training.callbacks import AverageOfLast, BatchWatch, SeedEveryBatch, moving_average
from crysldnet.training.checkpoint_file import BEST, CheckpointFile, check_best
from crysldnet.training.checkpointing import PreemptionCheckpoint
from crysldnet.training.diagnostics import Diagnostics
from crysldnet.training.loggers import MetricsFile
from crysldnet.training.matmul import MatmulPrecision, set_matmul_precision
from crysldnet.training.nan_guard import RefuseNonFinite
from crysldnet.training.progress import RunProgress
from crysldnet.training.strategies import FirstRanksBuffers, check_combination, environment, timeout_of
from crysldnet.training.watchdog import RankWatchdog

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # mallopt(3) options
FIXED: dict[str, Any] = {"enable_model_summary": False, "use_distributed_sampler": False, "num_sanity_val_steps": 0}
"""Settings shared by all Trainers."""
KEPT = 1 << 30
"""Bytes that may stay free at the top of the heap."""


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """Hardware, precision, checkpoints and limits of a run.

    Attributes:
        accelerator: ``auto`` uses GPUs if available, else an Apple GPU (``mps``) for one device and ``32-true``, else
            the CPU.
        devices: number of devices per node.
        num_nodes: number of nodes.
        precision: as in Lightning: 32-true, bf16-mixed, 16-mixed, 64-true.
        matmul_precision: of float32 matrix products on GPUs, as in torch.set_float32_matmul_precision; null for high
            (TF32). Ignored on CPUs.
        compile: compile the encoder (torch.compile); the first steps take a minute or more.
        activation_checkpointing: recompute the encoder's layers in the backward pass: less memory, more time.
        accumulate_grad_batches: batches per optimizer step; ``data.batch_size`` is divided over them.
        swa_fraction: average the weights over this last fraction of the steps (SWA), or null.
        ema_decay: exponential moving average of the weights with decay min(decay, (1 + n) / (10 + n)), or null.
        deterministic: only allow operations that are reproducible on this device.
        progress_bar: show a progress bar.
        log_every_n_steps: steps between logged training losses; shorter runs log their last step.
        checkpoint_every_steps: optimizer steps between checkpoints within an epoch, or null.
        checkpoint_every_minutes: minutes between checkpoints; null for none.
        keep_checkpoints: number of recent checkpoints to keep.
        max_time: after which the run saves a checkpoint and stops, as DD:HH:MM:SS or in minutes; null for no limit.
        max_nonfinite_steps: maximum number of skipped steps per stage with nonfinite loss or gradient.
    """

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"
    matmul_precision: MatmulPrecision | None = None
    compile: bool = False
    activation_checkpointing: bool = False
    accumulate_grad_batches: int = 1
    ema_decay: float | None = None
    swa_fraction: float | None = None
    deterministic: bool = False
    progress_bar: bool = True
    log_every_n_steps: int = 10
    checkpoint_every_steps: int | None = None
    checkpoint_every_minutes: float | None = 10.0
    keep_checkpoints: int = 2
    max_time: float | str | None = None
    max_nonfinite_steps: int = 0

    def __post_init__(self) -> None:
        if min(self.devices, self.num_nodes, self.accumulate_grad_batches, self.log_every_n_steps) < 1:
            raise ValueError("devices, num_nodes, accumulate_grad_batches and log_every_n_steps must be at least 1")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must lie between 0 and 1, not {self.ema_decay}")
        if self.swa_fraction is not None and not 0.0 < self.swa_fraction < 1.0:
            raise ValueError(f"swa_fraction must lie between 0 and 1, not {self.swa_fraction}")
        if self.swa_fraction is not None and self.ema_decay is not None:
            raise ValueError("ema_decay and swa_fraction both average the weights; set one of them to null")
        for name in ("checkpoint_every_steps", "checkpoint_every_minutes", "limit_minutes", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name.replace('limit_minutes', 'max_time')} must be over 0, not {value}")
        if self.max_nonfinite_steps < 0:
            raise ValueError(f"max_nonfinite_steps must be 0 or more, not {self.max_nonfinite_steps}")

    @property
    def limit_minutes(self) -> float | None:
        """``max_time`` in minutes."""
        if not isinstance(self.max_time, str):
            return self.max_time
        if not (match := re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", self.max_time)):
            raise ValueError(f"max_time must be DD:HH:MM:SS or a number of minutes, not {self.max_time!r}")
        days, hours, minutes, seconds = map(int, match.groups())
        return (days * 24 + hours) * 60 + minutes + seconds / 60

    def check(self, strategy: Strategy | str) -> None:
        """Check that this machine and the strategy support the settings, before anything is written.

        Raises:
            DeviceError: there are fewer devices than requested.
            ConfigError: settings are incompatible, or a different number of processes was started.
        """
        check_combination(strategy, self, self.resolve_accelerator())

    def prepare(self, encoder: Encoder) -> None:
        """Compile an encoder or enable activation checkpointing, as configured."""
        if self.compile:
            encoder.compile_layers()
        if self.activation_checkpointing:
            encoder.checkpoint_layers()

    @property
    def device(self) -> str:
        """Device for predictions after training, the CPU in place of an Apple GPU, because they need float64."""
        return "cuda" if self.resolve_accelerator() == "gpu" else "cpu"

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.devices * self.num_nodes

    def resolve_accelerator(self) -> Literal["cpu", "gpu", "mps"]:
        """Return the accelerator to use.

        Raises:
            DeviceError: there are fewer devices than requested.
        """
        gpus, has_mps = torch.cuda.device_count(), torch.backends.mps.is_available()
        if self.accelerator == "mps" and not has_mps:
            raise DeviceError("trainer.accelerator=mps: torch finds no Apple GPU; leave it out, to use what there is")
        for_mps = self.world_size == 1 and self.precision == "32-true"
        if self.accelerator == "mps" or (self.accelerator == "auto" and not gpus and has_mps and for_mps):
            return "mps"
        if self.accelerator == "cpu" or (self.accelerator == "auto" and gpus == 0):
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            if self.devices > cores:
                raise DeviceError(
                    f"trainer.devices={self.devices}: this machine has no GPU, and {self.devices} CPU processes need "
                    f"more than its {cores} cores; ask for at most {cores}"
                )
            return "cpu"
        if not gpus:
            raise DeviceError(f"trainer.accelerator=gpu: {no_gpu()}; or leave it out, to compute on the CPU")
        if self.devices > gpus:
            raise DeviceError(f"trainer.devices={self.devices}: this machine has {gpus} GPU(s); ask for at most {gpus}")
        return "gpu"


def checked_settings(trainer: Mapping[str, Any], strategy: Mapping[str, Any]) -> TrainerSettings:
    """Build the Trainer settings and check that this machine and the strategy support them."""
    settings: TrainerSettings = build(trainer, "trainer")
    settings.check(build(strategy, "strategy"))
    return settings


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for the next step.

    By default it returns every block over a few megabytes to the system, and each CPU step spends much of its time
    zeroing the pages of its activations. This has no effect except on Linux with glibc.
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
    gradient_clip_val: float | None,
    owner: Mapping[str, Any],
    resume: bool = False,
    loggers: Sequence[Logger] = (),
    monitor: str | None = None,
    validate_every: int = 1,
    patience: int | None = None,
    stage: str = "training",
) -> pl.Trainer:
    """Create the Trainer of one stage.

    Args:
        settings: devices, precision and so on.
        strategy: distribution over devices.
        folder: folder for ``metrics.csv`` and ``checkpoints/``.
        epochs, seed: number of epochs and random seed.
        gradient_clip_val: maximum gradient norm; None for no clipping.
        owner: command, stage and model, as plain values, that the checkpoints belong to.
        resume: continue from the last checkpoint, if any.
        loggers: in addition to the CSV.
        monitor: metric whose lowest validation value selects ``best.ckpt``; None keeps only the last.
        validate_every: epochs between validations and checkpoints.
        patience: stop after this many validations without improvement of ``monitor``; None for never.
        stage: name in the progress display.

    Raises:
        CheckpointError: no checkpoint is usable, the best one is damaged, or the folder can't be created.
    """
    accelerator = _prepare_process(settings)
    files = CheckpointFile(owner, settings.keep_checkpoints)
    start = _newest(files, folder / "checkpoints", with_best=monitor is not None) if resume else None
    preemption = _preemption_checkpoint(settings, folder / "checkpoints", validate_every, start)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=strategy,
        precision=settings.precision,
        max_epochs=epochs,
        check_val_every_n_epoch=validate_every,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=gradient_clip_val,
        deterministic=settings.deterministic,
        callbacks=[*_callbacks(settings, strategy, folder, seed, monitor, patience, stage), preemption],
        logger=[MetricsFile(folder / "metrics.csv", start[1]["step"] if start is not None else 0), *loggers],
        log_every_n_steps=settings.log_every_n_steps,
        enable_progress_bar=settings.progress_bar and get_console().is_jupyter,
        plugins=[files, *environment()],
        **FIXED,
    )
    _keep_signal_handlers(trainer)
    return trainer


def _prepare_process(settings: TrainerSettings) -> Literal["cpu", "gpu", "mps"]:
    """Set what holds for the whole process; return the accelerator."""
    if (accelerator := settings.resolve_accelerator()) == "cpu":
        keep_freed_memory()
    set_matmul_precision(settings.matmul_precision, accelerator)
    return accelerator


def _preemption_checkpoint(
    settings: TrainerSettings, checkpoints: Path, every_epochs: int, start: tuple[Path, dict[str, Any]] | None
) -> PreemptionCheckpoint:
    return PreemptionCheckpoint(
        _free(checkpoints),
        every_steps=settings.checkpoint_every_steps,
        every_minutes=settings.checkpoint_every_minutes,
        limit_minutes=settings.limit_minutes,
        every_epochs=every_epochs,
        start=start,
    )


def _free(checkpoints: Path) -> Path:
    if checkpoints.exists() and not checkpoints.is_dir():
        raise CheckpointError(f"{checkpoints}: a file is in place of the checkpoints folder; move it")
    return checkpoints


def _newest(files: CheckpointFile, checkpoints: Path, *, with_best: bool) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint to resume from and its header, after verifying that of the best epoch."""
    start = files.newest(_free(checkpoints))
    if start is not None and with_best:
        check_best(checkpoints)
    return start


def _keep_signal_handlers(trainer: pl.Trainer) -> None:
    """Reinstall our signal handlers after Lightning's, which would make ranks wait outside training."""
    connector = trainer._signal_connector
    register = connector.register_signal_handlers

    def register_and_reinstall() -> None:
        register()
        signals.reinstall_handlers()

    connector.register_signal_handlers = register_and_reinstall  # type: ignore[method-assign]


def _callbacks(
    settings: TrainerSettings,
    strategy: Strategy | str,
    folder: Path,
    seed: int,
    monitor: str | None,
    patience: int | None,
    stage: str,
) -> list[Callback]:
    """Return the callbacks of a stage in calling order; those that save and stop come last."""
    callbacks: list[Callback] = [
        RefuseNonFinite(folder, settings.max_nonfinite_steps),
        SeedEveryBatch(seed),
        BatchWatch(),
        FirstRanksBuffers(),
        RankWatchdog(timeout_of(strategy)),
    ]
    if settings.swa_fraction is not None:
        callbacks.append(AverageOfLast(settings.swa_fraction))
    if settings.ema_decay is not None:
        callbacks.append(moving_average(settings.ema_decay))
    if settings.progress_bar:
        callbacks.append(TQDMProgressBar(leave=False) if get_console().is_jupyter else RunProgress(stage))
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
