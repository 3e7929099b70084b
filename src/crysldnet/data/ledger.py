"""The account of an import: what was rejected and why, and what was read otherwise than it stood there."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from crysldnet.errors import DataError


class Ledger:
    """Keeps account of what is rejected and noted; a strict one raises at the first rejection."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._lines: list[tuple[str, str, str]] = []
        self._notes: dict[str, tuple[int, str]] = {}

    def reject(self, place: str, material_id: str, reason: str) -> None:
        """Record that the crystal, row or value in ``place`` (a file, or a row of one) is left out.

        Raises:
            DataError: the ledger is strict.
        """
        if self._strict:
            raise DataError(f"{place}{f' ({material_id})' if material_id else ''}: {reason}")
        self._lines.append((place, material_id, reason))

    def note(self, text: str, place: str) -> None:
        """Count one more ``place`` of which a text is true."""
        count, first = self._notes.get(text, (0, place))
        self._notes[text] = (count + 1, first)

    @property
    def notes(self) -> tuple[str, ...]:
        """Each text with its count and its first place."""
        return tuple(f"{count:,} {text} (first: {first})" for text, (count, first) in self._notes.items())

    def save(self, path: Path) -> Path | None:
        """Write the rejections as CSV, or remove an earlier import's where there are none."""
        if not self._lines:
            path.unlink(missing_ok=True)
            return None
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        with partial.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("source", "id", "reason"), *self._lines])
        os.replace(partial, path)
        return path
