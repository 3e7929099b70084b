"""Measure graph building and loading on one thread.

python -m benchmarks.data [--data FILE.parquet] [--rounds N]

Graph building is compared with pymatgen's compiled kernel in interleaved rounds: every round times each contender on
the same crystals, and ratios are taken within a round. Loading reads a store of 45,000 crystals (those of the data,
repeated) through the data module, graphs built on the fly; then the same as PyG graphs with their edges, pickled and in
an InMemoryDataset.
"""

from __future__ import annotations

import argparse
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from pymatgen.optimization.neighbors import find_points_in_spheres
from torch_geometric.data import Data, InMemoryDataset
from torch_geometric.loader import DataLoader as PyGLoader

from crysldnet.data.datamodule import CrystalDataModule, open_store
from crysldnet.data.schema import table_from_crystals
from crysldnet.data.split import Split
from crysldnet.data.store_writer import write_store
from crysldnet.graphs.batch import make_batch
from crysldnet.graphs.crystals import Crystals
from crysldnet.graphs.spec import GraphSpec
from experiments import evidence

HERE = Path(__file__).parent
BATCH = 64
STORED = 45_000


def structures_per_second(build: Callable[[int], object], n: int) -> float:
    """Time one pass over all batches."""
    start = time.perf_counter()
    for first in range(0, n, BATCH):
        build(first)
    return n / (time.perf_counter() - start)


def all_distances(crystals: Crystals, radius: float) -> list[torch.Tensor]:
    """Find neighbors by brute force: distances to all images within the cutoff's reach."""
    found = []
    for b in range(len(crystals)):
        lattice = torch.from_numpy(crystals.lattice[b])
        frac = torch.from_numpy(crystals.frac_coords[crystals.ptr[b] : crystals.ptr[b + 1]]).double()
        reach = torch.ceil(radius * torch.linalg.inv(lattice).norm(dim=0)).int().tolist()
        images = torch.cartesian_prod(*(torch.arange(-n - 1, n + 2, dtype=torch.float64) for n in reach))
        vectors = (frac[:, None, None] - frac[None, :, None] - images) @ lattice
        length = vectors.norm(dim=-1)
        found.append(vectors[(length <= radius) & (length > 1e-8)])
    return found


def graph_building(crystals: Crystals, rounds: int) -> dict[str, list[float]]:
    """Return structures per second for each contender, one value per round."""
    n = len(crystals)
    batches = {
        first: crystals.take(np.arange(first, min(first + BATCH, n), dtype=np.int64)) for first in range(0, n, BATCH)
    }
    positions = np.ascontiguousarray(crystals.positions)
    lattices = [np.ascontiguousarray(lattice) for lattice in crystals.lattice]
    periodic = np.ones(3, np.int64)

    def pymatgen(first: int) -> None:
        for b in range(first, min(first + BATCH, n)):
            points = positions[crystals.ptr[b] : crystals.ptr[b + 1]]
            find_points_in_spheres(points, points, 5.0, periodic, lattices[b], 1e-8)

    contenders = {
        "all distances to all images at once, torch, 5 Å": lambda first: all_distances(batches[first], 5.0),
        "pymatgen find_points_in_spheres, 5 Å": pymatgen,
        "neighbor list, 5 Å": lambda first: GraphSpec(radius=5.0).build(batches[first]),
        "neighbor list, k = 12 with ties": lambda first: GraphSpec(k=12).build(batches[first]),
        "neighbor list, k = 25 with ties": lambda first: GraphSpec(k=25).build(batches[first]),
        "PDDFormer's graph, k = 25 symmetric, 92 distances": lambda first: GraphSpec(
            k=25, symmetric=True, n_distances=92
        ).build(batches[first]),
    }
    for build in contenders.values():
        build(0)
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, build in contenders.items():
            speeds[name].append(structures_per_second(build, n))
    return speeds


