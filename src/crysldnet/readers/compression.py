"""Open files as byte streams, decompressed according to their names."""

from __future__ import annotations

import io
import lzma
import os
import re
import zipfile
import zlib
from typing import BinaryIO, cast

import pyarrow as pa

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
"""Suffixes of compressed files."""
DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile)
"""Errors raised when reading a damaged or missing file."""
_ZIPPED = re.compile(r"\.(json|jsonl|ndjson|csv)(?=\.zip$)", re.IGNORECASE)
"""Suffixes of multi-crystal files that a zip archive may contain one of, as in JARVIS."""


def inner_name(name: str) -> str:
    """Drop the compression suffix from a name or path."""
    suffix = os.path.splitext(name)[1].lower()
    if _ZIPPED.search(name):
        return name[: -len(".zip")]
    return name[: -len(suffix)] if suffix in COMPRESSIONS else name


def open_stream(path: str | os.PathLike[str], compression: str | None = None) -> BinaryIO:
    """Open a file for reading bytes, decompressed by its suffix or as specified.

    Raises:
        OSError: it can't be opened. Damaged data also raise an error on reading.
    """
    if zipped := _ZIPPED.search(os.fspath(path)):
        return _open_zipped(path, zipped[0].lower())
    kind = compression or COMPRESSIONS.get(os.path.splitext(os.fspath(path))[1].lower())
    if kind is None:
        return open(path, "rb")
    if kind == "xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    os.stat(path)  # so that a missing file has the same error as elsewhere
    # as bytes, because a name may not be UTF-8
    return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.OSFile(os.fsencode(path)), kind)))


def _open_zipped(path: str | os.PathLike[str], suffix: str) -> BinaryIO:
    """Open the file with this suffix in a zip archive."""
    archive = zipfile.ZipFile(path)
    found = [m for m in archive.infolist() if m.filename.lower().endswith(suffix) and not m.filename.startswith("__")]
    if len(found) != 1 or found[0].flag_bits & 1:
        raise OSError(f"it holds {len(found)} files *{suffix} where it should hold one, not encrypted")
    return cast(BinaryIO, archive.open(found[0]))


def decompressed(content: bytes, name: str, limit: int) -> bytes:
    """Return up to ``limit`` bytes of a file in an archive, decompressed according to its name.

    Raises:
        OSError: it is damaged.
    """
    kind = COMPRESSIONS.get(os.path.splitext(name)[1].lower())
    if kind is None:
        return content
    if kind == "xz":
        return lzma.LZMADecompressor().decompress(content, limit)
    return io.BufferedReader(pa.CompressedInputStream(pa.BufferReader(content), kind)).read(limit)
