"""CIF and POSCAR files in zip and tar archives, read without unpacking to disk.

A member's name only names its crystal and is never used as a path. A member that is encrypted, damaged or over 64 MiB,
as declared or as found, is rejected with the reason.
"""

from __future__ import annotations

import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

from crysldnet.errors import DataError
from crysldnet.readers.compression import DAMAGED, decompressed, open_stream
from crysldnet.readers.rows import Piece, Task
from crysldnet.readers.sources import Settings, pieces, read_members
from crysldnet.readers.structure_files import KNOWN_NAMES, LIMIT, kind_of, material_ids, printable

_TOO_LARGE = f"it is larger than {LIMIT // 2**20} MiB, too large for one crystal"


def _is_structure(name: str) -> bool:
    hidden = any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
    return kind_of(name) is not None and not hidden and not name.startswith("__MACOSX/")


class _Archive(ABC):
    """Common part of both kinds of archive; see :class:`crysldnet.readers.sources.Reader`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = printable(path.name)
        self.metadata: dict[str, str] = {}
        self._members = [(place, name) for place, name in enumerate(self._names()) if _is_structure(name)]
        if not self._members:
            raise DataError(f"{path}: no structure file in it; those read are {KNOWN_NAMES}")
        names = [name for _, name in self._members]
        ids = material_ids([printable(name) for name in names], PurePosixPath(self.name).stem)
        self._entries = [
            (f"{self.name}/{printable(name)}", material_id, name) for name, material_id in zip(names, ids, strict=True)
        ]
        self.total = len(names)

    @abstractmethod
    def _names(self) -> list[str]: ...


class ZipReader(_Archive):
    """A zip archive; each process opens it and reads its members."""

    def _names(self) -> list[str]:
        try:
            with zipfile.ZipFile(self._path) as archive:
                return ["" if member.is_dir() else member.filename for member in archive.infolist()]
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise DataError(f"{self._path}: not a zip archive that can be read ({error})") from error

    def tasks(self, settings: Settings) -> Iterator[Task]:
        members = ((*entry, index) for entry, (index, _) in zip(self._entries, self._members, strict=True))
        for piece in pieces(members):
            yield partial(_read_zip, str(self._path), piece, settings)


@lru_cache(1)
def _opened(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _read_zip(path: str, members: list[tuple[str, str, str, int]], settings: Settings) -> Piece:
    archive = _opened(path)
    listed = archive.infolist()
    return read_members(
        ((place, material_id, name, _content(archive, listed[index])) for place, material_id, name, index in members),
        settings,
    )


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes | str:
    """Return the content of a member, or why it can't be read."""
    if member.flag_bits & 1:
        return "it is encrypted; unpack the archive with its password and import the folder"
    if member.file_size > LIMIT:
        return _TOO_LARGE
    try:
        with archive.open(member) as file:
            return decompressed(file.read(LIMIT + 1), member.filename, LIMIT + 1)
    except (*DAMAGED, NotImplementedError, RuntimeError) as error:
        return f"it is damaged, or compressed in a way that isn't known ({error})"


class TarReader(_Archive):
    """A tar archive, compressed or not; it is read once for names and once for content."""

    def _names(self) -> list[str]:
        return [member.name if member.isfile() else "" for _, member in self._walk()]

    def _walk(self) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        short = {".tgz": "gzip", ".tbz2": "bz2", ".txz": "xz"}.get(self._path.suffix.lower())
        try:
            with open_stream(self._path, short) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    yield archive, member
        except (*DAMAGED, tarfile.TarError) as error:
            raise DataError(f"{self._path}: not a tar archive that can be read to its end ({error})") from error

    def tasks(self, settings: Settings) -> Iterator[Task]:
        for piece in pieces(self._contents(), lambda member: len(member[3])):
            yield partial(read_members, piece, settings)

    def _contents(self) -> Iterator[tuple[str, str, str, bytes | str]]:
        entries = iter(self._entries)
        for archive, member in self._walk():
            if not (member.isfile() and _is_structure(member.name)):
                continue
            place, material_id, name = next(entries)
            if member.size > LIMIT:
                yield place, material_id, name, _TOO_LARGE
                continue
            file = archive.extractfile(member)
            assert file is not None
            try:
                yield place, material_id, name, decompressed(file.read(), name, LIMIT + 1)
            except DAMAGED as error:
                yield place, material_id, name, f"it is damaged ({error})"
