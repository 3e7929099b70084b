"""Create a store from a published data set, with the official split of each property as a column.

Its layout is converted to records for the importer's readers. Nothing is unpickled.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crysldnet.data.catalog import Property, PublishedSet
from crysldnet.data.split import SPLITS
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError
from crysldnet.readers.archives import ZipReader
from crysldnet.readers.compression import DAMAGED, open_stream
from crysldnet.readers.json_stream import top_level
from crysldnet.readers.record_files import JsonReader
from crysldnet.readers.records import Entry, read_entries
from crysldnet.readers.rows import Task
from crysldnet.readers.sources import Reader, Settings, pieces
from crysldnet.readers.table_cells import CsvRecords
from crysldnet.readers.tables import ParquetReader
from crysldnet.tools.importer.importer import ImportReport, import_crystals

OPTIMADE = ("immutable_id", "lattice_vectors", "cartesian_site_positions", "species_at_sites")


def id_of(record: Any) -> str | None:
    """Return the id of a published record, or None."""
    keys = ("jid", "id", "material_id") if isinstance(record, Mapping) else ()
    return next((str(record[key]) for key in keys if key in record), None)


def _with(entry: Entry, values: Mapping[str, Any]) -> Entry:
    """Add values to a record; invalid records are rejected on reading."""
    return entry._replace(record={**entry.record, **values}) if isinstance(entry.record, Mapping) else entry


def _json(definition: PublishedSet, folder: Path, _: CrystalStore | None = None) -> Iterator[Entry]:
    return JsonReader(folder / definition.files[0].name).entries()


def _megnet(definition: PublishedSet, folder: Path, _: CrystalStore | None) -> Iterator[Entry]:
    """Read crystals and energies as distributed by JARVIS-Tools, and moduli from MEGNet's own file."""
    more = (entry.record for entry in JsonReader(folder / definition.files[1].name).entries())
    moduli = {id_of(r): {key: r.get(key) for key in ("K", "G")} for r in more if isinstance(r, Mapping)}
    for entry in _json(definition, folder):
        yield _with(entry, moduli.get(id_of(entry.record), {}))


def _cif_tables(definition: PublishedSet, folder: Path, _: CrystalStore | None) -> Iterator[Entry]:
    """Read one CSV of CIFs per split."""
    for part in definition.files:
        for entry in CsvRecords(folder / part.name).entries():
            yield _with(entry, {"split": part.split})


