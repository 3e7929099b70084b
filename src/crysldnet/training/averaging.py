"""Averages of the weights along a run."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging


class AverageOfLast(WeightAveraging):
    """Average the weights of the last steps, each counting alike, after Izmailov et al., arXiv 1803.05407.

    Args:
        share: of the steps that are averaged over; before them the average is the weights themselves.
    """

    def __init__(self, share: float) -> None:
        super().__init__(use_buffers=True, avg_fn=self._average)
        self.share, self.start = share, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the first step that counts."""
        epochs = trainer.max_epochs or 1
        steps = int(trainer.num_training_batches) // trainer.accumulate_grad_batches * epochs
        self.start = round((1.0 - self.share) * steps)

    def _average(self, averaged: torch.Tensor, current: torch.Tensor, done: torch.Tensor | int) -> torch.Tensor:
        counted = max(int(done) - self.start, 0)
        return averaged + (current - averaged) / (counted + 1)
