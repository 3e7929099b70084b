"""What is known of each measure: its title, its unit, which direction is better, and what it is compared with.

An objective lists its own in ``measures``; a plugin that logs others calls :func:`register`.
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
    """A quantity that is logged.

    Attributes:
        name: as it is logged, without stage, split and target.
        title: for a person; the name by default.
        unit: empty for none.
        of_target: it is in the unit of the target.
        better: which direction is; None where neither is.
        summary: what of a run is kept where neither direction is better.
        baseline: what ``NAME_baseline`` stands for; empty where there is none.
        form: how a value is printed.
        learned: what a verdict on pretraining calls it; empty where it is left out of that.
        shown: it stands in the table that pretraining ends with.
        plotted: it has a panel in the plot of pretraining.
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
        """Return the unit, given those of the targets, for one of them or for all together."""
        if not self.of_target:
            return self.unit
        if target:
            return targets.get(target, "")
        return next(iter(targets.values())) if len(set(targets.values())) == 1 else ""


MEASURES: dict[str, Measure] = {}
"""By name, in the order in which tables show them."""


def register(*measures: Measure) -> None:
    """Make measures known."""
    MEASURES.update({measure.name: measure for measure in measures})


def find(metric: str) -> tuple[Measure, str]:
    """Return the measure of a logged metric, such as ``vae/val/mae/band_gap``, and its target; empty where it has none.

    An unknown name has a measure without unit and title: of the training and the validation less is better, of anything
    else neither. A baseline has the unit of its measure.
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


register(
    Measure("mae", "MAE", of_target=True),
    Measure("rmse", "RMSE", of_target=True),
    Measure("r2", "R²", better="higher"),
    Measure("nll", "NLL"),
    Measure("accuracy", better="higher"),
    Measure("f1", "F1", better="higher"),
    Measure("log_loss", "log loss"),
    Measure("roc_auc", "ROC-AUC", better="higher"),
    Measure("grad_norm", better=None),
    Measure("atoms_per_s", "", "atoms/s", better=None, summary="mean"),
    Measure("crystals_per_s", "", "crystals/s", better=None, summary="mean"),
    Measure("memory_mb", "", "MiB", better=None, summary="max"),
)
