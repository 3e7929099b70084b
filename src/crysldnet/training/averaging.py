"""Averages of the weights during training."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


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
