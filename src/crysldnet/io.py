"""Files that appear under their names once they are whole, disk errors in words, the folder of the configuration."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path

from crysldnet.errors import DataError

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM}
"""Of a disk: full, over the quota, read-only, a too large file, broken, forbidden."""


def conf_folder() -> Path:
    """Return the folder of the configuration: inside the installed package, or of the working tree."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parents[1] / "conf"


def cannot_write(path: str | os.PathLike[str], error: OSError) -> DataError:
    """Return the error that says that a file can't be written, and why."""
    return DataError(f"{os.fspath(path)}: can't be written ({os.strerror(error.errno) if error.errno else error})")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write a file under; it takes its own when it is whole, and goes where writing fails.

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
    """Open a file for writing that takes its name once it is whole and on the disk; ``before`` is called just then.

    Where writing fails, what stood under the name before stays.
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
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is whole or not there."""
    with whole_file(path) as file:
        file.write(text.encode())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
