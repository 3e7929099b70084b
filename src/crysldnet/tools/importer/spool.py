"""Temporary storage of chunks in an unnamed file until they are assembled."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from crysldnet.readers.rows import Piece


class Spool:
    """Chunks whose tables are in an unnamed file: memory stays constant, and a killed process leaves nothing behind.

    Args:
        folder: folder with enough space, such as that of the output.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._pieces: list[tuple[int, int, Piece]] = []

    def close(self) -> None:
        """Remove the file."""
        self._file.close()

    def append(self, piece: Piece) -> None:
        """Add a chunk."""
        begin = -(-self._file.tell() // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._file.seek(begin)
        with pa.ipc.new_stream(self._file, piece.table.schema) as writer:
            writer.write_table(piece.table)
        self._pieces.append((begin, self._file.tell() - begin, piece._replace(table=piece.table.schema.empty_table())))

    def __iter__(self) -> Iterator[Piece]:
        """Yield the chunks with memory-mapped tables."""
        self._file.flush()
        for begin, size, piece in self._pieces:
            mapped = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ, offset=begin)
            yield piece._replace(table=pa.ipc.open_stream(pa.py_buffer(mapped)).read_all())
