"""Measure how much of an epoch is spent waiting for data.

python -m benchmarks.epoch [--data FILE.parquet] [--workers N]

Batches of 64 come from the data module with the given number of worker processes, graphs built on the fly, while the
training process takes steps of forward, backward and optimizer on one thread. Waiting is the time in which the loop
asks for the next batch. The first batch, for which the workers start, is left out. Nothing is slowed down on purpose,
so a share at some speed is an upper bound at any lower one.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.encoders import make_encoder
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.split import Split
from crysldnet.encoders.protocol import Encoder
from crysldnet.models.head import PropertyHead
from crysldnet.training.trainer import keep_freed_memory
from experiments import evidence

HERE = Path(__file__).parent
COMMAND = "python -m benchmarks.epoch"
ENCODERS = ("neighbor_attention", "neighbor_attention_small", "cgcnn", "pddformer")
BATCH = 64
MAX_ATOMS = 20


def epoch(encoder: Encoder, data: CrystalDataModule, steps: int) -> tuple[float, float, int]:
    """Train for some steps; return seconds waited, total seconds, and crystals seen."""
    head = PropertyHead(width=encoder.width, outputs=1, layers=0)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-4)
    batches = iter(data.train_dataloader())
    next(batches)
    waited, seen, begun = 0.0, 0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        optimizer.zero_grad()
        head(head.read(encoder, batch), batch.crystal, batch.num_crystals).square().mean().backward()
        optimizer.step()
        seen += batch.num_crystals
    return waited, time.perf_counter() - begun, seen


def main() -> None:
    """Measure; write results.json and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="embedded:mp_starter")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    settings = parser.parse_args()
    commit = evidence.current_commit(HERE)
    keep_freed_memory()
    torch.set_num_threads(1)
    records = []
    for name in ENCODERS:
        encoder = make_encoder(name)
        shares, speeds = [], []
        for seed in range(settings.rounds):
            data = CrystalDataModule(
                path=settings.data,
                graph=encoder.graph,
                split=Split(by="random", fractions=[1.0, 0.0, 0.0]),
                batch_size=BATCH,
                max_crystal_atoms=MAX_ATOMS,
                num_workers=settings.workers,
                seed=seed,
            )
            data.setup()
            waited, total, seen = epoch(encoder, data, settings.steps)
            shares.append(100.0 * waited / total)
            speeds.append(seen / total)
        what = f"{Path(settings.data).stem}, crystals of at most {MAX_ATOMS} atoms, {settings.workers} worker"
        for metric, unit, values in (("waiting for data", "%", shares), ("speed", "structures/s", speeds)):
            records.append(
                evidence.timed(values, name=name, metric=metric, unit=unit, data=what, command=COMMAND, commit=commit)
            )
    evidence.write(HERE, records)
    print(evidence.table_by_name(records))


if __name__ == "__main__":
    main()
