"""Several models as one.

Shapes: ``M`` members, ``B`` crystals, ``T`` targets, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from crysldnet.models.head import Prediction


def combine(predictions: Sequence[Prediction]) -> Prediction:
    """Return the mean of the members' predictions, and the spread between and within them.

    The standard deviation is that of the mixture of the members' distributions,
    std² = mean(value² + std²) − mean(value)² (Lakshminarayanan et al., arXiv 1612.01474); members without one of their
    own count as exact. Probabilities are averaged, and the likeliest class of the average is predicted.

    Args:
        predictions: of the M members, for the same B crystals.

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
    if predictions[0].probability is None:
        return Prediction(mean, std, None)
    probability = torch.stack([p.probability for p in predictions if p.probability is not None]).mean(0)
    classified = ~probability[:, :, 0].isnan()
    likeliest = probability.nan_to_num(0.0).argmax(-1).to(mean.dtype)
    return Prediction(torch.where(classified, likeliest, mean), std.masked_fill(classified, torch.nan), probability)
