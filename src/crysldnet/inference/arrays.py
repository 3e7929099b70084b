"""Embeddings as NumPy arrays in one ``.npz``."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import pyarrow as pa

from crysldnet.data.output import FileOutput


class ArraysOutput(FileOutput):
    """An ``.npz`` with ``embedding`` [rows, D] float32 and one array per other column of the table.

    Embeddings are buffered in a temporary file, so memory only holds the other columns.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, overwrite=True)
        self._columns: dict[str, list[Any]] = {}
        self._width = 0

    def __enter__(self) -> FileOutput:
        entered = super().__enter__()
        self._features = tempfile.TemporaryFile(dir=self._path.parent)
        return entered

    def append(self, table: pa.Table) -> None:
        """Add rows; all tables have the same columns."""
        features = table["embedding"].combine_chunks()
        self._width = features.type.list_size
        self._features.write(np.ascontiguousarray(features.flatten().to_numpy(), np.float32).tobytes())
        for name in table.column_names:
            if name != "embedding":
                self._columns.setdefault(name, []).append(_array(table[name]))

    def _finish(self) -> None:
        self._features.flush()
        size = self._features.tell() // 4
        features = np.memmap(self._features, np.float32, "r", shape=(size // max(self._width, 1), self._width))
        columns: dict[str, Any] = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        np.savez(self._file, embedding=features, **columns)
        self._features.close()


def _array(column: pa.ChunkedArray) -> np.ndarray:
    values = column.to_numpy(zero_copy_only=False)
    return values.astype(np.str_) if pa.types.is_string(column.type) else values
