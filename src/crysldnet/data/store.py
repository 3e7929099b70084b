"""The crystal store: crystals as memory-mapped flat arrays.

A store is a folder. ``lattice.bin``, ``ptr.bin``, ``numbers.bin`` and ``frac_coords.bin`` are little-endian arrays of
all crystals in sequence; ``columns.arrow`` (Arrow IPC) holds ids, properties and text columns; ``store.json`` holds the
counts, the sha256 of every file, units, source, license and citation, and is written last. Opening maps the files and
checks basic validity, 0.2 s for a million crystals; worker processes share one copy.

A store is written under a temporary name and renamed when complete: a killed import leaves no partial store.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crysldnet.console import listed
from crysldnet.data.schema import (
    STRUCTURE_COLUMNS,
    crystals_from_table,
    ids_of,
    metadata_of,
    refuse_claims,
    table_from_crystals,
    units_of,
    with_current_keys,
)
from crysldnet.errors import DataError
from crysldnet.graphs.crystals import Crystals, damage, faults

FORMAT_VERSION = 1
ARRAYS: dict[str, tuple[str, tuple[int, ...]]] = {
    "lattice": ("<f8", (3, 3)),
    "ptr": ("<i8", ()),
    "numbers": ("|u1", ()),
    "frac_coords": ("<f4", (3,)),
}
_DESCRIPTION = {"crystals": int, "atoms": int, "units": dict, "metadata": dict, "files": dict, "sha256": str}


class CrystalStore:
    """Crystals with ids and properties, read from a store, a Parquet file or a table.

    Attributes:
        crystals: the structures, memory-mapped if from a store.
        units: unit of each property that has one.
        metadata: data set, source, license, citation.
        name: source, for messages.
        folder: store folder of the mapped arrays; None if in memory.
    """

    def __init__(
        self,
        crystals: Crystals,
        columns: pa.Table,
        units: dict[str, str],
        metadata: dict[str, str],
        name: str,
        hash_: str,
    ) -> None:
        self.crystals = crystals
        self._columns = columns
        self.units = units
        self.metadata = metadata
        self.name = name
        self.hash = hash_
        """sha256 of the content."""
        self.folder: Path | None = None

    def __len__(self) -> int:
        return len(self.crystals)

    @property
    def column_names(self) -> list[str]:
        """Names of the property and text columns."""
        return [name for name in self._columns.column_names if name != "material_id"]

    @property
    def ids(self) -> pa.ChunkedArray:
        """[B] the material ids."""
        return self._columns["material_id"]

    def ids_at(self, index: NDArray[np.int64]) -> list[str]:
        """Return the ids of some rows."""
        return self.ids.take(pa.array(index)).to_pylist()

    def numbers_of(self, name: str) -> NDArray[np.float64]:
        """[B] a numeric property, NaN where there is no value.

        Raises:
            DataError: there is no such column, or it isn't numeric.
        """
        column = self._column(name)
        if not self.is_numeric(name):
            raise DataError(f"{self.name}: column {name!r} holds {column.type}, not numbers; name another")
        return column.cast(pa.float64()).to_numpy(zero_copy_only=False)

    def is_numeric(self, name: str) -> bool:
        """Return whether a column has numbers or booleans."""
        type_ = self.type_of(name)
        return pa.types.is_floating(type_) or pa.types.is_integer(type_) or pa.types.is_boolean(type_)

    def type_of(self, name: str) -> pa.DataType:
        """Return the Arrow type of a property or text column.

        Raises:
            DataError: the column doesn't exist.
        """
        return self._column(name).type

    def texts_of(self, name: str) -> NDArray[np.object_]:
        """[B] a text column, None for missing values."""
        return self._column(name).to_numpy(zero_copy_only=False)

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self._columns.column_names:
            raise DataError(f"{self.name}: no column {name!r}; it has {listed(self.column_names) or 'none'}")
        return self._columns[name]

    def to_table(self, rows: NDArray[np.int64] | None = None) -> pa.Table:
        """Return everything, or some rows, as a table in the Parquet schema."""
        columns = self._columns if rows is None else _rows_of(self._columns, rows)
        properties = {name: columns[name].combine_chunks() for name in self.column_names}
        crystals = self.crystals if rows is None else self.crystals.take(rows)
        return table_from_crystals(crystals, columns["material_id"].to_pylist(), properties, self.units, self.metadata)

    @classmethod
    def from_table(cls, table: pa.Table, name: str = "table") -> CrystalStore:
        """Create a store from a table in the Parquet schema."""
        crystals = crystals_from_table(table)
        columns = table.drop_columns([c for c in STRUCTURE_COLUMNS if c != "material_id"])
        columns = columns.set_column(columns.column_names.index("material_id"), "material_id", ids_of(table))
        digest = hashlib.sha256()
        for array in (crystals.lattice, crystals.ptr, crystals.numbers, crystals.frac_coords):
            digest.update(np.ascontiguousarray(array).tobytes())
        for column_name, column in zip(columns.column_names, columns.columns, strict=True):
            digest.update(json.dumps([column_name, column.to_pylist()]).encode())
        return cls(crystals, columns, units_of(table.schema), metadata_of(table.schema), name, digest.hexdigest())

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check: bool = True) -> CrystalStore:
        """Open a store folder or a Parquet file.

        Args:
            path: folder or file.
            check: check the arrays of a folder for damage.

        Raises:
            DataError: it is missing, neither of these, or damaged; the message names the file.
        """
        path = utf8_path(Path(path))
        if path.is_dir():
            store = cls._open_folder(path)
            if check and (damage_ := damage(store.crystals)):
                raise DataError(f"{path}: damaged: {damage_}; import the store again")
            return store
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        if path.suffix != ".parquet":
            raise DataError(
                f"{path}: neither a crystal store (a folder) nor a .parquet file; "
                f"make one with: crysldnet data import {path} --out my.store"
            )
        try:
            with pq.ParquetFile(path) as file:
                refuse_claims(file, path.stat().st_size)
                table = file.read()
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable Parquet file ({error})") from error
        try:
            store = cls.from_table(table, str(path))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        store.refuse_faults()
        return store

    @classmethod
    def _open_folder(cls, path: Path) -> CrystalStore:
        info = _read_info(path)
        atoms, count = info["atoms"], info["crystals"]
        lengths = {"lattice": count, "ptr": count + 1, "numbers": atoms, "frac_coords": atoms}
        for name in (*(f"{name}.bin" for name in ARRAYS), "columns.arrow"):
            file, entry = path / name, info["files"].get(name)
            size = file.stat().st_size if file.exists() else -1
            said = entry.get("bytes") if isinstance(entry, dict) else None
            if size != said:
                raise DataError(
                    f"{file}: {'missing' if size < 0 else f'{size} bytes'} where the store says {said}; "
                    "it was cut off or changed, import it again"
                )
        arrays = {}
        for name, (dtype, shape) in ARRAYS.items():
            file, full = path / f"{name}.bin", (lengths[name], *shape)
            if file.stat().st_size != math.prod(full) * np.dtype(dtype).itemsize:
                raise DataError(f"{path / 'store.json'}: {name}.bin isn't of {count} crystals with {atoms} atoms")
            arrays[name] = np.memmap(file, dtype, "r", shape=full) if full[0] else np.empty(full, np.dtype(dtype))
        try:
            columns = pa.ipc.open_file(pa.memory_map(str(path / "columns.arrow"))).read_all()
            columns.validate(full=True)
            whole = columns.num_rows == count and columns.schema.field("material_id").type == pa.string()
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise DataError(f"{path / 'columns.arrow'}: damaged ({error}); import the store again") from error
        if not whole:
            raise DataError(f"{path / 'columns.arrow'}: damaged (not {count} ids); import the store again")
        store = cls(
            Crystals(**arrays), columns, info["units"], with_current_keys(info["metadata"]), str(path), info["sha256"]
        )
        store.folder = path
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a path if the arrays are mapped, so that processes don't copy them."""
        if self.folder is not None:
            return _reopen, (self.folder, self.name)
        return super().__reduce__()  # type: ignore[return-value]

    def refuse_faults(self) -> None:
        """Check every crystal; for a store the import has done this."""
        wrong = [(row, fault) for row, fault in enumerate(faults(self.crystals)) if fault is not None]
        if wrong:
            shown = "; ".join(f"{self.ids[row]} (row {row}): {fault}" for row, fault in wrong[:3])
            raise DataError(
                f"{self.name}: {len(wrong)} of {len(self)} crystals can't be used: {shown}{'; …' * (len(wrong) > 3)}. "
                f"Leave them out with: crysldnet data import {self.name} --out clean.store"
            )

    def verify(self) -> None:
        """Compare every file of a store folder with its sha256.

        Raises:
            DataError: a file differs; the message names it.
        """
        path = self.folder or Path(self.name)
        for name, entry in _read_info(path)["files"].items():
            if file_hash(path / name) != entry["sha256"]:
                raise DataError(f"{path / name}: its content differs from the sha256 in store.json; import it again")


