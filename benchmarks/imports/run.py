"""Measure importing: every format against its parser alone, and a store of a million crystals.

python -m benchmarks.imports.run [--rows N] [--crystals N] [--rounds N] [--formats FORMAT …]

Each format holds the first crystals of the embedded starter set. "Parser alone" reads the same file in one process
with the library of the format and keeps nothing. Rounds are interleaved: each times every contender once. Speeds
are by the clock.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ase.db
import ase.io
import numpy as np
import pyarrow.parquet as pq
from gemmi import cif
from pymatgen.core import Lattice, Structure
from pymatgen.io.ase import AseAtomsAdaptor
from pymatgen.io.cif import CifWriter
from pymatgen.io.vasp import Poscar

from crysldnet.data.datasets import EMBEDDED, open_store
from crysldnet.data.schema import table_from_crystals
from crysldnet.data.store import CrystalStore
from crysldnet.tools.importer.importer import import_crystals
from experiments import evidence

HERE = Path(__file__).parent
BATCH = 256
COPIES = 8
MORE = 4
"""of each crystal in a folder of CIFs, so that it takes seconds"""


def structures(count: int, path: Path = EMBEDDED / "mp_starter.parquet") -> list[tuple[str, Structure, float]]:
    """Return id, structure and formation energy of the first crystals of a file."""
    rows = pq.read_table(path).slice(0, count).to_pylist()
    return [
        (
            r["material_id"],
            Structure(
                Lattice(np.reshape(r["lattice"], (3, 3))), r["atomic_numbers"], np.reshape(r["frac_coords"], (-1, 3))
            ),
            r["formation_energy_per_atom"],
        )
        for r in rows
    ]


def write_inputs(folder: Path, count: int) -> None:
    """Write crystals in every format."""
    crystals = structures(count)
    texts = {name: str(CifWriter(structure)) for name, structure, _ in crystals}
    for kind in ("CIF, P 1", "CIF, symmetry", "POSCAR"):
        (folder / kind).mkdir()
    for name, structure, _ in crystals:
        for copy in range(COPIES):
            (folder / "CIF, P 1" / f"{name}-{copy}.cif").write_text(texts[name])
        (folder / "CIF, symmetry" / f"{name}.cif").write_text(str(CifWriter(structure, symprec=0.01)))
        Poscar(structure).write_file(folder / "POSCAR" / f"{name}.vasp")
    with zipfile.ZipFile(folder / "CIF in a zip.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            for copy in range(COPIES):
                archive.writestr(f"{name}-{copy}.cif", text)
    documents = [{"material_id": n, "structure": s.as_dict(), "energy": e} for n, s, e in crystals]
    (folder / "pymatgen JSON.json").write_text(json.dumps(documents))
    (folder / "JSON lines.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    with (folder / "CSV of CIFs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["material_id", "cif"], *([n, texts[n]] for n, _, _ in crystals)])
    atoms = []
    for name, structure, energy in crystals:
        one = AseAtomsAdaptor.get_atoms(structure, msonable=False)
        one.info = {"material_id": name, "energy": energy}
        atoms.append(one)
    ase.io.write(folder / "extended XYZ.extxyz", atoms)
    with ase.db.connect(folder / "ASE database.db") as database:
        for one in atoms:
            database.write(one, key_value_pairs={"material_id": one.info["material_id"]})


def poscars(path: Path) -> None:
    """Read POSCARs with pymatgen."""
    with warnings.catch_warnings(action="ignore"):
        for file in path.iterdir():
            _ = Poscar.from_str(file.read_text(), read_velocities=False).structure


def rows_of_csv(path: Path) -> None:
    """Read a CSV, and the syntax of each CIF in it."""
    csv.field_size_limit(2**26)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            cif.read_string(row["cif"])


def members(path: Path) -> None:
    """Read a zip archive, and the syntax of each CIF in it."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            cif.read_string(archive.read(name).decode())


PARSERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "CIF, P 1": ("gemmi, syntax only", lambda path: [cif.read_string(file.read_text()) for file in path.iterdir()]),
    "CIF, symmetry": (
        "gemmi, syntax only",
        lambda path: [cif.read_string(file.read_text()) for file in path.iterdir()],
    ),
    "CIF in a zip.zip": ("zipfile and gemmi, syntax only", members),
    "POSCAR": ("pymatgen", poscars),
    "pymatgen JSON.json": (
        "json and pymatgen",
        lambda path: [Structure.from_dict(record["structure"]) for record in json.loads(path.read_text())],
    ),
    "JSON lines.jsonl": ("json", lambda path: [json.loads(line) for line in path.open()]),
    "CSV of CIFs.csv": ("csv and gemmi, syntax only", rows_of_csv),
    "extended XYZ.extxyz": ("ase", lambda path: ase.io.read(path, ":")),
    "ASE database.db": ("ase", lambda path: [row.toatoms() for row in ase.db.connect(path).select()]),
}


