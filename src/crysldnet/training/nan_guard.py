"""Protect the weights from nonfinite losses and gradients, and report their origin."""

from __future__ import annotations

import json
from dataclasses import dataclass
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
from crysldnet.training.module import StepModule

SHOWN = 5
"""Ids shown in the message; the file has all of them."""


@dataclass
class CheckedStep:
    """An optimizer step, and whether its losses and gradients were finite.

    Attributes:
        number, epoch: step and epoch.
        batches: each batch with its loss and its terms.
        norm: norm of the gradients.
        bad: 1 if something wasn't finite on any rank, else 0.
    """

    number: int
    epoch: int
    batches: list[tuple[CrystalBatch, Tensor, dict[str, Tensor]]]
    norm: Tensor
    bad: Tensor
    _copied: torch.cuda.Event | None = None

    def send_to_host(self) -> None:
        """Start to copy the result to the host, without waiting."""
        if self.bad.is_cuda:
            on_host = torch.empty_like(self.bad, device="cpu", pin_memory=True)
            self.bad = on_host.copy_(self.bad, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def was_finite(self) -> bool:
        """Wait for the result."""
        if self._copied is not None:
            self._copied.synchronize()
        return not bool(self.bad)


class RefuseNonFinite(Callback):
    """Skip optimizer steps with a nonfinite loss or gradient, and stop after too many of them.

    Weights, optimizer moments and buffers (batch normalization statistics) stay as they were before the step. Each
    skipped step is written to ``nonfinite_steps.jsonl`` with the nonfinite term and the crystal ids. Losses and the
    total gradient norm are checked together once per optimizer step, before it is taken. If the optimizer is fused, it
    skips the step on the device, and the host looks at the result one step later, before the next update; otherwise
    this is the only time in a step when the host waits for the device.

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
        self._unread: CheckedStep | None = None

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
        assert isinstance(pl_module, StepModule)
        self._seen.append((self._batch, loss.detach(), pl_module.step_losses))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Skip the step if something isn't finite.

        Raises:
            DivergedError: the limit is exceeded.
        """
        assert isinstance(pl_module, StepModule)
        self._read(trainer)
        step = self._check(trainer, pl_module.gradient_norm(optimizer))
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = step.bad  # type: ignore[attr-defined]
            for buffer, before in zip(self._buffers, self._before, strict=True):
                buffer.copy_(torch.where(step.bad > 0, before, buffer))
            step.send_to_host()
            self._unread = step
        elif not step.was_finite():
            optimizer.zero_grad(
                set_to_none=True
            )  # the optimizer ignores parameters without gradient, and their moments
            if self._buffers:
                torch._foreach_copy_(self._buffers, self._before)
            self._count(trainer, step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count the last step before it is saved."""
        self._read(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the last step."""
        self._read(trainer)

    def _check(self, trainer: pl.Trainer, norm: Tensor) -> CheckedStep:
        """Check the losses and the norm, without waiting for the device."""
        values = [loss.float() for _, loss, _ in self._seen]
        if getattr(trainer.precision_plugin, "scaler", None) is None:  # otherwise the loss scaler skips the step itself
            values.append(norm.to(values[0].device))
        bad = (~torch.stack(values).isfinite()).any().float()
        if trainer.world_size > 1:  # all ranks skip, or none
            distributed.all_reduce(bad, distributed.ReduceOp.MAX)
        return CheckedStep(trainer.global_step, trainer.current_epoch + 1, self._seen, norm, bad)

    def _read(self, trainer: pl.Trainer) -> None:
        """Look at the result of the last step that the device may have skipped."""
        step, self._unread = self._unread, None
        if step is not None and not step.was_finite():
            self._count(trainer, step)

    def _count(self, trainer: pl.Trainer, step: CheckedStep) -> None:
        """Count and report a skipped step."""
        self.skipped += 1
        text = self._report(trainer, step)
        if self.skipped > self.limit:
            raise DivergedError(
                f"{text}. The weights are those before this step. Check these crystals, lower optimizer.lr or "
                f"gradient_clip_val, or let trainer.max_nonfinite_steps (now {self.limit}) such steps be skipped; "
                f"resume=last "
                "goes on from the last checkpoint"
            )
        rank_zero_only(note)(f"{text}; skipped ({self.skipped} of at most {self.limit})")

    def _report(self, trainer: pl.Trainer, step: CheckedStep) -> str:
        """Write what wasn't finite on any rank; return it as one line."""
        store = trainer.datamodule.store  # type: ignore[attr-defined]
        found: list[dict[str, Any]] = []
        for batch, loss, terms in step.batches:
            wrong = {name: float(value) for name, value in terms.items() if not bool(torch.isfinite(value))}
            if not wrong and bool(loss.isfinite()):
                wrong = {"the gradient's norm": float(step.norm)}
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
        where = {"step": step.number, "epoch": step.epoch}
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
        return f"step {step.number} (epoch {step.epoch}): {what}; crystals {shown}"
