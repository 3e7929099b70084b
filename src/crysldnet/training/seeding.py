"""Random numbers that depend on the batch only."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback


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
