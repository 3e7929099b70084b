"""Sources of an import. A reader divides its source into chunks that can be read independently."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import pyarrow as pa

from crysldnet.errors import DataError
from crysldnet.graphs.crystals import Crystals
from crysldnet.readers.compression import inner_name
from crysldnet.readers.kinds import KINDS as KINDS
from crysldnet.readers.kinds import STORE, known_files
from crysldnet.readers.kinds import register as register
from crysldnet.readers.rows import Piece, Rows, Task
from crysldnet.readers.structure_files import (
    at_home,
    find_structure_files,
    kind_of,
    matches,
    material_ids,
    parse_structure,
    printable,
    read_structure,
)

PIECE = 500
"""crystals per chunk"""
PIECE_BYTES = 16 * 2**20
"""maximum bytes of a chunk that is sent to another process"""

T = TypeVar("T")


class Settings(NamedTuple):
    """Settings of an import for the readers.

    Attributes:
        max_atoms: larger crystals are rejected.
        id_column: key of a record's id, if not one of the usual ones.
        structure: key of a record's structure, ``output.structure`` for a nested one; None for automatic.
    """

    max_atoms: int
    id_column: str | None
    on_note: Literal["keep", "reject"] = "keep"
    structure: str | None = None


class Reader(Protocol):
    """A source of crystals.

    Attributes:
        name: name of the source, for messages and the store.
        metadata: metadata of the source.
        total: number of crystals, None if not known in advance.
    """

    name: str

    @property
    def metadata(self) -> Mapping[str, str]: ...

    @property
    def total(self) -> int | None: ...

    def tasks(self, settings: Settings) -> Iterator[Task]:
        """Divide the source into chunks, always in the same way."""


def pieces(items: Iterable[T], size: Any = None) -> Iterator[list[T]]:
    """Divide items into lists of up to 500, and of up to 16 MiB if ``size`` returns the size of an item."""
    piece: list[T] = []
    carried = 0
    for item in items:
        piece.append(item)
        carried += size(item) if size is not None else 0
        if len(piece) == PIECE or carried >= PIECE_BYTES:
            yield piece
            piece, carried = [], 0
    if piece:
        yield piece


def tasks_to_the_end(reader: Reader, settings: Settings) -> Iterator[Task]:
    """Yield a reader's tasks; damage found later becomes a rejected crystal, and other sources continue.

    The tasks need no torch, so that a process that runs them starts sooner.
    """
    try:
        for task in reader.tasks(settings):
            yield partial(_read, task, reader.name, settings)
    except DataError as error:
        yield partial(_nothing, reader.name, str(error), settings)


def _read(task: Task, name: str, settings: Settings) -> Piece:
    try:
        return task()
    except DataError as error:
        return _nothing(name, str(error), settings)


def _nothing(name: str, reason: str, settings: Settings) -> Piece:
    rows = Rows()
    rows.reject(name, "", reason)
    return rows.piece(settings.max_atoms)


class FileReader:
    """CIF and POSCAR files; see :class:`Reader`."""

    def __init__(self, files: Sequence[Path], folder: Path | None) -> None:
        self._files = files
        paths = [os.path.abspath(file) for file in files]
        root = Path(os.path.abspath(folder) if folder else os.path.commonpath([os.path.dirname(p) for p in paths]))
        self._names = [printable(os.path.relpath(path, root)).replace(os.sep, "/") for path in paths]
        self._ids = material_ids(self._names, printable(root.name))
        self.name = self._names[0] if len(paths) == 1 and folder is None else printable(root.name)
        self.metadata: dict[str, str] = {}
        self.total = len(files)

    def tasks(self, settings: Settings) -> Iterator[Task]:
        for piece in pieces(zip(self._names, self._ids, map(str, self._files), strict=True)):
            yield partial(read_files, piece, settings)


def read_files(files: Iterable[tuple[str, str, str]], settings: Settings) -> Piece:
    """Read a chunk of a folder: place, id and path of each file."""

    def structures() -> Iterator[tuple[str, str, Any]]:
        for place, material_id, path in files:
            yield place, material_id, partial(_without_path, path)

    return read_structures(structures(), settings)


def _without_path(path: str, **options: Any) -> Any:
    try:
        return read_structure(path, **options)
    except DataError as error:
        raise DataError(str(error).removeprefix(f"{path}: ")) from error


def read_members(members: Iterable[tuple[str, str, str, bytes | str]], settings: Settings) -> Piece:
    """Read a chunk of an archive: place, id, name and content of each member, or why there is no content."""

    def structures() -> Iterator[tuple[str, str, Any]]:
        for place, material_id, name, content in members:
            read = partial(_refuse, content) if isinstance(content, str) else partial(parse_structure, content, name)
            yield place, material_id, read

    return read_structures(structures(), settings)


def _refuse(reason: str, **_options: Any) -> Any:
    raise DataError(reason)


def read_structures(structures: Iterable[tuple[str, str, Any]], settings: Settings) -> Piece:
    """Read structures, given place, id and a function that reads each."""
    rows = Rows()
    for place, material_id, read in structures:
        notes: list[str] = []
        try:
            structure = read(max_atoms=settings.max_atoms, notes=notes)
            refuse_noted(notes, settings)
        except DataError as error:
            rows.reject(place, material_id, str(error))
            continue
        rows.add(place, material_id, structure, {})
        for note in notes:
            rows.note(f"files {note}", place, material_id)
    return rows.piece(settings.max_atoms)


def refuse_noted(notes: Sequence[str], settings: Settings) -> None:
    """Reject a crystal with notes, if configured."""
    if notes and settings.on_note == "reject":
        raise DataError(f"of those that {'; and of those that '.join(notes)} (on_note is reject)")


OnBad = Callable[[str, str], None]
"""Called with the name of a file that can't be opened, and the reason."""


