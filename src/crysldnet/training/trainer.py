"""The Lightning Trainer, made from settings."""

from __future__ import annotations

import contextlib
import csv as csv_module
import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch import nn

from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.errors import ConfigError, DeviceError, Interrupted
from crysldnet.training.averaging import AverageOfLast
from crysldnet.training.diagnostics import Diagnostics

LAST = "last.ckpt"
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
        accumulate: batches per optimizer step; ``data.batch_size`` is divided over them.
        average_last: average the weights of this last share of the steps (SWA), which validates and is exported; null
            for none.
        ema_decay: keep an exponential moving average of the weights, which validates and is exported; null for none.
        deterministic: refuse operations that aren't reproducible on this device.
        progress_bar: show one.
        log_every: steps between two logged training losses.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    nodes: int = 1
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"
    compile: bool = False
    accumulate: int = 1
    ema_decay: float | None = None
    average_last: float | None = None
    deterministic: bool = False
    progress_bar: bool = True
    log_every: int = 10

    def __post_init__(self) -> None:
        if min(self.devices, self.nodes, self.accumulate, self.log_every) < 1:
            raise ValueError("devices, nodes, accumulate and log_every must be at least 1")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must lie between 0 and 1, not {self.ema_decay}")
        if self.average_last is not None and not 0.0 < self.average_last < 1.0:
            raise ValueError(f"average_last must lie between 0 and 1, not {self.average_last}")
        if self.average_last is not None and self.ema_decay is not None:
            raise ValueError("ema_decay and average_last both average the weights; set one of them to null")

    def check(self, strategy: Strategy | str) -> None:
        """Check that this machine and the strategy can do what is asked, before anything is written.

        Raises:
            DeviceError: there are fewer devices than asked for.
            ConfigError: the strategy is for one device, or for GPUs alone.
        """
        accelerator = self.resolve_accelerator()
        if self.world_size > 1 and strategy == "auto":
            raise ConfigError(f"{self.world_size} processes need strategy=ddp (or fsdp), not single", "strategy")
        if isinstance(strategy, FSDPStrategy) and accelerator == "cpu":
            raise ConfigError("strategy=fsdp needs GPUs; on CPU use strategy=ddp", "strategy")
        for key in ("ema_decay", "average_last"):
            if isinstance(strategy, FSDPStrategy) and getattr(self, key) is not None:
                raise ConfigError(f"strategy=fsdp can't average weights; set trainer.{key}=null", f"trainer.{key}")

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
        resume: keep what an earlier part of this run logged up to its last checkpoint.
        loggers: besides the CSV.
        monitor: metric whose lowest value on validation chooses ``best.ckpt``; None keeps the last alone.
        validate_every: epochs from one validation, and one checkpoint, to the next.
        patience: validations without a lower value of ``monitor`` after which training stops; None for none.
    """
    accelerator = settings.resolve_accelerator()
    if accelerator == "cpu":
        keep_freed_memory()
    checkpoints = folder / "checkpoints"
    callbacks: list[Callback] = [SeedEveryBatch(seed)]
    if monitor is not None:
        callbacks.append(
            ModelCheckpoint(checkpoints, filename="best", monitor=monitor, mode="min", enable_version_counter=False)
        )
    # After the best one, so that it knows of it: a run that is resumed would else forget which epoch was the best.
    callbacks.append(ModelCheckpoint(checkpoints, filename=LAST.removesuffix(".ckpt"), enable_version_counter=False))
    if monitor is not None and patience is not None:
        callbacks.append(EarlyStopping(monitor, patience=patience, mode="min", check_finite=False))
    if settings.average_last is not None:
        callbacks.append(AverageOfLast(settings.average_last))
    if settings.ema_decay is not None:
        callbacks.append(EMAWeightAveraging(decay=settings.ema_decay))
    if settings.progress_bar:
        callbacks.append(RichProgressBar(leave=False))
    csv = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    if resume:
        _keep_earlier_metrics(csv, folder / "metrics.csv", checkpoints / LAST)
    callbacks += [LearningRateMonitor(logging_interval="epoch"), Diagnostics()]
    return pl.Trainer(
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
        callbacks=callbacks,
        logger=[csv, *loggers],
        log_every_n_steps=settings.log_every,
        enable_progress_bar=settings.progress_bar,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


@rank_zero_only
def announce(stage: str, trainer: pl.Trainer, model: nn.Module, data: CrystalDataModule) -> None:
    """Print once what is about to run: crystals, parameters, devices, and what was left out."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    device = f"{trainer.world_size} × {trainer.accelerator.__class__.__name__.removesuffix('Accelerator')}"
    Console(stderr=True).print(
        f"{stage}: {len(data.rows['train']):,} training and {len(data.rows['val']):,} validation crystals of "
        f"{data.store.name}, {trainable:,} parameters, {trainer.max_epochs} epochs on {device}",
        highlight=False,
        soft_wrap=True,
    )
    for reason, count in data.left_out.items():
        Console(stderr=True).print(f"{count:,} crystals left out: {reason}", highlight=False, soft_wrap=True)


def _keep_earlier_metrics(logger: CSVLogger, file: Path, last: Path) -> None:
    """Log again what an interrupted run logged up to its last checkpoint; Lightning would begin a new file."""
    if not (rank_zero_only.rank == 0 and file.exists() and last.exists()):  # type: ignore[attr-defined]
        return
    steps = torch.load(last, weights_only=True, map_location="cpu")["global_step"]
    with file.open(newline="") as lines:
        rows = [row for row in csv_module.DictReader(lines) if int(row["step"]) < steps]
    for row in rows:
        values: dict[str, torch.Tensor | float] = {
            name: int(value) if value.isdigit() else float(value)
            for name, value in row.items()
            if name != "step" and value
        }
        logger.log_metrics(values, step=int(row["step"]))
    logger.save()


def fit(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, *, resume: bool) -> None:
    """Train to the end, from the last checkpoint of this stage where one is to be resumed.

    Raises:
        Interrupted: the run was stopped before its last epoch.
    """
    last = Path(trainer.checkpoint_callbacks[0].dirpath) / LAST  # type: ignore[attr-defined]
    start = str(last) if resume and last.exists() else None
    with contextlib.suppress(SystemExit):  # Lightning exits by itself on SIGTERM (with status 0) and on Ctrl-C
        trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
    enough = any(isinstance(c, EarlyStopping) and c.stopped_epoch for c in trainer.callbacks)  # type: ignore[attr-defined]
    unfinished = trainer.current_epoch < (trainer.max_epochs or 0) and not enough
    if trainer.interrupted or trainer.received_sigterm or unfinished:
        raise Interrupted(
            f"stopped after epoch {trainer.current_epoch} of {trainer.max_epochs}; continue with resume=last"
        )
    # The averaged weights are in the module now. The callback would swap them out again in a later validation, and
    # load the unaveraged ones for a test.
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
    if start is not None and not trainer.callback_metrics:  # it had trained to its end before it was stopped
        module.load_state_dict(torch.load(start, weights_only=True, map_location="cpu")["state_dict"])
        trainer.validate(module, datamodule=data, verbose=False)
