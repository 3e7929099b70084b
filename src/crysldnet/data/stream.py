"""Crystals of any source as a stream of batches: in the order of the source, in flat memory, read in the background."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, Full, Queue
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from crysldnet.data.batch import CrystalBatch, make_batch
from crysldnet.data.crystals import Crystals, from_lists
from crysldnet.data.graph import GraphSpec
from crysldnet.data.rows import PLACE, Rows
from crysldnet.data.schema import crystals_from_table
from crysldnet.data.sources import Reader, Settings, open_readers
from crysldnet.data.workspace import Task, run_in_order
from crysldnet.errors import DataError

T = TypeVar("T")

POLL = 0.1
"""seconds after which a thread that waits looks whether it is still needed"""


class Refused(NamedTuple):
    """A crystal that can't be used: the file or row it came from, its id, and why."""

    source: str
    id: str
    reason: str


class Portion(NamedTuple):
    """Crystals that go through models at once.

    Attributes:
        ids: [B] of the crystals.
        sources: [B] the file, or the row of one, that each came from.
        crystals: B crystals, which may be none.
        batches: their graphs, one for each way to build it.
        refused: what was left out on the way to these.
        notes: what was read otherwise than it stood there, each with its file or row.
    """

    ids: list[str]
    sources: list[str]
    crystals: Crystals
    batches: dict[GraphSpec, CrystalBatch]
    refused: list[Refused]
    notes: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How crystals are read and put into batches.

    Attributes:
        batch_size: crystals of a batch at most.
        batch_atoms: atoms of a batch at most; a larger crystal is a batch of its own.
        max_atoms: larger crystals are refused.
        workers: processes that read, where reading takes longer than what follows; as many as there are cores, but at
            most 8, where None. The graphs are built in a thread.
    """

    batch_size: int = 64
    batch_atoms: int = 4096
    max_atoms: int = 1000
    workers: int | None = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "batch_atoms", "max_atoms"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.workers is not None and self.workers < 1:
            raise DataError(f"workers must be at least 1 or null, not {self.workers}")


class CrystalStream:
    """The crystals of a source, as often as it can be read; iterating gives :class:`Portion` after portion.

    Args:
        source: anything that :func:`crysldnet.data.importer.import_crystals` reads, or :class:`Crystals`.
        graphs: the graphs to build.
        settings: how to read.

    Attributes:
        total: how many crystals there are, None where that isn't known beforehand.

    Raises:
        DataError: there is nothing to read, or nothing that is known.
    """

    def __init__(self, source: Any, graphs: Iterable[GraphSpec], settings: StreamSettings) -> None:
        self._damaged: list[Refused] = []
        self._readers = open_readers(source, lambda name, reason: self._damaged.append(Refused(name, "", reason)))
        self._graphs, self._settings = list(dict.fromkeys(graphs)), settings
        totals = [reader.total for reader in self._readers]
        self.total = None if None in totals else sum(total for total in totals if total is not None)

    def __iter__(self) -> Iterator[Portion]:
        return ahead(self._portions(), 2)

    def _tables(self) -> Iterator[pa.Table]:
        settings = Settings(self._settings.max_atoms, None)
        workers = min(os.cpu_count() or 1, 8) if self._settings.workers is None else self._settings.workers
        return run_in_order(((task, False) for reader in self._readers for task in _tasks(reader, settings)), workers)

    def _portions(self) -> Iterator[Portion]:
        if self._damaged:
            yield Portion([], [], from_lists([], [], []), {}, self._damaged)
        for table in self._tables():
            ids, places = table["material_id"].to_pylist(), table[PLACE].to_pylist()
            crystals, refused = crystals_from_table(table), _refused(table.schema, set(places))
            notes = [(text, place) for text, place in json.loads(table.schema.metadata[b"notes"])]
            if not ids:
                yield Portion([], [], crystals, {}, refused, notes)
            for start, stop in cut(crystals.sizes, self._settings.batch_size, self._settings.batch_atoms):
                part = crystals.take(np.arange(start, stop))
                batches = {graph: make_batch(part, graph) for graph in self._graphs}
                yield Portion(ids[start:stop], places[start:stop], part, batches, refused, notes)
                refused, notes = [], []


def _tasks(reader: Reader, settings: Settings) -> Iterator[Task]:
    """Give a reader's tasks; what is damaged further on becomes a refused crystal, and other sources go on."""
    try:
        for task in reader.tasks(settings):
            yield partial(_read, task, reader.name, settings)
    except DataError as error:
        yield partial(_nothing, reader.name, str(error), settings)


def _read(task: Task, name: str, settings: Settings) -> pa.Table:
    try:
        return task()
    except DataError as error:
        return _nothing(name, str(error), settings)


def _nothing(name: str, reason: str, settings: Settings) -> pa.Table:
    rows = Rows()
    rows.reject(name, "", reason)
    return rows.table(settings.max_atoms)


def _refused(schema: pa.Schema, kept: set[str]) -> list[Refused]:
    """Return what a piece left out; not the properties alone of a crystal that it has kept."""
    return [Refused(*entry) for entry in json.loads(schema.metadata[b"rejects"]) if entry[0] not in kept]


def cut(sizes: NDArray[np.int64], crystals: int, atoms: int) -> Iterator[tuple[int, int]]:
    """Cut consecutive crystals into batches within both bounds."""
    start = total = 0
    for stop, size in enumerate(sizes.tolist()):
        if stop > start and (stop - start == crystals or total + size > atoms):
            yield start, stop
            start, total = stop, 0
        total += size
    if start < len(sizes):
        yield start, len(sizes)


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """Give items that a thread takes from an iterator ahead of time, at most ``depth`` of them.

    An error of the iterator is raised where its item would have come. The thread ends when the one who uses the items
    stops, at the latest after its next item.
    """
    queue: Queue[tuple[Sequence[T], BaseException | None]] = Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[Sequence[T], BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                return queue.put(entry, timeout=POLL)
            except Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(([item], None))
                if stopped.is_set():
                    break
            put(([], None))
        except BaseException as error:  # it is raised again in the other thread
            put(([], error))
        finally:
            if hasattr(items, "close"):
                items.close()

    thread = threading.Thread(target=work, name="crysldnet-read", daemon=True)
    thread.start()
    try:
        while True:
            try:
                found, error = queue.get(timeout=POLL)
            except Empty:
                continue  # so that Ctrl-C is noticed
            if error is not None:
                raise error
            if not found:
                return
            yield from found
    finally:
        stopped.set()
        thread.join()
