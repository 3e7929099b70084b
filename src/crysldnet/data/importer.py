"""Import crystals from CIF and POSCAR files, or from Parquet, into a store.

Crystals stream through in batches of 1,000: read, checked by :func:`crysldnet.data.crystals.faults`, joined with the
table of targets, written. Memory doesn't grow with their number, except for the ids and the targets. The output
appears under its name when it is whole, and its bytes depend on the input only, not on the number of processes.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crysldnet.data.crystals import Crystals, faults, from_lists
from crysldnet.data.schema import STRUCTURE_COLUMNS, crystals_from_table, metadata_of, table_from_crystals, units_of
from crysldnet.data.store import StoreWriter
from crysldnet.data.structure_files import find_structure_files, material_ids, read_many, without_suffix
from crysldnet.errors import DataError

BATCH = 1000
ID_COLUMNS = ("material_id", "id", "file", "filename", "name")
MISSING = ("", "nan", "na", "n/a", "null", "none")
Source = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


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
    ledger = _Ledger(strict=on_error == "raise")
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


class _Ledger:
    """Keeps account of what is rejected and noted; a strict one raises at the first rejection."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._lines: list[tuple[str, str, str]] = []
        self._notes: dict[str, tuple[int, str]] = {}

    def reject(self, place: str, material_id: str, reason: str) -> None:
        if self._strict:
            raise DataError(f"{place}{f' ({material_id})' if material_id else ''}: {reason}")
        self._lines.append((place, material_id, reason))

    def note(self, text: str, place: str) -> None:
        count, first = self._notes.get(text, (0, place))
        self._notes[text] = (count + 1, first)

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(f"{count:,} {text} (first: {first})" for text, (count, first) in self._notes.items())

    def save(self, path: Path) -> Path | None:
        """Write the rejections as CSV, or remove an earlier import's where there are none."""
        if not self._lines:
            path.unlink(missing_ok=True)
            return None
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        with partial.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("source", "id", "reason"), *self._lines])
        os.replace(partial, path)
        return path


class _Batch(NamedTuple):
    places: list[str]
    ids: list[str]
    crystals: Crystals
    properties: dict[str, pa.Array]


Advance = Callable[[int], None]


class _FileSource:
    """Crystals of CIF and POSCAR files."""

    def __init__(self, source: Source, workers: int, max_atoms: int) -> None:
        self._files = find_structure_files(source)
        self._workers, self._max_atoms = workers, max_atoms
        paths = [os.path.abspath(file) for file in self._files]
        folder = Path(source).expanduser() if isinstance(source, (str, os.PathLike)) else Path()
        inside = folder != Path() and folder.is_dir()
        root = Path(os.path.abspath(folder) if inside else os.path.commonpath([os.path.dirname(p) for p in paths]))
        self._names = [Path(path).relative_to(root).as_posix() for path in paths]
        self._ids = material_ids(self._names, root.name)
        self.units: dict[str, str] = {}
        self.columns: list[str] = []
        self.metadata = {"source": self._names[0] if len(paths) == 1 and not inside else root.name}

    def __len__(self) -> int:
        return len(self._files)

    def ids(self) -> set[str]:
        return set(self._ids)

    def batches(self, ledger: _Ledger, advance: Advance) -> Iterator[_Batch]:
        parsed = read_many(self._files, workers=self._workers, max_atoms=self._max_atoms)
        results = zip(self._names, self._ids, parsed, strict=True)
        while chunk := list(islice(results, BATCH)):
            good = []
            for name, material_id, (structure, reason, notes) in chunk:
                advance(1)
                for note in notes:
                    ledger.note(f"files {note}", name)
                if structure is None:
                    ledger.reject(name, material_id, reason)
                else:
                    good.append((name, material_id, *structure))
            names, ids, *arrays = (list(part) for part in zip(*good, strict=True)) if good else ([] for _ in range(5))
            yield _Batch(names, ids, from_lists(*arrays), {})


