"""Number of edges of every crystal's graph, computed once per node: the first process counts, the others read."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from crysldnet.data.store import CrystalStore
from crysldnet.graphs.spec import GraphSpec
from crysldnet.platforms import is_own

PORTION = 1024
"""Crystals whose graphs are built together."""


def edge_counts(store: CrystalStore, rows: NDArray[np.int64], graph: GraphSpec) -> NDArray[np.int64]:
    """Return the edges [n] of the graphs of n rows of a store.

    They are cached in the system's temporary folder, under a hash of crystals, rows and graph, with a lock. If the
    folder isn't writable or belongs to another user, every process counts.
    """
    key = hashlib.sha256(f"{store.hash} {graph}".encode() + np.ascontiguousarray(rows).tobytes()).hexdigest()[:32]
    file = Path(tempfile.gettempdir()) / f"crysldnet-{getattr(os, 'getuid', int)()}" / f"edges-{key}.npy"
    try:
        _make_own(file.parent)
        with FileLock(file.with_suffix(".lock")):
            kept = _read(file, len(rows))
            if kept is not None:
                return kept
            counts = _count(store, rows, graph)
            partial = file.with_suffix(f".{os.getpid()}.npy")
            np.save(partial, counts)
            partial.replace(file)
            return counts
    except OSError:
        return _count(store, rows, graph)


def _make_own(folder: Path) -> None:
    """Create a folder that only this user can write to.

    Raises:
        OSError: the folder belongs to another user, is writable by others, or is a link.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    if not is_own(folder):
        raise PermissionError(f"{folder} isn't this user's own folder")


def _read(file: Path, count: int) -> NDArray[np.int64] | None:
    try:
        kept = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return kept if kept.shape == (count,) and kept.dtype == np.int64 else None


def _count(store: CrystalStore, rows: NDArray[np.int64], graph: GraphSpec) -> NDArray[np.int64]:
    counts = []
    for start in range(0, len(rows), PORTION):
        crystals = store.crystals.take(rows[start : start + PORTION])
        owner = crystals.crystal[graph.build(crystals).neighbors.target]
        counts.append(np.bincount(owner, minlength=len(crystals)))
    return np.concatenate(counts).astype(np.int64)
