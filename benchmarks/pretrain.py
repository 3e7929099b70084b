"""Measure a training step of both stages of pretraining.

python -m benchmarks.pretrain [--data FILE.parquet] [--batch N] [--rounds N] [--device cpu|cuda]

One step is forward, backward and optimizer on one batch of the same crystals, corrupted where the stage reconstructs;
on a CPU on one thread. The default recipe and the published one take turns in every round. The bytes of the gradient
are what processes exchange in a step.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from benchmarks.encoders import draw
from crysldnet.config import compose, validate
from crysldnet.graphs.batch import CrystalBatch, make_batch
from crysldnet.graphs.crystals import Crystals
from crysldnet.models.pretraining import PretrainingModel
from crysldnet.pretrain import PretrainConfig, build_model
from crysldnet.training.trainer import keep_freed_memory
from experiments import evidence

HERE = Path(__file__).parent
COMMAND = "python -m benchmarks.pretrain"
RECIPES: dict[str, list[str]] = {"default": [], "published": ["preset=published"]}
STAGES: tuple[Literal["vae", "diffusion"], ...] = ("vae", "diffusion")


def make_model(recipe: str, stage: str) -> PretrainingModel:
    """Build the model of a stage with fresh weights."""
    config = validate(compose("pretrain", RECIPES[recipe]), PretrainConfig)
    return build_model(config, with_flow=stage == "diffusion")


def gradient_bytes(model: PretrainingModel) -> float:
    """Return the size of a float32 gradient in bytes."""
    return 4.0 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def make_stage_batch(model: PretrainingModel, crystals: Crystals) -> CrystalBatch:
    """Make a stage's training batch; corrupt it for reconstruction."""
    undo = None
    if model.reconstructs:
        crystals, undo = model.objective.corruption.apply(crystals, np.random.default_rng(0))
    return make_batch(crystals, model.encoder.graph, undo=undo)


class Stage:
    """A stage's model, batch and optimizer on a device."""

    def __init__(self, model: PretrainingModel, crystals: Crystals, device: str) -> None:
        self.model, self.batch = model.to(device), make_stage_batch(model, crystals).to(device)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def timed(self) -> float:
        """Time one step in seconds."""
        self._wait()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        torch.stack(list(self.model(self.batch).terms.values())).sum().backward()
        self.optimizer.step()
        self.model.update_teacher()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.batch.numbers.is_cuda:
            torch.cuda.synchronize()


def main() -> None:
    """Measure; write results.json and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="embedded:mp_starter")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    settings = parser.parse_args()
    commit = evidence.current_commit(HERE)
    keep_freed_memory()
    torch.set_num_threads(1)
    crystals = draw(settings.data, settings.batch)
    models = {f"{recipe}, {stage}": make_model(recipe, stage) for recipe in RECIPES for stage in STAGES}
    stages = {name: Stage(model, crystals, settings.device) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for stage in stages.values():
        stage.timed()
    for _ in range(settings.rounds):
        for name, stage in stages.items():
            seconds[name].append(stage.timed())
    what = f"{Path(settings.data).stem}, one batch of {len(crystals)} crystals, {len(crystals.numbers)} atoms"
    on_gpu = settings.device == "cuda"
    about = {"data": what, "command": f"{COMMAND} --device cuda" if on_gpu else COMMAND, "commit": commit}
    where = f", {torch.cuda.get_device_name()}" if on_gpu else ""
    records = [
        evidence.timed(values, name=f"{name}{where}", metric=metric, unit=unit, **about)
        for name in stages
        for metric, unit, values in (
            ("gradient", "MB", [gradient_bytes(models[name]) / 1e6]),
            ("step", "s", seconds[name]),
            ("speed", "structures/s", [len(crystals) / s for s in seconds[name]]),
        )
    ]
    evidence.write(HERE, records)
    print(evidence.table_by_name(records))


if __name__ == "__main__":
    main()