def open_readers(source: Any, on_bad: OnBad | None = None) -> list[Reader]:
    """Identify a source and return the readers of its parts.

    Args:
        source: as in :func:`crysldnet.tools.importer.importer.import_crystals`, or a reader.
        on_bad: called for a damaged multi-crystal file; None raises.

    Raises:
        DataError: there is nothing to read, or its kind is unknown.
    """
    if isinstance(source, (str, os.PathLike)):
        return _open_paths([source], on_bad)
    if hasattr(source, "tasks"):
        return [source]
    if _is_whole(source):
        return [_object_reader(source)]
    if not isinstance(source, Iterable):
        raise DataError(f"{type(source).__name__} is no source of crystals")
    items = iter(source)
    first = list(islice(items, 1))
    if not first:
        raise DataError("the source is empty")
    if isinstance(first[0], (str, os.PathLike)):
        return _open_paths([*first, *items], on_bad)
    return [_object_reader(source if isinstance(source, Sequence) else chain(first, items))]


def _is_whole(source: Any) -> bool:
    """Return whether a source is one object: crystals, a structure or record, or a table."""
    from crysldnet.readers.records import is_data_frame, is_object

    if isinstance(source, Mapping) and len(source) > 1 and all(is_object(value) for value in source.values()):
        raise DataError("a dict of structures would be taken for one record; give its values as a list")
    kinds = (Crystals, Mapping, pa.Table)
    return isinstance(source, kinds) or is_object(source) or hasattr(source, "iter_rows") or is_data_frame(source)


def _object_reader(source: Any) -> Reader:
    from crysldnet.readers.tables import ObjectReader

    return ObjectReader(source)


def _open_paths(sources: Sequence[str | os.PathLike[str]], on_bad: OnBad | None) -> list[Reader]:
    stores = [os.fspath(source) for source in sources if _is_store(source)]
    paths: dict[Path, None] = {}
    for source in sources:
        if _is_store(source):
            continue
        try:
            paths |= dict.fromkeys(_expanded(at_home(source)))
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(printable(os.fspath(source)), str(error).removeprefix(f"{source}: "))
    readers: list[Reader] = []
    structures = [path for path in paths if path.is_dir() or kind_of(path)]
    others = [path for path in paths if not (path.is_dir() or kind_of(path))]
    if structures:
        files = find_structure_files(structures)
        readers.append(FileReader(files, structures[0] if len(paths) == 1 and structures[0].is_dir() else None))
    opened: list[tuple[Callable[[str], Reader], str]] = [(_open_file, str(path)) for path in others]
    opened += [(partial(_open, STORE), store) for store in stores]
    for open_, path in opened:
        try:
            readers.append(open_(path))
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(printable(path), str(error).removeprefix(f"{path}: "))
    return readers


def _is_store(source: str | os.PathLike[str]) -> bool:
    """Return whether a source is a store, a named data set, or a split of one."""
    name = os.fspath(source)
    if name.startswith(("embedded:", "published:")) or os.path.isfile(os.path.join(name, "store.json")):
        return True
    whole, at, _ = name.rpartition("@")
    return bool(at) and not os.path.exists(name) and (_is_store(whole) or whole.lower().endswith(".parquet"))


def _expanded(path: Path) -> list[Path]:
    if os.path.lexists(path):  # a broken link is rejected on reading
        return [path]
    found = [file for file in matches(path) if not file.is_dir() and (kind_of(file) or suffix_of(file) in KINDS)]
    if not found:
        raise DataError(f"{path}: no structure file there; those read are {known_files()}")
    return found


def suffix_of(path: Path) -> str:
    """Return a file's suffix in lowercase without that of a compression; ".tar" also for "x.tgz"."""
    name = path.name.lower()
    for short in (".tgz", ".tbz2", ".txz"):
        name = name[: -len(short)] + ".tar" if name.endswith(short) else name
    return Path(inner_name(name)).suffix


def _open_file(path: str | Path) -> Reader:
    suffix = suffix_of(Path(path))
    if suffix not in KINDS:
        raise DataError(f"{path}: not a file of crystals by its name; those read are {known_files()}")
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would block
        raise DataError(f"{path}: not a file that can be read")
    return _open(KINDS[suffix], Path(path))


def _open(kind: str | Callable[[Any], Reader], path: str | Path) -> Reader:
    from importlib import import_module

    if not isinstance(kind, str):
        return kind(path)
    module, name = kind.split(".")
    return getattr(import_module(f"crysldnet.readers.{module}"), name)(path)
