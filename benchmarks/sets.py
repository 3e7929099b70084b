"""Measure the CPU time of splits, exclusion, fingerprints and opening Parquet for a million crystals.

python -m benchmarks.sets [--crystals N]

The crystals are those of the embedded starter set, then the same with permuted species, as often as needed: more
different formulas than real sets of that size have.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crysldnet.data.datasets import CACHE_VARIABLE, open_store
from crysldnet.data.elements import formulas_of, hashes
from crysldnet.data.fingerprint import Fingerprints, geometries_of, overlap
from crysldnet.data.matching import shared_rows
from crysldnet.data.output import write_store
from crysldnet.data.schema import table_from_crystals
from crysldnet.data.split import Split
from crysldnet.data.store import CrystalStore
from experiments import evidence

HERE = Path(__file__).parent
COMMAND = "python -m benchmarks.sets"
PIECE = 10_000
ROUNDS = 3


def stored(n: int, path: Path) -> CrystalStore:
    """Write a store of n crystals and open it."""
    crystals = open_store("embedded:mp_starter").crystals
    rng = np.random.default_rng(0)
    others = [[0, *rng.permutation(np.arange(1, 95)), *range(95, 119)] for _ in range(n // len(crystals))]
    species = np.array([np.arange(119), *others], np.uint8)

    def table(rows: NDArray[np.int64]) -> pa.Table:
        some = crystals.take(rows % len(crystals))
        numbers = species[(rows // len(crystals))[some.crystal], some.numbers]
        return table_from_crystals(replace(some, numbers=numbers), [f"c{row}" for row in rows], {}, {}, {})

    return write_store(path, (table(np.arange(a, min(a + PIECE, n))) for a in range(0, n, PIECE)))


def seconds(work: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """Return each round's CPU time, summed over threads."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return taken


def main() -> None:
    """Measure; write results.json and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crystals", type=int, default=1_000_000)
    n = parser.parse_args().crystals
    commit = evidence.current_commit(HERE)
    records = []

    def record(name: str, values: list[float]) -> None:
        data = f"embedded:mp_starter with permuted species, {different:,} different formulas"
        records.append(
            evidence.timed(
                values,
                name=name,
                metric=f"processor time for {n:,} crystals",
                unit="s",
                data=data,
                command=COMMAND,
                commit=commit,
            )
        )
        print(f"{name}: {min(values):.2f} s")

    with tempfile.TemporaryDirectory() as temporary:
        store, rows = stored(n, Path(temporary) / "set.store"), np.arange(n)
        geometries_of(store.crystals, rows[:10])  # compiles
        different = len(set(formulas_of(store.crystals)))
        record("splitting by formula", seconds(lambda: Split(by="formula").rows(store)))
        record("splitting by chemical system", seconds(lambda: Split(by="chemical_system").rows(store)))
        record("excluding by formula", seconds(lambda: shared_rows(store, rows, [str(store.folder)], "formula")))
        fast = [lambda: hashes(store.ids_at(rows)), lambda: hashes(formulas_of(store.crystals))]
        record("fingerprints without distances", seconds(lambda: [work() for work in fast]))
        record("distances of fingerprints", seconds(lambda: geometries_of(store.crystals, rows), rounds=1))
        packed = Fingerprints.of(store).packed()
        record("overlap of a tenth with all", seconds(lambda: overlap(packed[::10], packed)))
        file = Path(temporary) / "set.parquet"
        pq.write_table(store.to_table(), file, compression="zstd")
        os.environ[CACHE_VARIABLE] = temporary
        record("opening Parquet, the first time", seconds(lambda: open_store(str(file)), rounds=1))
        record("opening Parquet again", seconds(lambda: open_store(str(file))))
    evidence.write(HERE, records)
    print(evidence.table(records))


if __name__ == "__main__":
    main()
