"""Whole batches of crystals for a DataLoader: geometry is stored, graphs are built on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from crysldnet.data.edges import KeptEdges
from crysldnet.data.sampler import BatchRequest
from crysldnet.data.store import CrystalStore
from crysldnet.graphs.batch import CrystalBatch, make_batch
from crysldnet.graphs.corruption import Corruption, DenoisingTargets
from crysldnet.graphs.crystals import Crystals, concatenate
from crysldnet.graphs.neighbors import Neighbors
from crysldnet.graphs.spec import GraphSpec


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
    ) -> None:
        self.store, self.targets, self.graph, self.corruption, self.seed = store, targets, graph, corruption, seed
        self.descriptors, self.max_edges, self.with_clean = descriptors, max_edges, with_clean
        self.kept_edges = kept_edges

    def __getitem__(self, request: BatchRequest) -> CrystalBatch:
        batch = self._make(request, self.corruption)
        if self.corruption is not None and self.max_edges is not None and batch.edge_index.shape[1] > self.max_edges:
            batch = self._make(request, replace(self.corruption, displacement=0.0, strain=0.0))
        if self.with_clean:
            crystals = self.store.crystals.take(request.rows)
            neighbors = self._kept(crystals, request.rows)
            batch.clean = make_batch(crystals, self.graph, rows=request.rows, neighbors=neighbors)
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
