"""Batches balanced in crystals and atoms, independent of the number of ranks.

Every epoch is one list of batches, determined by (seed, epoch). Rank r of W takes the batches r, r + W, …; the length
is a multiple of W, so all ranks take the same number of steps and every crystal is seen exactly once. The batches of a
step have similar sizes, because the ranks wait for each other. Their assignment to ranks compensates for differences in
atoms in earlier steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from crysldnet.errors import DataError


class BatchRequest(NamedTuple):
    """A batch to build, with everything that determines its random numbers."""

    rows: NDArray[np.int64]
    epoch: int
    number: int


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """Limits of one batch on one device: crystals, atoms and directed edges."""

    crystals: int | None
    atoms: int | None = None
    edges: int | None = None

    def __str__(self) -> str:
        """Return the limits as text."""
        bounds = {"crystals": self.crystals, "atoms": self.atoms, "edges": self.edges}
        return ", ".join(f"{bound} {name}" for name, bound in bounds.items() if bound is not None)


ORDER = 2
"""Version of how an epoch's batches are made and ordered; a run can't resume within an epoch of another version."""
Step = list[NDArray[np.int64]]
"""The batches that all processes take at the same time, one or more each."""


def pack(
    atoms: NDArray[np.int64],
    edges: NDArray[np.int64] | None,
    budget: BatchLimits,
    multiple: int,
    order: NDArray[np.int64],
) -> list[NDArray[np.int64]]:
    """Distribute crystals over the smallest number of nearly equal batches within the limits.

    Crystals are assigned in rounds of one per batch, in the given order; within a round, the largest goes to the batch
    with the fewest atoms so far.

    Args:
        atoms: [n] number of atoms of each crystal.
        edges: [n] edges of each crystal's graph, needed if limited.
        budget: limits of one batch.
        multiple: the number of batches is a multiple of this.
        order: [n] a permutation of the crystals.

    Returns:
        Indices into ``atoms``, one array per batch; ``multiple`` successive batches form a step.

    Raises:
        DataError: a single crystal exceeds the limits, or there are fewer crystals than ``multiple``.
    """
    n = len(atoms)
    if n < multiple:
        raise DataError(f"{n} crystals can't be shared by {multiple} processes; use fewer or a larger set")
    bounds = [
        ("crystals", np.ones(n, np.int64), budget.crystals),
        ("atoms", atoms, budget.atoms),
        ("edges", edges, budget.edges),
    ]
    active = [(cost, limit) for _, cost, limit in bounds if cost is not None and limit is not None]
    for name, cost, limit in bounds:
        if cost is not None and limit is not None and cost.max() > limit:
            raise DataError(
                f"one crystal alone ({cost.max()} {name}) exceeds the limit of a batch on one device, {limit}; raise "
                f"data.max_{name}{' or data.batch_atoms' if name == 'atoms' else ''}, or leave such crystals out with "
                "data.max_crystal_atoms"
            )
    batches = max(int(np.ceil(cost.sum() / limit)) for cost, limit in active)
    while True:
        batches = min(-(-batches // multiple) * multiple, n // multiple * multiple)
        label = _deal(atoms, batches, order)
        if all(np.bincount(label, cost, batches).max() <= limit for cost, limit in active):
            break
        if batches >= n // multiple * multiple:
            raise DataError(
                f"{n} crystals don't fit into batches of at most {budget}, their number a multiple of {multiple}; "
                "raise batch_size, batch_atoms, max_atoms or max_edges"
            )
        batches += max(multiple, batches // 50)
    members = order[np.argsort(label[order], kind="stable")]
    dealt = np.split(members, np.cumsum(np.bincount(label, minlength=batches))[:-1])
    return _level(_into_steps(dealt, atoms, multiple, order), atoms)


def _deal(atoms: NDArray[np.int64], batches: int, order: NDArray[np.int64]) -> NDArray[np.int64]:
    label = np.empty(len(order), np.int64)
    load = np.zeros(batches, np.int64)
    for start in range(0, len(order), batches):
        round_ = order[start : start + batches]
        largest_first = round_[np.argsort(-atoms[round_], kind="stable")]
        emptiest = np.argsort(load, kind="stable")[: len(round_)]
        label[largest_first] = emptiest
        load[emptiest] += atoms[largest_first]
    return label


def _into_steps(
    batches: list[NDArray[np.int64]], atoms: NDArray[np.int64], multiple: int, order: NDArray[np.int64]
) -> list[Step]:
    """Group batches of similar size into steps, which wait for their largest batch; steps are in random order."""
    sizes = np.array([atoms[batch].sum() for batch in batches])
    steps = np.argsort(-sizes, kind="stable").reshape(-1, multiple)
    rng = np.random.default_rng(order[:8])  # as random as the order
    return [[batches[i] for i in step] for step in rng.permutation(steps)]


def _level(steps: list[Step], atoms: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Order the batches of each step so that the rank with the fewest atoms so far gets the largest."""
    had = np.zeros(len(steps[0]), np.int64)
    levelled = []
    for step in steps:
        sizes = np.array([atoms[batch].sum() for batch in step])
        placed = dict(zip(np.argsort(had, kind="stable"), np.argsort(-sizes, kind="stable"), strict=True))
        for place in range(len(step)):
            levelled.append(step[placed[place]])
            had[place] += sizes[placed[place]]
    return levelled


