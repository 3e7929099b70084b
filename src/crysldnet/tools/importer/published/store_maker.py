"""Make a store of a published data set, with the published split of each property as a column."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from crysldnet.data.catalog import Property, PublishedSet
from crysldnet.data.split import SPLITS
from crysldnet.data.store import CrystalStore
from crysldnet.readers.records import Entry, read_entries
from crysldnet.readers.rows import Task
from crysldnet.readers.sources import Settings, pieces
from crysldnet.tools.importer.importer import ImportReport, import_crystals
from crysldnet.tools.importer.published.formats import FILES, RECORDS, id_of

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


class PublishedReader:
    """The files of a published data set; see :class:`crysldnet.readers.sources.Reader`.

    Attributes:
        sizes: of the published split of each property, in the files.
    """

    def __init__(self, definition: PublishedSet, folder: Path, structures: CrystalStore | None) -> None:
        self._definition, self._folder, self._structures = definition, folder, structures
        self.name = definition.name
        self.metadata: Mapping[str, str] = {}
        self.total = definition.entries
        self.sizes: dict[str, dict[str, int]] = {}

    def tasks(self, settings: Settings) -> Iterator[Task]:
        definition = self._definition
        if definition.reader in FILES:
            for file in definition.files:
                for path in sorted(self._folder.glob(file.name)):
                    yield from FILES[definition.reader](path).tasks(settings)
            return
        units = {p.name: p.unit for p in definition.properties}
        for piece in pieces(self._entries(self._splits())):
            yield partial(read_entries, piece, settings, units)

    def _records(self) -> Iterator[Entry]:
        return RECORDS[self._definition.reader](self._definition, self._folder, self._structures)

    def _splits(self) -> dict[str, list[str | None]]:
        """Read the values of properties with a seeded split; return the columns of their splits."""
        of_seed = [p for p in self._definition.properties if p.sizes is not None or p.fractions is not None]
        known: dict[str, list[bool]] = {p.name: [] for p in of_seed}
        for entry in self._records() if of_seed else ():
            for p in of_seed:
                known[p.name].append(value_of(entry.record, p) is not None)
        splits = {p: split_of_values(known[p.name], p) for p in of_seed}
        self.sizes = {p.name: {name: labels.count(name) for name in SPLITS} for p, labels in splits.items()}
        return {p.split_column: labels for p, labels in splits.items() if any(labels)}

    def _entries(self, splits: Mapping[str, list[str | None]]) -> Iterator[Entry]:
        """Give each crystal with its properties, those of the definition alone."""
        for row, entry in enumerate(self._records()):
            found = entry.record
            if not isinstance(found, Mapping):
                yield entry
                continue
            record: dict[str, Any] = {"material_id": id_of(found) or entry.default_id}
            record |= {key: found[key] for key in ("atoms", "structure", "cif") if key in found}
            record |= {p.name: value_of(found, p) for p in self._definition.properties}
            record |= {name: labels[row] for name, labels in splits.items()}
            record |= {"split": found.get("split")} if any(file.split for file in self._definition.files) else {}
            yield entry._replace(record=record)


def make_store(
    definition: PublishedSet,
    folder: Path,
    out: Path,
    *,
    structures: CrystalStore | None = None,
    overwrite: bool = False,
    digests: Mapping[str, str] | None = None,
) -> Made:
    """Read a data set's files into a store.

    Args:
        definition: of the data set.
        folder: of its files.
        out: the store.
        structures: crystals with Materials Project ids, for a data set that has none of its own.
        overwrite: replace a store that is there.
        digests: sha256 of each file, kept with the crystals.

    Raises:
        DataError: a file can't be read, or ``out`` exists.
    """
    reader = PublishedReader(definition, folder, structures)
    about = {
        "dataset": definition.name,
        "source": f"{definition.title}, {definition.version}; {', '.join(f.url for f in definition.files)}",
        "licence": definition.licence,
        "citation": definition.citation,
        **({"sha256": "; ".join(f"{name} {digest}" for name, digest in digests.items())} if digests else {}),
    }
    report = import_crystals(reader, out, metadata=about, overwrite=overwrite)
    differences = [text for p in definition.properties for text in _compare(p, reader.sizes.get(p.name, {}))]
    read = report.kept + report.rejected
    if read != definition.entries:
        differences.insert(0, f"{read:,} entries, where {definition.entries:,} are published")
    return Made(report, reader.sizes, differences)


def value_of(record: Any, property_: Property) -> float | None:
    """Return a property of a published record in the unit of its column; None where it has none."""
    try:
        value = float(record[property_.key])
    except (KeyError, TypeError, ValueError):  # "na" in JARVIS-DFT
        return None
    if not math.isfinite(value):
        return None
    return (math.log10(value) if value > 0 else None) if property_.log10 else value


def split_of_values(known: list[bool], property_: Property) -> list[str | None]:
    """Return the published split of each row; None for rows without a value, and where they are too few."""
    labels: list[str | None] = [None] * len(known)
    rows = [row for row, has in enumerate(known) if has]
    sizes = property_.sizes
    if property_.fractions is None and (sizes is None or len(rows) < sizes.val + sizes.test + 1):
        return labels
    for row, label in zip(rows, seeded_split(len(rows), property_.fractions, sizes), strict=True):
        labels[row] = label
    return labels


def _compare(property_: Property, found: dict[str, int]) -> list[str]:
    if property_.sizes is None:
        return []
    published = {name: getattr(property_.sizes, name) for name in SPLITS}
    if found == published:
        return []
    shown = ["/".join(f"{sizes[name]:,}" for name in SPLITS) for sizes in (found, published)]
    return [f"{property_.name}: train/val/test are {shown[0]}, where {shown[1]} are published"]
