"""Measure importing against another checkout: CPU time of each format, interleaved.

python -m benchmarks.imports.compare [--of PARQUET] [--crystals N] [--rounds N] FOLDER

FOLDER is a checkout of another commit. One process of each imports the same files in turn, each first in every other
round; the ratio is that of the CPU times within a round, so other programs on the machine change it little. With --of
the first crystals of that file are measured as CIFs alone, with symmetry operations and without.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pymatgen.io.cif import CifWriter

from benchmarks.imports import run
from experiments import evidence

COLUMNS = 20
"""Of numbers, of whole numbers and of texts, beside crystals in a Parquet file and in a table of properties."""
SERVE = """
import json, sys, time
try:
    from crysldnet.tools.importer.importer import import_crystals
except ImportError:  # of earlier commits
    from crysldnet.data.importer import import_crystals
for line in sys.stdin:
    source, targets, out = json.loads(line)
    begun = time.process_time()
    kept = import_crystals(source, out, targets=targets, overwrite=True, workers=1, progress=False).kept
    print(json.dumps([kept, time.process_time() - begun]), flush=True)
"""


def write_columns(folder: Path, count: int) -> None:
    """Write crystals with many columns as Parquet, as CSV, and as a table beside CIFs."""
    run.write_rows(folder / "bare.parquet", count)
    table, rng = pq.read_table(folder / "bare.parquet"), np.random.default_rng(0)
    columns = {f"number_{i}": pa.array(rng.normal(size=count).round(6)) for i in range(COLUMNS)}
    columns |= {f"whole_{i}": pa.array(rng.integers(0, 999, count)) for i in range(COLUMNS)}
    columns |= {f"text_{i}": pa.array(rng.choice(["FM", "AFM", "NM"], count)) for i in range(COLUMNS)}
    for name, column in columns.items():
        table = table.append_column(name, column)
    pq.write_table(table, folder / "columns.parquet")
    ids = [path.stem for path in sorted((folder / "CIF, P 1").iterdir())]
    rows = zip(*(column.to_pylist() for column in columns.values()), strict=True)
    lines = [
        ",".join(["material_id", *columns]),
        *(",".join(map(str, [i, *row])) for i, row in zip(ids, rows, strict=True)),
    ]
    (folder / "properties.csv").write_text("\n".join(lines) + "\n")
    cifs = ["cif", *('"' + (folder / "CIF, P 1" / f"{i}.cif").read_text().replace('"', '""') + '"' for i in ids)]
    (folder / "columns.csv").write_text("".join(f"{line},{cif}\n" for line, cif in zip(lines, cifs, strict=True)))


def write_all(folder: Path, count: int) -> dict[str, tuple[str, str | None]]:
    """Write crystals of the starter set in every format: file and table of properties of each."""
    run.COPIES = 1
    run.write_inputs(folder, count)
    write_columns(folder, count)
    sources: dict[str, tuple[str, str | None]] = {name.split(".")[0]: (name, None) for name in run.PARSERS}
    sources["Parquet, one column"] = ("bare.parquet", None)
    sources[f"Parquet, {3 * COLUMNS} columns"] = ("columns.parquet", None)
    sources[f"CSV of CIFs, {3 * COLUMNS} columns"] = ("columns.csv", None)
    sources[f"CIF, P 1, with a table of {3 * COLUMNS} columns"] = ("CIF, P 1", str(folder / "properties.csv"))
    return sources


def write_cifs(folder: Path, parquet: Path, count: int) -> dict[str, tuple[str, str | None]]:
    """Write the first crystals of a file as pymatgen writes them, in the primitive cell or in the conventional one."""
    kinds = {"CIF, P 1": None, "CIF, symmetry": 0.1}
    for kind in kinds:
        (folder / kind).mkdir()
    for name, structure, _ in run.structures(count, parquet):
        for kind, symprec in kinds.items():
            (folder / kind / f"{name}.cif").write_text(str(CifWriter(structure, symprec=symprec)))
    return {kind: (kind, None) for kind in kinds}


def start(checkout: Path) -> subprocess.Popen[str]:
    """Start a process that imports with the code of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    return subprocess.Popen(
        [sys.executable, "-c", SERVE], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def cpu_time(process: subprocess.Popen[str], *request: str | None) -> float:
    """Return the CPU seconds of an import."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(json.dumps(request), file=process.stdin, flush=True)
    kept, seconds = json.loads(process.stdout.readline())
    assert kept
    return seconds


def main() -> None:
    """Measure, write results.json and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--crystals", type=int, default=1000, help="that are written in every format")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--of", type=Path, help="a Parquet file of crystals, to measure as CIFs")
    settings = parser.parse_args()
    commit, before = evidence.current_commit(run.HERE), evidence.current_commit(settings.checkout)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if settings.of is None:
            sources = write_all(folder, settings.crystals)
        else:
            sources = write_cifs(folder, settings.of, settings.crystals)
        processes = [start(settings.checkout), start(run.HERE.parents[1])]
        spent: dict[str, list[list[float]]] = {name: [] for name in sources}
        for i in range(settings.rounds + 1):
            for name, (source, targets) in sources.items():
                request = (str(folder / source), targets, str(folder / "out.store"))
                order = processes[:: 1 if i % 2 else -1]
                times_here = {process.pid: cpu_time(process, *request) for process in order}
                spent[name].append([times_here[process.pid] for process in processes])
        for process in processes:
            process.communicate()
    times = np.array([rounds[1:] for rounds in spent.values()])  # the first round compiles
    ratios = dict(zip(spent, times[..., 1] / times[..., 0], strict=True))
    ratios["all of these"] = times[..., 1].sum(0) / times[..., 0].sum(0)
    records = [
        evidence.timed(
            values.tolist(),
            name=name,
            metric=f"CPU time over that at {before}",
            unit="1",
            data=f"{settings.crystals} crystals of {settings.of.stem if settings.of else 'embedded:mp_starter'}",
            command=f"python -m benchmarks.imports.compare {'--of PARQUET ' if settings.of else ''}FOLDER",
            commit=commit,
        )
        for name, values in ratios.items()
    ]
    evidence.write(run.HERE, records)
    print(evidence.table(records))


if __name__ == "__main__":
    main()
