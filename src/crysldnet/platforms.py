"""Platform differences: devices, memory, locks, users.

Only this module imports POSIX-only modules.
"""

from __future__ import annotations

import errno
import math
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_OF_THE_CPU = ("can't allocate memory", "not enough memory: you tried to allocate")
"""Messages of torch's CPU allocator."""
WITHOUT_FLOAT64 = ("mps",)
"""Types of devices that don't compute in double precision: Apple GPUs."""


def no_gpu() -> str:
    """Return why no GPU is available, as far as torch can tell."""
    import torch

    if torch.backends.mps.is_available():
        return "this machine has an Apple GPU, which only trainer.accelerator=mps uses"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs alone; for a GPU install a build of torch for CUDA"
    return "torch finds no GPU on this machine (does nvidia-smi list one?)"


def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in double precision."""
    return device.type not in WITHOUT_FLOAT64


def double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU if its device has no float64."""
    return (tensor if has_float64(tensor.device) else tensor.cpu()).double()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory, on a GPU or the host."""
    named = type(error).__name__ == "OutOfMemoryError"  # torch's error, without importing torch
    return isinstance(error, MemoryError) or named or any(text in str(error) for text in _OF_THE_CPU)


def peak_memory_mb() -> float:
    """Return the peak memory of this process so far in MiB; NaN if unavailable.

    On Linux, ``getrusage`` includes memory used by the parent before the start, so it isn't used.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)


def lock(file: TextIO) -> bool:
    """Lock a file until this process closes it; return False if another process holds the lock.

    Raises:
        OSError: the file system, or Windows, has no such locks.
    """
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)) from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True


def is_own(folder: Path) -> bool:
    """Return whether a folder belongs to this user and isn't writable by others; False if unknown."""
    if not hasattr(os, "getuid"):
        return False
    about = folder.lstat()
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o022
