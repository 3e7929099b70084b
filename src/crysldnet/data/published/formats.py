"""Readers of the formats that data sets are published in. Nothing is unpickled."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crysldnet.data.elements import SYMBOLS
from crysldnet.data.published.definition import PublishedSet
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError

Arrays = tuple[NDArray[np.float64], NDArray[np.uint8], NDArray[np.float64]]
_NUMBERS = {symbol: number for number, symbol in enumerate(SYMBOLS) if number} | {"D": 1, "T": 1}
_CHUNK = 1 << 22
_ID_KEYS = ("jid", "id", "material_id")


@dataclass(frozen=True)
class Entry:
    """One row of a published file.

    Attributes:
        id: the material id.
        structure: the text of a CIF, or lattice [3, 3] in Å, atomic numbers [n] and fractional coordinates [n, 3].
        values: of its properties, by the keys of the file.
        split: the split that its file is, if it is one.
    """

    id: str
    structure: str | Arrays
    values: dict[str, Any]
    split: str | None = None


def read_entries(definition: PublishedSet, folder: Path, structures: CrystalStore | None) -> Iterator[Entry]:
    """Read a data set's files.

    Raises:
        DataError: a file isn't what the definition says; the message names it.
    """
    if definition.needs_structures and structures is None:
        raise DataError(
            f"{definition.name} has no structures, but Materials Project ids: name a store that has them, as "
            f"crysldnet data download {definition.name} --structures data/megnet.store"
        )
    try:
        yield from _READERS[definition.reader](definition, folder, structures)
    except (zipfile.BadZipFile, OSError, EOFError, KeyError, TypeError, ValueError) as error:
        names = ", ".join(file.name for file in definition.files)
        raise DataError(
            f"{folder}: {names}: not read as {definition.title} ({type(error).__name__}: {error})"
        ) from error


def stream_json(file: IO[str]) -> Iterator[Any]:
    """Yield the items of a JSON list, or the (key, value) pairs of an object, without holding the whole of it.

    Raises:
        ValueError: it is neither, or it ends too early.
    """
    decoder, text, position, more = json.JSONDecoder(), "", 0, _CHUNK

    def skip() -> str:
        """Move to the next character that isn't space or a comma, and return it."""
        nonlocal text, position
        while True:
            while position < len(text) and text[position] in " \t\r\n,":
                position += 1
            if position < len(text):
                return text[position]
            text, position = file.read(_CHUNK), 0
            if not text:
                raise ValueError("the JSON ends too early")

    def value() -> Any:
        """Decode what begins here; read on while it is cut off."""
        nonlocal text, position, more
        while True:
            try:
                found, position = decoder.raw_decode(text, position)
                more = _CHUNK
                return found
            except json.JSONDecodeError as error:
                added = file.read(more)
                if not added:
                    raise ValueError(f"the JSON ends too early or is damaged ({error.msg})") from error
                text, position, more = text[position:] + added, 0, 2 * more

    opening = skip()
    if opening not in "[{":
        raise ValueError("the JSON is neither a list nor an object")
    position += 1
    while skip() not in "]}":
        item = value()
        if opening == "{":
            if skip() != ":":
                raise ValueError(f"no value after {item!r}")
            position += 1
            skip()
            item = (item, value())
        yield item


def _text(path: Path) -> IO[str]:
    """Open a JSON file, or the one inside a zip, as text."""
    if path.suffix == ".zip":
        archive = zipfile.ZipFile(path)
        name = next((n for n in archive.namelist() if n.endswith(".json")), None)
        if name is None:
            raise ValueError(f"{path.name} holds no .json file")
        return io.TextIOWrapper(archive.open(name), encoding="utf-8")
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _of_atoms(atoms: dict[str, Any]) -> Arrays:
    """Read a structure as JARVIS-Tools writes it."""
    lattice = np.array(atoms["lattice_mat"], np.float64)
    coordinates = np.array(atoms["coords"], np.float64).reshape(-1, 3)
    if atoms.get("cartesian"):
        coordinates = coordinates @ np.linalg.inv(lattice)
    return lattice, _numbers(atoms["elements"]), coordinates


def _of_pymatgen(structure: dict[str, Any]) -> Arrays:
    """Read a structure as pymatgen writes it; a site that is shared or partly empty has no atomic number."""
    lattice = np.array(structure["lattice"]["matrix"], np.float64)
    symbols = []
    for site in structure["sites"]:
        whole = len(site["species"]) == 1 and site["species"][0]["occu"] == 1
        symbols.append(site["species"][0]["element"] if whole else "")
    return lattice, _numbers(symbols), np.array([site["abc"] for site in structure["sites"]], np.float64)


def _numbers(symbols: list[str]) -> NDArray[np.uint8]:
    """Return atomic numbers, 0 for what is no element: the import rejects such a crystal by its id."""
    return np.array([_NUMBERS.get(symbol.strip(), 0) for symbol in symbols], np.uint8)


