"""Measure neighbor search and loading in one thread, for crystals of all sizes.

python -m benchmarks.data [neighbors] [loading] [--data FILE.parquet] [--rounds N]

Contenders are interleaved: every round times each of them on the same crystals, in processor time of the thread, and
ratios are taken within a round. Sizes that the data don't have are supercells of crystals of 2 to 8 atoms.

Neighbors are compared with pymatgen's compiled kernel at 5 Å and, where jarvis-tools is installed, at k = 12 with the
builder that Matformer and ComFormer took from there. Loading reads a store of 20,000 crystals (those of the data,
repeated) through the data module, graphs built on the fly or with edges kept in memory from the first epoch; then the
same as PyG graphs with their edges in an InMemoryDataset.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from pymatgen.optimization.neighbors import find_points_in_spheres
from torch_geometric.data import Data, InMemoryDataset
from torch_geometric.loader import DataLoader as PyGLoader

from crysldnet.data.datamodule import CrystalDataModule, open_store
from crysldnet.data.elements import SYMBOLS
from crysldnet.data.output import write_store
from crysldnet.data.schema import table_from_crystals
from crysldnet.data.split import Split
from crysldnet.graphs.batch import make_batch
from crysldnet.graphs.crystals import Crystals, from_lists
from crysldnet.graphs.spec import GraphSpec
from crysldnet.training.trainer import keep_freed_memory
from experiments import evidence

HERE = Path(__file__).parent
BATCH = 64
STORED = 20_000
ATOMS = 4000
"""Of each size, about."""
SIZES = [(1, 2), (3, 4), (5, 8), (9, 12), (13, 20), (21, 40), (41, 80), (81, 120), (121, 200), (400, 400)]
PUBLISHED = 1000
"""Atoms of each size for the published builder, which takes milliseconds for each."""


def supercells(crystals: Crystals, low: int, high: int, rng: np.random.Generator) -> Crystals:
    """Repeat crystals of 2 to 8 atoms along their shortest edges until they have low to high atoms."""
    made = []
    for row in rng.permutation(np.flatnonzero((crystals.sizes >= 2) & (crystals.sizes <= 8))).tolist():
        one, repeats = crystals.take(np.array([row])), np.ones(3, int)
        while (atoms := len(one.numbers) * repeats.prod()) < low:
            repeats[np.argmin(np.linalg.norm(one.lattice[0], axis=1) * repeats)] += 1
        if atoms <= high:
            cells = np.argwhere(np.ones(repeats))
            frac = (one.frac_coords.astype(float) + cells[:, None]).reshape(-1, 3) / repeats
            made.append((one.lattice[0] * repeats[:, None], np.tile(one.numbers, len(cells)), frac))
        if sum(len(numbers) for _, numbers, _ in made) >= ATOMS:
            break
    return from_lists(*zip(*made, strict=True))


def by_size(crystals: Crystals) -> Iterator[tuple[str, Crystals]]:
    """Yield a name and crystals of each size."""
    rng = np.random.default_rng(0)
    for low, high in SIZES:
        rows = rng.permutation(np.flatnonzero((crystals.sizes >= low) & (crystals.sizes <= high)))
        rows = rows[: 1 + np.searchsorted(np.cumsum(crystals.sizes[rows]), ATOMS)]
        name = f"{low}–{high} atoms" if low < high else f"{low} atoms"
        if len(rows) >= 5:
            yield name, crystals.take(np.sort(rows))
        else:
            yield f"{name}, supercells", supercells(crystals, low, high, rng)


def batches_of(crystals: Crystals) -> list[Crystals]:
    """Cut crystals into batches of 64."""
    n = len(crystals)
    return [crystals.take(np.arange(first, min(first + BATCH, n))) for first in range(0, n, BATCH)]


def pymatgen(crystals: Crystals) -> None:
    """Find neighbors within 5 Å with pymatgen."""
    positions, periodic = np.ascontiguousarray(crystals.positions), np.ones(3, np.int64)
    for b in range(len(crystals)):
        points = positions[crystals.ptr[b] : crystals.ptr[b + 1]]
        find_points_in_spheres(points, points, 5.0, periodic, np.ascontiguousarray(crystals.lattice[b]), 1e-8)


def published_builder() -> Callable[[Crystals], None] | None:
    """Return the k-nearest builder of jarvis-tools, without the DGL that its file imports; None if not installed."""
    for name in ("dgl", "dgl.data"):
        stub = ModuleType(name)
        stub.__spec__, stub.DGLDataset, stub.DGLGraph = ModuleSpec(name, None), object, object  # type: ignore[attr-defined]
        sys.modules.setdefault(name, stub)
    try:
        from jarvis.core.atoms import Atoms
        from jarvis.core.graphs import build_undirected_edgedata, nearest_neighbor_edges
    except ImportError:
        return None

    def build(crystals: Crystals) -> None:
        for b in range(len(crystals)):
            own = slice(crystals.ptr[b], crystals.ptr[b + 1])
            symbols, frac = [SYMBOLS[z] for z in crystals.numbers[own]], crystals.frac_coords[own].astype(float)
            atoms = Atoms(lattice_mat=crystals.lattice[b], coords=frac, elements=symbols, cartesian=False)
            edges = nearest_neighbor_edges(atoms=atoms, cutoff=4.0, max_neighbors=12, use_canonize=True)
            build_undirected_edgedata(atoms, edges)

    return build


def thread_time(work: Callable[[], object]) -> float:
    """Return the processor time of the thread that some work takes."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def neighbors(crystals: Crystals, rounds: int) -> Iterator[tuple[str, str, str, list[float]]]:
    """Yield name, measure, unit and one value a round, of each size."""
    published = published_builder()
    for name, chosen in by_size(crystals):
        batches, atoms = batches_of(chosen), len(chosen.numbers)
        contenders: dict[str, Callable[[Crystals], object]] = {
            "5 Å": GraphSpec(radius=5.0).build,
            "pymatgen, 5 Å": pymatgen,
            "k = 12 with ties": GraphSpec(k=12).build,
            "k = 25, symmetric, 92 distances": GraphSpec(k=25, symmetric=True, n_distances=92).build,
        }
        times: dict[str, list[float]] = {key: [] for key in contenders}
        few = chosen.take(np.arange(max(1, np.searchsorted(chosen.ptr, PUBLISHED, side="right") - 1)))
        for turn in range(1 + rounds):  # the first fills caches
            for key, build in contenders.items():
                taken = thread_time(lambda build=build, batches=batches: [build(batch) for batch in batches])
                if turn:
                    times[key].append(1e6 * taken / atoms)
        for key, values in times.items():
            yield name, key, "µs an atom", values
        ratios = [theirs / own for theirs, own in zip(times["pymatgen, 5 Å"], times["5 Å"], strict=True)]
        yield name, "5 Å, over pymatgen", "ratio", ratios
        if published is not None:
            theirs = [1e6 * thread_time(lambda few=few: published(few)) / len(few.numbers) for _ in range(3)]
            own = times["k = 12 with ties"]
            yield name, "k = 12, over the published builder", "ratio", [np.median(theirs) / value for value in own]