class BatchSampler(Sampler[BatchRequest]):
    """Yield this rank's batches of an epoch.

    Args:
        rows: [n] rows of the store.
        atoms: [n] their sizes.
        edges: [n] edges of their graphs, or None if not limited.
        budget: limits of one batch on one device.
        shuffle: a new order every epoch; else a fixed one.
        seed: seed of the order.
        rank, world_size: rank of this process and number of processes.
        multiple: the epoch's number of batches is a multiple of this (world size × accumulation).
        start: initial epoch, and the number of its batches that this rank skips as completed.
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        atoms: NDArray[np.int64],
        edges: NDArray[np.int64] | None,
        budget: BatchLimits,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        multiple: int | None = None,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        self.rows, self.atoms, self.edges, self.budget = rows, atoms, edges, budget
        self.shuffle, self.seed, self.rank, self.world_size = shuffle, seed, rank, world_size
        self.multiple = multiple or world_size
        self.start = start
        self.epoch = start[0]  # workers prefetch before Lightning sets the epoch of a resumed run
        self._epoch_0: list[NDArray[np.int64]] | None = None
        self._packed: tuple[int, list[NDArray[np.int64]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this before each."""
        self.epoch = epoch

    def _batches(self) -> list[NDArray[np.int64]]:
        epoch = self.epoch if self.shuffle else 0
        if self._packed is None or self._packed[0] != epoch:
            self._packed = (epoch, self._pack(epoch))
        return self._packed[1]

    def _pack(self, epoch: int) -> list[NDArray[np.int64]]:
        """Pack an epoch into as many batches as epoch 0, because the schedule and the other ranks rely on it."""
        n = len(self.rows)
        if not self.shuffle:
            return pack(self.atoms, self.edges, self.budget, self.multiple, np.arange(n))
        rng = np.random.default_rng([self.seed, epoch])
        packed = pack(self.atoms, self.edges, self.budget, self.multiple, rng.permutation(n))
        first = self._first() if epoch else packed
        if len(packed) == len(first):
            return packed
        steps = [first[start : start + self.multiple] for start in range(0, len(first), self.multiple)]
        return _level([steps[i] for i in rng.permutation(len(steps))], self.atoms)

    def _first(self) -> list[NDArray[np.int64]]:
        if self._epoch_0 is None:
            self._epoch_0 = self._pack(0)
        return self._epoch_0

    def __len__(self) -> int:
        """Return the number of this rank's batches per epoch, including completed ones."""
        return len(self._batches()) // self.world_size

    def __iter__(self) -> Iterator[BatchRequest]:
        batches = self._batches()
        done = self.start[1] if self.epoch == self.start[0] else 0
        for number in range(self.rank + done * self.world_size, len(batches), self.world_size):
            yield BatchRequest(self.rows[batches[number]], self.epoch if self.shuffle else 0, number)