def measure_formats(folder: Path, names: list[str], crystals: int, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Return crystals per second of each format and contender, one value a round."""
    speeds: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for name in names:
            parser, parse = PARSERS[name]
            count = crystals * (COPIES if name in ("CIF, P 1", "CIF in a zip.zip") else 1)
            for contender in (f"{parser}, alone", "import"):
                begun = time.perf_counter()
                if contender == "import":
                    report = import_crystals(
                        folder / name, folder / "out.store", overwrite=True, workers=1, progress=False
                    )
                    assert report.kept == count, str(report)
                else:
                    parse(folder / name)
                speeds.setdefault((name, contender), []).append(count / (time.perf_counter() - begun))
    return speeds


def write_rows(path: Path, count: int) -> None:
    """Write a Parquet file of the starter set, repeated, every row with an id of its own."""
    store = open_store("embedded:mp_starter")
    energies = store.numbers_of("formation_energy_per_atom")
    writer = None
    for first in range(0, count, 20_000):
        rows = np.arange(first, min(first + 20_000, count), dtype=np.int64)
        index = rows % len(store)
        table = table_from_crystals(
            store.crystals.take(index),
            [f"c{row:07}" for row in rows],
            {"formation_energy_per_atom": energies[index]},
            {"formation_energy_per_atom": "eV/atom"},
            {},
        )
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is not None:
        writer.close()


IMPORT = """
import json, resource, sys, time
from crysldnet.tools.importer.importer import import_crystals
if __name__ == "__main__":
    begun = time.perf_counter()
    kept = import_crystals(sys.argv[1], sys.argv[2], workers=2, progress=False).kept
    seconds = time.perf_counter() - begun
    used = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
    print(json.dumps([kept, seconds, used, own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024]))
"""


def repeated(source: Path, out: Path) -> Path:
    """Write each file of a folder several times, so that the start of processes weighs little."""
    out.mkdir()
    for path in source.iterdir():
        content = path.read_bytes()
        for copy in range(MORE):
            (out / f"{path.stem}-{copy}.cif").write_bytes(content)
    return out


def two_processes(source: Path, out: Path) -> float:
    """Return crystals per second of an import by two processes."""
    begun = time.perf_counter()
    report = import_crystals(source, out, overwrite=True, workers=2, progress=False)
    return report.kept / (time.perf_counter() - begun)


def build(folder: Path, count: int) -> tuple[Path, float, float, float, float]:
    """Import ``count`` rows in a process of its own: the store, seconds, CPU seconds, and peaks of memory (MiB)."""
    write_rows(folder / f"{count}.parquet", count)
    (folder / "build.py").write_text(IMPORT)
    out = folder / f"{count}.store"
    command = [sys.executable, str(folder / "build.py"), str(folder / f"{count}.parquet"), str(out)]
    kept, seconds, used, own, workers = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    assert kept == count
    (folder / f"{count}.parquet").unlink()
    return out, seconds, used, own, workers


def iterate(store: CrystalStore, order: np.ndarray) -> tuple[float, int]:
    """Copy every crystal out in batches: seconds, and the atoms seen."""
    begun = time.perf_counter()
    atoms = 0
    for first in range(0, len(store), BATCH):
        atoms += len(store.crystals.take(order[first : first + BATCH]).numbers)
    return time.perf_counter() - begun, atoms


def resident() -> float:
    """Return the private memory of this process (MiB): mapped files, which the system may drop, don't count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    """Measure, write results.json and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--crystals", type=int, default=2500, help="that are written in every format")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", nargs="*", default=list(PARSERS), choices=list(PARSERS))
    settings = parser.parse_args()
    commit = evidence.current_commit(HERE)
    records = []

    def record(name: str, metric: str, unit: str, values: list[float], data: str) -> None:
        command = "python -m benchmarks.imports.run"
        records.append(
            evidence.timed(values, name=name, metric=metric, unit=unit, data=data, command=command, commit=commit)
        )

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if settings.formats:
            write_inputs(folder, settings.crystals)
        for (name, contender), values in measure_formats(
            folder, settings.formats, settings.crystals, settings.rounds
        ).items():
            copies = f", each {COPIES} times" if name in ("CIF, P 1", "CIF in a zip.zip") else ""
            data = f"{settings.crystals} crystals of embedded:mp_starter{copies}"
            record(f"{name.split('.')[0]}: {contender}", "read by one process", "crystals/s", values, data)
        if "CIF, P 1" in settings.formats:
            many = repeated(folder / "CIF, P 1", folder / "many")
            speeds = [two_processes(many, folder / "out.store") for _ in range(settings.rounds)]
            data = f"{settings.crystals} crystals of embedded:mp_starter, each {COPIES * MORE} times"
            record("CIF, P 1: import", "read by two processes, their start included", "crystals/s", speeds, data)
        for count in (settings.rows // 10, settings.rows):
            out, seconds, used, own, workers = build(folder, count)
            data = f"{count:,} rows of Parquet, embedded:mp_starter repeated"
            record("Parquet into a store, two processes", "time", "s", [seconds], data)
            record("Parquet into a store, two processes", "CPU time", "s", [used], data)
            record("Parquet into a store, two processes", "peak memory of the importing process", "MiB", [own], data)
            record("Parquet into a store, two processes", "peak memory of a reading process", "MiB", [workers], data)
        size = sum(path.stat().st_size for path in out.iterdir()) / 2**20
        data = f"the store of {settings.rows:,}, {CrystalStore.open(out).crystals.ptr[-1]:,} atoms"
        record("the store", "size", "MiB", [size], data)
        opened = []
        for _ in range(max(settings.rounds, 2)):
            begun = time.perf_counter()
            store = CrystalStore.open(out)
            opened.append(time.perf_counter() - begun)
        record("opening the store", "time", "s", opened, data)
        before = resident()
        rng = np.random.default_rng(0)
        for name, order in (("in order", np.arange(len(store))), ("shuffled", rng.permutation(len(store)))):
            seconds, atoms = iterate(store, order)
            assert atoms == store.crystals.ptr[-1]
            record(f"iterating over it, {name}", f"time for batches of {BATCH}", "s", [seconds], data)
        record("iterating over it", "private memory added", "MiB", [resident() - before], data)
    evidence.write(HERE, records)
    print(evidence.table(records))


if __name__ == "__main__":
    main()
