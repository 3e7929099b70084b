"""Measure `crysldnet predict`: its memory for stores of increasing size, and its speed from CIF files.

python -m benchmarks.predict [memory] [cifs] [--crystals N …] [--cifs N]

The crystals are those of the embedded starter set, again and again; the model is small and hardly trained. Memory is
the largest that the process had for itself, looked at five times a second; pages of the store that are mapped into it
don't count, since the system takes them back when it needs them (Linux).

Speed is the processor time of the command in one process, with models on the small and on the included encoder. The
time for six of the files is subtracted, because it is that of starting.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from crysldnet.data.datasets import open_store
from crysldnet.data.output import write_store
from experiments import evidence

HERE = Path(__file__).parent
QUICK = ["epochs=1", "min_steps=0", "data.split.train_fraction=0.1"]
MODELS = {
    "neighbor_attention_small": ["encoder=neighbor_attention_small"],
    "base": ["pretrained=base"],
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
TINY = ["encoder=neighbor_attention_small", "encoder.width=32", "encoder.layers=1"]


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


def write_cifs(folder: Path, count: int) -> None:
    """Write CIFs of the starter set, as pymatgen writes them."""
    from pymatgen.core import Lattice, Structure
    from pymatgen.io.cif import CifWriter

    folder.mkdir()
    for row in next(repeated(count)).to_pylist():
        lattice, coordinates = np.reshape(row["lattice"], (3, 3)), np.reshape(row["frac_coords"], (-1, 3))
        structure = Structure(Lattice(lattice), row["atomic_numbers"], coordinates)
        (folder / f"{row['material_id']}.cif").write_text(str(CifWriter(structure)))


def processor_time(model: Path, cifs: Path, out: Path) -> float:
    """Predict once in one process and thread; return its processor time in seconds."""
    line = ["predict", f"model={model}", f"files={cifs}", f"out={out}", "workers=1"]
    before = os.times()
    subprocess.run(
        [sys.executable, "-m", "crysldnet", *line], check=True, capture_output=True, env=os.environ | ONE_THREAD
    )
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def speeds(folder: Path, count: int, rounds: int) -> Iterator[evidence.Record]:
    """Measure the speed from CIF files for each model, in interleaved rounds."""
    write_cifs(folder / "cifs", count)
    (folder / "six").mkdir()
    for file in sorted((folder / "cifs").iterdir())[:6]:
        shutil.copy(file, folder / "six")
    found: dict[str, list[float]] = {name: [] for name in MODELS}
    for name, settings in MODELS.items():
        evidence.launch(folder, "finetune", name, *settings, "recipe=network", *QUICK)
        processor_time(folder / "finetune" / name, folder / "six", folder / "warm.csv")
    for _ in range(rounds):
        for name, rates in found.items():
            model, out = folder / "finetune" / name, folder / f"{name}.csv"
            start = processor_time(model, folder / "six", out)
            out.unlink()
            rates.append((count - 6) / (processor_time(model, folder / "cifs", out) - start))
            out.unlink()
    for name, rates in found.items():
        yield evidence.timed(
            rates,
            name=f"CIFs, {name}",
            metric="predicted per processor second",
            unit="crystals/s",
            data=f"{count:,} CIFs of embedded:mp_starter",
            command="python -m benchmarks.predict cifs",
            commit=evidence.current_commit(HERE),
        )


def memory(folder: Path, counts: Sequence[int]) -> Iterator[evidence.Record]:
    """Measure the peak memory for stores of increasing size."""
    evidence.launch(folder, "finetune", "model", *TINY, *QUICK)
    for count in counts:
        store = folder / f"{count}.store"
        write_store(store, repeated(count))
        yield evidence.summarise(
            [measure(folder / "finetune" / "model", store, folder / f"{count}.parquet")],
            name=f"{count:,} crystals",
            metric="peak memory",
            unit="MB",
            seeds=[],
            data="embedded:mp_starter, repeated",
            command="python -m benchmarks.predict memory",
            commit=evidence.current_commit(HERE),
        )


def main() -> None:
    """Measure what is asked for and write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["memory", "cifs", []], help="both by default")
    parser.add_argument("--crystals", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--cifs", type=int, default=4000, help="number of CIF files")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if "cifs" in (options.what or ["cifs"]):
            evidence.write(HERE, list(speeds(Path(name), options.cifs, options.rounds)))
        if "memory" in (options.what or ["memory"]):
            evidence.write(HERE, list(memory(Path(name), options.crystals)))


if __name__ == "__main__":
    main()
