"""Find CIF and POSCAR files, name their crystals, and read them.

CIF is read with gemmi, POSCAR with pymatgen, each imported on first use. Ambiguous files are rejected, because a wrong
guess can't be detected later. A POSCAR without element names is one, because pymatgen would guess them.
"""

from __future__ import annotations

import glob
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crysldnet.errors import DataError
from crysldnet.graphs.crystals import MAX_FRACTION
from crysldnet.readers.compression import DAMAGED, inner_name, open_stream
from crysldnet.readers.species import element_symbols

Structure = tuple[NDArray[np.float64], NDArray[np.uint8], NDArray[np.float64]]
"""lattice [3, 3] in Å, atomic numbers [n], fractional coordinates [n, 3]"""

Source = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
"""a folder, glob pattern or file, or several of these"""

SUFFIXES = {".cif": "CIF", ".vasp": "POSCAR", ".poscar": "POSCAR"}
BARE_NAMES = ("POSCAR", "CONTCAR")
KNOWN_NAMES = "*.cif, *.vasp, *.poscar, POSCAR*, CONTCAR*"
LIMIT = 64 * 2**20
"""bytes; a larger file is a mistake, or would exhaust memory"""
MAX_EMPTY_LINES = 100_000
"""consecutive empty lines; a file with more is a mistake, or would take forever"""


def kind_of(name: str | os.PathLike[str]) -> str | None:
    """Return "CIF" or "POSCAR" from the file name in any case, or None."""
    name = os.path.basename(inner_name(os.fspath(name)))
    kind = SUFFIXES.get(os.path.splitext(name)[1].lower())
    return kind or ("POSCAR" if name.upper().startswith(BARE_NAMES) else None)


def without_suffix(name: str) -> str:
    """Drop a structure file's suffix from a name or path; other names are unchanged."""
    bare = inner_name(name)
    stem, suffix = os.path.splitext(bare)
    return stem if suffix.lower() in SUFFIXES else bare if kind_of(bare) else name


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
        path = at_home(source)
        if path.is_dir():
            files = sorted(_in_folder(path), key=Path.as_posix)
        elif os.path.lexists(path):
            files = [path]
            if kind_of(path) is None:
                raise DataError(f"{path}: not a structure file by its name; those read are {KNOWN_NAMES}")
        else:
            files = [file for file in matches(path) if kind_of(file)]
        if not files:
            raise DataError(f"{path}: no structure file there; those read are {KNOWN_NAMES}")
        found.update(dict.fromkeys(files))
    return list(found)


def at_home(source: str | os.PathLike[str]) -> Path:
    """Return a path with a leading ~ expanded, unless a file or folder has that very name."""
    path = Path(source)
    return path if os.path.lexists(path) else Path(os.path.expanduser(source))


def matches(pattern: Path) -> list[Path]:
    """Return the matches of a glob pattern; its longest existing part is taken literally.

    Raises:
        DataError: no part of it is a pattern.
    """
    root = pattern
    while not root.exists() and root != root.parent:
        root = root.parent
    rest = str(pattern.relative_to(root))
    if not glob.has_magic(rest):
        raise DataError(f"{pattern}: {no_such_file(pattern)}")
    found: dict[tuple[str, str], Path] = {}  # visit a folder reached through several links only once
    for name in sorted(glob.glob(rest, root_dir=root, recursive=True)):
        folder, bare = os.path.split(root / name)
        found.setdefault((os.path.realpath(folder), bare), root / name)
    return [*found.values()]


def _in_folder(folder: Path) -> Iterator[Path]:
    """Yield the structure files in a folder recursively, and what can't be opened; linked folders are visited once,
    last.
    """
    seen: set[str] = set()
    waiting = [str(folder)]
    refused: list[OSError] = []
    while waiting:
        for base, folders, names in os.walk(waiting.pop(0), onerror=refused.append):
            if (real := os.path.realpath(base)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in folders if not name.startswith(".")]
            waiting += [path for name in folders if os.path.islink(path := os.path.join(base, name))]
            yield from (Path(base, name) for name in names if not name.startswith(".") and kind_of(name))
    yield from (Path(error.filename) for error in refused)


def no_such_file(path: str | os.PathLike[str]) -> str:
    """Return the message for a missing file, with the target if it is a link."""
    return f"no such file, but a link to {os.readlink(path)}" if os.path.islink(path) else "no such file or folder"


