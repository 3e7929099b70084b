"""Ensembles.

Shapes: ``M`` members, ``B`` crystals, ``T`` targets, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from crysldnet.graphs.batch import CrystalBatch
from crysldnet.models.predictor import Prediction, TargetModel
from crysldnet.models.targets import TargetType


def combine(predictions: Sequence[Prediction], types: Sequence[TargetType]) -> Prediction:
    """Return the mean of the members' predictions and their joint standard deviation.

    The standard deviation is that of the mixture of the members' distributions, std² = mean(value² + std²) −
    mean(value)² (Lakshminarayanan et al., arXiv 1612.01474); members without a standard deviation count as exact. The
    target type defines how values are combined. Probabilities are averaged, and the most likely class of the average is
    predicted.

    Args:
        predictions: predictions of the M members for the same B crystals.
        types: types of the T targets.

    Returns:
        ``std`` [B, T] is NaN for classifications.
    """
    values = torch.stack([p.value for p in predictions])
    mean = torch.stack([kind.combine(values[:, :, place]) for place, kind in enumerate(types)], dim=1)
    variance = values.var(0, correction=0)
    if all(p.std is not None for p in predictions):
        within = torch.stack([p.std for p in predictions if p.std is not None])
        variance = variance + within.nan_to_num(0.0).square().mean(0)
    std = variance.sqrt()
    if predictions[0].probability is None:
        return Prediction(mean, std, None)
    probability = torch.stack([p.probability for p in predictions if p.probability is not None]).mean(0)
    classified = ~probability[:, :, 0].isnan()
    likeliest = probability.nan_to_num(0.0).argmax(-1).to(mean.dtype)
    return Prediction(torch.where(classified, likeliest, mean), std.masked_fill(classified, torch.nan), probability)


def predict_batch(models: Sequence[TargetModel], batch: CrystalBatch) -> Prediction:
    """Return the prediction of one model, or of an ensemble, for a batch on its device."""
    each = [model.predict(batch) for model in models]
    return combine(each, models[0].types) if len(each) > 1 else each[0]


@torch.inference_mode()
def predict(models: Sequence[TargetModel], batches: Iterable[CrystalBatch]) -> Prediction:
    """Return the predictions for all crystals of some batches, on the CPU."""
    parts = [predict_batch(models, batch.to(models[0].std.device)).to("cpu") for batch in batches]
    return Prediction.joined(parts) if parts else Prediction(torch.empty(0, len(models[0].targets)), None, None)