def _reopen(folder: Path, name: str) -> CrystalStore:
    store = CrystalStore.open(folder, check=False)
    store.name = name
    return store


def _rows_of(columns: pa.Table, rows: NDArray[np.int64]) -> pa.Table:
    if len(rows) and (np.diff(rows) == 1).all():  # a slice copies nothing
        return columns.slice(int(rows[0]), len(rows))
    return columns.take(pa.array(rows, pa.int64()))


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads((path / "store.json").read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: not a crystal store (no store.json in it)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path / 'store.json'}: unreadable ({error})") from error
    if not isinstance(info, dict) or not isinstance(info.get("format_version"), int):
        raise DataError(f"{path / 'store.json'}: not the description of a crystal store")
    if info["format_version"] > FORMAT_VERSION:
        raise DataError(
            f"{path}: its store format is {info['format_version']}, this version reads up to {FORMAT_VERSION}; "
            "upgrade crysldnet"
        )
    for key, kind in _DESCRIPTION.items():
        if not isinstance(info.get(key), kind):
            raise DataError(f"{path / 'store.json'}: {key!r} must be of type {kind.__name__}; import the store again")
    return info


def file_hash(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def utf8_path(path: Path) -> Path:
    """Return a path that Arrow can open.

    Raises:
        DataError: its name isn't UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{os.fsencode(path).decode(errors='backslashreplace')}: its name isn't UTF-8") from error
    return path
