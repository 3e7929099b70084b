"""Write an HTML report on finished runs that works offline.

It shows learning curves, test errors (parity, histogram, by element, by number of atoms), the worst predictions with
their structures, which atoms and descriptors a few predictions come from, and calibration if predictions have standard
deviations. Several runs are compared on their common test crystals, with confidence intervals.

  crysldnet report runs/finetune/latest
  crysldnet report runs/finetune/pretrained runs/finetune/scratch out=compared.html figures=pdf
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from crysldnet.errors import ConfigError
from crysldnet.io import cannot_write, replacing
from crysldnet.tools.report.run_files import Run, read_run

MOST_EXPLAINED = 6
"""Maximum number of explained crystals per target."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Every key of ``conf/report.yaml``."""

    runs: list[str]
    out: str
    images: bool
    figures: Literal["pdf", "svg"] | None
    worst: int
    explained: int
    resamples: int
    seed: int
    plugins: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs: name at least one run folder")
        if self.worst < 0 or self.seed < 0 or self.resamples < 100:
            raise ValueError("worst and seed must be 0 or more and resamples at least 100")
        if not 0 <= self.explained <= MOST_EXPLAINED:
            raise ValueError(f"explained must be from 0 to {MOST_EXPLAINED}, not {self.explained}")


def names_of(runs: Sequence[Run]) -> list[str]:
    """Return a unique name for each run: its folder's name, with parent folders if needed."""
    parts = [run.path.absolute().parts for run in runs]
    depth = 1
    while depth < max(map(len, parts)) and len({p[-depth:] for p in parts}) < len({*parts}):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def run(config: ReportConfig, _values: dict[str, Any]) -> int:
    """Write the report; return the exit status.

    Args:
        config: the settings.
        _values: the same as plain values, unused.
    """
    from crysldnet.tools.report.report_page import Report

    out = Path(config.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"out={config.out}: the page needs a name that ends in .html", "out")
    runs = [read_run(Path(path)) for path in config.runs]
    if len({run.path.absolute() for run in runs}) < len(runs):
        raise ConfigError("runs: a run is named twice", "runs")
    if any(run.command == "pretrain" for run in runs):
        importlib.import_module("crysldnet.models.pretraining")  # registers its measures
    report = Report(
        runs,
        names_of(runs),
        worst=config.worst,
        explained=config.explained,
        resamples=config.resamples,
        seed=config.seed,
        keep=config.images,
        printed=config.figures,
    )
    text = report.html()
    folder = out.with_name(f"{out.stem}_images")
    with replacing(out) as partial:
        partial.write_text(text, encoding="utf-8")
    if report.images:
        _write_images(report.images, folder)
    print(f"written: {out} ({len(text) / 1e6:.1f} MB)")  # noqa: T201
    if report.images:
        print(f"written: {folder} ({len(report.images)} images)")  # noqa: T201
    return 0


def _write_images(images: Mapping[str, bytes], folder: Path) -> None:
    is_new = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        for name, content in images.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise cannot_write(error.filename or folder, error) from error
