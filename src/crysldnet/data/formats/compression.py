"""Open files as streams of bytes, decompressed by what their names say."""

from __future__ import annotations

import io
import lzma
import os
from typing import BinaryIO, cast

import pyarrow as pa

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
"""Suffixes of compressed files."""
DAMAGED = (OSError, EOFError, lzma.LZMAError)
"""What reading a damaged or missing file raises."""


def inner_name(name: str) -> str:
    """Drop the suffix of a compression from a name or path."""
    suffix = os.path.splitext(name)[1].lower()
    return name[: -len(suffix)] if suffix in COMPRESSIONS else name


def open_stream(path: str | os.PathLike[str], compression: str | None = None) -> BinaryIO:
    """Open a file for reading in bytes, decompressed by its suffix or as told.

    Raises:
        OSError: it can't be opened. Damaged data raise one too, when they are read.
    """
    kind = compression or COMPRESSIONS.get(os.path.splitext(os.fspath(path))[1].lower())
    if kind is None:
        return open(path, "rb")
    if kind == "xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    os.stat(path)  # so that a file that isn't there has the same error as elsewhere
    return cast(BinaryIO, io.BufferedReader(pa.input_stream(os.fspath(path), compression=kind)))


def decompressed(content: bytes, name: str, limit: int) -> bytes:
    """Return the content of a file in an archive, decompressed by the file's name, up to ``limit`` bytes of it.

    Raises:
        OSError: it is damaged.
    """
    kind = COMPRESSIONS.get(os.path.splitext(name)[1].lower())
    if kind is None:
        return content
    if kind == "xz":
        return lzma.LZMADecompressor().decompress(content, limit)
    return io.BufferedReader(pa.CompressedInputStream(pa.BufferReader(content), kind)).read(limit)
