"""Whole batches of crystals for a DataLoader: geometry is stored, graphs are built on demand.

Edges are kept in memory from one epoch to the next, or only counted, once per node.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from torch.utils.data import Dataset

from crysldnet.data.sampler import BatchRequest
from crysldnet.data.store import CrystalStore
from crysldnet.graphs.batch import CrystalBatch, make_batch
from crysldnet.graphs.corruption import Corruption, DenoisingTargets
from crysldnet.graphs.crystals import Crystals, concatenate
from crysldnet.graphs.device_graph import Where
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


class CrystalDataset(Dataset[CrystalBatch]):
    """Whole batches of one split, built on demand.

    Args:
        store: the crystals.
        targets: [n, T] targets of all rows of the store, in physical units, NaN if unknown; None for none.
        graph: the graph to build.
        corruption: corruption of the crystals; None for none.
        seed: seed of the corruption, together with split, epoch and batch number.
        max_edges: if displaced atoms and strained cells have more edges than this, the batch only has masked species:
            the stored crystals have fewer. None for no limit.
        with_clean: also return the clean crystals.
        descriptors: [n, K] descriptors of all rows of the store; None for none.
        kept_edges: keeps the edges of crystals that aren't corrupted; None to search them in every epoch.
        graph_on: ``device`` leaves out the edges, which are then built on the device.
    """

    def __init__(
        self,
        store: CrystalStore,
        targets: NDArray[np.float64] | None,
        graph: GraphSpec,
        corruption: Corruption | None,
        seed: Sequence[int],
        max_edges: int | None = None,
        with_clean: bool = False,
        descriptors: NDArray[np.float64] | None = None,
        kept_edges: KeptEdges | None = None,
        graph_on: Where = "host",
    ) -> None:
        self.store, self.targets, self.graph, self.corruption, self.seed = store, targets, graph, corruption, seed
        self.descriptors, self.max_edges, self.with_clean = descriptors, max_edges, with_clean
        self.kept_edges, self.graph_on = kept_edges if graph_on == "host" else None, graph_on

    def __getitem__(self, request: BatchRequest) -> CrystalBatch:
        batch = self._make(request, self.corruption)
        if self.corruption is not None and self.max_edges is not None and batch.edge_index.shape[1] > self.max_edges:
            batch = self._make(request, replace(self.corruption, displacement=0.0, strain=0.0))
        if self.with_clean:
            crystals = self.store.crystals.take(request.rows)
            neighbors = self._kept(crystals, request.rows)
            batch.clean = make_batch(
                crystals, self.graph, rows=request.rows, neighbors=neighbors, graph_on=self.graph_on
            )
        return batch

    def _make(self, request: BatchRequest, corruption: Corruption | None) -> CrystalBatch:
        crystals, undo = self.store.crystals.take(request.rows), None
        if corruption is not None and corruption.resample:
            rng = np.random.default_rng([*self.seed, request.epoch, request.number])
            crystals, undo = corruption.apply(crystals, rng)
        elif corruption is not None:
            crystals, undo = self._corrupt_always_alike(corruption, request.rows)
        targets = None if self.targets is None else self.targets[request.rows]
        descriptors = None if self.descriptors is None else self.descriptors[request.rows]
        return make_batch(
            crystals,
            self.graph,
            rows=request.rows,
            targets=targets,
            descriptors=descriptors,
            undo=undo,
            neighbors=self._kept(crystals, request.rows) if corruption is None else None,
            graph_on=self.graph_on,
        )

    def _kept(self, crystals: Crystals, rows: NDArray[np.int64]) -> Neighbors | None:
        return None if self.kept_edges is None else self.kept_edges.neighbors(crystals, rows)

    def _corrupt_always_alike(
        self, corruption: Corruption, rows: NDArray[np.int64]
    ) -> tuple[Crystals, DenoisingTargets]:
        """Corrupt each crystal with its own random numbers, independent of its batch."""
        parts = [
            corruption.apply(self.store.crystals.take(rows[i : i + 1]), np.random.default_rng([*self.seed, int(row)]))
            for i, row in enumerate(rows)
        ]
        undo = DenoisingTargets(*(np.concatenate(values) for values in zip(*(undo for _, undo in parts), strict=True)))
        return concatenate([crystals for crystals, _ in parts]), undo
