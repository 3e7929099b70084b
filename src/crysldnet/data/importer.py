"""Import crystals of any format into a store.

An import has two steps. First the source is cut into pieces, which are read and checked in processes, each piece being
kept in a folder beside the output (:mod:`crysldnet.data.workspace`). Then the pieces are put together in their order:
ids that came before are left out, the columns get one type, the table of targets is joined. The output appears under
its name when it is whole, and its bytes depend on the input only: not on the number of processes, and not on how often
the import was stopped. Memory hardly grows with the number of crystals, except for names of files, targets and rejects.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crysldnet import __version__
from crysldnet.data.assembly import Plan, write
from crysldnet.data.ledger import Ledger
from crysldnet.data.output import ParquetOutput
from crysldnet.data.rows import enter_account, read_of
from crysldnet.data.sources import Reader, Settings, open_readers
from crysldnet.data.store import StoreWriter
from crysldnet.data.structure_files import Source
from crysldnet.data.targets import check_table, read_targets
from crysldnet.data.workspace import Workspace, read_pieces, schema_of
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
                plan = Plan(pieces, _about(readers) | dict(metadata or {}))
                table = None if targets is None else read_targets(Path(targets), plan.ids(), id_column, ledger)
                plan.join(table, units or {})
                kept = write(plan.tables(ledger), output, ledger, report_path)
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
