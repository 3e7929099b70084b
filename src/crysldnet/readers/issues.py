"""Issues of an import: rejections with reasons, and notes on what was normalized."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from crysldnet.console import csv_text
from crysldnet.errors import DataError
from crysldnet.io import replacing


class ImportIssues:
    """Records rejections and notes; a strict instance raises at the first rejection."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._lines: list[tuple[str, str, str]] = []
        self._notes: list[tuple[str, str, str]] = []
        self._unused: dict[str, tuple[int, str]] = {}
        self._totals: Counter[str] = Counter()

    def reject(self, place: str, material_id: str, reason: str) -> None:
        """Record the rejection of the crystal, row or value in ``place`` (a file, or file and row).

        Raises:
            DataError: the instance is strict.
        """
        if self._strict:
            raise DataError(f"{place}{f' ({material_id})' if material_id else ''}: {reason}")
        self._lines.append((place, material_id, reason))

    def leave_out(self, kind: str, what: str, place: str, material_id: str, reason: str) -> None:
        """Record the rejection of a value or row, though its crystal may be used.

        Args:
            kind: counted kind, such as "values of 'band_gap'".
            what: the value or the row's id, as written.
            place, material_id, reason: as in :meth:`reject`.

        Raises:
            DataError: the instance is strict.
        """
        self.reject(place, material_id, reason)
        count, first = self._unused.get(kind, (0, f"{what!r} in {place}"))
        self._unused[kind] = (count + 1, first)

    def count(self, kind: str, number: int) -> None:
        """Add to the total number of values or rows of a kind."""
        self._totals[kind] += number

    @property
    def unused(self) -> tuple[str, ...]:
        """Number of rejected values of each property and rows of the table, the total, and the first."""
        return tuple(
            f"{count:,} of {self._totals[kind]:,} {kind} could not be used, first {first}"
            for kind, (count, first) in self._unused.items()
        )

    def note(self, text: str, place: str, material_id: str = "") -> None:
        """Record another ``place`` for a note."""
        self._notes.append((place, material_id, text))

    @property
    def notes(self) -> tuple[str, ...]:
        """Each note with its count and first place."""
        first = {text: place for place, _, text in reversed(self._notes)}
        counts = Counter(text for _, _, text in self._notes)
        return tuple(f"{count:,} {text} (first: {first[text]})" for text, count in counts.items())

    def save(self, out: Path, rejects: str = "rejects") -> tuple[Path | None, Path | None]:
        """Write ``OUT.rejects.csv`` and ``OUT.notes.csv`` and return their paths; empty ones are removed."""
        return _save(out, rejects, "reason", self._lines), _save(out, "notes", "note", self._notes)


def _save(out: Path, kind: str, title: str, lines: list[tuple[str, str, str]]) -> Path | None:
    path = out.with_name(f"{out.name}.{kind}.csv")
    if not lines:
        path.unlink(missing_ok=True)
        return None
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        file.write(csv_text([("source", "id", title), *lines]))
    return path