def loading(crystals: Crystals, rounds: int) -> tuple[list[float], list[float], list[float]]:
    """Return batches per second, seconds to open the store, and seconds from then to the first batch."""
    n = len(crystals)
    speeds, opened, first_batch = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        index = np.arange(STORED, dtype=np.int64) % n
        tables = (
            table_from_crystals(
                crystals.take(index[a : a + 5000]), [f"c{i}" for i in range(a, min(a + 5000, STORED))], {}, {}, {}
            )
            for a in range(0, STORED, 5000)
        )
        path = write_store(f"{folder}/crystals.store", tables).name
        for _ in range(rounds):
            data = CrystalDataModule(
                path=path,
                graph=GraphSpec(k=12),
                split=Split(by="random", fractions=[1.0, 0.0, 0.0]),
                batch_size=BATCH,
            )
            start = time.perf_counter()
            data.setup()
            opened.append(time.perf_counter() - start)
            start = time.perf_counter()
            batches = iter(data.train_dataloader())
            next(batches)
            first_batch.append(time.perf_counter() - start)
            start = time.perf_counter()
            count = sum(1 for _ in batches)
            speeds.append(count / (time.perf_counter() - start))
    return speeds, opened, first_batch


def pyg_graphs(crystals: Crystals, n: int) -> list[Data]:
    """Repeat the given crystals to n PyG graphs with edges."""
    graphs = []
    for b in range(len(crystals)):
        batch = make_batch(crystals.take(np.array([b])), GraphSpec(k=12))
        graphs.append(Data(z=batch.numbers, pos=batch.positions, edge_index=batch.edge_index, edge_vec=batch.edge_vec))
    return [graphs[i % len(graphs)].clone() for i in range(n)]


def others_loading(crystals: Crystals, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Measure a pickled list of graphs and PyG's InMemoryDataset of the same graphs, with stored edges."""
    results: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        graphs = pyg_graphs(crystals, STORED)
        Path(folder, "list.pickle").write_bytes(pickle.dumps(graphs))
        torch.save(InMemoryDataset.collate(graphs), f"{folder}/collated.pt")
        del graphs

        def pickled() -> object:
            return pickle.loads(Path(folder, "list.pickle").read_bytes())  # noqa: S301

        def in_memory() -> object:
            dataset = InMemoryDataset()
            dataset.data, dataset.slices = torch.load(f"{folder}/collated.pt", weights_only=False)
            return dataset

        for name, opening in (("pickled list of PyG graphs", pickled), ("PyG InMemoryDataset", in_memory)):
            times = results[name] = {"first": [], "speed": []}
            for _ in range(rounds):
                start = time.perf_counter()
                batches = iter(PyGLoader(opening(), batch_size=BATCH, shuffle=True))
                next(batches)
                times["first"].append(time.perf_counter() - start)
                start = time.perf_counter()
                count = sum(1 for _ in zip(batches, range(300), strict=False))
                times["speed"].append(count / (time.perf_counter() - start))
    return results


def main() -> None:
    """Measure; write results.json and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="embedded:mp_starter", help="crystals: embedded:NAME, a store or Parquet file"
    )
    parser.add_argument("--max-atoms", type=int, default=20, help="use the crystals of at most this many atoms")
    parser.add_argument("--rounds", type=int, default=7)
    settings = parser.parse_args()
    commit = evidence.current_commit(HERE)
    store = open_store(settings.data).crystals
    crystals = store.take(np.flatnonzero(store.sizes <= settings.max_atoms))
    what = f"{Path(settings.data).stem}, {len(crystals)} crystals of at most {settings.max_atoms} atoms"
    records = []

    def record(name: str, metric: str, unit: str, values: list[float], data: str = what) -> None:
        command = "python -m benchmarks.data"
        records.append(
            evidence.timed(values, name=name, metric=metric, unit=unit, data=data, command=command, commit=commit)
        )

    speeds = graph_building(crystals, settings.rounds)
    reference = speeds["pymatgen find_points_in_spheres, 5 Å"]
    for name, values in speeds.items():
        record(name, "graphs built", "structures/s", values)
    for name, values in speeds.items():
        if values is not reference:
            ratios = [own / theirs for own, theirs in zip(values, reference, strict=True)]
            record(f"{name}, over pymatgen at 5 Å", "ratio within a round", "1", ratios)
    batches, opened, first = loading(crystals, settings.rounds)
    stored = f"the same repeated to {STORED} in a store"
    record("loading, graphs k = 12 built on the fly", "batches of 64 in one process", "1/s", batches, stored)
    record("opening the store", "time", "s", opened, stored)
    record("first batch, compiled", "time", "s", first, stored)
    for name, times in others_loading(crystals, 3).items():
        record(f"{name}, edges stored", "batches of 64 in one process", "1/s", times["speed"], stored)
        record(f"{name}, opening and first batch", "time", "s", times["first"], stored)
    evidence.write(HERE, records)
    print(evidence.table(records))


if __name__ == "__main__":
    main()
