"""Choose the crystals to measure next.

Predicts a property of every candidate with a finetuned model and selects n: by expected improvement over the best value
so far (goal=maximize or minimize), or by uncertainty (goal=learn). Crystals similar to those already selected score
lower, because measuring one informs about both.

  crysldnet suggest model=runs/finetune/latest files="candidates/*.cif" n=10
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import special, stats

from crysldnet.console import note
from crysldnet.data.output import open_table
from crysldnet.errors import ConfigError, DataError
from crysldnet.inference import Device, load
from crysldnet.inference.command import refuse_overwriting
from crysldnet.inference.results import Predictions
from crysldnet.readers.stream import StreamSettings

Floats = NDArray[np.float64]
Goal = Literal["maximize", "minimize", "learn"]


@dataclass(frozen=True, kw_only=True)
class SuggestConfig(StreamSettings):
    """Every key of ``conf/suggest.yaml``."""

    model: str
    files: str | list[str]
    out: str
    n: int
    goal: Goal
    target: str | None
    best: float | None
    interval: float
    device: Device
    plugins: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1:
            raise ValueError(f"n must be 1 or more, not {self.n}")
        if not 0.0 < self.interval < 1.0:
            raise ValueError(f"interval must be between 0 and 1, not {self.interval}")


def expected_improvement(mean: Floats, std: Floats, best: float) -> Floats:
    """Return the expected improvement over ``best`` for a normal distribution."""
    z = (mean - best) / np.maximum(std, 1e-12)
    return (mean - best) * special.ndtr(z) + std * stats.norm.pdf(z)


def choose(mean: Floats, std: Floats, features: Floats, n: int, goal: Goal, best: float) -> list[tuple[int, float]]:
    """Return the batch of candidates to measure, and the score of each at selection.

    After each selection, the variance of every other candidate is multiplied by 1 − ρ², as in a Gaussian process; ρ is
    a Gaussian of the feature distance with the median distance as width.

    Args:
        mean: [B] predictions.
        std: [B] standard deviations.
        features: [B, D] features of the candidates.
        n: number to select.
        goal: ``maximize``, ``minimize`` or ``learn``.
        best: value to improve on.
    """
    sign = -1.0 if goal == "minimize" else 1.0
    spread = std.astype(np.float64).copy()
    scale = features.std(axis=0)
    x = (features - features.mean(axis=0)) / np.where(scale > 1e-6 * max(float(scale.max()), 1e-12), scale, 1.0)
    squares = (x**2).sum(axis=1)
    sample = x[np.linspace(0, len(x) - 1, min(len(x), 300)).astype(int)]
    pairs = ((sample[:, None] - sample[None]) ** 2).sum(axis=-1)[np.triu_indices(len(sample), 1)]
    width = float(np.median(pairs)) if len(pairs) and np.median(pairs) > 0 else 1.0
    found: list[tuple[int, float]] = []
    for _ in range(min(n, len(mean))):
        score = spread.copy() if goal == "learn" else expected_improvement(sign * mean, spread, sign * best)
        score[[row for row, _ in found]] = -np.inf
        row = int(np.argmax(score))
        found.append((row, float(score[row])))
        squared = (squares + squares[row] - 2.0 * x @ x[row]).clip(0.0)
        rho = np.exp(-squared / width)
        spread *= np.sqrt((1.0 - rho**2).clip(0.0))
    return found


def uncertainty(found: Predictions, place: int, interval: float) -> Floats:
    """Return [B] standard deviations of a target: the model's, or derived from its intervals for a normal distribution.

    Raises:
        DataError: the model has neither.
    """
    std = found.std[:, place]
    if not np.isnan(std).any():
        return std
    half = (found.high[:, place] - found.low[:, place]) / 2.0
    if np.isnan(half).any():
        raise DataError(
            "the model gives neither standard deviations nor intervals; finetune it with validation crystals"
        )
    return half / float(stats.norm.ppf(0.5 + interval / 2.0))


def run(config: SuggestConfig, _values: dict[str, Any]) -> int:
    """Write the suggestions; return the exit status."""
    model = load(config.model, device=config.device)
    place = model.place_of(config.target)
    if model.members[0].classes[place] is not None:
        raise ConfigError(f"target: {model.targets[place]} has classes; suggestions need numbers", "target")
    refuse_overwriting(config.out, config.files)
    output = open_table(config.out)
    found = model.predict(config.files, interval=config.interval, on_error="report", settings=config)
    embedded = model.embed(config.files, on_error="report", settings=config)
    for refused in found.refused:
        note(f"refused: {refused.source}: {refused.reason}")
    value, std = found.values[:, place], uncertainty(found, place, config.interval)
    learned = np.array(["trained" in flags for flags in found.flags])
    if learned.all():
        raise DataError(f"the model was trained on all {len(learned)} candidates; give others")
    best = config.best
    if best is None:
        seen = value[learned] if learned.any() else value
        best = float(seen.min() if config.goal == "minimize" else seen.max())
        if config.goal != "learn":
            kind = "of a candidate that the model has learned from" if learned.any() else "of all candidates"
            note(f"best={best:g}, the best prediction {kind}; give best= as measured if you can")
    rows = np.flatnonzero(~learned)
    chosen = choose(value[rows], std[rows], embedded.features[rows].astype(np.float64), config.n, config.goal, best)
    where = rows[[row for row, _ in chosen]]
    with output:
        output.append(
            pa.table(
                {
                    "rank": np.arange(1, len(where) + 1),
                    "id": [found.ids[row] for row in where],
                    "source": [found.sources[row] for row in where],
                    "formula": [found.formulas[row] for row in where],
                    "prediction": value[where],
                    "std": std[where],
                    "unit": [model.units[place]] * len(where),
                    "score": [score for _, score in chosen],
                    "flags": [" ".join(found.flags[row]) for row in where],
                }
            )
        )
    note(f"{len(where)} of {len(rows):,} candidates suggested: {config.out}")
    return 0