def stored(crystals: Crystals, folder: str) -> str:
    """Write a store of 20,000 crystals, those given repeated."""
    tables = (
        table_from_crystals(crystals.take(rows % len(crystals)), [f"c{row}" for row in rows.tolist()], {}, {}, {})
        for rows in np.split(np.arange(STORED), 10)
    )
    return write_store(f"{folder}/crystals.store", tables).name


def pyg_dataset(crystals: Crystals) -> InMemoryDataset:
    """Return 20,000 crystals as PyG graphs with their edges, those given repeated."""
    graphs = []
    for b in range(len(crystals)):
        batch = make_batch(crystals.take(np.array([b])), GraphSpec(k=12))
        graphs.append(Data(z=batch.numbers, pos=batch.positions, edge_index=batch.edge_index, edge_vec=batch.edge_vec))
    dataset = InMemoryDataset()
    dataset.data, dataset.slices = InMemoryDataset.collate([graphs[i % len(graphs)] for i in range(STORED)])
    return dataset


def loading(crystals: Crystals, rounds: int) -> Iterator[tuple[str, str, list[float]]]:
    """Yield measure, unit and one value a round."""
    with tempfile.TemporaryDirectory() as folder:
        path, pyg = stored(crystals, folder), pyg_dataset(crystals)
        split = Split(by="random", fractions=[1.0, 0.0, 0.0])
        fly, kept = (
            CrystalDataModule(path=path, graph=GraphSpec(k=12), split=split, batch_size=BATCH, keep_edges_mb=megabytes)
            for megabytes in (0, 2000)
        )
        opening = [thread_time(data.setup) for data in (fly, kept)]
        contenders = {
            "on the fly": fly.train_dataloader,
            "kept": kept.train_dataloader,
            "PyG": lambda: PyGLoader(pyg, BATCH, shuffle=True),
        }
        times: dict[str, list[float]] = {key: [] for key in contenders}
        for turn in range(1 + rounds):
            for key, loader in contenders.items():
                taken = thread_time(lambda loader=loader: sum(1 for _ in loader()))
                if turn:
                    times[key].append(STORED / taken)
        yield "opening the store", "s", opening
        yield "graphs k = 12 built on the fly", "structures/s", times["on the fly"]
        yield "edges kept in memory (data.keep_edges_mb)", "structures/s", times["kept"]
        yield "PyG InMemoryDataset, edges stored", "structures/s", times["PyG"]
        for key in ("on the fly", "kept"):
            ratios = [own / theirs for own, theirs in zip(times[key], times["PyG"], strict=True)]
            yield f"{key}, over PyG", "ratio", ratios


