"""Extended XYZ files and ASE databases, read by ase (extra ``formats``).

ase uses eV for energies, Å for lengths and Bohr magnetons for magnetic moments. From a database, only atoms and
key-value pairs are read.
"""

from __future__ import annotations

import io
import re
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from crysldnet.errors import DataError
from crysldnet.readers.records import Entry, read_entries, whole_numbers
from crysldnet.readers.rows import Piece
from crysldnet.readers.sources import Settings
from crysldnet.readers.structure_files import LIMIT, MAX_EMPTY_LINES, printable

UNITS = {"energy": "eV", "free_energy": "eV", "magmom": "muB", "fmax": "eV/Angstrom", "smax": "eV/Angstrom^3"}
"""Units of ase's own properties."""
_RESULTS = ("energy", "free_energy", "magmom")


def require_ase() -> None:
    """Raise a DataError if ase isn't installed."""
    try:
        import ase  # noqa: F401
    except ImportError as error:
        raise DataError("extended XYZ and ASE databases need ase: pip install 'crysldnet[formats]'") from error


def frames(stream: BinaryIO, name: str) -> Iterator[bytes]:
    """Split an extended XYZ file into frames; a truncated last frame is returned as is.

    Raises:
        DataError: a frame doesn't start with its number of atoms, so later frames can't be found.
    """
    line_number = last = 0
    while first := stream.readline(4096):
        line_number += 1
        if line_number - last > MAX_EMPTY_LINES:
            raise DataError(f"{name} line {line_number}: over {MAX_EMPTY_LINES:,} empty lines in a row")
        if not first.strip():
            continue
        if not (first.strip().isdigit() and len(first.strip()) < 10):
            raise DataError(
                f"{name} line {line_number}: {first[:40].decode(errors='replace').strip()!r} stands where a frame "
                "should begin with its number of atoms; correct it, because later frames can't be found"
            )
        lines, size = [first], 0
        for _ in range(int(first) + 1):
            line = stream.readline(LIMIT)
            size += sys.getsizeof(line)
            if not line:
                break
            if size > LIMIT:
                raise DataError(f"{name} line {line_number}: a frame of over {LIMIT // 2**20} MiB of lines")
            lines.append(line)
        line_number += len(lines) - 1
        last = line_number
        yield b"".join(lines)


def read_frames(frames: Iterable[tuple[str, str, bytes]], settings: Settings) -> Piece:
    """Read a chunk of an extended XYZ file: place, default id and text of each frame."""
    entries = (Entry(place, default_id, _frame(text)) for place, default_id, text in frames)
    return read_entries(entries, settings, UNITS)


def _frame(text: bytes) -> Any:
    """Return a frame as a record, or a record with the reason for its rejection."""
    from ase.io.extxyz import read_xyz

    count, lines = int(text.split(b"\n", 1)[0]), text.count(b"\n") + (not text.endswith(b"\n"))
    if lines < count + 2:
        return DataError(f"it ends too early for its {count} atoms")
    if fault := _fault_of_columns(text):
        return DataError(fault)
    try:
        (atoms,) = read_xyz(io.StringIO(text.decode("utf-8")), 0)
    except Exception as error:  # ase's parser raises any kind of error
        what = " ".join(str(error).split())[:150] or type(error).__name__
        return DataError(f"not an extended XYZ frame that can be read ({what})")
    if b"attice=" not in text.split(b"\n", 2)[1]:
        return DataError("it has no Lattice; a crystal needs one")
    results = {} if atoms.calc is None else {k: v for k, v in atoms.calc.results.items() if k in _RESULTS}
    return {**results, **atoms.info, "structure": atoms}


def _fault_of_columns(text: bytes) -> str | None:
    """Return errors in the columns declared by a frame; ase would allocate memory for all of them."""
    _, comment, *atoms = text.split(b"\n", 3)
    claimed = re.search(rb"""(?<!\w)Properties=["']?([^\s"']+)""", comment)
    if claimed is None or not atoms:
        return None
    names, kinds, widths = (claimed[1].decode(errors="replace").split(":")[i::3] for i in range(3))
    columns = sum(int(width) if width.isdecimal() else 0 for width in widths)
    if columns != len(cells := atoms[0].split()):
        return f"its Properties claim {columns} columns where an atom has {len(cells)}"
    if any(name == "Z" and kind != "I" for name, kind in zip(names, kinds, strict=False)):
        return "its atomic numbers Z are not a column of whole numbers (Z:I:1)"
    return None


def is_sqlite(path: Path) -> bool:
    """Return whether a file is an SQLite database, from its first bytes."""
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def refuse_what_computes(path: Path) -> None:
    """Reject an SQLite database that contains more than tables, because a view could return endless rows."""
    other = "SELECT name FROM sqlite_master WHERE type = 'view' OR sql LIKE 'CREATE VIRTUAL%'"
    try:
        with closing(sqlite3.connect(path)) as database:
            found = database.execute(other).fetchone()
    except sqlite3.Error as error:
        raise DataError(f"{path}: ase can't read this database ({error})") from error
    if found is not None:
        raise DataError(f"{path}: {found[0]!r} in it is a view or a virtual table; only tables are read")


def database_entries(path: Path, kind: str) -> Iterator[Entry]:
    """Yield the rows of an ASE database as records.

    Args:
        path: database file.
        kind: "db" (SQLite) or "json".

    Raises:
        DataError: ase can't read the database.
    """
    from ase.db import connect

    row = None
    try:
        for row in connect(str(path), type=kind, use_lock_file=False).select(include_data=False):
            default_id = f"{printable(path.stem)}-{row.id}"
            try:
                whole_numbers(row.numbers)  # ase would truncate decimals
                record: Any = {"structure": row.toatoms(), **row.key_value_pairs}
                record |= {key: row.get(key) for key in UNITS if isinstance(row.get(key), (int, float, np.number))}
            except DataError as error:
                record = error
            except Exception as error:
                record = DataError(f"not a row that ase can read ({' '.join(str(error).split())[:150]})")
            yield Entry(f"{printable(path.name)} row {row.id}", default_id, record)
    except Exception as error:
        after = "" if row is None else f" after row {row.id}"
        raise DataError(f"{path}: ase can't read this database{after} ({error})") from error


def is_ase_json(first: Any) -> bool:
    """Return whether the first value in a JSON file is a row of an ASE database."""
    return isinstance(first, dict) and {"unique_id", "numbers", "ctime"} <= first.keys()


def size_of(path: Path, kind: str) -> int | None:
    """Return the number of rows of a database."""
    from ase.db import connect

    try:
        return len(connect(str(path), type=kind, use_lock_file=False))
    except Exception as error:
        raise DataError(f"{path}: ase can't read this database ({error})") from error
