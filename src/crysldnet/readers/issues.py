"""The account of an import: what was rejected and why, and what was normalized on reading."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from crysldnet.console import csv_text
from crysldnet.errors import DataError
from crysldnet.io import replacing


class ImportIssues:
    """Keeps account of what is rejected and noted; a strict one raises at the first rejection."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._lines: list[tuple[str, str, str]] = []
        self._notes: list[tuple[str, str, str]] = []
        self._unused: dict[str, tuple[int, str]] = {}
        self._totals: Counter[str] = Counter()

    def reject(self, place: str, material_id: str, reason: str) -> None:
        """Record that the crystal, row or value in ``place`` (a file, or a row of one) is left out.

        Raises:
            DataError: it is strict.
        """
        if self._strict:
            raise DataError(f"{place}{f' ({material_id})' if material_id else ''}: {reason}")
        self._lines.append((place, material_id, reason))

    def leave_out(self, kind: str, what: str, place: str, material_id: str, reason: str) -> None:
        """Record that a value or a row isn't used, though its crystal may be.

        Args:
            kind: what is counted, such as "values of 'band_gap'".
            what: the value or the row's id, as it stands there.
            place, material_id, reason: as :meth:`reject` takes them.

        Raises:
            DataError: it is strict.
        """
        self.reject(place, material_id, reason)
        count, first = self._unused.get(kind, (0, f"{what!r} in {place}"))
        self._unused[kind] = (count + 1, first)

    def count(self, kind: str, number: int) -> None:
        """Add to how many values or rows of a kind there are, used or not."""
        self._totals[kind] += number

    @property
    def unused(self) -> tuple[str, ...]:
        """How many values of each property and rows of the table aren't used, of how many, and the first."""
        return tuple(
            f"{count:,} of {self._totals[kind]:,} {kind} could not be used, first {first}"
            for kind, (count, first) in self._unused.items()
        )

    def note(self, text: str, place: str, material_id: str = "") -> None:
        """Record one more ``place`` of which a text is true."""
        self._notes.append((place, material_id, text))

    @property
    def notes(self) -> tuple[str, ...]:
        """Each text with its count and its first place."""
        first = {text: place for place, _, text in reversed(self._notes)}
        counts = Counter(text for _, _, text in self._notes)
        return tuple(f"{count:,} {text} (first: {first[text]})" for text, count in counts.items())

    def save(self, out: Path, rejects: str = "rejects") -> tuple[Path | None, Path | None]:
        """Write ``OUT.rejects.csv`` and ``OUT.notes.csv`` and return them; one without lines is removed."""
        return _save(out, rejects, "reason", self._lines), _save(out, "notes", "note", self._notes)


def _save(out: Path, kind: str, title: str, lines: list[tuple[str, str, str]]) -> Path | None:
    path = out.with_name(f"{out.name}.{kind}.csv")
    if not lines:
        path.unlink(missing_ok=True)
        return None
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        file.write(csv_text([("source", "id", title), *lines]))
    return path
