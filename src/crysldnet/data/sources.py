"""Where an import's crystals come from: structure files, or a Parquet file. Both give them in batches of 1,000."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crysldnet.data.crystals import Crystals, from_lists
from crysldnet.data.ledger import Ledger
from crysldnet.data.schema import STRUCTURE_COLUMNS, crystals_from_table, metadata_of, units_of
from crysldnet.data.structure_files import Source, Structure, find_structure_files, material_ids, read_many
from crysldnet.errors import DataError

BATCH = 1000
Advance = Callable[[int], None]
"""Called with how many more crystals were read."""


class Batch(NamedTuple):
    """Crystals, and the file or row that each came from."""

    places: list[str]
    ids: list[str]
    crystals: Crystals
    properties: dict[str, pa.Array]


class FileSource:
    """Crystals of CIF and POSCAR files.

    Attributes:
        columns: properties that come with the crystals: none.
        units: of the properties.
        metadata: the name of what was given.
    """

    def __init__(self, source: Source, workers: int, max_atoms: int) -> None:
        self._files = find_structure_files(source)
        self._workers, self._max_atoms = workers, max_atoms
        paths = [os.path.abspath(file) for file in self._files]
        folder = Path(source).expanduser() if isinstance(source, (str, os.PathLike)) else None
        inside = folder is not None and folder.is_dir()
        shared = os.path.commonpath([os.path.dirname(p) for p in paths])
        root = Path(os.path.abspath(folder) if folder is not None and inside else shared)
        self._names = [Path(path).relative_to(root).as_posix() for path in paths]
        self._ids = material_ids(self._names, root.name)
        self.units: dict[str, str] = {}
        self.columns: list[str] = []
        self.metadata = {"source": self._names[0] if len(paths) == 1 and not inside else root.name}

    def __len__(self) -> int:
        return len(self._files)

    def ids(self) -> set[str]:
        """Return the ids of all crystals."""
        return set(self._ids)

    def batches(self, ledger: Ledger, advance: Advance) -> Iterator[Batch]:
        """Read the files; those that can't be are rejected."""
        parsed = read_many(self._files, workers=self._workers, max_atoms=self._max_atoms)
        results = zip(self._names, self._ids, parsed, strict=True)
        while chunk := list(islice(results, BATCH)):
            names: list[str] = []
            ids: list[str] = []
            structures: list[Structure] = []
            for name, material_id, (structure, reason, notes) in chunk:
                advance(1)
                for note in notes:
                    ledger.note(f"files {note}", name)
                if structure is None:
                    ledger.reject(name, material_id, reason)
                else:
                    names.append(name)
                    ids.append(material_id)
                    structures.append(structure)
            crystals = from_lists(*zip(*structures, strict=True)) if structures else from_lists([], [], [])
            yield Batch(names, ids, crystals, {})


class ParquetSource:
    """Crystals of a Parquet file in the schema.

    Attributes:
        columns: properties that come with the crystals.
        units: of the properties that state one.
        metadata: what the file says of itself.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable Parquet file ({error})") from error
        schema = self._file.schema_arrow
        try:
            crystals_from_table(schema.empty_table())
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        types = {field.name: _property_type(field.type) for field in schema if field.name not in STRUCTURE_COLUMNS}
        self._types = {name: kind for name, kind in types.items() if kind is not None}
        self._left_out = [name for name, kind in types.items() if kind is None]
        self.columns = list(self._types)
        self.units = {name: unit for name, unit in units_of(schema).items() if name in self._types}
        self.metadata = {"source": path.name} | metadata_of(schema)

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def ids(self) -> set[str]:
        """Return the ids of all crystals."""
        return set(self._file.read(["material_id"])["material_id"].cast(pa.string()).to_pylist())

    def batches(self, ledger: Ledger, advance: Advance) -> Iterator[Batch]:
        """Read the rows; those that can't be are rejected."""
        for name in self._left_out:
            ledger.note("columns hold neither numbers nor text and were left out", name)
        row = 1
        try:
            for batch in self._file.iter_batches(BATCH, columns=[*STRUCTURE_COLUMNS, *self.columns]):
                yield self._batch(pa.Table.from_batches([batch]), row, ledger)
                row += len(batch)
                advance(len(batch))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self._path}: damaged at or after row {row} ({error})") from error

    def _batch(self, table: pa.Table, row: int, ledger: Ledger) -> Batch:
        places = [f"{self._path.name} row {row + i}" for i in range(len(table))]
        ids = [material_id or "" for material_id in table["material_id"].cast(pa.string()).to_pylist()]
        try:
            crystals = crystals_from_table(table)
        except DataError:
            faults = [_row_fault(table.slice(i, 1)) for i in range(len(table))]
            for place, material_id, fault in zip(places, ids, faults, strict=True):
                if fault is not None:
                    ledger.reject(place, material_id, fault)
            good = [i for i, fault in enumerate(faults) if fault is None]
            table = table.take(pa.array(good, pa.int64()))
            places, ids = [places[i] for i in good], [ids[i] for i in good]
            crystals = crystals_from_table(table)
        return Batch(places, ids, crystals, self._properties(table, places, ids, ledger))

    def _properties(self, table: pa.Table, places: list[str], ids: list[str], ledger: Ledger) -> dict[str, pa.Array]:
        properties = {}
        for name, kind in self._types.items():
            column = table[name].cast(kind).combine_chunks()
            if pa.types.is_floating(kind):
                for i in np.flatnonzero(np.isinf(column.to_numpy(zero_copy_only=False))).tolist():
                    ledger.reject(places[i], ids[i], f"{name} is infinite; its value is null")
                column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, kind))
            properties[name] = column
        return properties


def _row_fault(row: pa.Table) -> str | None:
    try:
        crystals_from_table(row)
    except DataError as error:
        return re.sub(r"^row 0 \(.*?\): | in row 0$", "", str(error))
    return None


def _property_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type that a property column is kept in, or None for a type that isn't kept."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_float32(kind):
        return kind
    return pa.float64() if pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind) else None
