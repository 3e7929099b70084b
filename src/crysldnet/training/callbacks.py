"""Small callbacks of every training: seeds that depend on the batch only, averages of the weights, and batch sizes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import Tensor

from crysldnet.errors import DeviceError
from crysldnet.graphs.batch import CrystalBatch


class SeedEveryBatch(Callback):
    """Seed torch before every batch from (seed, epoch, batch index in the epoch).

    Random numbers then don't depend on earlier draws, so a resumed run draws the same ones as an uninterrupted run, and
    a batch draws the same ones on any rank. Validation batches draw the same ones every epoch.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _seed(self, trainer: pl.Trainer, epoch: int, batch_idx: int, device: torch.device) -> None:
        """Seed the generators of the CPU and of this device; torch.manual_seed also looks for all others, which takes a
        millisecond.
        """
        number = batch_idx * trainer.world_size + trainer.global_rank
        seed = int(np.random.SeedSequence([self.seed, epoch, number]).generate_state(1, np.uint64)[0] >> 1)
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            getattr(torch, device.type).manual_seed(seed)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Seed by epoch and batch."""
        self._seed(trainer, trainer.current_epoch + 1, batch_idx, pl_module.device)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed by batch only."""
        self._seed(trainer, 0, batch_idx, pl_module.device)


def moving_average(decay: float) -> WeightAveraging:
    """Return an exponential moving average with a warmed-up decay, so that short runs don't lag behind."""

    def average(averaged: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        now = torch.as_tensor(updates, dtype=torch.float32)
        return averaged + (1.0 - ((1.0 + now) / (10.0 + now)).clamp(max=decay)) * (current - averaged)

    return WeightAveraging(avg_fn=average)


class AverageOfLast(WeightAveraging):
    """Average the weights over the last steps with equal weight (SWA; Izmailov et al., arXiv 1803.05407).

    Args:
        share: last fraction of the steps, over which to average; before that, the average equals the weights.
    """

    def __init__(self, share: float) -> None:
        super().__init__(use_buffers=True, avg_fn=self._average)
        self.share, self.start = share, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the first step to average."""
        epochs = trainer.max_epochs or 1
        steps = int(trainer.num_training_batches) // trainer.accumulate_grad_batches * epochs
        self.start = round((1.0 - self.share) * steps)

    def _average(self, averaged: Tensor, current: Tensor, done: Tensor | int) -> Tensor:
        counted = max(int(done) - self.start, 0)
        return averaged + (current - averaged) / (counted + 1)


class BatchWatch(Callback):
    """Track the size of the current batch and of the largest one that fit, for out-of-memory messages."""

    def __init__(self) -> None:
        self._now: tuple[int, int, int] | None = None
        self._fits = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: CrystalBatch, batch_idx: int
    ) -> None:
        """Record crystals, atoms and edges."""
        self._now = (batch.num_crystals, len(batch.numbers), batch.edge_index.shape[1])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: CrystalBatch, batch_idx: int
    ) -> None:
        """Record that the batch fit."""
        self._fits = max(self._fits, len(batch.numbers))

    def error(self, accumulate: int) -> DeviceError:
        """Return the out-of-memory error to raise, with a batch size that would fit."""
        if self._now is None:
            return DeviceError("out of memory before the first batch; free some, or choose a smaller encoder")
        crystals, atoms, edges = self._now
        fits = f"; the largest batch that fit had {self._fits:,} atoms" if self._fits else ""
        budget = self._fits if 0 < self._fits < atoms else max(atoms // 2, 1)
        return DeviceError(
            f"out of memory in a batch of {crystals:,} crystals, {atoms:,} atoms and {edges:,} edges{fits}; bound a "
            f"batch with data.max_atoms={budget}, or compute each step in smaller parts with "
            f"trainer.accumulate_grad_batches={2 * accumulate}"
        )