def _mptrj(definition: PublishedSet, folder: Path, _: CrystalStore | None) -> Iterator[Entry]:
    """Read an object of materials, each an object of frames by id."""
    path = folder / definition.files[0].name
    try:
        with open_stream(path) as stream:
            for material, _element, frames, _size in top_level(stream):
                for name, frame in frames.items():
                    yield Entry(f"{path.name} {material} {name}", name, {**frame, "material_id": name})
    except (*DAMAGED, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not an object of materials with frames ({error})") from error


def _matbench(definition: PublishedSet, folder: Path, _: CrystalStore | None) -> Iterator[Entry]:
    """Read a Matbench task; ids are numbered as in Matbench, ``mb-jdft2d-001``."""
    with open_stream(folder / definition.files[0].name) as stream:
        rows = next((value for key, element, value, _ in top_level(stream) if key == "index" and not element), ())
    stem, digits = definition.name.removeprefix("matbench_").replace("_", "-"), len(str(len(rows)))
    for place, entry in enumerate(_json(definition, folder), 1):
        yield _with(entry, {"material_id": f"mb-{stem}-{place:0{digits}d}"})


def _by_id(definition: PublishedSet, folder: Path, structures: CrystalStore | None) -> Iterator[Entry]:
    """Join measured values to structures of a store by Materials Project id; rows without one are dropped."""
    if structures is None:
        raise DataError(
            f"{definition.name} has no structures, but Materials Project ids: name a store that has them, as "
            f"crysldnet data download {definition.name} --structures data/megnet.store"
        )
    where = {id_: row for row, id_ in enumerate(structures.ids.to_pylist())}
    for entry in _json(definition, folder):
        record = entry.record if isinstance(entry.record, Mapping) else {}
        id_ = record.get("likely_mpid") or record.get("mpid")
        if id_ in where:
            crystal = structures.to_table(np.array([where[id_]])).to_pylist()[0]
            structure = {key: crystal[key] for key in ("lattice", "atomic_numbers", "frac_coords")}
            yield _with(entry, {"material_id": id_, "structure": structure})


RECORDS: dict[str, Callable[[PublishedSet, Path, CrystalStore | None], Iterator[Entry]]] = {
    "jarvis": _json,
    "megnet": _megnet,
    "cif_table": _cif_tables,
    "mptrj": _mptrj,
    "pandas_structures": _matbench,
    "pandas_by_id": _by_id,
}
"""Layouts of records with their structure under ``atoms``, ``structure`` or ``cif``."""

FILES: dict[str, Callable[[Path], Reader]] = {
    "zip_of_cifs": ZipReader,
    "optimade_parquet": lambda path: ParquetReader(path, OPTIMADE),
}
"""Readers of files that only contain structures."""


FIELD_SEED = 123
"""Seed of the standard splits of JARVIS-DFT and MEGNet."""


@dataclass(frozen=True)
class Made:
    """A created store.

    Attributes:
        report: import report.
        sizes: sizes of the official split of each property in the published file.
        differences: differences from the publication.
    """

    report: ImportReport
    sizes: dict[str, dict[str, int]]
    differences: list[str]


def seeded_split(count: int, fractions: tuple[float, float] | None, sizes: Any, seed: int = FIELD_SEED) -> list[str]:
    """Return the split of each of ``count`` rows in the standard way for JARVIS-DFT and MEGNet.

    The rows are shuffled by Python's ``random.seed(seed)``. The last are test, those before them validation, and the
    rest training. Released code uses int(0.8·n) for training instead, which leaves one or two rows unused; the
    published 44,578 of 55,722 are the whole rest.

    Args:
        count: number of rows n.
        fractions: fractions of validation and test, int(fraction · n) rows each; None to use the sizes.
        sizes: with the attributes val and test.
        seed: seed of the shuffle.
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
        sizes: sizes of the official split of each property in the files.
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
        """Read the values of properties with a seeded split; return the split columns."""
        of_seed = [p for p in self._definition.properties if p.sizes is not None or p.fractions is not None]
        known: dict[str, list[bool]] = {p.name: [] for p in of_seed}
        for entry in self._records() if of_seed else ():
            for p in of_seed:
                known[p.name].append(value_of(entry.record, p) is not None)
        splits = {p: split_of_values(known[p.name], p) for p in of_seed}
        self.sizes = {p.name: {name: labels.count(name) for name in SPLITS} for p, labels in splits.items()}
        return {p.split_column: labels for p, labels in splits.items() if any(labels)}

    def _entries(self, splits: Mapping[str, list[str | None]]) -> Iterator[Entry]:
        """Yield each crystal with the properties of the definition."""
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
    """Convert a data set's files to a store.

    Args:
        definition: definition of the data set.
        folder: folder of its files.
        out: output store.
        structures: crystals with Materials Project ids, for a data set without structures.
        overwrite: replace an existing store.
        digests: sha256 of each file, stored with the crystals.

    Raises:
        DataError: a file can't be read, or ``out`` exists.
    """
    reader = PublishedReader(definition, folder, structures)
    about = {
        "dataset": definition.name,
        "source": f"{definition.title}, {definition.version}; {', '.join(f.url for f in definition.files)}",
        "license": definition.license,
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
    """Return a property of a published record in the unit of its column; None if missing."""
    try:
        value = float(record[property_.key])
    except (KeyError, TypeError, ValueError):  # "na" in JARVIS-DFT
        return None
    if not math.isfinite(value):
        return None
    return (math.log10(value) if value > 0 else None) if property_.log10 else value


def split_of_values(known: list[bool], property_: Property) -> list[str | None]:
    """Return the official split of each row; None for rows without a value, or if there are too few."""
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