class _ParquetSource:
    """Crystals of a Parquet file in the schema, read batch by batch."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable Parquet file ({error})") from error
        schema = self._file.schema_arrow
        try:
            crystals_from_table(schema.empty_table())
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        types = {field.name: _property_type(field.type) for field in schema if field.name not in STRUCTURE_COLUMNS}
        self._types = {name: kind for name, kind in types.items() if kind is not None}
        self._left_out = [name for name, kind in types.items() if kind is None]
        self.columns = list(self._types)
        self.units = {name: unit for name, unit in units_of(schema).items() if name in self._types}
        self.metadata = {"source": path.name} | metadata_of(schema)

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def ids(self) -> set[str]:
        return set(self._file.read(["material_id"])["material_id"].cast(pa.string()).to_pylist())

    def batches(self, ledger: _Ledger, advance: Advance) -> Iterator[_Batch]:
        for name in self._left_out:
            ledger.note("columns hold neither numbers nor text and were left out", name)
        row = 1
        try:
            for batch in self._file.iter_batches(BATCH, columns=[*STRUCTURE_COLUMNS, *self.columns]):
                yield self._batch(pa.Table.from_batches([batch]), row, ledger)
                row += len(batch)
                advance(len(batch))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self._path}: damaged at or after row {row} ({error})") from error

    def _batch(self, table: pa.Table, row: int, ledger: _Ledger) -> _Batch:
        places = [f"{self._path.name} row {row + i}" for i in range(len(table))]
        ids = [material_id or "" for material_id in table["material_id"].cast(pa.string()).to_pylist()]
        try:
            crystals, good = crystals_from_table(table), np.arange(len(table))
        except DataError:
            faulty = {i: _row_fault(table.slice(i, 1)) for i in range(len(table))}
            for i, fault in faulty.items():
                if fault is not None:
                    ledger.reject(places[i], ids[i], fault)
            good = np.array([i for i, fault in faulty.items() if fault is None], np.int64)
            crystals = crystals_from_table(table.take(good))
        places, ids = [places[i] for i in good], [ids[i] for i in good]
        properties = {}
        for name, kind in self._types.items():
            column = table[name].take(pa.array(good)).cast(kind).combine_chunks()
            if pa.types.is_floating(kind):
                for i in np.flatnonzero(np.isinf(column.to_numpy(zero_copy_only=False))).tolist():
                    ledger.reject(places[i], ids[i], f"{name} is infinite; its value is null")
                column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, kind))
            properties[name] = column
        return _Batch(places, ids, crystals, properties)


def _row_fault(row: pa.Table) -> str | None:
    try:
        crystals_from_table(row)
    except DataError as error:
        return re.sub(r"^row 0 \(.*?\): | in row 0$", "", str(error))
    return None


def _property_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type that a property column is kept in, or None for a type that isn't kept."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_float32(kind):
        return kind
    return pa.float64() if pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind) else None


def _open_source(source: Source, workers: int | None, max_atoms: int) -> _FileSource | _ParquetSource:
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix.lower() == ".parquet":
        return _ParquetSource(Path(source))
    return _FileSource(source, min(os.cpu_count() or 1, 8) if workers is None else max(workers, 1), max_atoms)


def _admitted(batch: _Batch, max_atoms: int, seen: set[str], ledger: _Ledger) -> _Batch:
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
    return _Batch(
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


@dataclass(frozen=True)
class Targets:
    """Properties of crystals by id.

    Attributes:
        name: the file's name.
        columns: [R] a column of numbers or text for each property.
        units: unit of each property whose header states one.
        rows: the row of each id.
    """

    name: str
    columns: dict[str, pa.Array]
    units: dict[str, str]
    rows: dict[str, int]

    def take(self, ids: list[str], ledger: _Ledger) -> dict[str, pa.Array]:
        """Return the properties of some crystals, null for those without a row."""
        index = [self.rows.get(material_id) for material_id in ids]
        for material_id, row in zip(ids, index, strict=True):
            if row is None:
                ledger.note(f"crystals have no row in {self.name}: their values are null", material_id)
        return {name: column.take(pa.array(index, pa.int64())) for name, column in self.columns.items()}


def _all_units(reader: _FileSource | _ParquetSource, table: Targets | None, given: Mapping[str, str]) -> dict[str, str]:
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


def read_targets(path: Path, ids: set[str], id_column: str | None, ledger: _Ledger) -> Targets:
    """Read a CSV of properties for crystals with these ids; commas, semicolons or tabs separate its cells.

    Raises:
        DataError: the file can't be read, or has no column of ids or none of properties.
    """
    header, rows = _read_csv(path)
    key = _key_column(path, header, id_column)
    found: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    for line, cells in rows:
        place = f"{path.name} line {line}"
        written = cells[key].strip() if key < len(cells) else ""
        material_id = next((name for name in _spellings(written) if name in ids), None)
        if len(cells) != len(header):
            ledger.reject(place, written, f"it has {len(cells)} cells where the header has {len(header)}")
        elif not written:
            ledger.reject(place, "", "the id is empty")
        elif material_id is None:
            ledger.reject(place, written, "no crystal has this id")
        else:
            found[material_id].append((place, cells))
    if not found:
        raise DataError(f"{path}: no row belongs to a crystal; is {header[key]!r} the column of ids (id_column)?")
    for material_id in [material_id for material_id, same in found.items() if len(same) > 1]:
        same = found.pop(material_id)
        for place, _ in same:
            ledger.reject(place, material_id, f"the id stands in {len(same)} rows, so none of them is used")
    columns: dict[str, pa.Array] = {}
    units: dict[str, str] = {}
    for j, title in enumerate(header):
        if j != key and title:
            name, unit = _name_and_unit(title)
            cells_ = [(same[0][0], material_id, same[0][1][j].strip()) for material_id, same in found.items()]
            columns[name] = _column(name, unit, cells_, ledger)
            if unit:
                units[name] = unit
    return Targets(path.name, columns, units, {material_id: row for row, material_id in enumerate(found)})


def _read_csv(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header and the rows that aren't empty, each with its line number."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: can't be opened ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line}: not UTF-8; save the table as CSV in UTF-8") from error
    first = text.lstrip().split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
    try:
        rows = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}") from error
    if not rows:
        raise DataError(f"{path}: the table is empty")
    return [title.strip() for title in rows[0][1]], rows[1:]


def _key_column(path: Path, header: list[str], id_column: str | None) -> int:
    """Return the index of the column of ids, having checked the names of all columns."""
    key = id_column or next((name for name in ID_COLUMNS if name in header), None)
    if key is None or key not in header:
        raise DataError(
            f"{path}: no column {key or ', '.join(ID_COLUMNS)} for the ids; "
            f"name one of {', '.join(map(repr, header))} with id_column"
        )
    names = [_name_and_unit(title)[0] for title in header if title and title != key]
    for name in names:
        if names.count(name) > 1 or name in STRUCTURE_COLUMNS:
            raise DataError(f"{path}: the column name {name!r} is taken or stands there twice; rename it")
    if header.count(key) > 1:
        raise DataError(f"{path}: {key!r} stands there twice; rename one")
    if not names:
        raise DataError(f"{path}: it has no column beside the ids; are its cells separated by commas?")
    return header.index(key)


def _name_and_unit(title: str) -> tuple[str, str | None]:
    """Split ``band_gap (eV)`` or ``band_gap [eV]``."""
    match = re.fullmatch(r"(.*\S)\s*[(\[]([^()\[\]]+)[)\]]", title)
    return (match[1], match[2].strip()) if match else (title, None)


def _spellings(written: str) -> Iterator[str]:
    """Give the ids that a table may mean: as written, without suffix, without folder, the folder of a POSCAR."""
    bare = without_suffix(written)
    yield from (written, bare, *material_ids([written], ""), Path(written).name, Path(bare).name)


def _column(name: str, unit: str | None, cells: list[tuple[str, str, str]], ledger: _Ledger) -> pa.Array:
    """Make a column of numbers, or of text where it has no unit and no number."""
    numbers = [_number(text) for _, _, text in cells]
    if unit is None and None in numbers and all(number is None or math.isnan(number) for number in numbers):
        return pa.array([None if text.lower() in MISSING else text for *_, text in cells], pa.string())
    for (place, material_id, text), number in zip(cells, numbers, strict=True):
        if number is None:
            ledger.reject(place, material_id, f"{name} is {text!r}, not a finite number; its value is null")
    values = [math.nan if number is None else number for number in numbers]
    return pa.array(np.array(values, np.float64), from_pandas=True)


def _number(text: str) -> float | None:
    """Read a cell: NaN where it is empty, None where it isn't a finite number."""
    if text.lower() in MISSING:
        return math.nan
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None
