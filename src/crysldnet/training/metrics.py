"""Metrics over a whole split, independent of the number of ranks.

Shapes: ``B`` crystals, ``T`` targets, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc, binary_f1_score, multiclass_f1_score
from torchmetrics.utilities import dim_zero_cat

from crysldnet.models.exact_metric import ExactMetric
from crysldnet.models.predictor import Prediction
from crysldnet.models.targets import TargetType
from crysldnet.platforms import double


class Means(ExactMetric):
    """Weighted means of named quantities, each from a sum and a count."""

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, capacity: int = 32, *, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.names: list[str] = []
        self.add_state("sums", torch.zeros(capacity, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(capacity, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, measures: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Add sums and counts; every call must give the same names."""
        self.names = list(measures)
        for place, (total, count) in enumerate(measures.values()):
            self.sums[place] += double(total.detach())
            self.counts[place] += double(count)

    def compute(self) -> dict[str, Tensor]:
        """Return the means; a quantity with zero count is NaN."""
        return {name: self.sums[i] / self.counts[i] for i, name in enumerate(self.names)}


class RegressionErrors(ExactMetric):
    """MAE, RMSE and R² of each target in its own units, over the known values."""

    full_state_update = False
    count: Tensor
    absolute: Tensor
    squared: Tensor
    total: Tensor
    total_squared: Tensor

    def __init__(self, targets: list[str], *, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.targets = targets
        for name in ("count", "absolute", "squared", "total", "total_squared"):
            self.add_state(name, torch.zeros(len(targets), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, true: Tensor) -> None:
        """Add predictions [B, T] and true values [B, T], NaN if unknown."""
        true, predicted = double(true), double(predicted.detach())
        known = ~true.isnan()
        y = torch.where(known, true, 0.0)
        error = torch.where(known, predicted - true, 0.0)
        self.count += known.sum(0)
        self.absolute += error.abs().sum(0)
        self.squared += error.square().sum(0)
        self.total += y.sum(0)
        self.total_squared += y.square().sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Return ``mae``, ``rmse``, ``r2`` for one target, or ``mae/NAME`` … for several and the mean ``mae``."""
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
        """Return the MAE of each target [T], NaN if no value is known."""
        return self.absolute / torch.where(self.count > 0, self.count, torch.nan)


class ClassificationScores(ExactMetric):
    """Accuracy, F1, log loss and, for two classes, the area under the ROC curve of the probabilities.

    With more than two classes, F1 is averaged over classes.

    Args:
        classes: number of classes C.
    """

    full_state_update = False
    probability: list[Tensor]
    true: list[Tensor]

    def __init__(self, classes: int, *, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.classes = classes
        self.add_state("probability", [], dist_reduce_fx="cat")
        self.add_state("true", [], dist_reduce_fx="cat")

    def update(self, probability: Tensor, true: Tensor) -> None:
        """Add probabilities [B, C] and true classes [B], NaN if unknown."""
        probability, true = probability.to(self.device), true.to(self.device)
        known = ~true.isnan()
        self.probability.append(probability[known].detach().float())
        self.true.append(true[known].long())

    def compute(self) -> dict[str, Tensor]:
        """Return the scores; NaN if no class is known. The area is NaN if only one class occurs."""
        probability, true = dim_zero_cat(self.probability), dim_zero_cat(self.true)
        names = ["accuracy", "f1", "log_loss"] + (["roc_auc"] if self.classes == 2 else [])
        if not len(true):
            return {name: torch.tensor(torch.nan, device=self.device) for name in names}
        log_loss = -probability.gather(1, true[:, None]).clamp_min(torch.finfo(torch.float32).tiny).log().mean()
        accuracy = (probability.argmax(1) == true).float().mean()
        if self.classes > 2:
            f1 = multiclass_f1_score(probability, true, self.classes, average="macro")
            return {"accuracy": accuracy, "f1": f1, "log_loss": log_loss}
        both = len(true.unique()) == 2
        area = binary_auroc(probability[:, 1], true) if both else torch.tensor(torch.nan, device=self.device)
        return {
            "accuracy": accuracy,
            "f1": binary_f1_score(probability[:, 1], true),
            "log_loss": log_loss,
            "roc_auc": area,
        }


class TargetMetrics(nn.Module):
    """Metrics of all targets, and the value that selects the best epoch.

    Args:
        targets: names of the T targets.
        types: target types.
        entropies: [T] entropy of the training classes; 1 by default.
        sync_on_compute: combine all ranks; false if each rank has seen all data.
    """

    def __init__(
        self,
        targets: Sequence[str],
        types: Sequence[TargetType],
        entropies: Sequence[float] | None = None,
        *,
        sync_on_compute: bool = True,
    ) -> None:
        super().__init__()
        self.targets, self.types, self.entropies = targets, types, entropies or [1.0] * len(targets)
        self.numbers = [i for i, kind in enumerate(types) if kind.classes is None]
        names = [targets[i] for i in self.numbers]
        self.errors = RegressionErrors(names, sync_on_compute=sync_on_compute)
        self.normalised = RegressionErrors(names, sync_on_compute=sync_on_compute)
        self.scores = nn.ModuleDict(
            {
                str(i): ClassificationScores(len(kind.classes), sync_on_compute=sync_on_compute)
                for i, kind in enumerate(types)
                if kind.classes is not None
            }
        )
        self.spread = any(kind.spread is not None for kind in types)
        self.likelihood = Means(1, sync_on_compute=sync_on_compute)

    @property
    def selection(self) -> str:
        """Name of the value whose minimum selects the best epoch."""
        if self.spread:
            return "nll"
        if not self.scores:
            return "normalised_mae"
        return "normalised_error" if self.numbers else "normalised_log_loss"

    def update(self, predicted: Prediction, true: Tensor, losses: Tensor, scale: Tensor) -> None:
        """Add predictions of B crystals.

        Args:
            predicted: predictions of the model.
            true: [B, T] in physical units, NaN if unknown.
            losses: [B, T] in normalized units, 0 if unknown.
            scale: [T] standard deviations of the targets.
        """
        self.likelihood.update({"nll": (losses.sum(), (~true.isnan()).sum())})
        if self.numbers:
            self.errors.update(predicted.value[:, self.numbers], true[:, self.numbers])
            on_line = [
                torch.stack([self.types[i].coordinate(values[:, i]) / scale[i] for i in self.numbers], dim=1)
                for values in (predicted.value, true)
            ]
            self.normalised.update(*on_line)
        for place, score in self.scores.items():
            assert predicted.probability is not None
            i = int(place)
            score.update(predicted.probability[:, i, : score.classes], true[:, i])  # type: ignore[operator]

    def compute(self) -> dict[str, Tensor]:
        """Return every metric, ``mae`` … for one target or ``mae/NAME`` … for several, and the value that selects the
        epoch.
        """
        values: dict[str, Tensor] = {}
        normalised: list[Tensor] = []
        if self.numbers:
            errors = self.errors.compute()
            alone = len(self.numbers) == 1 and len(self.targets) > 1
            values |= {f"{k}/{self.targets[self.numbers[0]]}": v for k, v in errors.items()} if alone else errors
            normalised += list(self.normalised.mae())
            values["normalised_mae"] = self.normalised.mae().nanmean()
        found = {int(place): score.compute() for place, score in self.scores.items()}  # type: ignore[operator]
        for place, scores in found.items():
            suffix = f"/{self.targets[place]}" if len(self.targets) > 1 else ""
            values |= {f"{name}{suffix}": value for name, value in scores.items()}
        if found:
            losses = [scores["log_loss"] / self.entropies[place] for place, scores in found.items()]
            normalised += losses
            values["normalised_log_loss"] = torch.stack(losses).nanmean()
        if found and self.numbers:
            values["normalised_error"] = torch.stack([v.float() for v in normalised]).nanmean()
        if self.spread:
            values |= self.likelihood.compute()
        return values

    def reset(self) -> None:
        """Reset all metrics."""
        for metric in (self.errors, self.normalised, self.likelihood, *self.scores.values()):
            metric.reset()  # type: ignore[operator]
