"""Find CIF and POSCAR files, name the crystals in them, and read them one by one or in parallel.

Both formats are read by pymatgen, which is imported when the first file is read and not before. Where pymatgen would
guess (a species that is no element, a space group that it doesn't know, a POSCAR without element names), the file is
refused instead, because a guessed crystal can't be told from a right one later.
"""

from __future__ import annotations

import glob
import math
import os
import re
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

from crysldnet.data.elements import SYMBOLS
from crysldnet.errors import DataError

Structure = tuple[NDArray[np.float64], NDArray[np.uint8], NDArray[np.float64]]
"""lattice [3, 3] in Å, atomic numbers [n], fractional coordinates [n, 3]"""

SUFFIXES = {".cif": "CIF", ".vasp": "POSCAR", ".poscar": "POSCAR"}
BARE_NAMES = ("POSCAR", "CONTCAR")
KNOWN_NAMES = "*.cif, *.vasp, *.poscar, POSCAR*, CONTCAR*"

NOTE_ISOTOPE = "have deuterium or tritium, which was read as hydrogen"
NOTE_BLOCKS = "hold several crystals, of which the first was read"
NOTE_NO_SYMMETRY = "state no symmetry and were read as P 1"
NOTE_SETTING = "name their space group but not its operations; its standard setting was taken"
NOTE_FORMULA = "state a formula that their atoms don't give; hydrogens may be missing in them"

_SERIAL = 200
"""files; fewer are read sooner in one process than it takes to start others"""
_GROUP = 32
_CELL = (*(f"_cell_length_{x}" for x in "abc"), *(f"_cell_angle_{x}" for x in ("alpha", "beta", "gamma")))
_SITE = ("fract_x", "fract_y", "fract_z", "occupancy", "disorder_group", "attached_hydrogens")
_SYMMETRY = re.compile(r"name_h[-_]m|name_hall|it_number|int_tables_number|symop_operation|equiv_pos_as_xyz", re.I)
_ELEMENTS = frozenset(SYMBOLS[1:])
_TYPE = re.compile(r"([A-Za-z]+)[\d.]*[+-]?[\d.]*")
_LABEL = re.compile(r"([A-Za-z]+)[\w'\"*()]*[+-]?")
_UNKNOWN = ("?", ".")
_HYDROGEN = {"D": "H", "T": "H"}
_NO_SYMMETRY = {"", "?", ".", "1", "P1", "X,Y,Z", "+X,+Y,+Z"}


def kind_of(name: str | os.PathLike[str]) -> str | None:
    """Return "CIF" or "POSCAR" by the file's name, in any case, or None where it is neither's."""
    name = Path(name).name
    kind = SUFFIXES.get(Path(name).suffix.lower())
    return kind or ("POSCAR" if name.upper().startswith(BARE_NAMES) else None)


def without_suffix(name: str) -> str:
    """Drop a structure file's suffix from a name or path, and nothing from other names."""
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in SUFFIXES else name


