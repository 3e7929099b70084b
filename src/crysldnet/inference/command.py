"""Helpers for commands that process many crystals: list of files, progress, and final summary;
and the rejected crystals of a call from Python.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from crysldnet.console import note, progress
from crysldnet.errors import DataError
from crysldnet.readers.rows import ImportIssues
from crysldnet.readers.stream import Chunk, Refused

SHOWN = 20
"""rejected crystals to print; the file lists all"""


OnError = Literal["raise", "report"]


class Refusals:
    """Rejected crystals, if allowed, and notes on what was normalized on reading."""

    def __init__(self, on_error: OnError = "report") -> None:
        if on_error not in get_args(OnError):
            raise DataError(f"on_error must be one of {', '.join(get_args(OnError))}, not {on_error!r}")
        self._raise = on_error == "raise"
        self._issues = ImportIssues(strict=False)
        self.refused: list[Refused] = []

    def refuse(self, refused: Refused) -> None:
        """Add a rejected crystal.

        Raises:
            DataError: this isn't allowed.
        """
        if self._raise:
            raise DataError(f"{refused.source}: {refused.reason}")
        self._issues.reject(*refused)
        self.refused.append(refused)

    def take(self, portion: Chunk) -> None:
        """Add the rejections and notes of a portion; raises like :meth:`refuse`."""
        for refused in portion.refused:
            self.refuse(refused)
        for noted in portion.notes:
            self._issues.note(*noted)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on what was normalized on reading."""
        return self._issues.notes


class Account(Refusals):
    """Refusals of a command, which are printed, and the number of processed crystals.

    Args:
        out: the output; rejected crystals are listed in a file next to it.
        done: verb for the last line.
    """

    def __init__(self, out: str, done: str) -> None:
        super().__init__()
        self.out, self._done = out, done
        self.used = 0

    def refuse(self, refused: Refused) -> None:
        """Add and report a rejected crystal."""
        super().refuse(refused)
        if len(self.refused) <= SHOWN:
            note(f"refused: {refused.source}: {refused.reason}")
        elif len(self.refused) == SHOWN + 1:
            note("refused: … and more")

    @contextmanager
    def progress(self, total: int | None) -> Iterator[Callable[[Chunk], None]]:
        """Show the progress; the returned function takes each portion."""
        with progress("crystals", total) as advance:

            def take(portion: Chunk) -> None:
                self.used += len(portion.ids)
                self.take(portion)
                advance(len(portion.ids) + len(portion.refused))

            yield take

    def refuse_nothing_used(self) -> None:
        """Stop if no crystal was valid, and list the reasons next to the output."""
        if not self.used:
            raise DataError(f"none of the {len(self.refused)} crystals could be used{self._reasons()}")

    def finish(self, notes: Iterable[str] = ()) -> None:
        """List what was rejected and noted next to the output, and print a summary."""
        for noted in (*self.notes, *notes):
            note(f"note: {noted}")
        note(f"{self.used:,} crystals {self._done}, {len(self.refused):,} refused: {self.out}{self._reasons()}")

    def _reasons(self) -> str:
        """List what was rejected and noted next to the output; return the location, as the end of a line."""
        if self.out == "-":
            return ""
        out = Path(self.out)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            refused, notes = self._issues.save(out, "refused")
        except (OSError, DataError) as error:
            return f", reasons can't be listed: {error}"
        return (f", reasons in {refused}" if refused else "") + (f", notes in {notes}" if notes else "")


def refuse_overwriting(out: str, files: str | list[str]) -> None:
    """Refuse an output that would replace one of the files to read."""
    for name in [files] if isinstance(files, str) else files:
        if os.path.exists(out) and os.path.exists(name) and os.path.samefile(out, name):
            raise DataError(f"out={out}: one of the files to read; choose another name")


def named_files(files: str | list[str], account: Account) -> str | list[str]:
    """Return the files to read: as named, or several separated by commas if each exists.

    ``-`` reads names from standard input, one per line. Missing files in that list are rejected; the others are read.

    Raises:
        DataError: the list is empty, or the output would replace a file of it.
    """
    found = _named_files(files, account)
    refuse_overwriting(account.out, found)
    return found


def _named_files(files: str | list[str], account: Account) -> str | list[str]:
    if isinstance(files, str) and "," in files and not os.path.exists(files):
        several = [name.strip() for name in files.split(",") if name.strip()]
        return several if all(map(_is_there, several)) else files
    if files != "-":
        return files
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # names may not be UTF-8
    listed = [line for line in (line.strip() for line in sys.stdin) if line]
    if not listed:
        raise DataError("files=-: standard input lists no file")
    there = []
    for name in listed:
        if _is_there(name):
            there.append(name)
        else:
            account.refuse(Refused(name, "", "no such file"))
    if not there:
        account.refuse_nothing_used()
    return there


def _is_there(name: str) -> bool:
    """Return whether a name is a file, folder or data set, or a split of one."""
    return os.path.exists(os.path.expanduser(name)) or ":" in name or "@" in name
