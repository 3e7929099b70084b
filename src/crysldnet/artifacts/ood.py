"""Statistics of the training set stored with a property model, to detect out-of-distribution crystals.

Shapes: ``B`` crystals, ``N`` atoms, ``D`` width of the encoder, ``R`` stored crystals of the training set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crysldnet.data.elements import SYMBOLS, element_pairs
from crysldnet.encoders.scatter import scatter
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.crystals import Crystals

REMEMBERED = 1024
"""Maximum R."""
NEIGHBORS = 5
FAR = 0.99
"""Fraction of training crystals below the distance flagged as far."""


class Features:
    """Captures the encoder output during prediction, so that it isn't computed twice."""

    last: Tensor | None = None

    def of_crystals(self, batch: CrystalBatch) -> Tensor:
        """Return the mean over the atoms [B, D] of the last batch, in float32 on its device."""
        assert self.last is not None
        return scatter(self.last.float(), batch.crystal, batch.num_crystals, "mean")


@contextmanager
def catch_features(encoder: nn.Module) -> Iterator[Features]:
    """Capture the features of every batch that passes through an encoder."""
    caught = Features()

    def keep(_module: nn.Module, _inputs: object, output: Tensor | list[Tensor]) -> None:
        caught.last = output if isinstance(output, Tensor) else output[-1]

    handle = encoder.register_forward_hook(keep)
    try:
        yield caught
    finally:
        handle.remove()


@dataclass(frozen=True)
class TrainingSet:
    """Statistics of the training crystals.

    The latent distance of a crystal is the mean distance of its feature (the mean over its atoms) from the 5 nearest
    training crystals, in units of the median of this distance within the training set. Each dimension is first divided
    by its standard deviation. At most 1,024 randomly chosen training crystals are used.

    Attributes:
        elements: [119] number of training crystals that contain each element.
        largest: number of atoms of the largest training crystal.
        features: [R, D] features of some of them, in units of ``scale``.
        scale: [D] standard deviation of their features.
        distances: [R] ascending distances between them, not in units of the median.
    """

    elements: Tensor
    largest: Tensor
    features: Tensor
    scale: Tensor
    distances: Tensor

    @classmethod
    def of(cls, crystals: Crystals, features: Tensor) -> TrainingSet:
        """Compute the statistics of training crystals.

        Args:
            crystals: all training crystals.
            features: [R, D] features of a random subset.
        """
        counts = np.bincount(element_pairs(crystals)[1], minlength=len(SYMBOLS))
        scale = features.std(dim=0, correction=0)
        scale = torch.where(scale > 1e-6 * scale.max(), scale, 1.0)
        features = features / scale
        apart = _apart(features, features).fill_diagonal_(torch.inf)
        distances = _nearest(apart).sort().values
        largest = torch.tensor(int(crystals.sizes.max(initial=0)))
        return cls(torch.from_numpy(counts), largest, features, scale, distances)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TrainingSet:
        """Return the statistics from stored tensors.

        Raises:
            ValueError: a tensor is missing or inconsistent.
        """
        if lacks := {field.name for field in fields(cls)} ^ tensors.keys():
            raise ValueError(f"training_set isn't complete ({', '.join(sorted(lacks))})")
        kept = cls(**tensors)
        count, width = (*kept.features.shape, 0, 0)[:2]
        shapes = {"elements": (len(SYMBOLS),), "largest": (), "features": (count, width), "scale": (width,)}
        for name, shape in {**shapes, "distances": (count,)}.items():
            tensor = tensors[name]
            is_whole = not (tensor.is_floating_point() or tensor.is_complex())
            if tensor.shape != shape or is_whole != (name in ("elements", "largest")) or bool(tensor.isnan().any()):
                raise ValueError(f"training_set.{name} can't be used ({tensor.dtype}, {list(tensor.shape)})")
        return kept

    @property
    def _unit(self) -> float:
        """The median distance within the training set."""
        median = float(self.distances[len(self.distances) // 2]) if len(self.distances) else 0.0
        return median if 0 < median < float("inf") else 1.0

    def distance(self, features: Tensor) -> NDArray[np.float64]:
        """Return the latent distance [B] of crystals from their features [B, D]."""
        apart = _apart(features.cpu() / self.scale, self.features)
        return _nearest(apart).double().numpy() / self._unit

    @property
    def far(self) -> float:
        """The latent distance below which 99 % of the training crystals lie."""
        finite = self.distances[self.distances.isfinite()]
        return float(finite.quantile(FAR)) / self._unit if len(finite) else float("inf")

    def unseen(self, numbers: NDArray[np.uint8]) -> list[str]:
        """Return the elements that no training crystal contains."""
        return [SYMBOLS[z] for z in np.unique(numbers).tolist() if not int(self.elements[z])]


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """Return all distances from differences; via matrix products they would depend on the batch size."""
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")


def _nearest(apart: Tensor) -> Tensor:
    """Return the mean of the smallest distances of each row."""
    count = min(NEIGHBORS, apart.shape[1])
    return apart.topk(count, dim=1, largest=False).values.mean(dim=1) if count else apart.new_zeros(len(apart))
