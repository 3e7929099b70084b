"""Import crystals of any format into a store.

An import has two steps. First the source is cut into pieces, which are read and checked in processes, each piece being
kept in a folder beside the output (:mod:`crysldnet.data.workspace`). Then the pieces are put together in their order:
ids that came before are left out, the columns get one type, the table of targets is joined. The output appears under
its name when it is whole, and its bytes depend on the input only: not on the number of processes, and not on how often
the import was stopped. Memory doesn't grow with the number of crystals, except for the names of files and the targets.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crysldnet import __version__
from crysldnet.data.ledger import Ledger
from crysldnet.data.rows import NOTE_MIXED, PLACE, common_type, dropped_of, enter_account, read_of
from crysldnet.data.schema import STRUCTURE_COLUMNS, units_of
from crysldnet.data.sources import Reader, Settings, open_readers
from crysldnet.data.store import StoreWriter, remove_partials
from crysldnet.data.structure_files import Source
from crysldnet.data.targets import Targets, check_table, read_targets
from crysldnet.data.workspace import Workspace, ids_of, open_piece, read_pieces, schema_of
from crysldnet.errors import DataError

_ROWS = 16_384
_ATOMS = 1_000_000
"""crystals and atoms that are written at a time"""


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes:
        kept: crystals written.
        rejected: crystals left out.
        notes: what was read otherwise than it stood there, and how often.
        path: the store or Parquet file; there is none where ``kept`` is 0.
        report_path: the CSV of every rejected crystal, table row and value, or None where nothing was rejected.
    """

    kept: int
    rejected: int
    notes: tuple[str, ...]
    path: Path
    report_path: Path | None

    def __str__(self) -> str:
        lines = [f"{self.kept:,} crystals kept in {self.path}" if self.kept else "no crystal kept, nothing written"]
        lines.append(f"{self.rejected:,} crystals rejected")
        if self.report_path is not None:
            lines.append(f"what was rejected, and why: {self.report_path}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def import_crystals(
    source: Source | Any,
    out: str | os.PathLike[str],
    *,
    targets: str | os.PathLike[str] | None = None,
    id_column: str | None = None,
    units: Mapping[str, str] | None = None,
    on_error: Literal["report", "raise"] = "report",
    max_atoms: int = 1000,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    workers: int | None = None,
) -> ImportReport:
    """Import crystals into a store or a Parquet file.

    A crystal's id is its file's stem (the path where stems collide, the folder's name for a file called POSCAR), or
    what its record says; see :data:`crysldnet.data.formats.records.ID_KEYS`.

    Args:
        source: a folder, glob pattern or list of files, whose names say what they are: CIF and POSCAR, zip and tar
            archives of them, JSON, JSON lines, CSV with a column of CIFs, extended XYZ, ASE databases, Parquet.
            Or objects: a pandas or polars data frame, an Arrow table, or anything that gives pymatgen's ``Structure``,
            ASE's ``Atoms`` or records one by one, such as a Hugging Face data set.
        out: the store's folder (``name.store`` by convention), or a file where the name ends in .parquet.
        targets: a CSV with a column of ids and columns of properties, ``band_gap (eV)`` or ``band_gap``. An empty
            cell is null; so is the value of a crystal without a row. A column without any number is kept as text,
            one without a name is left out.
        id_column: the column of ids of the CSV or of the records, where it isn't called material_id, id, file,
            filename or name.
        units: unit of each property whose column doesn't state it.
        on_error: "report" leaves out what can't be used and lists it in ``<out>.rejects.csv``; "raise" stops at the
            first and leaves nothing behind.
        max_atoms: crystals with more atoms are rejected.
        metadata: source, licence and citation, kept with the crystals; the source's name by default.
        overwrite: replace what an earlier import left under ``out``.
        progress: show a progress bar where standard error is a terminal.
        workers: processes that read, at most 8 by default. They start after two seconds, and import the calling
            script anew, so a script needs its ``if __name__ == "__main__":``.

    Raises:
        DataError: nothing to import, ``out`` can't be written, the table of targets can't be read; and with
            ``on_error="raise"`` the first crystal, row or value that can't be used.
    """
    if on_error not in ("report", "raise"):
        raise DataError(f"on_error must be 'report' or 'raise', not {on_error!r}")
    out = Path(out)
    strict = on_error == "raise"
    output = _open_output(out, overwrite)
    readers = open_readers(source)
    settings = Settings(max_atoms, id_column)
    if targets is not None:
        check_table(Path(targets), id_column)
    ledger = Ledger(strict)
    report_path = out.with_name(f"{out.name}.rejects.csv")
    try:
        with Workspace(out, _stamp(readers, settings)) as workspace:
            pieces: list[Path] = []
            try:
                pieces = list(_read(readers, settings, workspace, strict, progress, workers))
                plan = _Plan(pieces, _about(readers) | dict(metadata or {}))
                table = None if targets is None else read_targets(Path(targets), plan.ids(), id_column, ledger)
                plan.join(table, units or {})
                kept = _write(plan.tables(ledger), output, ledger, report_path)
            except DataError:
                if strict or len(pieces) < 2:  # what took long isn't thrown away for a wrong unit or table
                    workspace.remove()
                raise
            read = sum(read_of(schema_of(piece)) for piece in pieces)
            workspace.remove()
    except OSError as error:
        raise DataError(f"{out}: can't be written ({error.strerror})") from error
    return ImportReport(kept, read - kept, ledger.notes, out, report_path if report_path.exists() else None)


