"""Layouts of published data sets, converted to records for the importer's readers. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crysldnet.data.catalog import PublishedSet
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError
from crysldnet.readers.archives import ZipReader
from crysldnet.readers.compression import DAMAGED, open_stream
from crysldnet.readers.json_stream import top_level
from crysldnet.readers.record_files import JsonReader
from crysldnet.readers.records import Entry
from crysldnet.readers.sources import Reader
from crysldnet.readers.table_cells import CsvRecords
from crysldnet.readers.tables import ParquetReader

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
