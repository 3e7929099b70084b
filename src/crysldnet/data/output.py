"""Write tables in chunks with constant memory; files get their final name when complete.

The output classes are context managers: an exception removes what was written.
"""

from __future__ import annotations

import json
import os
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crysldnet.console import csv_text
from crysldnet.data.store import utf8_path
from crysldnet.data.store_writer import remove_partials
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
