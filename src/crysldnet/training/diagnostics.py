"""Metrics logged for every training besides losses: gradient norm, throughput, memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from crysldnet.graphs.batch import CrystalBatch
from crysldnet.platforms import peak_memory_mb
from crysldnet.training.module import StepModule

OF_THE_MACHINE = ("train/atoms_per_s", "train/crystals_per_s", "train/memory_mb")
"""Metrics that differ between runs with the same seed."""


def device_memory_mb(device: torch.device) -> float:
    """Return the peak memory use so far in MiB, of the GPU or of this process."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_memory_mb()


def mean_losses(steps: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each loss over steps, without nonfinite values; NaN if there are only such.

    Args:
        steps: losses of each step, scalars by name.
    """
    return {name: _finite_mean(torch.stack([losses[name].float() for losses in steps])) for name in steps[-1]}


def _finite_mean(values: Tensor) -> Tensor:
    known = values.isfinite()
    return torch.where(known, values, 0.0).sum() / known.sum()


class Diagnostics(Callback):
    """Log training health and speed every ``trainer.log_every_n_steps`` optimizer steps.

    - ``train/loss`` and its terms (``module.step_losses``): means over the batches since the last log, on the first
      device, without nonfinite ones, whose steps are skipped; at the end of an epoch the progress bar has them too.
    - ``train/grad_norm``: before clipping.
    - ``train/atoms_per_s``, ``train/crystals_per_s``: over all devices since the last log, including
      waiting for data, excluding validation.
    - ``train/memory_mb``: MiB, the peak so far on the first device.

    Other steps don't synchronize with the device.
    """

    def __init__(self) -> None:
        self._atoms = self._crystals = 0
        self._seconds = self._since = 0.0
        self._logged = 0
        self._losses: list[Mapping[str, Tensor]] = []
        """Losses of each batch since the last log, on the device."""

    def state_dict(self) -> dict[str, Any]:
        """Return the losses since the last log."""
        return {"losses": [{name: float(value) for name, value in losses.items()} for losses in self._losses]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the losses since the last log."""
        self._losses = [{name: torch.tensor(v) for name, v in losses.items()} for losses in state_dict["losses"]]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start timing; a run resumed within an epoch has no epoch start."""
        self._since, self._logged = time.monotonic(), trainer.global_step
        self._losses = [{name: v.to(pl_module.device) for name, v in losses.items()} for losses in self._losses]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue timing after a validation."""
        self._since = time.monotonic()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Log the gradient norm; mixed precision has already unscaled it."""
        assert isinstance(pl_module, StepModule)
        if (trainer.global_step + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        norm = pl_module.gradient_norm(optimizer)
        if isinstance(trainer.strategy, FSDPStrategy):  # each rank has the gradients of its shard
            norm = trainer.strategy.reduce(norm.square().to(pl_module.device), reduce_op="sum").sqrt()
        pl_module.log("train/grad_norm", norm)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: CrystalBatch, batch_idx: int
    ) -> None:
        """Count atoms, crystals and seconds, and log the losses and rates."""
        assert isinstance(pl_module, StepModule)
        now = time.monotonic()
        self._seconds += now - self._since
        self._since = now
        self._atoms += batch.num_atoms
        self._crystals += batch.num_crystals
        self._losses.append(pl_module.step_losses)
        step = trainer.global_step
        due = step % trainer.log_every_n_steps == 0 and step != self._logged  # type: ignore[attr-defined]
        if due or batch_idx + 1 == trainer.num_training_batches:
            means = mean_losses(self._losses)
            pl_module.log("train/loss", means.pop("train/loss"), prog_bar=True, batch_size=1)
            pl_module.log_dict(means, batch_size=1)
        if not due:
            return
        self._logged, self._losses = step, []
        counts = torch.tensor([self._atoms, self._crystals], dtype=torch.float32, device=pl_module.device)
        if trainer.world_size > 1:
            counts = trainer.strategy.reduce(counts, reduce_op="sum")
        rates = counts / max(self._seconds, 1e-9)
        pl_module.log("train/atoms_per_s", rates[0])
        pl_module.log("train/crystals_per_s", rates[1])
        pl_module.log("train/memory_mb", device_memory_mb(pl_module.device))
        self._atoms = self._crystals = 0
        self._seconds = 0.0