def _stamp(readers: Sequence[Reader], settings: Settings) -> Any:
    stamps = [reader.stamp() for reader in readers]
    return None if None in stamps else [__version__, *settings, *stamps]


def _about(readers: Sequence[Reader]) -> dict[str, str]:
    """Return what the sources say of themselves."""
    if len(readers) == 1:
        return {"source": readers[0].name, **readers[0].metadata}
    more = f" and {len(readers) - 3} more" if len(readers) > 3 else ""
    return {"source": ", ".join(reader.name for reader in readers[:3]) + more}


def _read(
    readers: Sequence[Reader],
    settings: Settings,
    workspace: Workspace,
    strict: bool,
    progress: bool,
    workers: int | None,
) -> Iterator[Path]:
    """Read what isn't read yet, and give the pieces in order."""
    tasks = (task for reader in readers for task in reader.tasks(settings))
    processes = min(os.cpu_count() or 1, 8) if workers is None else max(workers, 1)
    totals = [reader.total for reader in readers]
    total = None if None in totals else sum(total for total in totals if total is not None)
    with _progress(total, progress) as advance:
        for piece in read_pieces(tasks, workspace, processes):
            schema = schema_of(piece)
            if strict:
                enter_account(schema, Ledger(strict=True))
            advance(read_of(schema))
            yield piece


class _Plan:
    """How pieces are put together: which columns of which type, and which ids are there more than once."""

    def __init__(self, pieces: Sequence[Path], about: Mapping[str, str]) -> None:
        self._pieces, self._about = pieces, about
        self._targets: Targets | None = None
        types: dict[str, list[pa.DataType]] = {}
        self._dropped: dict[str, str] = {}
        self.units: dict[str, str] = {}
        for schema in map(schema_of, pieces):
            self._dropped |= dropped_of(schema)
            for name, unit in units_of(schema).items():
                if self.units.setdefault(name, unit) != unit:
                    raise DataError(f"the unit of {name!r} is {self.units[name]!r} in one file and {unit!r} in another")
            for field in schema:
                if field.name not in STRUCTURE_COLUMNS and field.name != PLACE:
                    types.setdefault(field.name, []).append(field.type)
        kept = {name: found for name, found in types.items() if name not in self._dropped}
        self._types = {name: common_type(found) for name, found in kept.items()}
        self._mixed = [
            name
            for name, kind in self._types.items()
            if pa.types.is_string(kind) and any(not (pa.types.is_string(t) or pa.types.is_null(t)) for t in types[name])
        ]
        self._repeated = _repeated(map(ids_of, pieces))

    def ids(self) -> set[str]:
        """Return all ids, for a table of targets."""
        return {material_id for piece in self._pieces for material_id in ids_of(piece)}

    def join(self, targets: Targets | None, given: Mapping[str, str]) -> None:
        """Add the columns of a table of targets, and units.

        Raises:
            DataError: a column is there twice, a unit is of no column, or differs from the one stated.
        """
        self._targets = targets
        names = [*self._types, *(targets.columns if targets else ())]
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"column {twice[0]!r} stands in the crystals' file and in the targets; leave one out")
        self.units |= targets.units if targets else {}
        for name, unit in given.items():
            if name not in names:
                close = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names) or 'none'}"
                raise DataError(f"units are given for {name!r}, which is no property; {hint}")
            if self.units.setdefault(name, unit) != unit:
                raise DataError(f"the unit of {name!r} is {self.units[name]!r} in the file and {unit!r} in units")

    def tables(self, ledger: Ledger) -> Iterator[pa.Table]:
        """Give the crystals of each piece, entering in the ledger what is left out."""
        for name, note in self._dropped.items():
            ledger.note(note, name)
        for name in self._mixed:
            ledger.note(NOTE_MIXED, name)
        seen: set[str] = set()
        for piece in self._pieces:
            table = open_piece(piece)
            enter_account(table.schema, ledger)
            ids = table["material_id"].to_pylist()
            if self._repeated:
                table, ids = self._without_repeated(table, ids, seen, ledger)
            yield self._table(table, ids, ledger)

    def _without_repeated(
        self, table: pa.Table, ids: list[str], seen: set[str], ledger: Ledger
    ) -> tuple[pa.Table, list[str]]:
        good = []
        for row, material_id in enumerate(ids):
            if material_id in seen:
                ledger.reject(table[PLACE][row].as_py(), material_id, "an earlier crystal has the same id")
                continue
            good.append(row)
            if _hash(material_id) in self._repeated:
                seen.add(material_id)
        return table.take(pa.array(good, pa.int64())), [ids[row] for row in good]

    def _table(self, table: pa.Table, ids: list[str], ledger: Ledger) -> pa.Table:
        columns: dict[str, pa.Array | pa.ChunkedArray] = {name: table[name] for name in STRUCTURE_COLUMNS}
        for name, kind in self._types.items():
            found = name in table.column_names
            columns[name] = table[name].cast(kind, safe=False) if found else pa.nulls(len(table), kind)
        columns |= {} if self._targets is None else self._targets.take(ids, ledger)
        fields = [
            pa.field(name, column.type, metadata={"units": self.units[name]} if name in self.units else None)
            for name, column in columns.items()
        ]
        return pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields, metadata=dict(self._about)))


