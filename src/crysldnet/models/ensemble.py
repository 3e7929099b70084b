"""Several models as one.

Shapes: ``M`` members, ``B`` crystals, ``T`` targets, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from crysldnet.models.predictor import Prediction
from crysldnet.models.target import TargetType, TwoPart


def combine(predictions: Sequence[Prediction], types: Sequence[TargetType]) -> Prediction:
    """Return the mean of the members' predictions, and the spread between and within them.

    The standard deviation is that of the mixture of the members' distributions,
    std² = mean(value² + std²) − mean(value)² (Lakshminarayanan et al., arXiv 1612.01474); members without one of their
    own count as exact. Probabilities are averaged, and the likeliest class of the average is predicted. A number of two
    parts is 0 where most members say 0, else the mean of those that don't.

    Args:
        predictions: of the M members, for the same B crystals.
        types: of the T targets.

    Returns:
        ``std`` [B, T] is NaN for classifications.
    """
    values = torch.stack([p.value for p in predictions])
    mean = values.mean(0)
    variance = values.var(0, correction=0)
    if all(p.std is not None for p in predictions):
        within = torch.stack([p.std for p in predictions if p.std is not None])
        variance = variance + within.nan_to_num(0.0).square().mean(0)
    std = variance.sqrt()
    gated = torch.tensor([isinstance(kind, TwoPart) for kind in types], device=mean.device)
    over = (values != 0).sum(0)
    mean = torch.where(gated, torch.where(2 * over >= len(values), values.sum(0) / over.clamp_min(1), 0.0), mean)
    if predictions[0].probability is None:
        return Prediction(mean, std, None)
    probability = torch.stack([p.probability for p in predictions if p.probability is not None]).mean(0)
    classified = ~probability[:, :, 0].isnan()
    likeliest = probability.nan_to_num(0.0).argmax(-1).to(mean.dtype)
    return Prediction(torch.where(classified, likeliest, mean), std.masked_fill(classified, torch.nan), probability)