def printable(name: str) -> str:
    r"""Return a file name as text: ``caf\xe9.cif`` if it isn't UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")


def material_ids(names: Sequence[str], folder: str) -> list[str]:
    """Name crystals after their files: by stem, or by path if several files have the same stem.

    Args:
        names: the files' paths relative to one folder, with forward slashes.
        folder: name of the folder, for a file just named POSCAR.
    """

    def stem(name: str) -> str:
        parent, bare = os.path.split(without_suffix(name))
        return (os.path.basename(parent) or folder) if bare.upper() in BARE_NAMES else bare

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
        path: the file; its name determines the kind. It may be compressed (.gz, .bz2, .zst, .xz).
        max_atoms: reject a file that lists more sites, before expanding them.
        notes: what was normalized on reading is appended: the ``NOTE_`` texts of :mod:`crysldnet.readers.cif` and
            :mod:`crysldnet.readers.species`.

    Returns:
        lattice [3, 3] in Å with lattice vectors in rows, atomic numbers [n], fractional coordinates [n, 3] of atoms
        wrapped into the cell.

    Raises:
        DataError: the file is empty, binary or not of its kind; the crystal is disordered, has no atoms, a species
            that is no element, a symmetry that isn't understood, or a lattice that isn't finite or has no volume.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"{path}: not a file that can be read")
        with open_stream(path) as stream:
            raw = stream.read(LIMIT + 1)
    except FileNotFoundError as error:
        raise DataError(f"{path}: {no_such_file(path)}") from error
    except DAMAGED as error:
        raise DataError(f"{path}: it can't be read ({getattr(error, 'strerror', None) or error})") from error
    try:
        return parse_structure(raw, os.fspath(path), max_atoms=max_atoms, notes=notes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def parse_structure(
    raw: bytes | str, name: str, *, max_atoms: int | None = None, notes: list[str] | None = None
) -> Structure:
    """Read a crystal from the content of a CIF or POSCAR file; see :func:`read_structure`.

    Args:
        raw: the content.
        name: file name, which determines the kind.
        max_atoms: as in :func:`read_structure`.
        notes: as in :func:`read_structure`.
    """
    kind = kind_of(name)
    if kind is None:
        raise DataError(f"not a structure file by its name; those read are {KNOWN_NAMES}")
    found: list[str] = []
    try:
        text = _text(raw) if isinstance(raw, bytes) else raw
        structure = checked(*_reader(kind)(text, max_atoms, found))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"not a {kind} file that can be read ({_reason(error)})") from error
    if notes is not None:
        notes.extend(found)
    return structure


def _reader(kind: str) -> Callable[[str, int | None, list[str]], tuple[Any, Any, Any]]:
    if kind == "CIF":
        from crysldnet.readers.cif import read_cif

        return read_cif
    return read_poscar


def _reason(error: Exception) -> str:
    """Explain the terse errors of pymatgen's parser."""
    if isinstance(error, IndexError):
        return "it ends too early"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _text(raw: bytes) -> str:
    if len(raw) > LIMIT:
        raise DataError(f"it is larger than {LIMIT // 2**20} MiB, too large for one crystal")
    if not raw.strip():
        raise DataError("the file is empty; export it again")
    if b"\0" in raw:
        raise DataError("a binary file, not text; is it compressed or of another program?")
    return raw.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")


def checked(lattice: Any, numbers: Any, frac_coords: Any) -> Structure:
    """Check a crystal's arrays and wrap its atoms into the cell.

    Args:
        lattice: [3, 3] vectors as rows, in Å.
        numbers: [n] atomic numbers.
        frac_coords: [n, 3].

    Raises:
        DataError: no atoms, different numbers of species and coordinates, a value that isn't finite, or a cell without
            volume.
    """
    lattice = np.array(lattice, np.float64).reshape(3, 3)
    frac_coords = np.array(frac_coords, np.float64).reshape(-1, 3)
    if not len(numbers):
        raise DataError("it has no atoms")
    if len(numbers) != len(frac_coords):
        raise DataError(f"it has {len(numbers)} species and {len(frac_coords)} coordinates")
    if not np.isfinite(lattice).all():
        raise DataError("its lattice has a value that is not finite")
    if abs(np.linalg.det(lattice)) < 1e-6:
        raise DataError("its cell has no volume; check the lattice vectors")
    if not np.isfinite(frac_coords).all():
        raise DataError("a coordinate is not finite")
    if (farthest := np.abs(frac_coords).max()) > MAX_FRACTION:
        raise DataError(f"an atom is {farthest:.3g} cells away from the origin: is the unit right?")
    return lattice, np.array(numbers, np.uint8), frac_coords - np.floor(frac_coords)


def read_poscar(text: str, max_atoms: int | None, notes: list[str]) -> tuple[Any, Any, Any]:
    """Return lattice, atomic numbers and fractional coordinates as in :func:`read_structure`."""
    from pymatgen.io.vasp.inputs import Poscar

    lines = text.split("\n")
    float(lines[1])  # the scale; otherwise it isn't a POSCAR, as the error says
    names = [re.split("[_/]", word)[0] for word in lines[5].split()]
    counts = [int(word) for word in lines[6].split() if word.isdigit()]
    if names and not names[0].isdigit():
        element_symbols(names, notes=notes)
        if not sum(counts):
            raise DataError("it has no atoms")
    if max_atoms is not None and sum(counts) > max_atoms:
        raise DataError(f"it has {sum(counts)} atoms, over the limit of {max_atoms} (max_atoms)")
    if sum(counts) > len(lines):
        raise DataError(f"it ends too early for its {sum(counts)} atoms")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        poscar = Poscar.from_str(text, read_velocities=False)
    if not poscar.true_names:
        raise DataError("it doesn't name its elements (VASP 4); add a line with their symbols above the counts")
    structure = poscar.structure
    return structure.lattice.matrix, structure.atomic_numbers, structure.frac_coords
