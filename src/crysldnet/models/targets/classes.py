"""Classification targets.

Shapes as in :mod:`crysldnet.models.targets.base`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from crysldnet.measures import MEASURES, Measure
from crysldnet.models.targets.base import Estimate, Floats, Kind, Loss, TargetType

LEAST_PROBABILITY = 1e-3
"""Regression trees may predict a probability of zero, which would make the log loss infinite."""


@dataclass(frozen=True)
class Classes(TargetType):
    """One of several classes, given as 0 … C − 1; the predicted value is the most likely class.

    Attributes:
        labels: names of the C classes.
    """

    name: ClassVar[str] = "classification"
    measure: ClassVar[Measure] = MEASURES["error_rate"]
    labels: tuple[str, ...]

    @property
    def classes(self) -> list[str]:
        """Class names."""
        return list(self.labels)

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        """``binary`` or ``multiclass``."""
        return "binary" if len(self.labels) == 2 else "multiclass"

    @property
    def outputs(self) -> int:
        """Number of outputs O: one logit for two classes, else one per class."""
        return 1 if self.kind == "binary" else len(self.labels)

    def describe(self) -> dict[str, Any]:
        """Return the description for :func:`make_target`."""
        return {"type": self.name, "labels": list(self.labels)}

    def wrong(self, values: NDArray[np.float64]) -> tuple[NDArray[np.bool_], str]:
        """Return the values that aren't classes."""
        return ~np.isin(values, np.arange(len(self.labels))), f"one of {len(self.labels)} classes"

    def on_line(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return zeros: classes aren't normalized."""
        return np.zeros_like(values)

    def coordinate(self, values: Tensor) -> Tensor:
        """Return the classes."""
        return values

    def loss(self, output: Tensor, true: Tensor, center: Tensor, scale: Tensor, kind: Loss) -> Tensor:
        """Return the cross-entropy [B]."""
        if self.kind == "binary":
            return binary_cross_entropy_with_logits(output[:, 0], true.to(output.dtype), reduction="none")
        return cross_entropy(output, true.long(), reduction="none")

    def estimate(self, output: Tensor, center: Tensor, scale: Tensor) -> Estimate:
        """Return the most likely class and all probabilities."""
        if self.kind == "binary":
            p = output[:, 0].sigmoid()
            return Estimate((p > 0.5).to(p.dtype), None, torch.stack([1.0 - p, p], dim=1))
        return Estimate(output.argmax(dim=1).to(output.dtype), None, output.softmax(dim=1))

    def entropy(self, values: NDArray[np.float64]) -> float:
        """Return the cross-entropy of guessing by the frequencies of these values."""
        counts = one_hot(torch.from_numpy(values[~np.isnan(values)]).long(), len(self.labels)).sum(0).double()
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * shares.log()).sum())

    def combine(self, values: Tensor) -> Tensor:
        """Return the majority class; probabilities, if available, are averaged instead."""
        return values.mode(dim=0).values

    def constant(self, values: Floats) -> float:
        """Return the most frequent class."""
        return float(np.bincount(values.astype(np.int64)).argmax())

    def errors(self, predicted: Floats, true: Floats) -> Floats:
        """Return 1 if the class is wrong, else 0."""
        return (predicted != true).astype(np.float64)

    def table_outputs(self, values: NDArray[np.floating]) -> Floats:
        """Return 1 for the class of each value and 0 for the others; for two classes only the second."""
        classes = np.arange(len(self.labels))
        return (np.asarray(values)[:, None] == (classes[-1:] if self.kind == "binary" else classes)).astype(np.float64)

    def as_table_outputs(self, found: Estimate) -> Floats:
        """Return the probabilities; for two classes that of the second."""
        assert found.probability is not None
        return found.probability[:, 1 if self.kind == "binary" else 0 : len(self.labels)].cpu().double().numpy()

    def from_table(self, outputs: Floats, spread: Floats) -> Estimate:
        """Return the most likely class from outputs that are probabilities."""
        share = torch.from_numpy(outputs).clamp(LEAST_PROBABILITY, 1.0)
        if self.kind == "binary":
            share = torch.cat([1.0 - share, share], dim=1).clamp_min(LEAST_PROBABILITY)
        share = share / share.sum(dim=1, keepdim=True)
        return Estimate(share.argmax(dim=1).double(), None, share)
