"""LightningDataModule of crystal graphs: geometry is stored, graphs are built on the fly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from crysldnet.build import Part
from crysldnet.console import SHOWN, listed
from crysldnet.data.crystal_dataset import CrystalDataset, KeptEdges, edge_counts
from crysldnet.data.datasets import join_splits, open_store, refuse_repeated_ids
from crysldnet.data.matching import By, shared_rows
from crysldnet.data.sampler import BatchLimits, BatchSampler
from crysldnet.data.split import SPLITS, Rows, Split, split_text
from crysldnet.data.store import CrystalStore
from crysldnet.data.targets import column_called, read_target
from crysldnet.errors import ConfigError, DataError
from crysldnet.graphs.batch import CrystalBatch, cut, make_batch
from crysldnet.graphs.corruption import Corruption
from crysldnet.graphs.device_graph import Where, check_place
from crysldnet.graphs.spec import GraphSpec
from crysldnet.signals import leave_to_parent

INFERENCE_BATCH = (64, 4096)
"""Crystals and atoms per batch outside training."""


class CrystalDataModule(pl.LightningDataModule):
    """Crystal graphs in batches limited by crystals, atoms and edges, for any number of ranks.

    Args:
        path: a store folder, a Parquet file, ``embedded:NAME`` or ``published:NAME``; or one of those for each of
            train, val and test.
        graph: the encoder's graph.
        targets: columns to predict; rows without any of them are left out. None or empty for no targets.
        descriptors: numeric columns that the head also reads; rows that lack one are left out.
        calibration_fraction: fraction of the validation crystals reserved for calibration.
        split: how to split, unless ``path`` names a file per split.
        corruption: corruption for pretraining.
        with_clean: also return the clean crystals.
        batch_size: crystals per global batch, over all devices and accumulation steps; None to limit only by
            ``batch_atoms``.
        batch_atoms: limit of atoms per global batch; None for none.
        max_atoms: limit of atoms in one batch on one device.
        max_edges: limit of edges in one batch on one device; edges are then counted once at the start.
        max_crystal_atoms: larger crystals are left out, with a note.
        num_workers: data loader processes; 0 builds batches in the training process.
        keep_edges_mb: memory per process, in MB, to keep edges of crystals that aren't corrupted from one epoch to the
            next; 0 to search them in every epoch.
        graph_on: ``device`` builds graphs on the device that trains, instead of in the processes that load data.
        exclude: data sets whose crystals are excluded from training and validation, named like ``path``, optionally
            with ``@SPLIT``.
        exclude_by: ``formula`` excludes every crystal with a formula in such a set, ``structure`` only matching
            structures.
        seed: seed of data order and corruption.
        target_types: target types of columns, if not determined by the column type.
        store: open crystals in place of ``path``.
        rows: their train, val and test rows.
    """

    _loaded = False
    _commonest: int | None = None

    def __init__(
        self,
        *,
        path: str | dict[str, str] = "",
        graph: Part[GraphSpec],
        targets: list[str] | None = None,
        descriptors: list[str] | None = None,
        split: Split | None = None,
        corruption: Part[Corruption | None] = None,
        with_clean: Part[bool] = False,
        batch_size: int | None = 64,
        batch_atoms: int | None = None,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        max_crystal_atoms: int | None = None,
        num_workers: int = 0,
        keep_edges_mb: int = 500,
        graph_on: Where = "host",
        exclude: list[str] | None = None,
        exclude_by: By = "formula",
        calibration_fraction: float = 0.0,
        seed: Part[int] = 0,
        target_types: Part[Mapping[str, Any] | None] = None,
        store: Part[CrystalStore | None] = None,
        rows: Part[Rows | None] = None,
    ) -> None:
        super().__init__()
        if not path and (store is None or rows is None):
            raise ValueError("path: name a store, a Parquet file or embedded:NAME")
        self.path, self.graph, self.targets, self.split = path, graph, targets or [], split or Split()
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets: name each once, not {listed(self.targets)}")
        self.descriptors = descriptors or []
        if len({*self.descriptors, *self.targets}) < len(self.descriptors) + len(self.targets):
            raise ValueError(f"descriptors: name each once, and no target, not {', '.join(self.descriptors)}")
        if batch_size is None and batch_atoms is None:
            raise ValueError("batch_size or batch_atoms: set at least one of them")
        self.corruption, self.with_clean, self.seed = corruption, with_clean, seed
        self.batch_size, self.batch_atoms = batch_size, batch_atoms
        self.max_atoms, self.max_edges, self.max_crystal_atoms = max_atoms, max_edges, max_crystal_atoms
        self.num_workers, self._keep_mb = num_workers, keep_edges_mb // max(1, num_workers)
        self._kept_edges, self.graph_on = KeptEdges(graph, self._keep_mb), graph_on
        check_place(graph_on, graph, "data.graph_on", max_edges)
        self.exclude, self.exclude_by = exclude or [], exclude_by
        if not 0.0 <= calibration_fraction < 1.0:
            raise ValueError(f"calibration_fraction must be 0 or more and below 1, not {calibration_fraction}")
        self.calibration_fraction = calibration_fraction
        self._given = (store, rows)
        self.target_types = target_types or {}
        self.descriptor_values: NDArray[np.float64] | None = None
        """[n, K] of all rows of the store, NaN if unknown; None for none."""
        self.labels: list[list[str] | None] = []
        """Class names of each target, None for numbers."""
        self.left_out: dict[str, int] = {}
        """Number of crystals excluded by each rule."""
        self.excluded: list[dict[str, Any]] = []
        """For each set in ``exclude``: name, sha256, rule, and number of crystals removed."""
        self.start = (0, 0)
        """Initial epoch, and number of its batches that each rank has completed."""

    def setup(self, stage: str | None = None) -> None:
        """Open the store and select the rows; identical on every rank."""
        if self._loaded:
            return
        store, rows = self._given
        self.store, self.rows = (store, dict(rows)) if store is not None and rows is not None else self._open()
        self.target_values = self._read_targets()
        self.descriptor_values = self._read_descriptors()
        self._leave_out_excluded()
        self.rows = {name: self._keep(rows) for name, rows in self.rows.items()}
        if not len(self.rows["train"]):
            gone = "; ".join(f"{count:,} left out: {reason}" for reason, count in self.left_out.items())
            raise DataError(f"{self.store.name}: no crystal is left to train on ({gone or 'the split gives none'})")
        self.rows["val"], self.calibration_rows = self._keep_for_calibration(self.rows["val"])
        self._loaded = True

    def _open(self) -> tuple[CrystalStore, Rows]:
        if isinstance(self.path, str):
            store = open_store(self.path)
            refuse_repeated_ids(store)
            self._find_columns(store)
            return store, self.split.rows(store, self.targets)
        unknown = set(self.path) - set(SPLITS)
        if unknown or "train" not in self.path:
            raise DataError(f"data.path must name a file for train, val and test, not {', '.join(self.path)}")
        stores = {name: open_store(self.path[name]) for name in SPLITS if name in self.path}
        self._find_columns(stores["train"])
        store = join_splits(stores, [*self.targets, *self.descriptors])
        split = Split(by="column", column="split", train_fraction=self.split.train_fraction, seed=self.split.seed)
        return store, split.rows(store)

    def _find_columns(self, store: CrystalStore) -> None:
        """Resolve targets and descriptors to column names."""
        self.targets = [column_called(store, name) for name in self.targets]
        self.descriptors = [column_called(store, name) for name in self.descriptors]
        if len({*self.targets, *self.descriptors}) < len(self.targets) + len(self.descriptors):
            raise ConfigError(f"data.targets: two of {listed([*self.targets, *self.descriptors])} are one column")

    def _leave_out_excluded(self) -> None:
        if not self.exclude:
            return
        used = np.sort(np.concatenate([self.rows["train"], self.rows["val"]]))
        shared, self.excluded = shared_rows(self.store, used, self.exclude, self.exclude_by)
        for name in ("train", "val"):
            self.rows[name] = np.setdiff1d(self.rows[name], shared)
        self.left_out[f"also in {', '.join(self.exclude)} (exclude, by {self.exclude_by})"] = len(shared)

    def _read_targets(self) -> NDArray[np.float64] | None:
        if not self.targets:
            return None
        read = [read_target(self.store, name, self.target_types.get(name)) for name in self.targets]
        self.labels = [labels for _, labels in read]
        return np.stack([values for values, _ in read], axis=1)

    def _read_descriptors(self) -> NDArray[np.float64] | None:
        """Return [n, K] of all rows of the store, NaN if unknown; None for none."""
        if not self.descriptors:
            return None
        return np.stack([read_target(self.store, name, "regression")[0] for name in self.descriptors], axis=1)

    def _keep(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        sizes = self.store.crystals.sizes[rows]
        smallest = self.corruption.min_atoms if self.corruption is not None else 1
        rules: dict[str, NDArray] = {f"fewer than {smallest} atoms": sizes < smallest}
        if self.max_crystal_atoms is not None:
            rules[f"over {self.max_crystal_atoms} atoms (max_crystal_atoms)"] = sizes > self.max_crystal_atoms
        if self.target_values is not None:
            many = len(self.targets) > SHOWN
            named = f"any of {len(self.targets):,} targets" if many else " or ".join(self.targets)
            rules[f"no value of {named}"] = np.asarray(np.isnan(self.target_values[rows]).all(axis=1))
        for place, name in enumerate(self.descriptors):
            assert self.descriptor_values is not None
            rules[f"no value of {name} (descriptors)"] = np.isnan(self.descriptor_values[rows, place])
        gone: NDArray = np.zeros(len(rows), bool)
        for reason, bad in rules.items():
            if (bad & ~gone).any():
                self.left_out[reason] = self.left_out.get(reason, 0) + int((bad & ~gone).sum())
            gone = gone | bad
        return rows[~gone]

    def _keep_for_calibration(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the validation and the calibration rows, which are the same unless a fraction is reserved.

        Given rows are used unchanged.
        """
        if not self.calibration_fraction or self._given[1] is not None:
            return rows, rows
        if not len(rows):
            raise DataError(
                f"{self.store.name}: there are no validation crystals, of which data.calibration_fraction="
                f"{self.calibration_fraction} would keep a share"
            )
        count = round(self.calibration_fraction * len(rows))
        if count in (0, len(rows)):
            raise DataError(
                f"{self.store.name}: data.calibration_fraction={self.calibration_fraction} of {len(rows)} validation "
                f"crystals leaves none for {'validation' if count else 'calibration'}"
            )
        order = np.random.default_rng([self.split.seed, 2]).permutation(rows)
        return np.sort(order[count:]), np.sort(order[:count])

    def split_text(self) -> str:
        """Return the split file after all exclusions."""
        return split_text(self.store, self.rows, {"path": self.path, "targets": self.targets, **asdict(self.split)})

    @property
    def units(self) -> list[str]:
        """Unit of each target, or an empty string."""
        return [self.store.units.get(name, "") for name in self.targets]

    @property
    def descriptor_units(self) -> list[str]:
        """Unit of each descriptor, or an empty string."""
        return [self.store.units.get(name, "") for name in self.descriptors]

    def batch(self, rows: NDArray[np.int64], graph: GraphSpec) -> CrystalBatch:
        """Return the graphs of some rows of the store with their descriptors."""
        descriptors = None if self.descriptor_values is None else self.descriptor_values[rows]
        return make_batch(self.store.crystals.take(rows), graph, rows=rows, descriptors=descriptors)

    def batches(self, rows: NDArray[np.int64], graph: GraphSpec) -> Iterator[CrystalBatch]:
        """Yield the graphs of many rows of the store in order, for use without training."""
        for start, stop in cut(self.store.crystals.sizes[rows], *INFERENCE_BATCH):
            yield self.batch(rows[start:stop], graph)

    @property
    def commonest_species(self) -> int:
        """Most frequent atomic number among the training atoms."""
        if self._commonest is None:
            numbers = self.store.crystals.take(self.rows["train"]).numbers
            self._commonest = int(np.bincount(numbers).argmax())
        return self._commonest

    def train_targets(self) -> NDArray[np.float64]:
        """[n, T] targets of the training rows, the only ones used for normalization."""
        assert self.target_values is not None
        return self.target_values[self.rows["train"]]

    def steps_per_epoch(self, world_size: int, accumulate: int) -> int:
        """Optimizer steps of one training epoch."""
        return len(self._sampler("train", 0, world_size, accumulate)) // accumulate

    def _sampler(self, name: str, rank: int, world_size: int, accumulate: int) -> BatchSampler:
        rows = self.rows[name]
        parts = world_size * accumulate
        for key, whole in (("batch_size", self.batch_size), ("batch_atoms", self.batch_atoms)):
            if whole is not None and whole % parts:
                raise DataError(
                    f"data.{key}={whole} can't be divided by {world_size} processes × {accumulate} accumulation steps; "
                    "choose a multiple"
                )
        train = name == "train"
        return BatchSampler(
            rows,
            self.store.crystals.sizes[rows],
            edge_counts(self.store, rows, self.graph) if self.max_edges is not None else None,
            self.share_of_a_step(parts),
            shuffle=train,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            multiple=parts if train else world_size,
            start=self.start if train else (0, 0),
        )

    def share_of_a_step(self, parts: int) -> BatchLimits:
        """Return the limit of one of ``parts`` batches of a step."""
        atoms = [] if self.max_atoms is None else [self.max_atoms]
        atoms += [] if self.batch_atoms is None else [self.batch_atoms // parts]
        crystals = None if self.batch_size is None else self.batch_size // parts
        return BatchLimits(crystals=crystals, atoms=min(atoms, default=None), edges=self.max_edges)

    def _loader(self, name: str) -> DataLoader[CrystalBatch]:
        rank, world_size, accumulate = 0, 1, 1
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
            accumulate = self.trainer.accumulate_grad_batches
        if self._kept_edges.graph != self.graph:
            self._kept_edges = KeptEdges(self.graph, self._keep_mb)
        return DataLoader(
            CrystalDataset(
                self.store,
                self.target_values,
                self.graph,
                self.corruption,
                [self.seed, SPLITS.index(name)],
                self.max_edges,
                self.with_clean,
                self.descriptor_values,
                self._kept_edges,
                self.graph_on,
            ),
            sampler=self._sampler(name, rank, world_size, accumulate),
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=leave_to_parent,
            pin_memory=torch.cuda.is_available(),
        )

    def transfer_batch_to_device(self, batch: CrystalBatch, device: torch.device, dataloader_idx: int) -> CrystalBatch:
        """Copy a batch without waiting for the copy; Lightning waits, except for plain tensors.

        With ``graph_on=device``, its edges are built now.
        """
        return batch.to(device, non_blocking=True)

    def train_dataloader(self) -> DataLoader[CrystalBatch]:
        """Shuffled every epoch."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[CrystalBatch] | list:
        """Fixed order and corruption."""
        return self._loader("val") if len(self.rows["val"]) else []

    def test_dataloader(self) -> DataLoader[CrystalBatch] | list:
        """Fixed order."""
        return self._loader("test") if len(self.rows["test"]) else []
