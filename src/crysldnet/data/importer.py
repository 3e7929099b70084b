"""Import crystals from CIF and POSCAR files, or from Parquet, into a store.

Crystals stream through in batches of 1,000: read, checked by :func:`crysldnet.data.crystals.faults`, joined with the
table of targets, written. Memory doesn't grow with their number, except for the ids and the targets. The output
appears under its name when it is whole, and its bytes depend on the input only, not on the number of processes.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crysldnet.data.crystals import faults
from crysldnet.data.ledger import Ledger
from crysldnet.data.schema import table_from_crystals
from crysldnet.data.sources import Advance, Batch, FileSource, ParquetSource
from crysldnet.data.store import StoreWriter
from crysldnet.data.structure_files import Source
from crysldnet.data.targets import Targets, read_targets
from crysldnet.errors import DataError


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
    source: Source,
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

    A crystal's id is its file's stem: the path where stems collide, the folder's name for a file called POSCAR.

    Args:
        source: a folder, glob pattern or list of CIF and POSCAR files, or one .parquet file in the schema.
        out: the store's folder (``name.store`` by convention), or a file where the name ends in .parquet.
        targets: a CSV with a column of ids and columns of properties, ``band_gap (eV)`` or ``band_gap``. An empty
            cell is null; so is the value of a crystal without a row. A column without any number is kept as text,
            one without a name is left out.
        id_column: the CSV's column of ids, where it isn't called material_id, id, file, filename or name.
        units: unit of each property whose column doesn't state it.
        on_error: "report" leaves out what can't be used and lists it in ``<out>.rejects.csv``; "raise" stops at the
            first and leaves nothing behind.
        max_atoms: crystals with more atoms are rejected.
        metadata: source, licence and citation, kept with the crystals; the source's name by default.
        overwrite: replace what an earlier import left under ``out``.
        progress: show a progress bar where standard error is a terminal.
        workers: processes that parse, at most 8 by default. They start for 200 files or more, and import the calling
            script anew, so a script needs its ``if __name__ == "__main__":``.

    Raises:
        DataError: nothing to import, ``out`` can't be written, the table of targets can't be read; and with
            ``on_error="raise"`` the first crystal, row or value that can't be used.
    """
    if on_error not in ("report", "raise"):
        raise DataError(f"on_error must be 'report' or 'raise', not {on_error!r}")
    out = Path(out)
    ledger = Ledger(strict=on_error == "raise")
    reader = _open_source(source, workers, max_atoms)
    kept = 0
    try:
        with _open_output(out, overwrite) as output, _progress(len(reader), progress) as advance:
            table = None if targets is None else read_targets(Path(targets), reader.ids(), id_column, ledger)
            all_units = _all_units(reader, table, units or {})
            about = {**reader.metadata, **(metadata or {})}
            seen: set[str] = set()
            for batch in reader.batches(ledger, advance):
                batch = _admitted(batch, max_atoms, seen, ledger)
                properties = batch.properties | ({} if table is None else table.take(batch.ids, ledger))
                if batch.ids:
                    output.append(table_from_crystals(batch.crystals, batch.ids, properties, all_units, about))
                kept += len(batch.ids)
            if not kept:
                raise _NothingKept
    except _NothingKept:
        pass
    except OSError as error:
        raise DataError(f"{out}: can't be written ({error.strerror})") from error
    report_path = ledger.save(out.with_name(f"{out.name}.rejects.csv"))
    return ImportReport(kept, len(reader) - kept, ledger.notes, out, report_path)


class _NothingKept(Exception):
    """Leaves the output's context so that nothing is written."""


def _open_source(source: Source, workers: int | None, max_atoms: int) -> FileSource | ParquetSource:
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix.lower() == ".parquet":
        return ParquetSource(Path(source))
    return FileSource(source, min(os.cpu_count() or 1, 8) if workers is None else max(workers, 1), max_atoms)


def _admitted(batch: Batch, max_atoms: int, seen: set[str], ledger: Ledger) -> Batch:
    """Drop the crystals that can't be used, and those whose id came before."""
    good = []
    for i, fault in enumerate(faults(batch.crystals, max_atoms=max_atoms)):
        material_id = batch.ids[i]
        if fault is None and (not material_id or material_id in seen):
            fault = "an earlier crystal has the same id" if material_id else "the id is empty"
        if fault is None:
            seen.add(material_id)
            good.append(i)
        else:
            ledger.reject(batch.places[i], material_id, fault)
    index = np.array(good, np.int64)
    return Batch(
        [batch.places[i] for i in good],
        [batch.ids[i] for i in good],
        batch.crystals.take(index),
        {name: column.take(pa.array(index)) for name, column in batch.properties.items()},
    )


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
            self._file = self._partial.open("wb")
        except OSError as error:
            raise DataError(f"can't write to {self._path.parent}: {error.strerror}") from error
        return self

    def append(self, table: pa.Table) -> None:
        """Add rows; all tables have the same columns."""
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file, table.schema, compression="zstd")
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
def _progress(total: int, shown: bool) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("importing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("importing", total=total)
        yield lambda count: bar.advance(task, count)


def _all_units(reader: FileSource | ParquetSource, table: Targets | None, given: Mapping[str, str]) -> dict[str, str]:
    names = [*reader.columns, *(table.columns if table else ())]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"column {twice[0]!r} stands in the crystals' file and in the targets; leave one out")
    stated = {**reader.units, **(table.units if table else {})}
    for name, unit in given.items():
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names) or 'none'}"
            raise DataError(f"units are given for {name!r}, which is no property; {hint}")
        if stated.get(name, unit) != unit:
            raise DataError(f"the unit of {name!r} is {stated[name]!r} in the file and {unit!r} in units")
    return {**stated, **given}
