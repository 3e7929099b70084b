"""Checkpoint file: written atomically, verified before loading, with plain types only.

It is a ``torch.save`` zip archive with an archive comment: a JSON header and the sha256 of everything before it. The
header records command, stage, model and position in the run, so that a wrong file is rejected before anything is
loaded.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from crysldnet.console import note
from crysldnet.errors import CheckpointError
from crysldnet.io import whole_file
from crysldnet.renames import new_key, new_value

FORMAT_VERSION = 1
LAST = "last.ckpt"
BEST = "best.ckpt"
HEADER = "crysldnet"
"""Checkpoint key for the position in the run, which goes into the header."""
_DIGEST = 64
_NO_COMMENT = b"\0\0"
_LONG = 1000
"""characters above which the header truncates a value"""


class DamagedError(CheckpointError):
    """A checkpoint differs from what was written."""


class CheckpointFile(CheckpointIO):
    """Write and read a run's checkpoints.

    Args:
        owner: command, stage and model that the files belong to, as plain values.
        keep: number of recent checkpoints to keep; older ones are ``last-1.ckpt``, ``last-2.ckpt``, …
    """

    def __init__(self, owner: Mapping[str, Any], keep: int = 2) -> None:
        self.owner, self.keep = dict(owner), keep

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint and rotate the earlier ones.

        Raises:
            CheckpointError: it can't be written; the earlier ones are unchanged.
        """
        path = Path(path)
        header = {"format_version": FORMAT_VERSION, "owner": _brief(self.owner), **checkpoint.get(HEADER, {})}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path, before=lambda: self._move_up(path)) as file:
                torch.save(checkpoint, file)
                _seal(file, header)
        except (OSError, RuntimeError) as error:  # torch's archive writer converts OSError to RuntimeError
            reason = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None) or error
            raise CheckpointError(
                f"can't write {path}: {reason}; the checkpoints before it are intact, continue with resume=last"
            ) from error

    def _move_up(self, path: Path) -> None:
        if path.name != LAST:
            return
        for number in range(self.keep - 1, 0, -1):
            younger = path if number == 1 else _older(path, number - 1)
            if younger.exists():
                younger.replace(_older(path, number))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verify and load a checkpoint; only plain types are ever loaded.

        Raises:
            CheckpointError: it is damaged, of a newer format or of another model.
        """
        self.check(Path(path), verify(Path(path)))
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path}: it holds more than plain values and tensors, and isn't loaded") from error
        except (RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: it can't be loaded ({error})") from error

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file."""
        Path(path).unlink(missing_ok=True)

    def check(self, path: Path, header: Mapping[str, Any]) -> None:
        """Check that a checkpoint can be read by this version and belongs to this command, stage and model.

        Raises:
            CheckpointError: naming what differs.
        """
        version = header.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: its format version is {version}, this crysldnet reads up to {FORMAT_VERSION}; "
                "upgrade crysldnet"
            )
        theirs, ours = _brief(header.get("owner", {})), _brief(self.owner)
        for key in sorted(theirs.keys() | ours.keys()):
            older = key.startswith("inputs.") and key not in theirs  # versions that didn't store them
            if theirs.get(key) != ours.get(key) and not older:
                raise CheckpointError(
                    f"{path}: it belongs to another run: {key} is {theirs.get(key)!r} there and {ours.get(key)!r} here"
                )

    def newest(self, folder: Path) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest good checkpoint of a folder and its header, or None if there is none yet.

        Raises:
            CheckpointError: the newest good one is of a newer format or of another model, or all are damaged.
        """
        last = folder / LAST
        there = [file for file in (last, *(_older(last, n) for n in range(1, 100))) if file.exists()]
        damage = []
        for file in there:
            if file.is_dir():
                raise CheckpointError(
                    f"{file}: a folder, as DeepSpeed writes them; it can't be verified or resumed from"
                )
            try:
                header = verify(file)
            except DamagedError as error:
                damage.append(str(error))
                continue
            self.check(file, header)
            for text in damage:
                rank_zero_only(note)(f"{text}; going on from {file.name}")
            return file, header
        if damage:
            raise CheckpointError(f"no checkpoint is left to resume from: {'; '.join(damage)}; start the run again")
        return None


def check_best(folder: Path) -> Path | None:
    """Return the checkpoint of the best epoch so far, verified, or None if there is none.

    Raises:
        CheckpointError: it is damaged and has no backup.
    """
    best = folder / BEST
    if not best.exists():
        return None
    if best.is_dir():  # DeepSpeed writes folders
        return best
    try:
        verify(best)
    except DamagedError as error:
        raise CheckpointError(
            f"{error}; no other file has the weights of that epoch. Start the run again, or delete this file and "
            "continue with resume=last: it then uses the best of the remaining epochs, or the last if none is better"
        ) from error
    return best


def _older(last: Path, number: int) -> Path:
    return last.with_name(f"{last.stem}-{number}{last.suffix}")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def _brief(owner: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of all keys; long ones, such as hundreds of targets, are truncated with their sha256.

    A zip archive comment is limited to 64 KiB.
    """
    found: dict[str, Any] = {}
    for key, value in _flat(json.loads(json.dumps(owner))).items():
        part, _, inner = key.partition(".")
        now = new_key(inner)
        found[f"{part}.{now}" if part == "model" else key] = new_value(now, value) if part == "model" else value
    for key, value in found.items():
        text = json.dumps(value)
        if len(text) > _LONG:
            found[key] = f"{text[:60]}… (sha256 {hashlib.sha256(text.encode()).hexdigest()})"
    return found


def _seal(file: io.BufferedRandom, header: Mapping[str, Any]) -> None:
    """Write header and digest as the comment of the zip archive."""
    text = json.dumps(header).encode()
    file.seek(-2, os.SEEK_END)
    assert file.read(2) == _NO_COMMENT
    file.seek(-2, os.SEEK_END)
    file.write((len(text) + _DIGEST).to_bytes(2, "little") + text)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0, os.SEEK_END)
    file.write(digest.encode())


def verify(path: Path) -> dict[str, Any]:
    """Check every byte of a checkpoint and return its header.

    Raises:
        DamagedError: it is empty, truncated or changed, or wasn't written by this package.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _DIGEST))
            digest = file.read(_DIGEST)
            file.seek(0)
            whole = hashlib.sha256()
            left = size - _DIGEST
            while left > 0:
                block = file.read(min(left, 1 << 20))
                whole.update(block)
                left -= len(block)
            if whole.hexdigest().encode() != digest:
                raise DamagedError(f"{path} is damaged (its sha256 differs)" if size else f"{path} is empty")
            return _read_header(file, size)
    except OSError as error:
        raise DamagedError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise DamagedError(f"{path} wasn't written by this version of crysldnet ({error})") from error


def _read_header(file: io.BufferedReader, size: int) -> dict[str, Any]:
    file.seek(max(0, size - (1 << 16) - 22))
    end = file.read()
    place = end.rfind(b"PK\x05\x06")
    header = json.loads(end[place + 22 : len(end) - _DIGEST]) if place >= 0 else None
    if not isinstance(header, dict):
        raise ValueError("it has no header")
    return header
