"""Find CIF and POSCAR files, name the crystals in them, and read them one by one or in parallel.

Both formats are read by pymatgen, which is imported when the first file is read and not before. Where pymatgen would
guess (a species that is no element, a space group that it doesn't know, a POSCAR without element names), the file is
refused instead, because a guessed crystal can't be told from a right one later.
"""

from __future__ import annotations

import glob
import os
import threading
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crysldnet.data.cif import read_cif
from crysldnet.data.poscar import read_poscar
from crysldnet.errors import DataError

Structure = tuple[NDArray[np.float64], NDArray[np.uint8], NDArray[np.float64]]
"""lattice [3, 3] in Å, atomic numbers [n], fractional coordinates [n, 3]"""

Source = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
"""a folder, glob pattern or file, or several of these"""

SUFFIXES = {".cif": "CIF", ".vasp": "POSCAR", ".poscar": "POSCAR"}
BARE_NAMES = ("POSCAR", "CONTCAR")
KNOWN_NAMES = "*.cif, *.vasp, *.poscar, POSCAR*, CONTCAR*"

_SERIAL = 200
"""files; fewer are read sooner in one process than it takes to start others"""
_GROUP = 32
"""files that a process reads at a time"""


def kind_of(name: str | os.PathLike[str]) -> str | None:
    """Return "CIF" or "POSCAR" by the file's name, in any case, or None where it is neither's."""
    path = Path(name)
    kind = SUFFIXES.get(path.suffix.lower())
    return kind or ("POSCAR" if path.name.upper().startswith(BARE_NAMES) else None)


def without_suffix(name: str) -> str:
    """Drop a structure file's suffix from a name or path, and nothing from other names."""
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in SUFFIXES else name


def find_structure_files(sources: Source) -> list[Path]:
    """List structure files.

    Args:
        sources: a folder (searched at every depth, hidden names left out), a glob pattern, a file, or several of
            these. The files of a folder or pattern are sorted; each file is listed once.

    Raises:
        DataError: a source gives no structure file, or a file isn't one by its name.
    """
    found: dict[Path, None] = {}
    for source in [sources] if isinstance(sources, (str, os.PathLike)) else sources:
        path = Path(source).expanduser()
        if path.is_dir():
            files = sorted(_in_folder(path), key=Path.as_posix)
        elif path.exists():
            files = [path]
            if kind_of(path) is None:
                raise DataError(f"{path}: not a structure file by its name; those read are {KNOWN_NAMES}")
        elif not glob.has_magic(str(path)):
            raise DataError(f"{path}: no such file or folder")
        else:
            files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if kind_of(name)]
        if not files:
            raise DataError(f"{path}: no structure file there; those read are {KNOWN_NAMES}")
        found.update(dict.fromkeys(files))
    return list(found)


def _in_folder(folder: Path) -> Iterator[Path]:
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(base, name) for name in names if not name.startswith(".") and kind_of(name))


def material_ids(names: Sequence[str], folder: str) -> list[str]:
    """Name crystals after their files: by the stem, or by the path where several files have the same stem.

    Args:
        names: the files' paths relative to one folder, with forward slashes.
        folder: that folder's name, for a file there that is just called POSCAR.
    """

    def stem(name: str) -> str:
        path = PurePosixPath(without_suffix(name))
        if path.name.upper() in BARE_NAMES:
            return path.parent.name or folder
        return path.name

    stems, paths = [stem(name) for name in names], [without_suffix(name) for name in names]
    of_stem, of_path = Counter(stems), Counter(paths)
    return [
        stem if of_stem[stem] == 1 else path if of_path[path] == 1 else name
        for stem, path, name in zip(stems, paths, names, strict=True)
    ]


