"""Atomic file writing, disk errors as messages, and the configuration folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path

from crysldnet.console import csv_text
from crysldnet.errors import DataError

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM}
"""Disk errors: full, over quota, read-only, file too large, I/O error, forbidden."""


def conf_folder() -> Path:
    """Return the configuration folder: inside the installed package, or of the working tree."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parents[1] / "conf"


def cannot_write(path: str | os.PathLike[str], error: OSError) -> DataError:
    """Return the error for a file that can't be written, with the reason."""
    return DataError(f"{os.fspath(path)}: can't be written ({os.strerror(error.errno) if error.errno else error})")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name for writing a file, which is renamed when complete and removed on failure.

    Raises:
        DataError: it can't be written.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path, before: Callable[[], object] = lambda: None) -> Iterator[BufferedRandom]:
    """Open a file for writing that is renamed once complete and flushed to disk, after calling ``before``.

    On failure, the previous file remains.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        before()
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # as where the disk is full
            error.filename = os.fspath(path)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write rows as CSV that spreadsheets open safely, atomically.

    Raises:
        DataError: it can't be written.
    """
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        file.write(csv_text(rows))


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, if supported."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