def _values(definition: PublishedSet, row: dict[str, Any]) -> dict[str, Any]:
    """Keep what becomes a property."""
    return {p.key: row[p.key] for p in definition.properties if p.key in row}


def _jarvis(definition: PublishedSet, folder: Path, _: CrystalStore | None) -> Iterator[Entry]:
    with _text(folder / definition.files[0].name) as file:
        for item in stream_json(file):
            key = next(key for key in _ID_KEYS if key in item)
            yield Entry(str(item[key]), _of_atoms(item["atoms"]), _values(definition, item))


def _megnet(definition: PublishedSet, folder: Path, _: CrystalStore | None) -> Iterator[Entry]:
    """Read the crystals and energies as JARVIS-Tools distributes them, and the moduli from MEGNet's own file."""
    moduli = {}
    with _text(folder / definition.files[1].name) as file:
        for item in stream_json(file):
            moduli[str(item["material_id"])] = {key: item.get(key) for key in ("K", "G")}
    for entry in _jarvis(definition, folder, None):
        yield Entry(entry.id, entry.structure, entry.values | moduli.get(entry.id, {}))


def _cif_table(definition: PublishedSet, folder: Path, _: CrystalStore | None) -> Iterator[Entry]:
    csv.field_size_limit(sys.maxsize)
    for part in definition.files:
        with (folder / part.name).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                yield Entry(row["material_id"], row["cif"], _values(definition, row), part.split)


def _zip_of_cifs(definition: PublishedSet, folder: Path, _: CrystalStore | None) -> Iterator[Entry]:
    with zipfile.ZipFile(folder / definition.files[0].name) as archive:
        for name in sorted(n for n in archive.namelist() if n.lower().endswith(".cif")):
            yield Entry(Path(name).stem, archive.read(name).decode("utf-8", "replace"), {})


def _optimade_parquet(definition: PublishedSet, folder: Path, _: CrystalStore | None) -> Iterator[Entry]:
    columns = ["immutable_id", "lattice_vectors", "cartesian_site_positions", "species_at_sites"]
    for path in sorted(folder.glob(definition.files[0].name)):
        for batch in pq.ParquetFile(path).iter_batches(1000, columns=columns):
            for row in batch.to_pylist():
                lattice = np.array(row["lattice_vectors"], np.float64)
                cartesian = np.array(row["cartesian_site_positions"], np.float64).reshape(-1, 3)
                structure = (lattice, _numbers(row["species_at_sites"]), cartesian @ np.linalg.inv(lattice))
                yield Entry(row["immutable_id"], structure, {})


def _mptrj(definition: PublishedSet, folder: Path, _: CrystalStore | None) -> Iterator[Entry]:
    with _text(folder / definition.files[0].name) as file:
        for _material, frames in stream_json(file):
            for name, frame in frames.items():
                yield Entry(name, _of_pymatgen(frame["structure"]), _values(definition, frame))


def _pandas(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    with _text(path) as file:
        content = json.load(file)
    for label, row in zip(content["index"], content["data"], strict=True):
        yield label, dict(zip(content["columns"], row, strict=True))


def _pandas_structures(definition: PublishedSet, folder: Path, _: CrystalStore | None) -> Iterator[Entry]:
    """Read a task of Matbench; ids are numbered as Matbench does, ``mb-jdft2d-001``."""
    rows = list(_pandas(folder / definition.files[0].name))
    stem, digits = definition.name.removeprefix("matbench_").replace("_", "-"), len(str(len(rows)))
    for place, (_, row) in enumerate(rows, 1):
        yield Entry(f"mb-{stem}-{place:0{digits}d}", _of_pymatgen(row["structure"]), _values(definition, row))


def _pandas_by_id(definition: PublishedSet, folder: Path, structures: CrystalStore | None) -> Iterator[Entry]:
    """Join measured values to the structures of a store by Materials Project id; rows without one are left out."""
    assert structures is not None
    where = {id_: row for row, id_ in enumerate(structures.ids.to_pylist())}
    for _, row in _pandas(folder / definition.files[0].name):
        id_ = row.get("likely_mpid") or row.get("mpid")
        if id_ in where:
            crystal = structures.crystals.take(np.array([where[id_]]))
            yield Entry(
                str(id_),
                (crystal.lattice[0], crystal.numbers, crystal.frac_coords.astype(np.float64)),
                _values(definition, row),
            )


_READERS: dict[str, Callable[[PublishedSet, Path, CrystalStore | None], Iterator[Entry]]] = {
    "jarvis": _jarvis,
    "megnet": _megnet,
    "cif_table": _cif_table,
    "zip_of_cifs": _zip_of_cifs,
    "optimade_parquet": _optimade_parquet,
    "mptrj": _mptrj,
    "pandas_structures": _pandas_structures,
    "pandas_by_id": _pandas_by_id,
}