def main() -> None:
    """Measure, write results.json and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="neighbors|loading", default=["neighbors", "loading"])
    parser.add_argument(
        "--data", default="embedded:mp_starter", help="crystals: embedded:NAME, a store or Parquet file"
    )
    parser.add_argument("--rounds", type=int, default=7)
    settings = parser.parse_args()
    if unknown := set(settings.parts) - {"neighbors", "loading"}:
        parser.error(f"{unknown.pop()}: give neighbors, loading or nothing for both")
    keep_freed_memory()  # as in training
    commit, crystals = evidence.current_commit(HERE), open_store(settings.data).crystals
    sizes = crystals.sizes
    what = f"{Path(settings.data).stem}, {len(crystals):,} crystals of {sizes.min()} to {sizes.max()} atoms"

    def record(part: str, name: str, metric: str, unit: str, values: list[float], data: str) -> evidence.Record:
        command = f"python -m benchmarks.data {part}"
        return evidence.timed(values, name=name, metric=metric, unit=unit, data=data, command=command, commit=commit)

    records = []
    if "neighbors" in settings.parts:
        for name, metric, unit, values in neighbors(crystals, settings.rounds):
            records.append(record("neighbors", name, metric, unit, values, what))
        print(evidence.table_by_name(records))
    if "loading" in settings.parts:
        small = crystals.take(np.flatnonzero(crystals.sizes <= 20))
        for name, some in (("at most 20 atoms", small), ("all sizes", crystals)):
            of = f"{name} (mean {some.sizes.mean():.1f} atoms)"
            records += [record("loading", of, *row, f"{what}, repeated to {STORED:,}") for row in loading(some, 3)]
        print(evidence.table_by_name([r for r in records if r.command.endswith("loading")]))
    evidence.write(HERE, records)


if __name__ == "__main__":
    main()