def find_structure_files(sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
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
        notes: what was read otherwise than it stands there is appended, as one of the ``NOTE_`` texts.

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
            read = _read_cif if kind == "CIF" else _read_poscar
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


def _read_cif(text: str, max_atoms: int | None, notes: list[str]) -> tuple[Any, Any, Any]:
    from pymatgen.io.cif import CifParser

    text = _block_with_atoms(text, notes)
    parser: Any = CifParser.from_str(text)
    data = next(iter(parser._cif.data.values())).data
    if len(_operations(data)) == 1 and any("rounded" in remark for remark in parser.warnings):
        # 0.33335 became 1/3, which is meant for special positions and wrong where there is no symmetry
        parser = CifParser.from_str(text, frac_tolerance=0)
        data = next(iter(parser._cif.data.values())).data
    _check_cell(data)
    _check_sites(data, max_atoms, notes)
    try:
        structure = parser.parse_structures(primitive=False, on_error="raise")[0]
    except ValueError as error:
        if "exceeded tolerance" not in str(error):
            raise
        raise DataError(
            "two sites stand at the same place: a disordered site, which needs an ordered approximation, "
            "or atoms listed in full beside symmetry operations that make them again"
        ) from error
    _check_symmetry(data, parser, structure.lattice.matrix, notes)
    if NOTE_ISOTOPE not in notes and (parser.check(structure) or "").startswith(("Missing", "Incorrect")):
        notes.append(NOTE_FORMULA)
    return structure.lattice.matrix, structure.atomic_numbers, structure.frac_coords


def _block_with_atoms(text: str, notes: list[str]) -> str:
    blocks = re.split(r"^\s*data_", text, flags=re.MULTILINE | re.IGNORECASE)[1:]
    if not blocks:
        raise DataError("not a CIF: there is no data_ block in it")
    blocks = [block for block in blocks if re.search(r"^\s*_atom_site_fract_x", block, re.MULTILINE)]
    if not blocks:
        raise DataError("it has no atoms (no _atom_site_fract_x)")
    if len(blocks) > 1:
        notes.append(NOTE_BLOCKS)
    return f"data_{blocks[0]}"


def _operations(data: dict[str, Any]) -> list[str]:
    """Return the symmetry operations that a block lists."""
    for key in ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz"):
        if key in data:
            return [data[key]] if isinstance(data[key], str) else data[key]
    return []


def _number(text: str) -> float:
    """Read a CIF number such as ``5.64(2)``; NaN where it isn't one."""
    try:
        return float(re.sub(r"\(\d*\)?$", "", text))
    except ValueError:
        return math.nan


def _check_cell(data: dict[str, Any]) -> None:
    for tag in _CELL:
        if tag not in data:
            raise DataError(f"it has no {tag}")
        value = _number(data[tag])
        if not math.isfinite(value):
            raise DataError(f"{tag} is {data[tag]!r}, not a finite number")
        if value <= 0 or ("angle" in tag and value >= 180):
            raise DataError(f"{tag} is {data[tag]}: its cell has no volume")


def _check_sites(data: dict[str, Any], max_atoms: int | None, notes: list[str]) -> None:
    """Refuse sites that aren't one whole atom each, and write the others so that pymatgen has nothing to guess."""
    for key in [key for key in data if key.startswith("_atom_site_") and isinstance(data[key], str)]:
        data[key] = [data[key]]
    labels = data["_atom_site_label"]
    if max_atoms is not None and len(labels) > max_atoms:
        raise DataError(f"it has {len(labels)} atoms, over the limit of {max_atoms} (max_atoms)")
    columns = [name for name in _SITE if f"_atom_site_{name}" in data]
    for i, label in enumerate(labels):
        if fault := _fault_of_site({name: data[f"_atom_site_{name}"][i] for name in columns}):
            raise DataError(f"site {label} {fault}")
    species = data.get("_atom_site_type_symbol")
    elements = [_element(text, is_label=species is None) for text in species or labels]
    if not {"D", "T"}.isdisjoint(elements):
        notes.append(NOTE_ISOTOPE)
    data["_atom_site_type_symbol"] = [_HYDROGEN.get(element, element) for element in elements]
    data["_atom_site_occupancy"] = ["1"] * len(labels)
    data.pop("_atom_type_oxidation_number", None)


def _fault_of_site(site: dict[str, str]) -> str | None:
    for axis in ("fract_x", "fract_y", "fract_z"):
        if axis not in site:
            return f"has no _atom_site_{axis}"
        if not math.isfinite(_number(site[axis])):
            return f"has the coordinate {site[axis]!r}, which is not a finite number"
    occupancy = site.get("occupancy", "1")
    if occupancy not in _UNKNOWN and not abs(_number(occupancy) - 1) < 1e-3:
        return f"has partial occupancy ({occupancy}): a crystal needs whole atoms, make an ordered approximation"
    if site.get("disorder_group", ".") not in _UNKNOWN:
        return "is disordered: a crystal needs whole atoms, make an ordered approximation"
    if site.get("attached_hydrogens", "0") not in (*_UNKNOWN, "0"):
        return "has hydrogens attached that have no coordinates; add them"
    return None


def _element(text: str, *, is_label: bool) -> str:
    """Return the element symbol, D or T that a type symbol ("Fe3+") or a site's label ("Fe1A") stands for."""
    match = (_LABEL if is_label else _TYPE).fullmatch(text)
    letters = match[1] if match else ""
    candidates = [letters.capitalize()]
    if is_label and not letters[1:2].islower():
        candidates += [letters[:2].capitalize(), letters[:1].upper()]
    for symbol in candidates:
        # the label T1 is as a rule a tetrahedral site, not tritium
        if symbol == "D" or (symbol == "T" and not is_label) or symbol in _ELEMENTS:
            return symbol
    raise DataError(f"{text!r} is not a chemical element (1 to 118)")


def _check_symmetry(data: dict[str, Any], parser: Any, lattice: NDArray[np.float64], notes: list[str]) -> None:
    """Refuse a symmetry that pymatgen didn't understand and left out, or that isn't one of the lattice."""
    rotations = np.array([operation.rotation_matrix for operation in parser.symmetry_operations])
    metric = lattice @ lattice.T
    if not np.allclose(rotations.transpose(0, 2, 1) @ metric @ rotations, metric, rtol=0, atol=0.02 * metric.max()):
        raise DataError(
            "its symmetry operations don't fit its cell; write it with operations in the cell's own setting"
        )
    if _operations(data):
        return
    if not any("Defaulting to P1" in remark for remark in parser.warnings):
        notes.append(NOTE_SETTING)
        return
    for key, value in data.items():
        stated = value if isinstance(value, str) else (value or [""])[0]
        if _SYMMETRY.search(key) and "".join(stated.split()).upper() not in _NO_SYMMETRY:
            raise DataError(f"its symmetry isn't understood ({key} {stated}): write it with its symmetry operations")
    notes.append(NOTE_NO_SYMMETRY)


def _read_poscar(text: str, max_atoms: int | None, notes: list[str]) -> tuple[Any, Any, Any]:
    from pymatgen.io.vasp.inputs import Poscar

    lines = text.split("\n")
    float(lines[1])
    names = [re.split("[_/]", word)[0] for word in lines[5].split()]
    counts = [int(word) for word in lines[6].split() if word.isdigit()]
    if names and not names[0].isdigit():
        elements = [_element(name, is_label=False) for name in names]
        if not {"D", "T"}.isdisjoint(elements):
            notes.append(NOTE_ISOTOPE)
        if not sum(counts):
            raise DataError("it has no atoms")
    if max_atoms is not None and sum(counts) > max_atoms:
        raise DataError(f"it has {sum(counts)} atoms, over the limit of {max_atoms} (max_atoms)")
    if sum(counts) > len(lines):
        raise DataError(f"it ends too early for its {sum(counts)} atoms")
    poscar = Poscar.from_str(text, read_velocities=False)
    if not poscar.true_names:
        raise DataError("it doesn't name its elements (VASP 4); add a line with their symbols above the counts")
    structure = poscar.structure
    return structure.lattice.matrix, structure.atomic_numbers, structure.frac_coords


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
