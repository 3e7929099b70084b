"""Write stores and tables in chunks with constant memory; files get their final name when complete.

The classes are context managers: an exception removes what was written.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crysldnet.console import csv_text
from crysldnet.data.schema import STRUCTURE_COLUMNS, crystals_from_table, metadata_of, units_of
from crysldnet.data.store import ARRAYS, FORMAT_VERSION, CrystalStore, file_hash, utf8_path
from crysldnet.errors import DataError
from crysldnet.io import DISK_ERRORS, cannot_write

ROW_GROUP_BYTES = 16 * 2**20
"""Size in memory of a row group in a Parquet file."""


class Output(Protocol):
    """Destination for a sequence of tables."""

    def __enter__(self) -> Output: ...

    def append(self, table: pa.Table) -> None:
        """Add rows; all tables have the same columns."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class FileOutput(ABC):
    """A file written under a temporary name and renamed.

    Args:
        path: output file.
        overwrite: replace an existing file.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self._path = utf8_path(Path(path))
        if self._path.is_dir() or (self._path.exists() and not overwrite):
            raise DataError(f"{self._path} already exists; choose another name or pass --overwrite")
        self._partial = self._path.with_name(f".{self._path.name}.partial-{os.getpid()}")

    def __enter__(self) -> FileOutput:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            remove_partials(self._path)
            self._file = self._partial.open("wb")
        except OSError as error:
            raise DataError(f"can't write to {self._path.parent}: {error.strerror}") from error
        return self

    @abstractmethod
    def append(self, table: pa.Table) -> None:
        """Add rows; all tables have the same columns."""

    def _finish(self) -> None:  # noqa: B027  (a file that is written as rows come has nothing left)
        """Write the remaining data."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
            self._file.close()
            if kind is None:
                os.replace(self._partial, self._path)
        except OSError as fault:
            raise cannot_write(self._path, fault) from fault
        finally:
            self._partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise cannot_write(self._path, error) from error


class ParquetOutput(FileOutput):
    """A Parquet file with row groups of a minimum size, because metadata of each group is kept in memory."""

    _writer: pq.ParquetWriter | None = None

    def __enter__(self) -> FileOutput:
        self._waiting: list[pa.Table] = []
        self._bytes = 0
        return super().__enter__()

    def append(self, table: pa.Table) -> None:
        """Add rows; all tables have the same columns."""
        self._waiting.append(table)
        self._bytes += table.nbytes
        if self._bytes >= ROW_GROUP_BYTES:
            self._write_group()

    def _write_group(self) -> None:
        group = pa.concat_tables(self._waiting)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file, group.schema, compression="zstd", write_page_checksum=True)
        self._writer.write_table(group)
        self._waiting, self._bytes = [], 0

    def _finish(self) -> None:
        if self._waiting:
            self._write_group()
        if self._writer is not None:
            self._writer.close()


class LinesOutput(FileOutput):
    """A CSV with header, or JSON lines, by file name."""

    _begun = False

    def append(self, table: pa.Table) -> None:
        """Add rows; all tables have the same columns."""
        as_json = self._path.suffix.lower() in JSON_LINES
        text = _json_lines(table) if as_json else _csv_lines(table, header=not self._begun)
        self._file.write(text.encode())
        self._begun = True


class StandardOutput:
    """CSV on standard output."""

    _begun = False

    def __enter__(self) -> StandardOutput:
        return self

    def append(self, table: pa.Table) -> None:
        """Add rows; all tables have the same columns."""
        sys.stdout.write(_csv_lines(table, header=not self._begun))
        self._begun = True

    def __exit__(self, *_error: object) -> None:
        sys.stdout.flush()


JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".csv", ".parquet", *JSON_LINES)


def open_table(out: str) -> Output:
    """Return the output for a table by its suffix: CSV, Parquet or JSON lines; ``-`` is CSV on standard output.

    Raises:
        DataError: the suffix is unknown, or a folder has this name.
    """
    if out == "-":
        return StandardOutput()
    suffix = Path(out).suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"out={out}: its name must end in {', '.join(SUFFIXES)}, or be - for standard output")
    return (ParquetOutput if suffix == ".parquet" else LinesOutput)(out, overwrite=True)


def _cells(column: pa.ChunkedArray) -> list[Any]:
    """Return a column's values; float32 numbers with only their significant digits."""
    if not pa.types.is_float32(column.type):
        return column.to_pylist()
    values = column.to_numpy(zero_copy_only=False)
    return [None if value != value else float(str(value)) for value in values.astype(np.float32)]


