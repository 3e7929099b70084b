"""Save a chart layout for this project on W&B: python -m crysldnet.tools.dashboard ENTITY [PROJECT].

There are two layouts: one for pretraining and one for finetuning. With --print the layouts are printed instead of sent,
which needs no account. This requires the package wandb-workspaces of the extra ``wandb``.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import crysldnet.models.pretraining  # noqa: F401  registers the measures of pretraining
from crysldnet.measures import MEASURES, STAGES
from crysldnet.models import objectives

STEP = "trainer/global_step"
Panels = list[tuple[str, list[str] | str]]
"""Chart titles with the metrics of each, or a regular expression for them."""


def _with_baseline(*names: str) -> Panels:
    """Return a chart for each metric, with its baseline."""
    found = [MEASURES[name] for name in names]
    return [(m.heading, [f"val/{m.name}", *([f"val/{m.name}_baseline"] if m.baseline else [])]) for m in found]


def _of_targets(*names: str) -> Panels:
    """Return a chart for each metric with all targets: with several, their names follow the metric name."""
    return [(MEASURES[name].heading, f"val/{name}(/.+)?") for name in names]


PRETRAINING: dict[str, Panels] = {
    "What it learned": _with_baseline(*(m.name for m in objectives.MEASURES if m.baseline and (m.plotted or m.unit))),
    "Latent space: a collapse shows here": _with_baseline(
        "features_spread", "features_rank", "latent_spread", "latent_rank"
    ),
    "Losses": [("training", ["train/loss"]), ("validation", ["val/loss"])],
}
"""Sections of the pretraining layout, one set per stage."""
FINETUNING: dict[str, Panels] = {
    "Errors of numbers, on validation": _of_targets("mae", "rmse", "r2", "nll"),
    "Scores of classes, on validation": _of_targets("roc_auc", "accuracy", "f1", "log_loss"),
    "Loss": [("training", ["train/loss"])],
}
HEALTH: dict[str, Panels] = {
    "Health and speed": [
        ("norm of the gradient", ["train/grad_norm"]),
        ("atoms/s", ["train/atoms_per_s"]),
        ("crystals/s", ["train/crystals_per_s"]),
        ("peak memory (MiB)", ["train/memory_mb"]),
    ]
}


def layouts(entity: str, project: str) -> list[Any]:
    """Return the layouts as ``wandb_workspaces`` objects without sending them."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    def chart(title: str, metrics: list[str] | str, before: str) -> Any:
        if isinstance(metrics, str):
            return reports.LinePlot(title=title, x=STEP, metric_regex=f"^{before}{metrics}$")
        return reports.LinePlot(title=title, x=STEP, y=[before + metric for metric in metrics])

    def sections(parts: dict[str, Panels], stage: str = "") -> list[Any]:
        before, named = (f"{stage}/", f", {stage} stage") if stage else ("", "")
        return [
            workspaces.Section(
                name=title + named,
                is_open=True,
                panels=[chart(name, metrics, before) for name, metrics in panels],
            )
            for title, panels in parts.items()
        ]

    pretraining = [section for stage in STAGES for section in sections(PRETRAINING | HEALTH, stage)]
    finetuning = sections(FINETUNING | HEALTH)
    return [
        workspaces.Workspace(entity=entity, project=project, name=name, sections=parts)
        for name, parts in (("crysldnet pretraining", pretraining), ("crysldnet finetuning", finetuning))
    ]


def main(arguments: list[str] | None = None) -> int:
    """Save or print the layouts; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m crysldnet.tools.dashboard", description=__doc__)
    parser.add_argument("entity", help="user or team on W&B")
    parser.add_argument("project", nargs="?", default="crysldnet")
    parser.add_argument("--print", action="store_true", help="print them as JSON; nothing is sent")
    given = parser.parse_args(arguments)
    try:
        made = layouts(given.entity, given.project)
    except ImportError as error:
        print(f"error: {error}: pip install 'crysldnet[wandb]'", file=sys.stderr)  # noqa: T201
        return 2
    if given.print:
        print(json.dumps([layout._to_model().model_dump(mode="json") for layout in made], indent=1))  # noqa: T201
        return 0
    for layout in made:
        print(layout.save().url)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
