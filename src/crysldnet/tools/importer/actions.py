"""What ``crysldnet data import | export | verify | show`` do with their arguments."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from crysldnet.console import lines_of
from crysldnet.data.datasets import open_part, open_store
from crysldnet.data.elements import SYMBOLS
from crysldnet.data.output import ParquetOutput
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError
from crysldnet.tools.importer.importer import import_crystals


def import_(arguments: argparse.Namespace) -> int:
    """Import crystals; return 1 if every one was rejected, else 0."""
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


def export(arguments: argparse.Namespace) -> int:
    """Write a store as a Parquet file; return 0."""
    out = Path(arguments.out)
    if out.suffix != ".parquet":
        raise DataError(f"{out}: the name must end in .parquet")
    store, rows = open_part(arguments.store)
    with ParquetOutput(out, overwrite=arguments.overwrite) as output:
        output.append(store.to_table(rows))
    sys.stdout.write(f"{len(rows):,} crystals written to {out}\n")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Compare a store with its checksums; return 0."""
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


def show(arguments: argparse.Namespace) -> int:
    """Print a summary of a store; return 0."""
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
