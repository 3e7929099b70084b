"""Optimizer and learning-rate schedule settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

FactorOf = Callable[[str], float]
NO_DECAY_NAMES = ("bias", "bn", "norm")


class _OneCycle(OneCycleLR):
    """OneCycle that stays at its final value if there are more steps than planned."""

    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch + 1 < self.total_steps:
            super().step(epoch)


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW with a schedule over all steps of the run.

    Attributes:
        lr: peak learning rate.
        weight_decay: applied to matrices only (``decay=matrices``), or of every parameter whose name contains none of
            "bias", "bn", "norm", as in the published code (``decay=names``).
        schedule: ``onecycle`` (from lr/25 up to lr and down to lr/250,000, cosine), ``cosine`` or ``linear`` (up, then
            down to ``min_lr_ratio``), or ``constant``.
        warmup: fraction of the steps with rising learning rate.
        min_lr_ratio: final learning rate of ``cosine`` and ``linear`` relative to lr.
    """

    lr: float
    weight_decay: float = 1e-5
    decay: Literal["matrices", "names"] = "matrices"
    schedule: Literal["onecycle", "cosine", "linear", "constant"] = "onecycle"
    warmup: float = 0.3
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio is a share of lr, from 0 to 1, not {self.min_lr_ratio}")
        if self.min_lr_ratio and self.schedule not in ("cosine", "linear"):
            raise ValueError(
                f"min_lr_ratio={self.min_lr_ratio} is for schedule=cosine or linear; {self.schedule} has an end of "
                f"its own"
            )
        if not self.lr > 0 or not 0 <= self.warmup < 1:
            raise ValueError(f"lr must be over 0 and warmup at least 0 and below 1, not {self.lr} and {self.warmup}")

    def parameter_groups(self, module: nn.Module, factor_of: FactorOf = lambda _: 1.0) -> list[dict[str, Any]]:
        """Return the trainable parameters by learning rate, with and without weight decay.

        Args:
            module: the module to train.
            factor_of: learning rate of a named parameter relative to ``lr``.
        """
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                by_name = not any(word in name for word in NO_DECAY_NAMES)
                matrix = getattr(parameter, "full_ndim", parameter.ndim) >= 2  # sharded parameters may be flat
                decays = by_name if self.decay == "names" else matrix
                groups.setdefault((factor_of(name), decays), []).append(parameter)
        factors = sorted({factor for factor, _ in groups}, reverse=True)
        return [
            {"params": groups.get((factor, decays), []), "weight_decay": weight_decay, "lr": factor * self.lr}
            for factor in factors
            for decays, weight_decay in ((True, self.weight_decay), (False, 0.0))
        ]

    def build(
        self, module: nn.Module, total_steps: int, factor_of: FactorOf = lambda _: 1.0, *, fused: bool = False
    ) -> dict[str, Any]:
        """Return the result for ``configure_optimizers``; the schedule advances every optimizer step.

        Args:
            module: the module to train.
            total_steps: total number of steps.
            factor_of: as in :meth:`parameter_groups`.
            fused: use PyTorch's fused implementation, which differs in the last bits.
        """
        optimizer = torch.optim.AdamW(self.parameter_groups(module, factor_of), lr=self.lr, fused=fused or None)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._schedule(optimizer, max(total_steps, 1)), "interval": "step"},
        }

    def _schedule(self, optimizer: torch.optim.Optimizer, total: int) -> LRScheduler:
        if self.schedule == "onecycle" and total > 1:
            # With very few steps, a warmup that rounds to zero would divide by zero in OneCycleLR.
            warmup = min(max(self.warmup, 1.5 / total), 0.9)
            highest = [group["lr"] for group in optimizer.param_groups]
            return _OneCycle(optimizer, max_lr=highest, total_steps=total, pct_start=warmup)
        if self.schedule == "constant":
            return LambdaLR(optimizer, lambda step: 1.0)  # noqa: ARG005
        up = max(1.0, self.warmup * total)

        def factor(step: int) -> float:
            if step < up:
                return (step + 1) / up
            gone = min(1.0, (step - up) / max(1.0, total - up))
            left = 1.0 - gone if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * gone))
            return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * left

        return LambdaLR(optimizer, factor)
