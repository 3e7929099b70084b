"""Draw the three Parquet files that ship inside the package from a folder of full data sets.

The draw depends only on SHA-256 hashes of names, so it is the same on every machine; the bytes of the files are the
same for the same version of pyarrow.
"""

import argparse
import hashlib
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

DEFAULT_OUT = Path(__file__).resolve().parents[2] / "src" / "crysldnet" / "data" / "embedded"
SOURCE_ROWS = {"mp_cgcnn_train": 29421, "matbench_jdft2d": 636, "matbench_phonons": 1265}

VERSION = "crysldnet-starter-v1"
STARTER_ROWS = 4000
MAX_ATOMS = 40
MAX_ABS_FORMATION_ENERGY = 5.0
TRAIN_CRYSTALS_PER_ELEMENT = 5

SPLIT_RULE = (
    f'u = first 8 hexadecimal digits of sha256("{VERSION}:" + formula) / 2**32, where formula is the formula column; '
    "train if u < 0.8, val if 0.8 <= u < 0.9, test otherwise. No reduced formula crosses a split."
)
SELECTION_RULE = (
    f"from the {SOURCE_ROWS['mp_cgcnn_train']} crystals of the train part of MP-CGCNN, keep those of at most "
    f"{MAX_ATOMS} atoms with |formation energy| <= {MAX_ABS_FORMATION_ENERGY:g} eV/atom; order them by "
    f'sha256("{VERSION}:select:" + material_id); for each element take the first {TRAIN_CRYSTALS_PER_ELEMENT} crystals '
    f"of the train split that contain it (all of them where there are fewer), then fill up to {STARTER_ROWS} crystals "
    "in that order. Rows are written in that order."
)
SCHEMA_NOTE = (
    "One row per crystal. lattice: 9 numbers, row-major 3x3 in angstrom, rows are the lattice vectors; "
    "atomic_numbers: Z of each atom; frac_coords: 3n numbers, row-major n x 3, not wrapped into [0, 1)."
)
MATBENCH_NOTE = (
    "Re-encoded, not the official Matbench file: the structures come from a table in which str(Structure) of pymatgen "
    "had printed them, so coordinates have 6 decimals. Row order and matbench_test_fold (the official outer fold, 0-4, "
    "in whose test part the row is) are the official ones."
)
STRUCTURE_FIELDS = [
    pa.field("material_id", pa.string()),
    pa.field("lattice", pa.list_(pa.field("element", pa.float32())), metadata={"units": "angstrom"}),
    pa.field("atomic_numbers", pa.list_(pa.field("element", pa.uint8()))),
    pa.field("frac_coords", pa.list_(pa.field("element", pa.float32())), metadata={"units": "1"}),
]
EPILOG = (
    "files read from the source folder:\n"
    + "".join(f"  {name}.parquet, {rows} rows\n" for name, rows in SOURCE_ROWS.items())
    + """
files written:
  mp_starter.parquet         crystals for the first training, split by formula
  matbench_jdft2d.parquet    the whole task, official order and folds
  matbench_phonons.parquet   the whole task, official order and folds

Each file is printed with its size and SHA-256: draw into another folder to compare.

example:
  python -m experiments.embedded_data.draw --source DATA_FOLDER --out redrawn"""
)


