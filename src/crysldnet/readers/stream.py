"""Stream batches of crystals from any source: in order, with constant memory, read in the background."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, Full, Queue
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from crysldnet.data.schema import crystals_from_table, units_of
from crysldnet.data.units import same_unit
from crysldnet.errors import DataError
from crysldnet.graphs.batch import CrystalBatch, cut, make_batch
from crysldnet.graphs.crystals import Crystals, from_lists
from crysldnet.graphs.device_graph import Where, check_place
from crysldnet.graphs.spec import GraphSpec
from crysldnet.readers.rows import PLACE, Piece
from crysldnet.readers.sources import Settings, open_readers, tasks_to_the_end
from crysldnet.readers.workers import run_in_order

T = TypeVar("T")

NOTHING: Mapping[str, Any] = MappingProxyType({})
POLL = 0.1
"""seconds between checks of a waiting thread whether it is still needed"""


Check = Callable[[Crystals, Sequence[str]], dict[int, str]]
"""Maps crystals and their ids to the rows that can't be used, with reasons."""


class Refused(NamedTuple):
    """A rejected crystal: file or row, id, and reason."""

    source: str
    id: str
    reason: str


class Chunk(NamedTuple):
    """Crystals that models process together.

    Attributes:
        ids: [B] crystal ids.
        sources: [B] file, or file and row, of each.
        crystals: B crystals, possibly none.
        batches: their graphs, one per graph definition.
        refused: crystals rejected up to here.
        notes: what was normalized on reading, with file or row and id.
        columns: [B] values of each requested numeric column.
    """

    ids: list[str]
    sources: list[str]
    crystals: Crystals
    batches: dict[GraphSpec, CrystalBatch]
    refused: list[Refused]
    notes: Sequence[tuple[str, str, str]] = ()
    columns: Mapping[str, NDArray[np.float64]] = NOTHING


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How crystals are read and batched.

    Attributes:
        batch_size: maximum crystals per batch.
        batch_atoms: maximum atoms per batch; a larger crystal gets its own batch.
        max_atoms: larger crystals are rejected.
        workers: reader processes, started if reading is slower than processing; None for one per core, at most 8.
            Graphs are built in a thread.
        graph_on: ``device`` builds graphs on the device that predicts.
    """

    batch_size: int = 64
    batch_atoms: int = 4096
    max_atoms: int = 1000
    workers: int | None = 1
    graph_on: Where = "host"

    def __post_init__(self) -> None:
        for name in ("batch_size", "batch_atoms", "max_atoms"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.workers is not None and self.workers < 1:
            raise DataError(f"workers must be at least 1 or null, not {self.workers}")


class CrystalStream:
    """The crystals of a source; iterating yields :class:`Chunk` objects and may be repeated if the source allows.

    Args:
        source: anything that :func:`crysldnet.tools.importer.importer.import_crystals` reads, or :class:`Crystals`.
        graphs: the graphs to build.
        settings: how to read.
        columns: required numeric columns with units, empty if unknown; a crystal that lacks a value, or has another
            unit, is rejected.
        check: returns the crystals that a model can't predict, with reasons; they are also rejected.

    Attributes:
        total: number of crystals, None if not known in advance.
        units: units of the properties read so far that have one.

    Raises:
        DataError: there is nothing to read, or its kind is unknown.
    """

    def __init__(
        self,
        source: Any,
        graphs: Iterable[GraphSpec],
        settings: StreamSettings,
        columns: Mapping[str, str] = NOTHING,
        check: Check | None = None,
    ) -> None:
        self.units: dict[str, str] = {}
        self._damaged: list[Refused] = []
        self._readers = open_readers(source, lambda name, reason: self._damaged.append(Refused(name, "", reason)))
        self._graphs, self._settings = list(dict.fromkeys(graphs)), settings
        for graph in self._graphs:
            check_place(settings.graph_on, graph, "graph_on")
        self._columns, self._check = dict(columns), check
        totals = [reader.total for reader in self._readers]
        self.total = None if None in totals else sum(total for total in totals if total is not None)

    def __iter__(self) -> Iterator[Chunk]:
        return ahead(self._portions(), 2)

    def unstated(self) -> list[str]:
        """Return a note on each input column read so far that lacks a required unit."""
        return [
            f"{name} states no unit, and was taken to be in {unit}, in which the model learned it"
            for name, unit in self._columns.items()
            if unit and name not in self.units
        ]

    def _pieces(self) -> Iterator[Piece]:
        settings = Settings(self._settings.max_atoms, None)
        workers = min(os.cpu_count() or 1, 8) if self._settings.workers is None else self._settings.workers
        return run_in_order((task for reader in self._readers for task in tasks_to_the_end(reader, settings)), workers)

    def _portions(self) -> Iterator[Chunk]:
        if self._damaged:
            yield Chunk([], [], from_lists([], [], []), {}, self._damaged)
        seen: set[int] = set()
        for piece in self._pieces():
            table, columns = piece.table, {name: _numbers_of(piece.table, name) for name in self._columns}
            ids, places = table["material_id"].to_pylist(), table[PLACE].to_pylist()
            there = set(places)  # rejected properties of a crystal aren't rejections
            refused = [Refused(*reject) for reject in piece.rejects if reject[0] not in there]
            if reasons := self._unusable(table, ids, columns, seen):
                refused += [Refused(places[row], ids[row], reason) for row, reason in reasons.items()]
                kept = np.setdiff1d(np.arange(len(table)), list(reasons))
                table, columns = table.take(pa.array(kept)), {name: own[kept] for name, own in columns.items()}
                ids, places = ([values[row] for row in kept.tolist()] for values in (ids, places))
            self.units |= units_of(table.schema)
            crystals, notes = crystals_from_table(table), piece.notes
            if not ids:
                yield Chunk([], [], crystals, {}, refused, notes)
            for start, stop in cut(crystals.sizes, self._settings.batch_size, self._settings.batch_atoms):
                part = crystals.take(np.arange(start, stop))
                batches = {graph: make_batch(part, graph, graph_on=self._settings.graph_on) for graph in self._graphs}
                own = {name: values[start:stop] for name, values in columns.items()}
                yield Chunk(ids[start:stop], places[start:stop], part, batches, refused, notes, own)
                refused, notes = [], []

    def _unusable(
        self, table: pa.Table, ids: Sequence[str], columns: Mapping[str, NDArray[np.float64]], seen: set[int]
    ) -> dict[int, str]:
        """Return the rows that can't be used, each with its reason.

        Args:
            table: the crystals.
            ids: their ids.
            columns: their values of each required column.
            seen: hashes of earlier ids, to which these are added.
        """
        reasons: dict[int, str] = {}
        for row, key in enumerate(map(hash, ids)):
            if key in seen:
                reasons[row] = "an earlier crystal has the same id"
            seen.add(key)
        units = units_of(table.schema)
        for name, unit in self._columns.items():
            whole = (
                "" if name in table.column_names else f"no column {name!r}, which the model needs (data.descriptors)"
            )
            if unit and not same_unit(unit, units.get(name, unit)):
                whole = f"{name} is in {units[name]}, and the model learned it in {unit}; convert it"
            for row in range(len(table)) if whole else np.flatnonzero(~np.isfinite(columns[name])).tolist():
                said = None if whole else table[name][row].as_py()
                own = (
                    f"no value of {name!r}, which the model needs" if said is None else f"{name} is {said!r}, no number"
                )
                reasons.setdefault(row, whole or own)
        if self._check is not None and ids:
            for row, reason in self._check(crystals_from_table(table), ids).items():
                reasons.setdefault(row, reason)
        return reasons


def _numbers_of(table: pa.Table, name: str) -> NDArray[np.float64]:
    """Return a column as numbers, NaN for anything else and without the column."""
    if name not in table.column_names:
        return np.full(len(table), np.nan)
    column = table[name]
    if pa.types.is_string(column.type):
        return np.array([_number(text) for text in column.to_pylist()])
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type):
        return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return np.full(len(table), np.nan)


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return np.nan


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """Yield items that a thread prefetches from an iterator, at most ``depth`` of them.

    Errors of the iterator are raised in place of its item. The thread exits when the consumer stops, at the latest
    after its next item.
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
        except BaseException as error:  # raised again in the other thread
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
                continue  # so that Ctrl-C works
            if error is not None:
                raise error
            if not found:
                return
            yield from found
    finally:
        stopped.set()
        thread.join()
