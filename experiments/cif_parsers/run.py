"""Do gemmi and pymatgen read the same crystal in a CIF, and how fast?

python -m experiments.cif_parsers.run [--data FOLDER] [--cifs FOLDER …] [--limit N] [--workers N]

Every crystal is written by several writers in several ways, and each file is read by three readers. What a file should
give is known from the crystal that it was written from.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import pyarrow.parquet as pq
from ase.io import write
from pymatgen.core import Lattice, Structure
from pymatgen.io.ase import AseAtomsAdaptor
from pymatgen.io.cif import CifParser, CifWriter

from crysldnet.data.datasets import EMBEDDED
from crysldnet.errors import DataError
from crysldnet.readers.structure_files import parse_structure
from experiments import evidence

HERE = Path(__file__).parent
READERS = ("this package", "gemmi alone", "pymatgen")
VARIANTS = {
    "pymatgen, P 1": "8 digits",
    "ase, P 1": "5 to 7 digits",
    "pymatgen, symmetry": "asymmetric unit and operations, 8 digits",
    "pymatgen, symmetry, 4 digits": "the same, coordinates rounded as in older files",
    "pymatgen, symmetry, name only": "the same, the operations left out",
}
CELL = tuple[np.ndarray, list[int], np.ndarray]


def written(structure: Structure) -> Iterator[tuple[str, str, CELL, float]]:
    """Give variant, text, the crystal that is in it, and how far a distance may be off (Å)."""
    truth = structure.lattice.matrix, list(structure.atomic_numbers), structure.frac_coords
    yield "pymatgen, P 1", str(CifWriter(structure)), truth, 1e-4
    buffer = io.BytesIO()
    write(buffer, AseAtomsAdaptor.get_atoms(structure, msonable=False), format="cif")
    yield "ase, P 1", buffer.getvalue().decode(), truth, 1e-2
    try:
        writer = CifWriter(structure, symprec=0.01)
    except Exception:  # spglib finds no symmetry
        return
    text = str(writer)
    refined = CifParser.from_str(text, frac_tolerance=0).parse_structures(primitive=False)[0]
    truth = refined.lattice.matrix, list(refined.atomic_numbers), refined.frac_coords
    yield "pymatgen, symmetry", text, truth, 1e-4
    yield "pymatgen, symmetry, 4 digits", rounded(text), truth, 2e-4 * max(refined.lattice.abc) * 3
    name_only = re.sub(r"loop_\n _symmetry_equiv_pos_site_id\n.*?(?=loop_)", "", text, flags=re.DOTALL)
    yield "pymatgen, symmetry, name only", name_only, truth, 1e-4


def rounded(text: str) -> str:
    """Round the coordinates of the sites to 4 digits."""
    head, sites = text.rsplit("_atom_site_occupancy\n", 1)
    return f"{head}_atom_site_occupancy\n" + re.sub(r"\d\.\d{8}", lambda number: f"{float(number[0]):.4f}", sites)


def read(reader: str, text: str) -> CELL:
    """Read a CIF; any exception means that it is refused."""
    if reader == "this package":
        lattice, numbers, frac = parse_structure(text, "x.cif")
        return lattice, numbers.tolist(), frac
    if reader == "gemmi alone":
        small = gemmi.make_small_structure_from_block(gemmi.cif.read_string(text).sole_block())
        sites = small.get_all_unit_cell_sites()
        lattice = np.array(small.cell.orth.mat.tolist()).T
        return (
            lattice,
            [site.element.atomic_number for site in sites],
            np.array([site.fract.tolist() for site in sites]),
        )
    structure = CifParser.from_str(text).parse_structures(primitive=False)[0]
    return structure.lattice.matrix, list(structure.atomic_numbers), structure.frac_coords


def difference(one: CELL, other: CELL, tolerance: float) -> str:
    """Say in what two crystals differ, "" where they don't."""
    if sorted(one[1]) != sorted(other[1]):
        return f"{len(one[1])} atoms, {len(other[1])} in the crystal" if len(one[1]) != len(other[1]) else "elements"
    lattices = [Lattice(cell[0]) for cell in (one, other)]
    if not np.isclose(lattices[0].volume, lattices[1].volume, rtol=1e-6 if tolerance < 1e-3 else 1e-3):
        return f"volume {lattices[0].volume:.4f}, {lattices[1].volume:.4f} in the crystal"
    sorted_distances = [
        np.sort(lattice.get_all_distances(cell[2], cell[2]), axis=None)
        for lattice, cell in zip(lattices, (one, other), strict=True)
    ]
    farthest = float(np.abs(sorted_distances[0] - sorted_distances[1]).max())
    return f"distances, by up to {farthest:.1e} Å" if farthest > tolerance else ""


