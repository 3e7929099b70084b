"""Settings that make a real run small enough for a test."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from crysldnet.config import compose, validate
from crysldnet.data.datasets import EMBEDDED
from crysldnet.finetune import FinetuneConfig
from crysldnet.pretrain import PretrainConfig
from crysldnet.training.diagnostics import OF_THE_MACHINE

ENCODER = ["encoder.width=32", "encoder.layers=2", "encoder.k=8", "encoder.n_distances=12", "encoder.n_basis=32"]
DENOISER = ["stage=both", "denoiser.width=32", "denoiser.layers=1", "denoiser.heads=2"]
QUIET = ["trainer.progress_bar=false"]


def subset(path: Path, *, train: int, val: int = 0, test: int = 0, max_atoms: int = 12) -> Path:
    """Write the first small crystals of each split of the embedded set as a Parquet file."""
    table, splits, sizes = _starter()
    rows: list[int] = []
    for name, count in (("train", train), ("val", val), ("test", test)):
        small = [i for i, (s, n) in enumerate(zip(splits, sizes, strict=True)) if s == name and 2 <= n <= max_atoms]
        rows += small[-count:] if count else []
    pq.write_table(table.take(rows), path)
    return path


@cache
def _starter() -> tuple[pa.Table, list[str], list[int]]:
    table = pq.read_table(EMBEDDED / "mp_starter.parquet")
    return table, table["split"].to_pylist(), [len(z) for z in table["atomic_numbers"].to_pylist()]


def environment_of_a_shell() -> dict[str, str]:
    """Return the environment without what ``make test ARGS=…`` would hand on to a ``make`` within a test."""
    makefile = Path(__file__).parents[1] / "Makefile"
    names = {"MAKEFLAGS", "MAKELEVEL", "PYTHONPATH", *re.findall(r"^(\w+) \?=", makefile.read_text(), re.MULTILINE)}
    return {key: value for key, value in os.environ.items() if key not in names}


def pretrain_config(*arguments: str, tiny_encoder: Sequence[str] = ENCODER) -> tuple[PretrainConfig, dict]:
    """Compose a tiny pretraining run."""
    composition = compose("pretrain", [*tiny_encoder, *DENOISER, *QUIET, *arguments])
    return validate(composition, PretrainConfig), composition.values


def finetune_config(*arguments: str, tiny_encoder: Sequence[str] = ENCODER) -> tuple[FinetuneConfig, dict]:
    """Compose a tiny finetuning run."""
    composition = compose("finetune", [*tiny_encoder, *QUIET, "min_steps=0", "baselines=false", *arguments])
    return validate(composition, FinetuneConfig), composition.values


def repeatable(metrics: Path) -> list[dict[str, str]]:
    """Return the rows of a ``metrics.csv`` without what the machine decides."""
    with metrics.open(newline="") as file:
        rows = [{name: v for name, v in row.items() if name not in OF_THE_MACHINE} for row in csv.DictReader(file)]
    assert rows
    return rows


def keep_two_curves(metrics: Path) -> None:
    """Drop the other columns of a ``metrics.csv``: a drawing of each, in every test, would take the most time."""
    with metrics.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    with metrics.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, ["epoch", "step", "train/loss", "val/mae"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
