"""The base of all LightningModules: what callbacks read of a step, and clipping."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor

from crysldnet.training.strategies import SHARDED, name_of


class StepModule(pl.LightningModule):
    """A LightningModule whose steps are checked, logged and clipped without repeated work.

    Attributes:
        step_losses: the loss ``train/loss`` of the last training batch and its terms.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step_losses: dict[str, Tensor] = {}
        self._norm: Tensor | None = None

    @property
    def skips_on_device(self) -> bool:
        """Whether the device itself can skip a nonfinite step, so that the host needn't wait for the loss.

        Fused AdamW can. A loss scaler skips steps by itself, and sharding strategies clip by themselves.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return self.device.type == "cuda" and scaler is None and name_of(self.trainer.strategy) not in SHARDED

    def gradient_norm(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Return the 2-norm of all gradients as a scalar on their device; with sharding, of this rank's shard.

        It is computed once per optimizer step and kept until clipping.
        """
        if self._norm is None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            self._norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return self._norm

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of all gradients together; the result is that of ``torch.nn.utils.clip_grad_norm_``."""
        if name_of(self.trainer.strategy) in SHARDED:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self.gradient_norm(optimizer))
        self._norm = None