def examine(task: tuple[str, dict[str, Any]]) -> list[tuple[str, str, str, str, float]]:
    """Return variant, crystal, reader, outcome and seconds for all files written of one crystal."""
    warnings.simplefilter("ignore")
    name, row = task
    lattice = Lattice(np.reshape(row["lattice"], (3, 3)))
    structure = Structure(lattice, row["atomic_numbers"], np.reshape(row["frac_coords"], (-1, 3)))
    found = []
    for variant, text, truth, tolerance in written(structure):
        for reader in READERS:
            begun = time.process_time()
            try:
                cell = read(reader, text)
                seconds = time.process_time() - begun
                outcome = difference(cell, truth, tolerance)
            except Exception as error:
                seconds = time.process_time() - begun
                reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
                outcome = f"refused: {' '.join(reason.split())[:160]}"
            found.append((variant, name, reader, outcome, seconds))
    return found


def compare_files(paths: list[Path]) -> Iterator[tuple[str, str, str, str, float]]:
    """Compare this package's reading of CIFs from elsewhere with pymatgen's."""
    for path in paths:
        text = path.read_text(errors="replace")
        begun = time.process_time()
        try:
            own = read("this package", text)
        except DataError as error:
            yield "files from elsewhere", path.name, "this package", f"refused: {error}", time.process_time() - begun
            continue
        seconds = time.process_time() - begun
        try:
            outcome = difference(own, read("pymatgen", text), 1e-3)
        except Exception as error:
            outcome = f"pymatgen refused it: {error}"
        yield "files from elsewhere", path.name, "this package", outcome, seconds


def tasks(folder: Path, limit: int, max_atoms: int) -> list[tuple[str, dict[str, Any]]]:
    """Return the first crystals of every Parquet file in the schema."""
    found = []
    for path in sorted(folder.glob("*.parquet")):
        columns = ["material_id", "lattice", "atomic_numbers", "frac_coords"]
        if set(columns) <= set(pq.read_schema(path).names):
            rows = pq.read_table(path, columns=columns).slice(0, limit).to_pylist()
            found += [(f"{path.stem} {r['material_id']}", r) for r in rows if len(r["atomic_numbers"]) <= max_atoms]
    return found


def main() -> None:
    """Read everything, write results.json, the table and the list of differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=EMBEDDED, help="folder of Parquet files in the schema")
    parser.add_argument("--cifs", type=Path, nargs="*", default=[], help="folders of CIFs from elsewhere")
    parser.add_argument("--limit", type=int, default=1000, help="crystals of each file")
    parser.add_argument("--max-atoms", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    settings = parser.parse_args()
    commit = evidence.current_commit(HERE)
    command = "python -m experiments.cif_parsers.run"
    if settings.data != EMBEDDED:
        command += f" --data {settings.data.name} --limit {settings.limit}"
    crystals = tasks(settings.data, settings.limit, settings.max_atoms)
    with ProcessPoolExecutor(settings.workers) as pool:
        results = list(chain.from_iterable(pool.map(examine, crystals, chunksize=50)))
    here = HERE.parents[1]
    paths = sorted(
        {path for folder in (here / "src", here / "tests", *settings.cifs) for path in folder.rglob("*.cif")}
    )
    with warnings.catch_warnings(action="ignore"):
        results += compare_files(paths)

    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    outcomes: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for variant, _, reader, outcome, time_ in results:
        seconds[variant, reader].append(time_)
        kind = "right" if not outcome else "refused" if outcome.startswith("refused") else "wrong"
        outcomes[variant, reader][kind] += 1
    records = []
    sets = {name.split()[0] for name, _ in crystals}
    data = f"{len(crystals)} crystals of at most {settings.max_atoms} atoms from {len(sets)} sets"
    for (variant, reader), counts in outcomes.items():
        total = sum(counts.values())

        def record(metric: str, value: float, unit: str, what: str = f"{reader}: {variant}", of: int = total) -> None:
            records.append(
                evidence.Record(
                    name=what,
                    metric=metric,
                    value=value,
                    unit=unit,
                    spread=None,
                    seeds=[],
                    data=f"{of} files" + ("" if "elsewhere" in what else f" of {data}"),
                    command=command,
                    commit=commit,
                    machine=evidence.describe_machine(),
                    date=date.today().isoformat(),
                )
            )

        record("read as another crystal", counts["wrong"], "files")
        record("refused", counts["refused"], "files")
        if variant in ("pymatgen, P 1", "pymatgen, symmetry"):
            record("read by one process", total / sum(seconds[variant, reader]), "files/s of CPU time")
    evidence.write(HERE, records)
    kinds: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for variant, name, reader, outcome, _ in results:
        if outcome:
            kinds[variant, reader, re.sub(r"(?<![A-Za-z_/])[\d.]+(e-\d+)?", "#", outcome)].append(f"{name}: {outcome}")
    with (HERE / "differences.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "reader", "outcome", "files", "first"])
        for (variant, reader, kind), found in sorted(kinds.items(), key=lambda item: -len(item[1])):
            writer.writerow([variant, reader, kind, len(found), found[0]])
    print(evidence.table(records))


if __name__ == "__main__":
    main()
