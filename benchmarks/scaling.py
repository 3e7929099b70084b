"""Measure whether the cost per atom stays flat from a thousand crystals to a million, and from 4 atoms to 400.

python -m benchmarks.scaling [--largest N]

Stores are made of the embedded crystals, repeated. Reading takes shuffled batches of 64 through the data module, graphs
built on the fly. The size of a crystal is varied by supercells of copper: neighbor lists, and one training step of
``neighbor_attention``.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from benchmarks.encoders import Contender, make_encoder
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.datasets import open_store
from crysldnet.data.output import write_store
from crysldnet.data.schema import table_from_crystals
from crysldnet.data.split import Split
from crysldnet.graphs.crystals import Crystals, concatenate, from_lists
from crysldnet.graphs.spec import GraphSpec
from crysldnet.training.trainer import keep_freed_memory
from experiments import evidence

HERE = Path(__file__).parent
COMMAND = "python -m benchmarks.scaling"
BATCH = 64
PIECE = 10_000
BATCHES = 200
ROUNDS = 3
FACES = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])


def stored(crystals: Crystals, n: int, folder: Path) -> Path:
    """Write a store of n crystals by repeating the given ones."""
    index = np.arange(n, dtype=np.int64) % len(crystals)
    tables = (
        table_from_crystals(
            crystals.take(index[a : a + PIECE]), [f"c{i}" for i in range(a, min(a + PIECE, n))], {}, {}, {}
        )
        for a in range(0, n, PIECE)
    )
    return folder / write_store(folder / f"{n}.store", tables).name


def reading(path: Path) -> tuple[float, float, float]:
    """Return seconds to set up the data module, seconds for the first batch, and then microseconds per atom."""
    data = CrystalDataModule(
        path=str(path), graph=GraphSpec(k=12), split=Split(by="random", fractions=[1.0, 0.0, 0.0]), batch_size=BATCH
    )
    start = time.perf_counter()
    data.setup()
    opened = time.perf_counter() - start
    start = time.perf_counter()
    batches = iter(data.train_dataloader())
    next(batches)
    first = time.perf_counter() - start
    atoms, start = 0, time.perf_counter()
    for batch, _ in zip(batches, range(BATCHES), strict=False):
        atoms += batch.num_atoms
    return opened, first, 1e6 * (time.perf_counter() - start) / atoms


def supercells(n_atoms: int, total: int) -> Crystals:
    """Return copper cells of n atoms each, ``total`` atoms in all."""
    repeats = {4: (1, 1, 1), 16: (2, 2, 1), 64: (4, 2, 2), 128: (4, 4, 2), 400: (5, 5, 4)}[n_atoms]
    shifts = np.stack(np.meshgrid(*map(np.arange, repeats), indexing="ij"), axis=-1).reshape(-1, 1, 3)
    frac = ((shifts + FACES) / repeats).reshape(-1, 3)
    lattice = 3.61 * np.diag(repeats).astype(float)
    one = from_lists([lattice], [np.full(len(frac), 29)], [frac])
    return concatenate([one] * (total // n_atoms))


def main() -> None:
    """Measure; write results.json and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=1_000_000)
    settings = parser.parse_args()
    commit = evidence.current_commit(HERE)
    keep_freed_memory()
    torch.set_num_threads(1)
    records = []

    def record(name: str, metric: str, unit: str, values: list[float], data: str) -> None:
        records.append(
            evidence.timed(values, name=name, metric=metric, unit=unit, data=data, command=COMMAND, commit=commit)
        )

    crystals = open_store("embedded:mp_starter").crystals
    with tempfile.TemporaryDirectory() as temporary:
        for n in (n for n in (1_000, 10_000, 100_000, 1_000_000) if n <= settings.largest):
            path = stored(crystals, n, Path(temporary))
            opened, first, cost = (list(values) for values in zip(*(reading(path) for _ in range(ROUNDS)), strict=True))
            name, data = f"{n:,} crystals", "embedded:mp_starter, repeated"
            record(name, "reading, graphs included", "µs/atom", cost, data)
            record(name, "opening and splitting", "s", opened, data)
            record(name, "ordering an epoch and first batch", "s", first, data)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            record(name, "peak memory so far", "MB", [peak], data)
    total = 1_600
    for n_atoms in (4, 16, 64, 128, 400):
        cells = supercells(n_atoms, total)
        graph, step = GraphSpec(k=12), Contender.make(make_encoder("neighbor_attention"), cells, "cpu")
        step.step()
        atoms = len(cells.numbers)
        built = []
        for _ in range(2 * ROUNDS):
            start = time.perf_counter()
            graph.build(cells)
            built.append(1e6 * (time.perf_counter() - start) / atoms)
        name, data = f"cells of {n_atoms} atoms", f"copper, about {total} atoms together"
        record(name, "neighbor list, k = 12", "µs/atom", built, data)
        record(
            name, "training step, neighbor_attention", "µs/atom", [1e6 * step.timed() / atoms for _ in range(5)], data
        )
    evidence.write(HERE, records)
    print(evidence.table_by_name(records))


if __name__ == "__main__":
    main()
