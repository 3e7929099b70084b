"""Command line of the data tools: ``crysldnet data import | export | verify | show``, and those of other modules."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from crysldnet.console import lines_of
from crysldnet.data.datasets import open_part, open_store
from crysldnet.data.elements import SYMBOLS
from crysldnet.data.output import ParquetOutput
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError
from crysldnet.readers.sources import known_files
from crysldnet.tools.importer.importer import import_crystals

FURTHER = {
    "describe": "crysldnet.tools.datacheck.describe",
    "dedupe": "crysldnet.tools.datacheck.dedupe",
    "audit": "crysldnet.tools.datacheck.audit",
    "download": "crysldnet.tools.importer.download",
}
"""Commands in separate modules, each with HELP, DESCRIPTION, EXAMPLE, add_arguments and run."""

IMPORT_HELP = f"""\
Import crystals into a store, the folder that training reads.

SOURCE is a folder (searched at every depth for CIF and POSCAR files), a quoted glob pattern, or files:
{known_files()}.
The pages of the documentation say which layouts of JSON, CSV and Parquet are known. A crystal's id is its file's name
without suffix, or what its record says. The result appears under its name when it is whole.
plugins=[my_format] imports a module of yours that reads other files.

Targets come from a CSV with a column of ids and columns of numbers; units stand in the header:

    material_id,formation_energy_per_atom (eV/atom),band_gap (eV)
    mp-149,0.0,0.61

What can't be used is left out and listed with its reason in OUT.rejects.csv; --on-error raise stops instead.
What is kept but noted, such as a formula that the atoms don't give, is listed in OUT.notes.csv; --on-note reject
rejects it.
The exit status is 0 where crystals were kept, 1 where every one was rejected, 2 where nothing could be imported."""

IMPORT_EXAMPLE = """\
example:
  crysldnet data import my_cifs --targets my_cifs/targets.csv --out my.store --license "CC BY 4.0"
