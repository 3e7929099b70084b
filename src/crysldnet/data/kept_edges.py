"""Edges of crystals that aren't corrupted, kept in memory from one epoch to the next."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crysldnet.graphs.crystals import Crystals
from crysldnet.graphs.neighbors import Neighbors
from crysldnet.graphs.spec import GraphSpec


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
