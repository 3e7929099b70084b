"""Metrics over a whole split, the same on any number of ranks.

Shapes: ``B`` crystals, ``T`` targets.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Means(Metric):
    """Weighted means of named quantities, each given as a sum and a count."""

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, capacity: int = 32) -> None:
        super().__init__()
        self.names: list[str] = []
        self.add_state("sums", torch.zeros(capacity, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(capacity, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, measures: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Add sums and counts; every call gives the same names."""
        self.names = list(measures)
        for place, (total, count) in enumerate(measures.values()):
            self.sums[place] += total.detach()
            self.counts[place] += count

    def compute(self) -> dict[str, Tensor]:
        """Return the means; a quantity that was never counted is NaN."""
        return {name: self.sums[i] / self.counts[i] for i, name in enumerate(self.names)}


class RegressionErrors(Metric):
    """MAE, RMSE and R² of each target in its own units, over the values that are known."""

    full_state_update = False
    count: Tensor
    absolute: Tensor
    squared: Tensor
    total: Tensor
    total_squared: Tensor

    def __init__(self, targets: list[str]) -> None:
        super().__init__()
        self.targets = targets
        for name in ("count", "absolute", "squared", "total", "total_squared"):
            self.add_state(name, torch.zeros(len(targets), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, true: Tensor) -> None:
        """Add predictions [B, T] and true values [B, T], NaN where unknown."""
        known = ~true.isnan()
        y = torch.where(known, true, 0.0).double()
        error = torch.where(known, predicted.detach().double() - true.double(), 0.0)
        self.count += known.sum(0)
        self.absolute += error.abs().sum(0)
        self.squared += error.square().sum(0)
        self.total += y.sum(0)
        self.total_squared += y.square().sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Return ``mae``, ``rmse``, ``r2`` of one target, or ``mae/NAME`` … of several and the mean ``mae``."""
        count = torch.where(self.count > 0, self.count, torch.nan)
        scatter = self.total_squared - self.total.square() / count
        values = {
            "mae": self.mae(),
            "rmse": (self.squared / count).sqrt(),
            "r2": torch.where(scatter > 0, 1.0 - self.squared / scatter, torch.nan),
        }
        if len(self.targets) == 1:
            return {name: value[0] for name, value in values.items()}
        named = {f"{name}/{t}": value[i] for name, value in values.items() for i, t in enumerate(self.targets)}
        return {**named, "mae": values["mae"].nanmean()}

    def mae(self) -> Tensor:
        """Return the MAE of each target [T], NaN where no value is known."""
        return self.absolute / torch.where(self.count > 0, self.count, torch.nan)
