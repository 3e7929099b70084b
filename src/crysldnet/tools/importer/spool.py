"""Pieces that were read, kept in a file without a name until they are put together."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from crysldnet.readers.rows import Piece


class Spool:
    """Pieces whose tables lie in a file without a name: memory stays flat, and a killed process leaves nothing behind.

    Args:
        folder: where there is room for them, such as that of the output.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._pieces: list[tuple[int, int, Piece]] = []

    def close(self) -> None:
        """Remove the file."""
        self._file.close()

    def append(self, piece: Piece) -> None:
        """Add a piece."""
        begin = -(-self._file.tell() // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._file.seek(begin)
        with pa.ipc.new_stream(self._file, piece.table.schema) as writer:
            writer.write_table(piece.table)
        self._pieces.append((begin, self._file.tell() - begin, piece._replace(table=piece.table.schema.empty_table())))

    def __iter__(self) -> Iterator[Piece]:
        """Give the pieces, their tables mapped into memory."""
        self._file.flush()
        for begin, size, piece in self._pieces:
            mapped = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ, offset=begin)
            yield piece._replace(table=pa.ipc.open_stream(pa.py_buffer(mapped)).read_all())
