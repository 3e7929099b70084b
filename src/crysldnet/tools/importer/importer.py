"""Import crystals of any format into a store.

An import has two steps. First the source is divided into chunks, which are read and checked in parallel processes
(:mod:`crysldnet.readers.workers`) and kept in a temporary file. Then the chunks are assembled in order: duplicate ids
are dropped, each column gets one type, and the target table is joined. The output appears under its name only when
complete, and depends only on the input, byte for byte, not on the number of processes. Memory hardly grows with the
number of crystals, except for file names, targets and rejections.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crysldnet import console
from crysldnet.data.output import ParquetOutput, StoreWriter
from crysldnet.data.schema import with_current_keys
from crysldnet.errors import DataError
from crysldnet.io import cannot_write
from crysldnet.readers.rows import ImportIssues, Piece
from crysldnet.readers.sources import Reader, Settings, open_readers
from crysldnet.readers.structure_files import Source
from crysldnet.readers.target_table import check_table, read_targets
from crysldnet.readers.workers import run_in_order
from crysldnet.tools.importer.assembly import Plan, Spool, write


@dataclass(frozen=True)
class ImportReport:
    """Result of an import.

    Attributes:
        kept: crystals written.
        rejected: crystals left out.
        notes: what was normalized on reading, with counts.
        path: the store or Parquet file; missing if ``kept`` is 0.
        report_path: the CSV of every rejected crystal, table row and value, or None if nothing was rejected.
        notes_path: the CSV of every noted crystal, or None if nothing was noted.
        unused: number of invalid values and rows of the table, the total, and the first.
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
        return console.lines_of([*lines, *(f"note: {note}" for note in self.notes)])


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

    A crystal's id is its file's stem (the path if stems collide, the folder's name for a file named POSCAR), or the id
    in its record; see :data:`crysldnet.readers.records.ID_KEYS`.

    Args:
        source: a folder, glob pattern or list of files or archives; or objects: a data frame, an Arrow table, or an
            iterable of pymatgen ``Structure``, ASE ``Atoms`` or records, such as a Hugging Face data set.
        out: the store's folder (``name.store`` by convention), or a file if the name ends in .parquet.
        targets: a CSV with a column of ids and columns of properties, ``band_gap (eV)`` or ``band_gap``. Empty cells
            are null, as are values of crystals without a row.
        id_column: the id column, if not named material_id, id, file, filename or name.
        structure: the structure key of records with several; ``output.structure`` for a nested one.
        units: units of properties whose columns don't state one.
        on_error: "report" lists what can't be used in ``<out>.rejects.csv``; "raise" stops and leaves nothing behind.
        on_note: "keep" lists crystals with a note, as of an odd formula, in ``<out>.notes.csv``; "reject" rejects them.
        max_atoms: crystals with more atoms are rejected.
        metadata: source, license and citation, kept with the crystals; the source's name by default.
        overwrite: replace what an earlier import left under ``out``.
        progress: show a progress bar where standard error is a terminal.
        workers: processes that read, at most 8 by default. A calling script needs ``if __name__ == "__main__":``.

    Raises:
        DataError: nothing to import, ``out`` can't be written, the table of targets can't be read; and with
            ``on_error="raise"`` the first crystal, row or value that can't be used.
    """
    for name, word, words in (("error", on_error, ("report", "raise")), ("note", on_note, ("keep", "reject"))):
        if word not in words:
            raise DataError(f"on_{name} must be {words[0]!r} or {words[1]!r}, not {word!r}")
    out, table = Path(out), None if targets is None else Path(targets)
    _open_output(out, overwrite)  # rejects existing output before reading anything
    readers = open_readers(source)
    if table is not None:
        check_table(table, id_column)
    issues = ImportIssues(strict := on_error == "raise")
    pieces = _read(readers, Settings(max_atoms, id_column, on_note, structure), strict, progress, workers)
    about = _about(readers) | with_current_keys(metadata or {})
    try:
        read, kept = _write_all(pieces, about, _with_commas(readers), table, id_column, units, out, overwrite, issues)
    except OSError as error:
        raise cannot_write(out, error) from error
    listed = (out.with_name(f"{out.name}.{kind}.csv") for kind in ("rejects", "notes"))
    rejects, notes = (path if path.exists() else None for path in listed)
    return ImportReport(kept, read - kept, issues.notes, out, rejects, notes, issues.unused)


def _write_all(
    pieces: Iterator[Piece],
    about: Mapping[str, str],
    commas: bool,
    targets: Path | None,
    id_column: str | None,
    units: Mapping[str, str] | None,
    out: Path,
    overwrite: bool,
    issues: ImportIssues,
) -> tuple[int, int]:
    """Collect all chunks until their columns are known, then write them; return the crystals read and kept."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with closing(Spool(out.parent)) as spool:
        for piece in pieces:
            spool.append(piece)
        plan = Plan(spool, about, commas=commas)
        plan.join(None if targets is None else read_targets(targets, plan.ids(), id_column, issues), units or {})
        kept = write(plan.tables(issues), _open_output(out, overwrite), issues, out)
        return sum(piece.read for piece in spool), kept


def _with_commas(readers: Sequence[Reader]) -> bool:
    """Return whether numbers may have decimal commas, because no source separates cells by commas."""
    return all(getattr(reader, "decimal_commas", False) for reader in readers)


def _about(readers: Sequence[Reader]) -> dict[str, str]:
    """Return the metadata of the sources."""
    if len(readers) == 1:
        return {"source": readers[0].name, **readers[0].metadata}
    more = f" and {len(readers) - 3} more" if len(readers) > 3 else ""
    return {"source": ", ".join(reader.name for reader in readers[:3]) + more}


def _read(
    readers: Sequence[Reader], settings: Settings, strict: bool, progress: bool, workers: int | None
) -> Iterator[Piece]:
    """Read all chunks in order."""
    tasks = (task for reader in readers for task in reader.tasks(settings))
    processes = min(os.cpu_count() or 1, 8) if workers is None else max(workers, 1)
    totals = [reader.total for reader in readers]
    total = None if None in totals else sum(total for total in totals if total is not None)
    with console.progress("importing", total, shown=progress) as advance:
        for piece in run_in_order(tasks, processes):
            if strict:
                piece.enter_account(ImportIssues(strict=True))
            advance(piece.read)
            yield piece


def _open_output(out: Path, overwrite: bool) -> StoreWriter | ParquetOutput:
    if out.suffix.lower() == ".parquet":
        return ParquetOutput(out, overwrite=overwrite)
    if overwrite and out.exists() and not (out / "store.json").is_file():
        raise DataError(f"{out} exists and is not a crystal store; it won't be overwritten")
    return StoreWriter(out, overwrite=overwrite)
