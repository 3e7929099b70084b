"""Protect the weights from nonfinite losses and gradients, and report their origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, distributed

from crysldnet.console import note
from crysldnet.errors import DivergedError
from crysldnet.graphs.batch import CrystalBatch

SHOWN = 5
"""Ids shown in the message; the file has all of them."""


class RefuseNonFinite(Callback):
    """Skip optimizer steps with a nonfinite loss or gradient, and stop after too many of them.

    Weights, optimizer moments and buffers (batch normalization statistics) stay as they were before the step. Each
    skipped step is written to ``nonfinite_steps.jsonl`` with the nonfinite term and the crystal ids. Losses and the
    total gradient norm are checked together once per optimizer step, before it is taken: the only time in a step when
    the host waits for the device.

    Args:
        folder: folder of the file.
        limit: maximum number of skipped steps.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.path, self.limit = folder / "nonfinite_steps.jsonl", limit
        self.skipped = 0
        self._seen: list[tuple[CrystalBatch, Tensor, dict[str, Tensor]]] = []
        self._buffers: list[Tensor] = []
        self._before: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the number of skipped steps."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of skipped steps."""
        self.skipped = state_dict["skipped"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the buffers on their device."""
        self._buffers = list(pl_module.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: CrystalBatch, batch_idx: int
    ) -> None:
        """Save the buffers before the first batch of a step."""
        self._batch = batch
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._seen = []
            if self._buffers:
                torch._foreach_copy_(self._before, self._buffers)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep a batch's loss and its terms."""
        self._seen.append((self._batch, loss.detach(), pl_module.step_losses))  # type: ignore[arg-type]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Skip the step if something isn't finite.

        Raises:
            DivergedError: the limit is exceeded.
        """
        norm = gradient_norm(optimizer)
        values = [loss.float() for _, loss, _ in self._seen]
        if getattr(trainer.precision_plugin, "scaler", None) is None:  # otherwise the loss scaler skips the step itself
            values.append(norm.to(values[0].device))
        bad = (~torch.stack(values).isfinite()).any().float()
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce(bad, reduce_op="sum")  # all ranks skip, or none
        if not bool(bad):
            return
        optimizer.zero_grad(set_to_none=True)  # the optimizer ignores parameters without gradient, and their moments
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._before)
        self.skipped += 1
        text = self._report(trainer, float(norm))
        if self.skipped > self.limit:
            raise DivergedError(
                f"{text}. The weights are those before this step. Check these crystals, lower optimizer.lr or "
                f"gradient_clip_val, or let trainer.max_nonfinite_steps (now {self.limit}) such steps be skipped; "
                f"resume=last "
                "goes on from the last checkpoint"
            )
        rank_zero_only(note)(f"{text}; skipped ({self.skipped} of at most {self.limit})")

    def _report(self, trainer: pl.Trainer, norm: float) -> str:
        """Write what wasn't finite on any rank; return it as one line."""
        store = trainer.datamodule.store  # type: ignore[attr-defined]
        found: list[dict[str, Any]] = []
        for batch, loss, terms in self._seen:
            wrong = {name: float(value) for name, value in terms.items() if not bool(torch.isfinite(value))}
            if not wrong and bool(loss.isfinite()):
                wrong = {"the gradient's norm": norm}
            if len(wrong) > 1:
                wrong.pop("train/loss", None)
            ids = [str(i) for i in store.ids_at(batch.rows.cpu().numpy())]
            found.append({"rank": trainer.global_rank, "not_finite": wrong, "material_ids": ids})
        if trainer.world_size > 1:
            shares: list[Any] = [None] * trainer.world_size
            distributed.all_gather_object(shares, found)
            found = [entry for share in shares for entry in share]
        if any("the gradient's norm" not in entry["not_finite"] for entry in found):  # follows from a loss
            found = [entry for entry in found if "the gradient's norm" not in entry["not_finite"]]
        where = {"step": trainer.global_step, "epoch": trainer.current_epoch + 1}
        if trainer.is_global_zero:
            try:
                with self.path.open("a") as file:
                    file.writelines(json.dumps({**where, **entry}) + "\n" for entry in found)
            except OSError as error:  # the error below mentions this as well
                note(f"can't write {self.path}: {error.strerror}")
        first = found[0]
        what = ", ".join(f"{name} is {value}" for name, value in first["not_finite"].items())
        ids = first["material_ids"]
        shown = ", ".join(ids[:SHOWN]) + (f", … ({len(ids)} in all, see {self.path})" if len(ids) > SHOWN else "")
        return f"step {trainer.global_step} (epoch {trainer.current_epoch + 1}): {what}; crystals {shown}"


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Return the 2-norm of all gradients as a scalar on their device; with sharding, of this rank's shard."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
