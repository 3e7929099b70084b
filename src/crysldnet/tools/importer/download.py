"""``crysldnet data download``: download a published data set and convert it to a store.

Downloads are resumable, atomic, and verified by sha256.
"""

from __future__ import annotations

import argparse
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from crysldnet import __version__
from crysldnet.data.catalog import File, PublishedSet, definition_of, published
from crysldnet.data.datasets import DATA_VARIABLE, data_folder, open_store, published_path
from crysldnet.data.store import file_hash
from crysldnet.errors import DataError
from crysldnet.tools.importer.published import Made, make_store

HELP = "download a published data set into a store"
DESCRIPTION = f"""\
Fetch the files of a published data set into data/raw/NAME, compare them with their sha256, and make data/NAME.store,
which data=NAME and published:NAME read. The environment variable {DATA_VARIABLE} names another folder than data.

Interrupted downloads resume. Without a network, the message says which file to put where; existing files aren't
downloaded again. Counts that differ from the publication are reported.

NAME.yaml defines your own data set, like the files in conf/published. Without NAME, the data sets are listed."""
EXAMPLE = """\
examples:
  crysldnet data download
  crysldnet data download jarvis_dft_3d
  crysldnet data download expt_kingsbury --structures data/megnet.store"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="of the data set, or NAME.yaml; without it they are listed",
    )
    parser.add_argument("--info", action="store_true", help="show the definition without downloading")
    parser.add_argument(
        "--structures", metavar="STORE", help="Materials Project crystals, for data sets that only name them"
    )
    parser.add_argument("--overwrite", action="store_true", help="recreate the store from the files")


def run(arguments: argparse.Namespace) -> int:
    """Download and convert, or list; return the exit status."""
    if arguments.name is None:
        sys.stdout.write("\n".join(_listed(definition) for definition in published().values()) + "\n")
        return 0
    definition = definition_of(arguments.name)
    if arguments.info:
        sys.stdout.write("\n".join(describe(definition)) + "\n")
        return 0
    raw, out = data_folder() / "raw" / definition.name, published_path(definition.name)
    if out.exists() and not arguments.overwrite:
        raise DataError(f"{out} already exists; use it, or recreate it with --overwrite")
    structures = None if arguments.structures is None else open_store(arguments.structures)
    with alone(out):
        if out.exists() and not arguments.overwrite:
            sys.stdout.write(f"{out} was created by another process meanwhile\n")
            return 0
        digests = fetch_all(definition, raw)
        made = make_store(definition, raw, out, structures=structures, overwrite=arguments.overwrite, digests=digests)
    sys.stdout.write("\n".join(_report(definition, digests, made)) + "\n")
    return 0 if made.report.kept else 1


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Let one process at a time prepare a store; the others wait.

    Raises:
        DataError: the folder isn't writable.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out.with_name(f".{out.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise DataError(f"can't write to {out.parent}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def _listed(definition: PublishedSet) -> str:
    where = "here" if published_path(definition.name).exists() else ""
    return f"{definition.name:<22}{definition.entries:>10,}  {where:<5} {definition.title}, {definition.version}"


def describe(definition: PublishedSet) -> list[str]:
    """Return the description of a data set in lines."""
    lines = [f"{definition.title}, {definition.version}", f"  entries   {definition.entries:,}"]
    for file in definition.files:
        lines.append(f"  file      {file.name} from {file.url}{' (by hand)' if file.manual else ''}")
        lines.append(f"            sha256 {file.sha256 or 'not verified'}")
    for property_ in definition.properties:
        sizes = property_.sizes
        shown = "" if sizes is None else f"; train/val/test {sizes.train:,}/{sizes.val:,}/{sizes.test:,}"
        lines.append(f"  property  {property_.name} ({property_.unit}){shown}")
    for key, text in (
        ("splits", definition.splits),
        ("license", definition.license),
        ("citation", definition.citation),
        ("caveat", definition.caveat),
    ):
        lines += [f"  {key:<9} {text}"] if text else []
    return lines


def _report(definition: PublishedSet, digests: dict[str, str], made: Made) -> list[str]:
    known = {file.name: file.sha256 for file in definition.files}
    lines = [str(made.report)]
    for name, digest in digests.items():
        if known.get(name) is None:
            lines.append(
                f"{name}: not verified, for no sha256 is published; this one is {digest}: compare it with a colleague's"
            )
        else:
            lines.append(f"{name}: sha256 as published")
    for name, sizes in made.sizes.items():
        lines.append(f"{name}: {sizes['train']:,} train, {sizes['val']:,} val, {sizes['test']:,} test")
    lines += [f"NOT AS PUBLISHED: {difference}" for difference in made.differences]
    lines += [f"license: {definition.license}", f"cite: {definition.citation}"]
    return lines


SCHEMES = ("https",)
"""Allowed URL schemes, also after redirects."""
TIMEOUT_S = 30.0
_CHUNK = 1 << 20


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_scheme(url: str) -> None:
    """Reject an address that isn't authenticated in transit.

    Raises:
        DataError: it isn't https.
    """
    if urlsplit(url).scheme not in SCHEMES:
        raise DataError(f"{url}: not downloaded, because it isn't https")


def fetch_all(definition: PublishedSet, folder: Path) -> dict[str, str]:
    """Download missing files; return the sha256 of every file.

    Raises:
        DataError: a file can't be downloaded or isn't the published one; the message states which file to put where.
    """
    digests: dict[str, str] = {}
    for file in definition.files:
        if file.manual:
            found = sorted(folder.glob(file.name))
            if not found:
                raise DataError(
                    f"{definition.name}: its files must be downloaded manually. {_by_hand(definition, file, folder)}"
                )
            digests |= {path.name: file_hash(path) for path in found}
            continue
        path = folder / file.name
        if not path.exists():
            _fetch(definition, file, path)
        digests[file.name] = file_hash(path)
        if file.sha256 is not None and digests[file.name] != file.sha256:
            raise DataError(
                f"{path}: its sha256 is {digests[file.name]}, the published file's is {file.sha256}: it was damaged or "
                f"changed. Remove it and run crysldnet data download {definition.name} again"
            )
    return digests


def _by_hand(definition: PublishedSet, file: File, folder: Path) -> str:
    command = f"crysldnet data download {definition.name}"
    return f"Get {file.name} from {file.url}, put it into {folder}, and run {command} again"


def _fetch(definition: PublishedSet, file: File, path: Path) -> None:
    """Download one file; an interrupted download resumes if the file on the server is unchanged."""
    hint = _by_hand(definition, file, path.parent)
    partial, tag = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.etag")
    _check_scheme(file.url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        request = urllib.request.Request(file.url, headers={"User-Agent": f"crysldnet/{__version__}"})
        if partial.exists() and tag.exists():
            request.add_header("Range", f"bytes={partial.stat().st_size}-")
            request.add_header("If-Range", tag.read_text())
        with urllib.request.build_opener(_SafeRedirects).open(request, timeout=TIMEOUT_S) as response:
            _receive(response, partial, tag, file)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send: the part is complete, or belongs to another file
            tag.unlink(missing_ok=True)
        raise DataError(f"{file.url}: the server says {error.code} {error.reason}. {hint}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"{file.url}: can't be reached, or was cut off ({reason}). Without a network: {hint}. "
            "The partial file is kept, and the next try resumes it"
        ) from error
    except OSError as error:
        raise DataError(f"can't write to {path.parent}: {error.strerror}") from error
    os.replace(partial, path)
    tag.unlink(missing_ok=True)


def _receive(response: HTTPResponse, partial: Path, tag: Path, file: File) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    begun = partial.stat().st_size if response.status == 206 else 0
    length = response.headers.get("Content-Length")
    total = None if length is None else begun + int(length)
    etag = response.headers.get("ETag", "")
    if etag and not etag.startswith("W/"):
        tag.write_text(etag)
    else:
        tag.unlink(missing_ok=True)
    console = Console(stderr=True)
    columns = (TextColumn(file.name), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        partial.open("ab" if begun else "wb") as out,
    ):
        task = bar.add_task("fetch", total=total, completed=begun)
        while chunk := response.read(_CHUNK):
            out.write(chunk)
            bar.advance(task, len(chunk))
        out.flush()
        os.fsync(out.fileno())
    if total is not None and partial.stat().st_size != total:
        raise ConnectionError(f"{partial.stat().st_size:,} of {total:,} bytes arrived")
