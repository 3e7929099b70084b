"""Track batch sizes to explain out-of-memory errors."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from crysldnet.errors import DeviceError
from crysldnet.graphs.batch import CrystalBatch


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