def _csv_lines(table: pa.Table, *, header: bool) -> str:
    return csv_text([*([table.column_names] if header else []), *zip(*map(_cells, table.columns), strict=True)])


def _json_lines(table: pa.Table) -> str:
    rows = zip(*(_cells(column) for column in table.columns), strict=True)
    return "".join(json.dumps(dict(zip(table.column_names, row, strict=True))) + "\n" for row in rows)


def remove_partials(path: Path) -> None:
    """Remove partial output of killed processes."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        try:
            os.kill(int(left.name.rpartition("-")[2]), 0)
        except (ProcessLookupError, ValueError):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
        except PermissionError:  # another user's import is running
            continue


class StoreWriter:
    """Write a store table by table with constant memory; it gets its final name when complete.

    Use it as a context manager: an exception removes what was written.

    Args:
        path: output folder.
        overwrite: replace an existing store.
        hash_: sha256 that identifies the content; by default that of the files.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False, hash_: str | None = None) -> None:
        self.path = utf8_path(Path(path))
        if self.path.exists():
            if not overwrite:
                raise DataError(f"{self.path} already exists; choose another name or pass --overwrite")
            if not (self.path / "store.json").is_file():
                raise DataError(f"{self.path} isn't a crystal store and won't be overwritten; choose another name")
        self._partial = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}")
        self._hash = hash_
        self._files: dict[str, Any] = {}
        self._columns: pa.RecordBatchFileWriter | None = None
        self._schema: pa.Schema | None = None
        self._metadata: dict[str, str] = {}
        self._crystals = self._atoms = 0

    def __enter__(self) -> StoreWriter:
        try:
            remove_partials(self.path)
            self._partial.mkdir(parents=True)
            for name in ARRAYS:
                self._files[name] = (self._partial / f"{name}.bin").open("wb")
        except OSError as error:
            raise DataError(f"can't write to {self.path.parent}: {error.strerror}") from error
        self._files["ptr"].write(np.zeros(1, "<i8").tobytes())
        return self

    def append(self, table: pa.Table) -> None:
        """Add the rows of a table in the Parquet schema; all tables have the same columns."""
        crystals = crystals_from_table(table)
        columns = table.drop_columns([c for c in STRUCTURE_COLUMNS if c != "material_id"])
        if self._columns is None:
            self._schema = table.schema
            self._metadata = metadata_of(table.schema)
            self._columns = pa.ipc.new_file(str(self._partial / "columns.arrow"), columns.schema)
        self._columns.write_table(columns)
        for name, (dtype, _) in ARRAYS.items():
            array = crystals.ptr[1:] + self._atoms if name == "ptr" else getattr(crystals, name)
            self._files[name].write(np.ascontiguousarray(array, dtype).tobytes())
        self._crystals += len(crystals)
        self._atoms += len(crystals.numbers)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            for file in [*self._files.values(), *([] if self._columns is None else [self._columns])]:
                file.close()
            if kind is None and self._schema is None:
                raise DataError(f"{self.path}: no crystal was left to write")
            if kind is None:
                self._finish()
        except OSError as fault:
            raise cannot_write(self.path, fault) from fault
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise cannot_write(self.path, error) from error

    def _finish(self) -> None:
        names = [*(f"{name}.bin" for name in ARRAYS), "columns.arrow"]
        files = {
            name: {"bytes": (self._partial / name).stat().st_size, "sha256": file_hash(self._partial / name)}
            for name in names
        }
        assert self._schema is not None
        info = {
            "format_version": FORMAT_VERSION,
            "crystals": self._crystals,
            "atoms": self._atoms,
            "units": units_of(self._schema),
            "metadata": self._metadata,
            "files": files,
            "sha256": self._hash or hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
        }
        (self._partial / "store.json").write_text(json.dumps(info, indent=1))
        for file in self._partial.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        replaced = self.path.with_name(f".{self.path.name}.replaced-{os.getpid()}")
        if self.path.exists():
            self.path.rename(replaced)
        self._partial.rename(self.path)
        shutil.rmtree(replaced, ignore_errors=True)


def write_store(path: str | os.PathLike[str], tables: Iterable[pa.Table], *, overwrite: bool = False) -> CrystalStore:
    """Write tables in the Parquet schema as one store and open it."""
    with StoreWriter(path, overwrite=overwrite) as writer:
        for table in tables:
            writer.append(table)
    return CrystalStore.open(path)
