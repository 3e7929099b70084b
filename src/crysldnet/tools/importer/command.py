"""Command line of the data tools: ``crysldnet data``. It imports what a command needs only to run it."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from crysldnet.readers.kinds import known_files

IMPORT = """\
Import crystals into a store, the folder that training reads.

SOURCE is a folder (searched at every depth for CIF and POSCAR files), a quoted glob pattern, or files:
@FILES@.
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

DESCRIBE = """\
Describe a data set: crystals, atoms, elements, properties with units, duplicates, and rows to look at before training
on them. --html writes an offline page, --png an image.

Suspicious crystals have atoms closer than 1 Å (0.7 Å with hydrogen), less than 4 or more than 200 Å³ per atom, or
formation energies over 5 eV/atom in magnitude. They are reported, not removed."""
DESCRIBE_EXAMPLE = """\
example:
  crysldnet data describe embedded:mp_starter --html starter.html --png starter.png"""

DEDUPE = """\
Write a store without repeats. By id keeps the first row of each id, by structure the first of crystals that are the
same structure (pymatgen's StructureMatcher, behind a filter of formula, volume and distances).

--against leaves out what other sets have, so that they can be tested on after pretraining on the result; by formula
(every crystal of a formula that they have) or by structure. What was left out, and why, is listed in OUT.removed.csv.

The exit status is 0 if crystals were kept, 1 if none was left."""
DEDUPE_EXAMPLE = """\
examples:
  crysldnet data dedupe my.store --out unique.store
  crysldnet data dedupe my.store --out pretraining.store --against embedded:matbench_phonons --against-by formula"""

AUDIT = """\
Count the crystals of a test set that are also in a training set: by id, by reduced formula, by structure (pymatgen's
StructureMatcher, behind a filter). A set is a store, a Parquet file, embedded:NAME or published:NAME; @SPLIT behind it
takes the rows whose column split says so. Several sets may be given; every pair is compared.

The exit status is 0, or with --strict 1 if anything is shared."""
AUDIT_EXAMPLE = """\
example:
  crysldnet data audit --train embedded:mp_starter@train --test embedded:mp_starter@test embedded:matbench_phonons"""

DOWNLOAD = """\
Fetch the files of a published data set into data/raw/NAME, compare them with their sha256, and make data/NAME.store,
which data=NAME and published:NAME read. The environment variable CRYSLDNET_DATA names another folder than data.

Interrupted downloads resume. Without a network, the message says which file to put where; existing files aren't
downloaded again. Counts that differ from the publication are reported.

NAME.yaml defines your own data set, like the files in conf/published. Without NAME, the data sets are listed."""
DOWNLOAD_EXAMPLE = """\
examples:
  crysldnet data download
  crysldnet data download jarvis_dft_3d
  crysldnet data download expt_kingsbury --structures data/megnet.store"""


def main(argv: Sequence[str]) -> int:
    """Run ``crysldnet data`` with these arguments.

    Returns:
        The exit status: 1 if an import rejected every crystal, else 0.

    Raises:
        CrysldnetError: the input is invalid; the message states the remedy.
    """
    arguments = parser().parse_args(list(argv))
    module, _, function = arguments.run.partition(":")
    return getattr(importlib.import_module(module), function)(arguments)


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


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE")
    parser.add_argument("out", metavar="OUT.parquet")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.parquet")


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE")


def _add_describe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="SET", help="a store, a Parquet file, embedded:NAME or published:NAME[@SPLIT]")
    parser.add_argument("--html", metavar="FILE", help="write a page")
    parser.add_argument("--png", metavar="FILE", help="write a picture")
    parser.add_argument("--no-structures", action="store_true", help="don't find duplicate structures")


def _add_dedupe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="SET", help="a store, a Parquet file, embedded:NAME or published:NAME[@SPLIT]")
    parser.add_argument("--out", metavar="OUT", required=True, help="name.store, or name.parquet")
    parser.add_argument(
        "--by",
        nargs="+",
        choices=("id", "structure"),
        default=["id", "structure"],
        help="what counts as a duplicate (default: both)",
    )
    parser.add_argument("--against", metavar="SET", nargs="+", default=[], help="sets to exclude from the result")
    parser.add_argument(
        "--against-by",
        choices=("formula", "structure"),
        default="formula",
        help="what counts as shared (default: formula)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")


def _add_audit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", metavar="SET", nargs="+", required=True)
    parser.add_argument("--test", metavar="SET", nargs="+", required=True)
    parser.add_argument("--no-structures", action="store_true", help="only compare ids and formulas, which is fast")
    parser.add_argument("--out", metavar="CSV", help="write every shared crystal")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if anything is shared")


def _add_download_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="of the data set, or NAME.yaml; without it they are listed",
    )
    parser.add_argument("--info", action="store_true", help="show the definition without downloading")
    parser.add_argument(
        "--structures", metavar="STORE", help="Materials Project crystals, for data sets that only name them"
    )
    parser.add_argument("--overwrite", action="store_true", help="recreate the store from the files")


class _Command(NamedTuple):
    """A command: its help line, description and example, its arguments, and the function that runs it."""

    help: str
    description: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: str


COMMANDS = {
    "import": _Command(
        "import structure files into a store",
        IMPORT,
        IMPORT_EXAMPLE,
        _add_import_arguments,
        "crysldnet.tools.importer.actions:import_",
    ),
    "export": _Command(
        "export a store to one Parquet file",
        "Write a store as one Parquet file, which pandas, polars and others can read.",
        "example:\n  crysldnet data export my.store my.parquet",
        _add_export_arguments,
        "crysldnet.tools.importer.actions:export",
    ),
    "verify": _Command(
        "check a store against its checksums",
        "Check every file of a store against its recorded sha256.",
        "example:\n  crysldnet data verify my.store",
        _add_store,
        "crysldnet.tools.importer.actions:verify",
    ),
    "show": _Command(
        "summarize a store",
        "Show a store or Parquet file on one screen: crystals, atoms, elements, properties, source, license.",
        "example:\n  crysldnet data show my.store",
        _add_store,
        "crysldnet.tools.importer.actions:show",
    ),
    "describe": _Command(
        "counts, histograms, properties, duplicates, suspicious rows",
        DESCRIBE,
        DESCRIBE_EXAMPLE,
        _add_describe_arguments,
        "crysldnet.tools.datacheck.describe:run",
    ),
    "dedupe": _Command(
        "remove duplicates and crystals of other sets",
        DEDUPE,
        DEDUPE_EXAMPLE,
        _add_dedupe_arguments,
        "crysldnet.tools.datacheck.dedupe:run",
    ),
    "audit": _Command(
        "overlap of a training and a test set",
        AUDIT,
        AUDIT_EXAMPLE,
        _add_audit_arguments,
        "crysldnet.tools.datacheck.audit:run",
    ),
    "download": _Command(
        "download a published data set into a store",
        DOWNLOAD,
        DOWNLOAD_EXAMPLE,
        _add_download_arguments,
        "crysldnet.tools.importer.download:run",
    ),
}


def parser() -> argparse.ArgumentParser:
    """Return what reads the arguments of ``crysldnet data``."""
    parser = argparse.ArgumentParser(
        prog="crysldnet data",
        description="Import, inspect, check and export crystals.",
        epilog="crysldnet data COMMAND --help explains a command and gives an example.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.help,
            description=command.description.replace("@FILES@", known_files()),
            epilog=command.example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    return parser