def read_structure(
    path: str | os.PathLike[str], *, max_atoms: int | None = None, notes: list[str] | None = None
) -> Structure:
    """Read the crystal in a CIF or POSCAR file, with every atom of the cell.

    Args:
        path: the file; its name says which kind it is.
        max_atoms: refuse a file that lists more sites than this before they are expanded.
        notes: what was read otherwise than it stands there is appended: the ``NOTE_`` texts of
            :mod:`crysldnet.data.cif` and :mod:`crysldnet.data.species`.

    Returns:
        lattice [3, 3] in Å with lattice vectors in rows, atomic numbers [n], fractional coordinates [n, 3] of atoms
        wrapped into the cell.

    Raises:
        DataError: the file is empty, binary or not of its kind; the crystal is disordered, has no atoms, a species
            that is no element, a symmetry that isn't understood, or a lattice that isn't finite or has no volume.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind is None:
        raise DataError(f"{path}: not a structure file by its name; those read are {KNOWN_NAMES}")
    found: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = read_cif if kind == "CIF" else read_poscar
            structure = _checked(*read(_text(path), max_atoms, found))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:
        raise DataError(f"{path}: not a {kind} file that can be read ({_reason(error)})") from error
    if notes is not None:
        notes.extend(found)
    return structure


def _reason(error: Exception) -> str:
    """Say in words what the bare errors of pymatgen's parsers mean."""
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]}"
    if isinstance(error, IndexError):
        return "it ends too early"
    if isinstance(error, ZeroDivisionError):
        return "its list of atoms, or another loop_, is empty"
    if "zip() argument" in str(error) or "is not a multiple" in str(error):
        return "a loop_ has a value too few or too many"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"it can't be opened ({error.strerror})") from error
    if not raw.strip():
        raise DataError("the file is empty; export it again")
    if b"\0" in raw:
        raise DataError("a binary file, not text; is it compressed or of another program?")
    return raw.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")


def _checked(lattice: Any, numbers: Any, frac_coords: Any) -> Structure:
    lattice = np.array(lattice, np.float64)
    frac_coords = np.array(frac_coords, np.float64).reshape(-1, 3)
    if not len(numbers):
        raise DataError("it has no atoms")
    if not np.isfinite(lattice).all():
        raise DataError("its lattice has a value that is not finite")
    if abs(np.linalg.det(lattice)) < 1e-6:
        raise DataError("its cell has no volume; check the lattice vectors")
    if not np.isfinite(frac_coords).all():
        raise DataError("a coordinate is not finite")
    return lattice, np.array(numbers, np.uint8), frac_coords - np.floor(frac_coords)


class Parsed(NamedTuple):
    """A file that was read, or why it couldn't be."""

    structure: Structure | None
    reason: str
    notes: tuple[str, ...]


def read_many(files: Sequence[Path], *, workers: int, max_atoms: int | None = None) -> Iterator[Parsed]:
    """Read files in their order, in ``workers`` processes where there are 200 or more.

    Raises:
        DataError: a process died.
    """
    groups = (list(files[first : first + _GROUP]) for first in range(0, len(files), _GROUP))
    if workers == 1 or len(files) < _SERIAL:
        for group in groups:
            yield from _read_group(group, max_atoms)
        return
    pending: deque[Future[list[Parsed]]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent)
    try:
        for group in groups:
            pending.append(pool.submit(_read_group, group, max_atoms))
            if len(pending) > 4 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that reads structure files died: it ran out of memory, or the script that called lacks "
            'if __name__ == "__main__"; with workers=1 everything runs in one process'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _read_group(files: Sequence[Path], max_atoms: int | None) -> list[Parsed]:
    return [_parsed(file, max_atoms) for file in files]


def _parsed(file: Path, max_atoms: int | None) -> Parsed:
    notes: list[str] = []
    try:
        structure = read_structure(file, max_atoms=max_atoms, notes=notes)
    except DataError as error:
        return Parsed(None, str(error).removeprefix(f"{file}: "), ())
    return Parsed(structure, "", tuple(notes))


def _end_with_parent() -> None:
    """Let a process end when the one that started it is killed; it would wait for work forever."""

    def wait() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
