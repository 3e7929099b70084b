"""Metrics summed in double precision on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from crysldnet.platforms import has_float64


class ExactMetric(Metric):
    """A metric that is summed in float64, on the CPU if the device of the module has no float64.

    Subclasses convert what they add with :func:`crysldnet.platforms.double`, or move it to ``self.device``.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> nn.Module:
        """Move to another device, if that has float64."""
        return super()._apply(fn, exclude_state) if has_float64(fn(torch.zeros(1)).device) else self
