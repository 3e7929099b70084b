"""Definition of every metric: title, unit, better direction, and baseline.

An objective lists its own in ``measures``; plugins that log others call :func:`register`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal

STAGES = ("vae", "diffusion")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Measure:
    """A logged quantity.

    Attributes:
        name: logged name without stage, split and target.
        title: display title; by default the name.
        unit: unit, or empty.
        of_target: whether it is in the unit of the target.
        better: better direction; None if neither.
        summary: summary statistic if neither direction is better.
        baseline: meaning of ``NAME_baseline``, or of the best constant prediction; empty if none.
        form: print format.
        learned: name in the pretraining verdict; empty to leave it out.
        shown: whether it is in the table after pretraining.
        plotted: whether it has a panel in the pretraining plot.
    """

    name: str
    title: str = ""
    unit: str = ""
    _: KW_ONLY
    of_target: bool = False
    better: Literal["lower", "higher"] | None = "lower"
    summary: Literal["last", "mean", "max"] = "last"
    baseline: str = ""
    form: str = "{:.4g}"
    learned: str = ""
    shown: bool = False
    plotted: bool = False

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title or self.name}{f' ({self.unit})' if self.unit else ''}"

    def unit_in(self, targets: Mapping[str, str], target: str = "") -> str:
        """Return the unit, given those of the targets, for one target or all together."""
        if not self.of_target:
            return self.unit
        if target:
            return targets.get(target, "")
        return next(iter(targets.values())) if len(set(targets.values())) == 1 else ""


MEASURES: dict[str, Measure] = {}
"""Metrics by name, in table order."""


def register(*measures: Measure) -> None:
    """Register metrics."""
    MEASURES.update({measure.name: measure for measure in measures})


def of_name(name: str) -> Measure:
    """Return the definition of a name without stage, split and target, such as ``mae``."""
    return MEASURES.get(name) or Measure(name)


def find(metric: str) -> tuple[Measure, str]:
    """Return the definition of a logged metric, such as ``vae/val/mae/band_gap``, and its target, or an empty string.

    An unknown name has no unit or title: for training and validation less is better, for anything else neither. A
    baseline has the unit of its metric.
    """
    parts = re.sub(rf"^({'|'.join(STAGES)})/", "", metric).split("/")
    if parts[0] not in SPLITS:
        return Measure(metric, better=None), ""
    name, rest = parts[1] if len(parts) > 1 else "", "/".join(parts[2:])
    plain = name.removesuffix("_baseline")
    known = MEASURES.get(plain) or MEASURES.get(rest)
    if plain != name:
        return Measure(name, unit=known.unit if known else "", better=None), ""
    return known or Measure(name), rest


def unit_of(metric: str, targets: Mapping[str, str]) -> str:
    """Return the unit of a logged metric, given those of the targets, or an empty string."""
    measure, target = find(metric)
    return measure.unit_in(targets, target)


register(
    Measure("mae", "MAE", of_target=True, baseline="training mean"),
    Measure("rmse", "RMSE", of_target=True),
    Measure("r2", "R²", better="higher"),
    Measure("nll", "NLL"),
    Measure("error_rate", "error rate", baseline="most frequent class"),
    Measure("accuracy", better="higher"),
    Measure("f1", "F1", better="higher"),
    Measure("log_loss", "log loss"),
    Measure("roc_auc", "ROC-AUC", better="higher"),
    Measure("grad_norm", better=None),
    Measure("atoms_per_s", "", "atoms/s", better=None, summary="mean"),
    Measure("crystals_per_s", "", "crystals/s", better=None, summary="mean"),
    Measure("memory_mb", "", "MiB", better=None, summary="max"),
)