def digest(text: str) -> str:
    """Hexadecimal SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def split_of(formula: str) -> str:
    """Split of a reduced formula, as SPLIT_RULE says."""
    u = int(digest(f"{VERSION}:{formula}")[:8], 16) / 2**32
    return "train" if u < 0.8 else "val" if u < 0.9 else "test"


def choose(ids: list[str], elements: list[set[int]], splits: list[str]) -> list[int]:
    """Indices of the chosen crystals, as SELECTION_RULE says."""
    order = sorted(range(len(ids)), key=lambda i: digest(f"{VERSION}:select:{ids[i]}"))
    seen: Counter[int] = Counter()
    needed = set()
    for i in order:
        if splits[i] == "train":
            if any(seen[z] < TRAIN_CRYSTALS_PER_ELEMENT for z in elements[i]):
                needed.add(i)
            seen.update(elements[i])
    fill = [i for i in order if i not in needed][: STARTER_ROWS - len(needed)]
    chosen = needed.union(fill)
    return [i for i in order if i in chosen]


def starter_table(source: pa.Table) -> pa.Table:
    """The Materials Project starter set, drawn from MP-CGCNN."""
    small = pc.less_equal(pc.list_value_length(source["atomic_numbers"]), MAX_ATOMS)
    physical = pc.less_equal(pc.abs(source["formation_energy_per_atom"]), MAX_ABS_FORMATION_ENERGY)
    kept = source.filter(pc.and_(small, physical))
    elements = [set(numbers) for numbers in kept["atomic_numbers"].to_pylist()]
    splits = [split_of(formula) for formula in kept["formula"].to_pylist()]
    kept = kept.append_column("split", pa.array(splits))
    drawn = kept.take(choose(kept["material_id"].to_pylist(), elements, splits))

    fields = [
        *STRUCTURE_FIELDS,
        pa.field("formation_energy_per_atom", pa.float32(), metadata={"units": "eV/atom"}),
        pa.field("band_gap", pa.float32(), metadata={"units": "eV"}),
        pa.field("formula", pa.string()),
        pa.field("split", pa.string()),
    ]
    description = (
        f"{STARTER_ROWS} Materials Project crystals with DFT formation energies and band gaps, to learn and test with"
    )
    extra = {"split_rule": SPLIT_RULE, "selection_rule": SELECTION_RULE}
    return labelled(drawn, fields, "mp_starter", description, SCHEMA_NOTE, source, extra)


def matbench_table(source: pa.Table, dataset: str, target: str, units: str, quantity: str) -> pa.Table:
    """A Matbench task with all its rows, in the official order."""
    fields = [
        *STRUCTURE_FIELDS,
        pa.field(target, pa.float32(), metadata={"units": units}),
        pa.field("matbench_test_fold", pa.int8()),
    ]
    description = f"Matbench task {dataset}, re-encoded: {quantity}"
    return labelled(source, fields, dataset, description, f"{SCHEMA_NOTE} {MATBENCH_NOTE}", source, {})


def labelled(
    table: pa.Table,
    fields: list[pa.Field],
    dataset: str,
    description: str,
    schema_note: str,
    source: pa.Table,
    extra: dict[str, str],
) -> pa.Table:
    """The named columns of a table, with provenance taken from the metadata of its source."""
    origin = {key.decode(): value.decode() for key, value in source.schema.metadata.items()}
    metadata = {
        "dataset": dataset,
        "description": description,
        "source": f"{origin['source_repo']} : {origin['source_path']}",
        "source_commit": origin["source_commit"],
        "licence": origin["data_licence"],
        "code_licence": origin["code_licence"],
        "citation": origin["citation"],
        "schema_note": schema_note,
    }
    schema = pa.schema(fields, metadata=metadata | extra)
    return table.select(schema.names).cast(schema)


def read_source(folder: Path, name: str) -> pa.Table:
    """Read one source table and check its number of rows."""
    path = folder / f"{name}.parquet"
    if not path.is_file():
        raise SystemExit(f"error: {path.name} is missing from the source folder {folder}")
    table = pq.read_table(path)
    if table.num_rows != SOURCE_ROWS[name]:
        raise SystemExit(f"error: {path} has {table.num_rows} rows, expected {SOURCE_ROWS[name]}")
    return table


def arguments() -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, metavar="FOLDER", help="folder with the source files")
    parser.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        metavar="FOLDER",
        help="folder to write to, made if missing; files in it are overwritten "
        "(default: src/crysldnet/data/embedded of this repository)",
    )
    return parser.parse_args()


def main() -> None:
    """Read the sources, draw, write, and print what was written."""
    args = arguments()
    sources = {name: read_source(args.source, name) for name in SOURCE_ROWS}
    tables = {
        "mp_starter": starter_table(sources["mp_cgcnn_train"]),
        "matbench_jdft2d": matbench_table(
            sources["matbench_jdft2d"],
            "matbench_jdft2d",
            "exfoliation_energy",
            "meV/atom",
            "DFT exfoliation energies of 2D materials (JARVIS-DFT)",
        ),
        "matbench_phonons": matbench_table(
            sources["matbench_phonons"],
            "matbench_phonons",
            "last_phdos_peak",
            "1/cm",
            "highest-frequency optical peak of the phonon density of states (DFPT)",
        ),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        path = args.out / f"{name}.parquet"
        # Plain encoding under zstd 22 is a third smaller here than dictionary encoding.
        pq.write_table(table, path, compression="zstd", compression_level=22, use_dictionary=False)
        data = path.read_bytes()
        print(f"{path.name}: {table.num_rows} rows, {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
