"""What a run prints, and how texts that come from files are shown in terminals, drawings and spreadsheets."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_silent: ContextVar[tuple[str, ...]] = ContextVar("silent", default=())

SHOWN = 20
"""Of hundreds of targets or rows, how many are shown in tables, plots and pages."""


def listed(names: Collection[str], most: int = SHOWN) -> str:
    """Return names with commas between them; of many, the first and how many more there are."""
    more = len(names) - most
    return ", ".join(islice(names, most)) + (f" and {more:,} more" if more > 0 else "")


def escaped(text: str) -> str:
    """Return a text with its control characters as escapes, so that a name in a file can't steer a terminal."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def indented(text: str) -> str:
    """Return a message for a terminal; its further lines are indented, so that none of them looks like another one."""
    return escaped(text).replace("\n", "\n  ")


def lines_of(texts: Iterable[str]) -> str:
    """Return texts for a terminal, each in a line of its own: a line break within one can't make it look like two."""
    return "\n".join(escaped(text).replace("\n", r"\n") for text in texts)


def drawable(text: str) -> str:
    """Return what matplotlib draws as this text in one line: its dollars begin no formula."""
    return escaped(text).replace("\n", r"\n").replace("\t", " ").replace("$", r"\$")


def spreadsheet_safe(value: object) -> object:
    """Return a value for a cell of a CSV: a text that a spreadsheet would take for a formula has ``'`` before it.

    Those are texts that begin with ``=``, ``+``, ``-``, ``@``, a tab or a carriage return (OWASP, CSV injection) and
    aren't numbers, also behind a ``'`` of their own.
    """
    text = value.lstrip("'") if isinstance(value, str) else ""
    if text[:1] not in ("=", "+", "-", "@", "\t", "\r") or not text:
        return value
    try:
        float(text)
    except ValueError:
        return f"'{value}"
    return value


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Return rows of a CSV whose cells :func:`spreadsheet_safe` has made; a line break within a cell is in quotes."""
    lines: list[str] = []
    writer = csv.writer(SimpleNamespace(write=lambda line: lines.append(f"{line[:-2]}\n")))
    writer.writerows(map(spreadsheet_safe, row) for row in rows)
    return "".join(lines)


def from_spreadsheet(cell: str) -> str:
    """Return the text of a cell that :func:`spreadsheet_safe` made."""
    return cell[1:] if cell.startswith("'") and spreadsheet_safe(cell[1:]) == cell else cell


@contextmanager
def silenced(*kinds: str) -> Iterator[None]:
    """Print nothing of these kinds, ``tables`` or ``notes``, within this context."""
    before = _silent.set(kinds)
    try:
        yield
    finally:
        _silent.reset(before)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to standard output; numbers are right-aligned."""
    if "tables" in _silent.get():
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=_plain(title) if title else None, title_justify="left", show_header=any(header))
    for place, name in enumerate(header):
        table.add_column(_plain(name), justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(_plain, row))
    Console().print(table)


def _plain(text: str) -> Text:
    """Return a text that is shown as it is: brackets in it are no markup."""
    from rich.text import Text

    return Text(lines_of([text]))


def note(text: str) -> None:
    """Print a line to standard error."""
    if "notes" in _silent.get():
        return
    from rich.console import Console

    Console(stderr=True).print(lines_of([text]), highlight=False, soft_wrap=True, markup=False, emoji=False)


def suggest_next(command: str, make: str | None = None) -> None:
    """Print the command to type next, in the form of those who use ``make`` where this one came from it."""
    note(f"next: {make if make is not None and 'MAKELEVEL' in os.environ else command}")