"""


def main(argv: Sequence[str]) -> int:
    """Run ``crysldnet data`` with these arguments.

    Returns:
        The exit status: 1 if an import rejected every crystal, else 0.

    Raises:
        CrysldnetError: the input is invalid; the message states the remedy.
    """
    arguments = parser().parse_args(list(argv))
    return arguments.run(arguments)


def parser() -> argparse.ArgumentParser:
    """Return what reads the arguments of ``crysldnet data``."""
    parser = argparse.ArgumentParser(
        prog="crysldnet data",
        description="Import, inspect, check and export crystals.",
        epilog="crysldnet data COMMAND --help explains a command and gives an example.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, help_: str, description: str, example: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=help_,
            description=description,
            epilog=example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=OWN.get(name))
        return added

    _add_import_arguments(command("import", "import structure files into a store", IMPORT_HELP, IMPORT_EXAMPLE))
    export = command(
        "export",
        "export a store to one Parquet file",
        "Write a store as one Parquet file, which pandas, polars and others can read.",
        "example:\n  crysldnet data export my.store my.parquet",
    )
    export.add_argument("store", metavar="STORE")
    export.add_argument("out", metavar="OUT.parquet")
    export.add_argument("--overwrite", action="store_true", help="replace OUT.parquet")
    verify = command(
        "verify",
        "check a store against its checksums",
        "Check every file of a store against its recorded sha256.",
        "example:\n  crysldnet data verify my.store",
    )
    verify.add_argument("store", metavar="STORE")
    show = command(
        "show",
        "summarize a store",
        "Show a store or Parquet file on one screen: crystals, atoms, elements, properties, source, license.",
        "example:\n  crysldnet data show my.store",
    )
    show.add_argument("store", metavar="STORE")
    for name, module_name in FURTHER.items():
        module = importlib.import_module(module_name)
        added = command(name, module.HELP, module.DESCRIPTION, module.EXAMPLE)
        module.add_arguments(added)
        added.set_defaults(run=module.run)
    return parser


def _add_import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", nargs="+")
    parser.add_argument("--out", required=True, metavar="OUT", help="name.store, or name.parquet for one Parquet file")
    parser.add_argument("--targets", metavar="CSV", help="table of properties")
    parser.add_argument(
        "--id-column",
        metavar="NAME",
        help="id column of the table or records, if not named material_id or id",
    )
    parser.add_argument(
        "--structure",
        metavar="KEY",
        help="structure key of records with several structures, as output.structure",
    )
    parser.add_argument(
        "--units",
        metavar="NAME=UNIT",
        nargs="+",
        action="extend",
        default=[],
        help="units that headers don't state, as band_gap=eV",
    )
    parser.add_argument(
        "--on-error",
        choices=("report", "raise"),
        default="report",
        help="skip and list invalid input, or stop at the first (default: report)",
    )
    parser.add_argument(
        "--on-note",
        choices=("keep", "reject"),
        default="keep",
        help="keep crystals with a note, such as a formula that doesn't match, or reject them (default: keep)",
    )
    parser.add_argument(
        "--max-atoms", metavar="N", type=int, default=1000, help="reject larger crystals (default: 1000)"
    )
    parser.add_argument("--source-name", metavar="TEXT", help="source of the crystals (default: SOURCE's name)")
    parser.add_argument("--license", metavar="TEXT", help="their license")
    parser.add_argument("--licence", dest="license", help=argparse.SUPPRESS)
    parser.add_argument("--citation", metavar="TEXT", help="what to cite when they are used")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier import")
    parser.add_argument("--workers", metavar="N", type=int, help="reader processes (default: cores, at most 8)")


def _import(arguments: argparse.Namespace) -> int:
    units = {}
    for pair in arguments.units:
        name, equals, unit = pair.partition("=")
        if not (name and equals and unit):
            raise DataError(f"--units needs NAME=UNIT, as band_gap=eV, not {pair!r}")
        units[name] = unit
    about = {"source": arguments.source_name, "license": arguments.license, "citation": arguments.citation}
    report = import_crystals(
        arguments.source[0] if len(arguments.source) == 1 else arguments.source,
        arguments.out,
        targets=arguments.targets,
        id_column=arguments.id_column,
        structure=arguments.structure,
        units=units,
        on_error=arguments.on_error,
        on_note=arguments.on_note,
        max_atoms=arguments.max_atoms,
        metadata={key: text for key, text in about.items() if text is not None},
        overwrite=arguments.overwrite,
        workers=arguments.workers,
    )
    sys.stdout.write(f"{report}\n")
    return 0 if report.kept else 1


def _export(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    if out.suffix != ".parquet":
        raise DataError(f"{out}: the name must end in .parquet")
    store, rows = open_part(arguments.store)
    with ParquetOutput(out, overwrite=arguments.overwrite) as output:
        output.append(store.to_table(rows))
    sys.stdout.write(f"{len(rows):,} crystals written to {out}\n")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    path = Path(arguments.store)
    if path.is_file():
        raise DataError(f"{path}: only a store, which is a folder, has checksums")
    try:
        store = CrystalStore.open(path)
    except pa.ArrowException as error:
        raise DataError(f"{path / 'columns.arrow'}: damaged ({error}); import it again") from error
    store.verify()
    sys.stdout.write(f"{path}: {len(store):,} crystals, every file is as it was written\n")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.store)
    sizes = store.crystals.sizes
    counts = np.bincount(store.crystals.numbers, minlength=len(SYMBOLS))
    elements = [symbol for symbol, count in zip(SYMBOLS, counts, strict=False) if count]
    lines = [store.name, f"  crystals  {len(store):,}"]
    if len(store):
        lines.append(
            f"  atoms     {sizes.sum():,}; {sizes.min()} to {sizes.max()} a crystal, {sizes.mean():.1f} on average"
        )
    lines.append(f"  elements  {len(elements)}: {' '.join(elements)}")
    lines += [f"  {_describe(store, name)}" for name in store.column_names]
    lines += [f"  {key:<9} {store.metadata.get(key, 'not stated')}" for key in ("source", "license", "citation")]
    sys.stdout.write(lines_of(lines) + "\n")
    return 0


def _describe(store: CrystalStore, name: str) -> str:
    """Describe a property in one line: name, unit, count, range."""
    if not store.is_numeric(name):
        texts = store.texts_of(name)
        return f"property  {name}: text, {sum(text is not None for text in texts):,} values"
    values = store.numbers_of(name)
    values = values[np.isfinite(values)]
    spread = f", {values.min():.4g} to {values.max():.4g}, mean {values.mean():.4g}" if len(values) else ""
    return f"property  {name} ({store.units.get(name, 'no unit stated')}): {len(values):,} values{spread}"


OWN = {"import": _import, "export": _export, "verify": _verify, "show": _show}
