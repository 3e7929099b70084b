"""Edges of a store's crystals: kept in memory from one epoch to the next, or only counted, once per node."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from crysldnet.data.store import CrystalStore
from crysldnet.graphs.crystals import Crystals
from crysldnet.graphs.neighbors import Neighbors
from crysldnet.graphs.spec import GraphSpec
from crysldnet.platforms import is_own


class KeptEdges:
    """The neighbors of rows of a store: found once, then kept up to a bound. Nothing is written to files.

    Args:
        graph: the graph that they are for.
        megabytes: bound of the memory in one process; rows beyond it are searched every time.

    Raises:
        ValueError: the bound is negative.
    """

    def __init__(self, graph: GraphSpec, megabytes: int) -> None:
        if megabytes < 0:
            raise ValueError(f"keep_edges_mb can't be negative: {megabytes}")
        self.graph, self._left = graph, megabytes * 10**6
        self._kept: dict[int, Neighbors] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def neighbors(self, crystals: Crystals, rows: NDArray[np.int64]) -> Neighbors:
        """Return what ``graph.neighbors(crystals)`` does.

        Args:
            crystals: B crystals as they are stored.
            rows: [B] rows of the store that they stand in.
        """
        parts = [self._kept.get(row) for row in rows.tolist()]
        missing = np.array([b for b, part in enumerate(parts) if part is None], np.int64)
        if len(missing) == len(rows) and self._left <= 0:
            return self.graph.neighbors(crystals)
        if len(missing):
            some = crystals.take(missing)
            for b, own in zip(missing.tolist(), _divided(self.graph.neighbors(some), some.ptr), strict=True):
                parts[b] = own
                if (size := sum(part.nbytes for part in own)) <= self._left:
                    self._left -= size
                    self._kept[int(rows[b])] = own
                else:
                    self._left = 0
        return _joined([part for part in parts if part is not None], crystals.ptr)


def _divided(found: Neighbors, ptr: NDArray[np.int64]) -> list[Neighbors]:
    """Return the neighbors of each crystal by itself, atoms counted from its first."""
    ends = np.searchsorted(found.target, ptr)
    parts = []
    for first, last, begin, end in zip(ptr, ptr[1:], ends, ends[1:], strict=False):
        edges, atoms = slice(begin, end), slice(first, last)
        source, target = found.source[edges] - first, found.target[edges] - first
        image, vector = found.image[edges].copy(), found.vector[edges].copy()
        parts.append(Neighbors(source, target, image, vector, found.distances[atoms].copy(), found.shell[atoms].copy()))
    return parts


def _joined(parts: list[Neighbors], ptr: NDArray[np.int64]) -> Neighbors:
    """Return the neighbors of a batch whose crystals begin at ``ptr``."""
    first = np.repeat(ptr[:-1], [len(part.target) for part in parts])
    source, target, *others = (np.concatenate(values) for values in zip(*parts, strict=True))
    return Neighbors(source + first, target + first, *others)


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
    """Create a folder that only this user can write to."""
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