def _repeated(ids: Iterable[list[str]]) -> set[int]:
    """Return the hashes of the ids that are there more than once, 8 bytes being kept of each id."""
    hashes = [np.fromiter(map(_hash, some), np.uint64, len(some)) for some in ids]
    values, counts = np.unique(np.concatenate(hashes or [np.empty(0, np.uint64)]), return_counts=True)
    return set(values[counts > 1].tolist())


def _hash(material_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(material_id.encode(), digest_size=8).digest(), "little")


def _write(tables: Iterable[pa.Table], output: StoreWriter | ParquetOutput, ledger: Ledger, report_path: Path) -> int:
    """Write crystals, many at a time; the list of what was rejected is there before they appear."""
    kept = 0
    try:
        with output:
            for table in _joined(tables):
                output.append(table)
                kept += len(table)
            ledger.save(report_path)
            if not kept:
                raise _NothingKept
    except _NothingKept:
        pass
    return kept


class _NothingKept(Exception):
    """Leaves the output's context so that nothing is written."""


def _joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Put small tables together."""
    waiting: list[pa.Table] = []
    rows = atoms = 0
    for table in tables:
        if len(table):
            waiting.append(table)
            rows += len(table)
            atoms += len(table["atomic_numbers"].combine_chunks().flatten())
        if rows >= _ROWS or atoms >= _ATOMS:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting, rows, atoms = [], 0, 0
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


class ParquetOutput:
    """Write a Parquet file a table at a time; it appears under its name when it is whole.

    Use it as a context manager: leaving with an exception removes what was written.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self._path = Path(path)
        if self._path.is_dir() or (self._path.exists() and not overwrite):
            raise DataError(f"{self._path} exists already; choose another name or pass --overwrite")
        self._partial = self._path.with_name(f".{self._path.name}.partial-{os.getpid()}")
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> ParquetOutput:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            remove_partials(self._path)
            self._file = self._partial.open("wb")
        except OSError as error:
            raise DataError(f"can't write to {self._path.parent}: {error.strerror}") from error
        return self

    def append(self, table: pa.Table) -> None:
        """Add rows; all tables have the same columns."""
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file, table.schema, compression="zstd", write_page_checksum=True)
        self._writer.write_table(table)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
            self._file.close()
            if kind is None:
                os.replace(self._partial, self._path)
        finally:
            self._partial.unlink(missing_ok=True)


def _open_output(out: Path, overwrite: bool) -> StoreWriter | ParquetOutput:
    if out.suffix.lower() == ".parquet":
        return ParquetOutput(out, overwrite=overwrite)
    if overwrite and out.exists() and not (out / "store.json").is_file():
        raise DataError(f"{out} exists and is not a crystal store; it won't be overwritten")
    return StoreWriter(out, overwrite=overwrite)


@contextmanager
def _progress(total: int | None, shown: bool) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("importing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("importing", total=total)
        yield lambda count: bar.advance(task, count)
