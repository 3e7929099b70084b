"""Rejected crystals, if allowed, and notes on what was normalized on reading."""

from __future__ import annotations

from typing import Literal, get_args

from crysldnet.errors import DataError
from crysldnet.readers.issues import ImportIssues
from crysldnet.readers.stream import Chunk, Refused

OnError = Literal["raise", "report"]


class Refusals:
    """Rejected crystals, if allowed, and notes on what was normalized on reading."""

    def __init__(self, on_error: OnError) -> None:
        if on_error not in get_args(OnError):
            raise DataError(f"on_error must be one of {', '.join(get_args(OnError))}, not {on_error!r}")
        self._raise = on_error == "raise"
        self._issues = ImportIssues(strict=False)
        self.refused: list[Refused] = []

    def take(self, portion: Chunk) -> None:
        """Add the rejections and notes of a portion.

        Raises:
            DataError: a crystal was rejected, and that isn't allowed.
        """
        if portion.refused and self._raise:
            raise DataError(f"{portion.refused[0].source}: {portion.refused[0].reason}")
        self.refused += portion.refused
        for note in portion.notes:
            self._issues.note(*note)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on what was normalized on reading."""
        return self._issues.notes
