"""Make a store of a published data set, with the published split of each property as a column."""

from __future__ import annotations

import csv
import math
import random
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from crysldnet.data.crystals import from_lists
from crysldnet.data.importer import ImportReport, import_crystals
from crysldnet.data.output import ParquetOutput
from crysldnet.data.published.definition import Property, PublishedSet
from crysldnet.data.published.formats import Entry, read_entries
from crysldnet.data.schema import table_from_crystals
from crysldnet.data.split import SPLITS
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError

FIELD_SEED = 123
"""Of the splits that the field uses for JARVIS-DFT and MEGNet."""


@dataclass(frozen=True)
class Made:
    """A store that was made.

    Attributes:
        report: of the import.
        sizes: of the published split of each property, in the published file.
        differences: what isn't as published.
    """

    report: ImportReport
    sizes: dict[str, dict[str, int]]
    differences: list[str]


def seeded_split(count: int, fractions: tuple[float, float] | None, sizes: Any, seed: int = FIELD_SEED) -> list[str]:
    """Return the split of each of ``count`` rows, as the field divides JARVIS-DFT and MEGNet.

    The rows are shuffled by Python's ``random.seed(seed)``. The last are test, those before them validation, all others
    training. The released code of the field takes int(0.8·n) for training instead, which leaves one or two rows in the
    middle unused; the published 44,578 of 55,722 are all that remain.

    Args:
        count: n.
        fractions: of validation and test, int(fraction · n) rows each; None to take the sizes.
        sizes: with the attributes val and test.
        seed: of the shuffle.
    """
    order = list(range(count))
    random.Random(seed).shuffle(order)
    val, test = (int(f * count) for f in fractions) if fractions is not None else (sizes.val, sizes.test)
    labels = ["train"] * count
    for row in order[count - val - test : count - test]:
        labels[row] = "val"
    for row in order[count - test :]:
        labels[row] = "test"
    return labels


def make_store(
    definition: PublishedSet,
    folder: Path,
    out: Path,
    *,
    structures: CrystalStore | None = None,
    overwrite: bool = False,
) -> Made:
    """Read a data set's files into a store.

    Raises:
        DataError: a file can't be read, or ``out`` exists.
    """
    entries: Iterable[Entry] = read_entries(definition, folder, structures)
    splits: dict[str, list[str | None]] = {}
    sizes: dict[str, dict[str, int]] = {}
    differences: list[str] = []
    split_by_seed = [p for p in definition.properties if p.sizes is not None or p.fractions is not None]
    if split_by_seed:
        entries = list(entries)
        for property_ in split_by_seed:
            labels, found = _published_split(entries, property_)
            splits[property_.split_column], sizes[property_.name] = labels, found
            differences += _compare(property_, found)
    counter = _Counter(entries)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=_made(out.parent)) as temporary:
        source, targets = _intermediate(definition, iter(counter), splits, Path(temporary))
        about = {
            "dataset": definition.name,
            "source": f"{definition.title}, {definition.version}; {', '.join(f.url for f in definition.files)}",
            "licence": definition.licence,
            "citation": definition.citation,
        }
        report = import_crystals(source, out, targets=targets, metadata=about, overwrite=overwrite)
    if counter.count != definition.entries:
        differences.insert(0, f"{counter.count:,} entries, where {definition.entries:,} are published")
    return Made(report, sizes, differences)


def value_of(entry: Entry, property_: Property) -> float | None:
    """Return a property's value in the unit of its column; None where there is none."""
    try:
        value = float(entry.values[property_.key])
    except (KeyError, TypeError, ValueError):  # "na" in JARVIS-DFT
        return None
    if not math.isfinite(value):
        return None
    return (math.log10(value) if value > 0 else None) if property_.log10 else value


def _published_split(entries: list[Entry], property_: Property) -> tuple[list[str | None], dict[str, int]]:
    rows = [row for row, entry in enumerate(entries) if value_of(entry, property_) is not None]
    labels: list[str | None] = [None] * len(entries)
    known = property_.sizes
    if property_.fractions is None and (known is None or len(rows) < known.val + known.test + 1):
        return labels, dict.fromkeys(SPLITS, 0)
    for row, label in zip(rows, seeded_split(len(rows), property_.fractions, known), strict=True):
        labels[row] = label
    return labels, {name: labels.count(name) for name in SPLITS}


def _compare(property_: Property, found: dict[str, int]) -> list[str]:
    if property_.sizes is None:
        return []
    published = {name: getattr(property_.sizes, name) for name in SPLITS}
    if found == published:
        return []
    shown = ["/".join(f"{sizes[name]:,}" for name in SPLITS) for sizes in (found, published)]
    return [f"{property_.name}: train/val/test are {shown[0]}, where {shown[1]} are published"]


class _Counter:
    """Count entries on their way."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries, self.count = entries, 0

    def __iter__(self) -> Iterator[Entry]:
        for entry in self._entries:
            self.count += 1
            yield entry


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"can't make {folder}: {error.strerror}") from error
    return folder


def _intermediate(
    definition: PublishedSet, entries: Iterator[Entry], splits: dict[str, list[str | None]], folder: Path
) -> tuple[Path, Path | None]:
    """Write what the importer reads: a Parquet file, or CIF files and a table of their values."""
    first = next(entries, None)
    if first is None:
        raise DataError(f"{definition.name}: there is nothing in its files")
    entries = chain([first], entries)
    if isinstance(first.structure, str):
        return folder / "cifs", _write_cifs(definition, entries, folder)
    _write_parquet(definition, entries, splits, folder / "crystals.parquet")
    return folder / "crystals.parquet", None


def _write_cifs(definition: PublishedSet, entries: Iterator[Entry], folder: Path) -> Path | None:
    cifs, table = folder / "cifs", folder / "values.csv"
    cifs.mkdir()
    properties = definition.properties
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["material_id", *(f"{p.name} ({p.unit})" for p in properties), "split"])
        for entry in entries:
            assert isinstance(entry.structure, str)
            (cifs / f"{Path(entry.id).name}.cif").write_text(entry.structure, encoding="utf-8")
            writer.writerow([entry.id, *(value_of(entry, p) for p in properties), entry.split])
    return table if properties else None


def _write_parquet(
    definition: PublishedSet, entries: Iterator[Entry], splits: dict[str, list[str | None]], path: Path
) -> None:
    units = {p.name: p.unit for p in definition.properties}
    begin = 0
    with ParquetOutput(path) as output:
        while batch := list(islice(entries, 1000)):
            crystals = from_lists(*zip(*(entry.structure for entry in batch), strict=True))
            values: dict[str, Any] = {
                p.name: pa.array([value_of(e, p) for e in batch], pa.float64()) for p in definition.properties
            }
            values |= {
                name: pa.array(labels[begin : begin + len(batch)], pa.string()) for name, labels in splits.items()
            }
            output.append(table_from_crystals(crystals, [e.id for e in batch], values, units, {}))
            begin += len(batch)
    assert np.all([len(labels) == begin for labels in splits.values()])
