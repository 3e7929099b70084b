"""Write the files of this folder anew: the same real crystals in every format, each by the library that defines it.

python tests/formats/write.py

Run it where matminer and ase are installed. A file's bytes may change with the versions of the libraries.
"""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from ase.db import connect
from ase.io import write
from matminer.utils.io import store_dataframe_as_json
from pymatgen.core import Structure
from pymatgen.io.ase import AseAtomsAdaptor
from pymatgen.io.cif import CifWriter

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "src" / "crysldnet" / "data" / "embedded" / "examples"


def crystals() -> list[tuple[str, Structure, float]]:
    """Return id, structure and formation energy (eV/atom) of the package's six examples."""
    with (EXAMPLES / "targets.csv").open() as file:
        rows = {row["material_id"]: row for row in csv.DictReader(file)}
    found = []
    for name, row in rows.items():
        with warnings.catch_warnings(action="ignore"):
            structure = Structure.from_file(EXAMPLES / f"{name}.cif")
        found.append((name.split("_")[1], structure, float(row["formation_energy_per_atom (eV/atom)"])))
    return found


def jarvis(material_id: str, structure: Structure, energy: float) -> dict[str, Any]:
    """Return a record as jarvis-tools' ``dft_3d`` has them; "na" stands for no value."""
    return {
        "jid": material_id,
        "formula": structure.composition.reduced_formula,
        "formation_energy_peratom": energy,
        "func": "OptB88vdW",
        "optb88vdw_bandgap": "na",
        "atoms": {
            "lattice_mat": structure.lattice.matrix.tolist(),
            "coords": structure.frac_coords.tolist(),
            "elements": [site.specie.symbol for site in structure],
            "abc": list(structure.lattice.abc),
            "angles": list(structure.lattice.angles),
            "cartesian": False,
            "props": [""] * len(structure),
        },
        "epsx": "na",
        "efg": [],
    }


def optimade(structure: Structure) -> dict[str, Any]:
    """Return the attributes of a structure as OPTIMADE 1.1 defines them."""
    symbols = sorted({site.specie.symbol for site in structure})
    return {
        "chemical_formula_reduced": structure.composition.reduced_formula,
        "nelements": len(symbols),
        "nsites": len(structure),
        "dimension_types": [1, 1, 1],
        "nperiodic_dimensions": 3,
        "lattice_vectors": structure.lattice.matrix.tolist(),
        "cartesian_site_positions": structure.cart_coords.tolist(),
        "species": [{"name": s, "chemical_symbols": [s], "concentration": [1.0]} for s in symbols],
        "species_at_sites": [site.specie.symbol for site in structure],
        "structure_features": [],
    }


def main() -> None:
    """Write every file."""
    rows = crystals()
    documents = [
        {"material_id": i, "structure": s.as_dict(), "formation_energy_per_atom": e, "theoretical": False}
        for i, s, e in rows
    ]
    (HERE / "mp_documents.json").write_text(json.dumps(documents))
    lines = "".join(f"{json.dumps(document)}\n" for document in documents).encode()
    with pa.CompressedOutputStream(str(HERE / "mp_documents.jsonl.zst"), "zstd") as stream:
        stream.write(lines)
    frame = pd.DataFrame({"structure": [s for _, s, _ in rows], "e_form": [e for *_, e in rows]})
    store_dataframe_as_json(frame, str(HERE / "matbench_like.json.gz"), compression="gz")
    (HERE / "jarvis_dft_3d.json").write_text(json.dumps([jarvis(*row) for row in rows]))
    resources = [{"type": "structures", "id": i, "attributes": optimade(s)} for i, s, _ in rows]
    response = {"links": {"next": None}, "meta": {"api_version": "1.1.0", "data_returned": 6}, "data": resources}
    (HERE / "optimade.json").write_text(json.dumps(response))
    lemat = [{**optimade(s), "immutable_id": i, "functional": "pbe", "energy": None} for i, s, _ in rows]
    for row in lemat:
        row["species"] = json.dumps(row["species"])
    pq.write_table(pa.Table.from_pylist(lemat), HERE / "lemat_bulk.parquet")
    with (HERE / "cdvae.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "material_id", "formation_energy_per_atom", "pretty_formula", "cif"])
        for number, (i, s, e) in enumerate(rows):
            writer.writerow([number, i, e, s.composition.reduced_formula, str(CifWriter(s))])
    atoms = []
    for i, s, e in rows:
        one = AseAtomsAdaptor.get_atoms(s, msonable=False)
        one.info = {"material_id": i, "formation_energy_per_atom": e}
        atoms.append(one)
    write(HERE / "crystals.extxyz", atoms)
    for name in ("crystals.db", "crystals_ase.json"):
        (HERE / name).unlink(missing_ok=True)
        with connect(HERE / name) as database:
            for one in atoms:
                database.write(one, key_value_pairs=one.info)


if __name__ == "__main__":
    main()
