"""Download files: resumable, atomic, verified by sha256."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from crysldnet import __version__
from crysldnet.console import progress
from crysldnet.data.catalog import File, PublishedSet
from crysldnet.data.store import file_hash
from crysldnet.errors import DataError

SCHEMES = ("https",)
"""Allowed URL schemes, also after redirects."""
TIMEOUT_S = 30.0
ALREADY_QUOTED = "%/:?#[]@!$&'()*+,;="
"""Characters of an address that have a meaning in it or were quoted before; others, as é, are quoted."""
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
            fetch(file.url, path, _by_hand(definition, file, folder))
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


def fetch(url: str, path: Path, hint: str) -> None:
    """Download one file; an interrupted download resumes if the file on the server is unchanged.

    Args:
        url: https address.
        path: of the file to write.
        hint: what to do without a network, as a sentence without period.

    Raises:
        DataError: it can't be downloaded or written.
    """
    partial, tag = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.etag")
    _check_scheme(url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        request = urllib.request.Request(
            quote(url, safe=ALREADY_QUOTED), headers={"User-Agent": f"crysldnet/{__version__}"}
        )
        if partial.exists() and tag.exists():
            request.add_header("Range", f"bytes={partial.stat().st_size}-")
            request.add_header("If-Range", tag.read_text())
        with urllib.request.build_opener(_SafeRedirects).open(request, timeout=TIMEOUT_S) as response:
            _receive(response, partial, tag)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send: the part is complete, or belongs to another file
            tag.unlink(missing_ok=True)
        raise DataError(f"{url}: the server says {error.code} {error.reason}. {hint}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        kept = ". The partial file is kept, and the next try resumes it" if partial.exists() and tag.exists() else ""
        raise DataError(
            f"{url}: can't be reached, or was cut off ({reason}). Without a network: {hint}{kept}"
        ) from error
    except OSError as error:
        raise DataError(f"can't write to {path.parent}: {error.strerror}") from error
    os.replace(partial, path)
    tag.unlink(missing_ok=True)


def _receive(response: HTTPResponse, partial: Path, tag: Path) -> None:
    begun = partial.stat().st_size if response.status == 206 else 0
    length = response.headers.get("Content-Length")
    total = None if length is None else begun + int(length)
    etag = response.headers.get("ETag", "")
    if etag and not etag.startswith("W/"):
        tag.write_text(etag)
    else:
        tag.unlink(missing_ok=True)
    with (
        progress(partial.stem, total, done=begun, in_bytes=True) as advance,
        partial.open("ab" if begun else "wb") as out,
    ):
        while chunk := response.read(_CHUNK):
            out.write(chunk)
            advance(len(chunk))
        out.flush()
        os.fsync(out.fileno())
    if total is not None and partial.stat().st_size != total:
        raise ConnectionError(f"{partial.stat().st_size:,} of {total:,} bytes arrived")
