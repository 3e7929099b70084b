"""Import crystals of any format into a store.

An import has two steps. First the source is cut into pieces, which are read and checked in processes
(:mod:`crysldnet.readers.workers`) and kept in a temporary file. Then they are put together in their order: ids that
came before are left out, the columns get one type, the table of targets is joined. The output appears under its name
when it is whole, and its bytes depend on the input alone, not on the number of processes. Memory hardly grows with the
number of crystals, except for names of files, targets and rejects.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crysldnet.data.output import ParquetOutput
from crysldnet.data.store import StoreWriter
from crysldnet.errors import DataError
from crysldnet.io import cannot_write
from crysldnet.readers.issues import Ledger
from crysldnet.readers.rows import Piece
from crysldnet.readers.sources import Reader, Settings, open_readers
from crysldnet.readers.structure_files import Source
from crysldnet.readers.target_table import check_table, read_targets
from crysldnet.readers.workers import run_in_order
from crysldnet.tools.importer.assembly import Plan, write
from crysldnet.tools.importer.spool import Spool


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes:
        kept: crystals written.
        rejected: crystals left out.
        notes: what was normalized on reading, and how often.
        path: the store or Parquet file; there is none where ``kept`` is 0.
        report_path: the CSV of every rejected crystal, table row and value, or None where nothing was rejected.
        notes_path: the CSV of every noted crystal, or None where nothing was noted.
        unused: how many values and rows of the table could not be used, of how many, and the first.
    """

    kept: int
    rejected: int
    notes: tuple[str, ...]
    path: Path
    report_path: Path | None
    notes_path: Path | None = None
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.kept:,} crystals kept in {self.path}" if self.kept else "no crystal kept, nothing written"]
        lines += [f"{self.rejected:,} crystals rejected", *self.unused]
        if self.report_path is not None:
            lines.append(f"what was rejected, and why: {self.report_path}")
        if self.notes_path is not None:
            lines.append(f"what was noted, and of which: {self.notes_path}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def import_crystals(
    source: Source | Any,
    out: str | os.PathLike[str],
    *,
    targets: str | os.PathLike[str] | None = None,
    id_column: str | None = None,
    structure: str | None = None,
    units: Mapping[str, str] | None = None,
    on_error: Literal["report", "raise"] = "report",
    on_note: Literal["keep", "reject"] = "keep",
    max_atoms: int = 1000,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    workers: int | None = None,
) -> ImportReport:
    """Import crystals into a store or a Parquet file.

    A crystal's id is its file's stem (the path where stems collide, the folder's name for a file called POSCAR), or
    what its record says; see :data:`crysldnet.readers.records.ID_KEYS`.

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
        structure: the key that records have their structure under, where they have several; ``output.structure`` for
            one inside another object.
        units: unit of each property whose column doesn't state it.
        on_error: "report" leaves out what can't be used and lists it in ``<out>.rejects.csv``; "raise" stops at the
            first and leaves nothing behind.
        on_note: "keep" keeps crystals with a note, such as a formula that their atoms don't give, and lists them in
            ``<out>.notes.csv``; "reject" rejects them.
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
    if on_note not in ("keep", "reject"):
        raise DataError(f"on_note must be 'keep' or 'reject', not {on_note!r}")
    out = Path(out)
    strict = on_error == "raise"
    _open_output(out, overwrite)  # refuses what is there before anything is read
    readers = open_readers(source)
    settings = Settings(max_atoms, id_column, on_note, structure)
    if targets is not None:
        check_table(Path(targets), id_column)
    ledger = Ledger(strict)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with closing(Spool(out.parent)) as pieces:
            for piece in _read(readers, settings, strict, progress, workers):
                pieces.append(piece)
            plan = Plan(pieces, _about(readers) | dict(metadata or {}))
            table = None if targets is None else read_targets(Path(targets), plan.ids(), id_column, ledger)
            plan.join(table, units or {})
            kept = write(plan.tables(ledger), _open_output(out, overwrite), ledger, out)
            read = sum(piece.read for piece in pieces)
    except OSError as error:
        raise cannot_write(out, error) from error
    rejects, notes = (
        path if path.exists() else None for path in (out.with_name(f"{out.name}.{k}.csv") for k in ("rejects", "notes"))
    )
    return ImportReport(kept, read - kept, ledger.notes, out, rejects, notes, ledger.unused)


def _about(readers: Sequence[Reader]) -> dict[str, str]:
    """Return what the sources say of themselves."""
    if len(readers) == 1:
        return {"source": readers[0].name, **readers[0].metadata}
    more = f" and {len(readers) - 3} more" if len(readers) > 3 else ""
    return {"source": ", ".join(reader.name for reader in readers[:3]) + more}


def _read(
    readers: Sequence[Reader], settings: Settings, strict: bool, progress: bool, workers: int | None
) -> Iterator[Piece]:
    """Read all pieces, in order."""
    tasks = (task for reader in readers for task in reader.tasks(settings))
    processes = min(os.cpu_count() or 1, 8) if workers is None else max(workers, 1)
    totals = [reader.total for reader in readers]
    total = None if None in totals else sum(total for total in totals if total is not None)
    with _progress(total, progress) as advance:
        for piece in run_in_order(tasks, processes):
            if strict:
                piece.enter_account(Ledger(strict=True))
            advance(piece.read)
            yield piece


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
