"""Measure the memory of `crysldnet predict` for stores of increasing size.

python -m benchmarks.predict [--crystals N …]

The crystals are those of the embedded starter set, again and again; the model is small and hardly trained. Memory is
the largest that the process had for itself, looked at five times a second; pages of the store that are mapped into it
don't count, since the system takes them back when it needs them (Linux).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from crysldnet.data.datasets import open_store
from crysldnet.data.output import write_store
from experiments import evidence

HERE = Path(__file__).parent
TINY = ["encoder=neighbor_attention_small", "encoder.width=32", "encoder.layers=1", "data.split.train_fraction=0.1"]


def repeated(count: int) -> Iterator[pa.Table]:
    """Yield the starter set repeatedly, with unique ids, up to the given number of crystals."""
    table = (
        open_store("embedded:mp_starter").to_table().select(["material_id", "lattice", "atomic_numbers", "frac_coords"])
    )
    for start in range(0, count, len(table)):
        part = table.slice(0, min(len(table), count - start))
        ids = pa.array([f"{name}-{start}" for name in part["material_id"].to_pylist()])
        yield part.set_column(0, part.schema.field(0), ids)


def measure(model: Path, store: Path, out: Path) -> float:
    """Predict once; return the peak memory in MB."""
    line = [sys.executable, "-m", "crysldnet", "predict", f"model={model}", f"files={store}", f"out={out}"]
    process = subprocess.Popen(line)
    peak = 0.0
    while process.poll() is None:
        with suppress(OSError, StopIteration):  # it has just ended, or not yet begun
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = max(peak, int(next(line for line in status if line.startswith("RssAnon")).split()[1]) * 1024 / 1e6)
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"crysldnet predict failed with status {process.returncode}")
    return peak


def main() -> None:
    """Measure every size and write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crystals", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    options = parser.parse_args()
    commit, records = evidence.current_commit(HERE), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        evidence.launch(folder, "finetune", "model", *TINY, "epochs=1", "min_steps=0")
        for count in options.crystals:
            store = folder / f"{count}.store"
            write_store(store, repeated(count))
            records.append(
                evidence.summarise(
                    [measure(folder / "finetune" / "model", store, folder / f"{count}.parquet")],
                    name=f"{count:,} crystals",
                    metric="peak memory",
                    unit="MB",
                    seeds=[],
                    data="embedded:mp_starter, repeated",
                    command="python -m benchmarks.predict",
                    commit=commit,
                )
            )
    evidence.write(HERE, records)


if __name__ == "__main__":
    main()
