"""Output of a run, and escaping of text from files for terminals, figures and spreadsheets."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from itertools import islice
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_FORMULA = (*"=+-@\t\r\n", *"＝＋－＠")
"""What a formula, or a cell that hides one, starts with."""
_NEXT = re.compile(r"(?<=[;\t\r\n])('*)(?=[=+\-@＝＋－＠])")
_silent: ContextVar[tuple[str, ...]] = ContextVar("silent", default=())

SHOWN = 20
"""Maximum number of targets or rows in tables, plots and pages."""


def listed(names: Collection[str], most: int = SHOWN) -> str:
    """Return names separated by commas; of many, the first and the number of others."""
    more = len(names) - most
    return ", ".join(islice(names, most)) + (f" and {more:,} more" if more > 0 else "")


def did_you_mean(name: str, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """Return a question with the known name most like an unknown one; ``otherwise`` if none is similar."""
    close = get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else otherwise


def escaped(text: str) -> str:
    """Return text with control characters escaped, so that a file name can't control a terminal."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def indented(text: str) -> str:
    """Return a message for a terminal with further lines indented, so that none looks like a separate message."""
    return escaped(text).replace("\n", "\n  ")


def lines_of(texts: Iterable[str]) -> str:
    """Return texts for a terminal, one per line, with line breaks escaped."""
    return "\n".join(escaped(text).replace("\n", r"\n") for text in texts)


def drawable(text: str) -> str:
    """Return text for matplotlib on one line, with dollar signs escaped."""
    return escaped(text).replace("\n", r"\n").replace("\t", " ").replace("$", r"\$")


def spreadsheet_safe(value: object) -> object:
    """Return a value for a CSV cell: text that a spreadsheet would interpret as a formula gets a leading ``'``.

    This applies to text that starts with ``=``, ``+``, ``-``, ``@``, also in full width, a tab or a line break (OWASP,
    CSV injection) and isn't a number, also after existing ``'``. Within a text the same signs get one after a
    semicolon, a tab or a line break, where a spreadsheet may begin another cell.
    """
    if not isinstance(value, str):
        return value
    value = _NEXT.sub(r"'\1", value)
    text = value.lstrip("'")
    if not text.startswith(_FORMULA):
        return value
    try:
        float(text)
    except ValueError:
        return f"'{value}"
    return value


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Return CSV rows with cells from :func:`spreadsheet_safe`; line breaks within cells are quoted."""
    lines: list[str] = []
    writer = csv.writer(SimpleNamespace(write=lambda line: lines.append(f"{line[:-2]}\n")))
    writer.writerows(map(spreadsheet_safe, row) for row in rows)
    return "".join(lines)


def from_spreadsheet(cell: str) -> str:
    """Return the inverse of :func:`spreadsheet_safe`."""
    text = _NEXT.sub(lambda quotes: quotes[1][1:], cell)
    return text[1:] if text.startswith("'") and spreadsheet_safe(text[1:]) == cell else text


@contextmanager
def silenced(*kinds: str) -> Iterator[None]:
    """Suppress ``tables``, ``notes`` or ``next`` within this context."""
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
    """Return text shown literally, without markup."""
    from rich.text import Text

    return Text(lines_of([text]))


def note(text: str) -> None:
    """Print a line to standard error."""
    if "notes" in _silent.get():
        return
    from rich.console import Console

    Console(stderr=True).print(lines_of([text]), highlight=False, soft_wrap=True, markup=False, emoji=False)


@contextmanager
def progress(
    title: str, total: int | None, *, done: int = 0, in_bytes: bool = False, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show a bar with its rate if standard error is a terminal; the returned function takes what was added.

    Args:
        title: what is counted.
        total: number at the end, None if unknown.
        done: number at the start.
        in_bytes: bytes are counted.
        shown: show the bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, rate = Console(stderr=True), TextColumn("{task.fields[rate]}")
    columns = (TextColumn(title), BarColumn(), DownloadColumn() if in_bytes else MofNCompleteColumn(), rate)
    off = not (shown and console.is_terminal)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=off) as bar:
        task = bar.add_task("", total=total, completed=done, rate="")

        def advance(count: int) -> None:
            bar.advance(task, count)
            speed = bar.tasks[0].finished_speed or bar.tasks[0].speed or 0.0
            bar.update(task, rate=(f"{speed / 1e6:,.1f} MB/s" if in_bytes else f"{speed:,.0f}/s") if speed else "")

        yield advance


def suggest_next(command: str, make: str | None = None) -> None:
    """Print the suggested next command, as a ``make`` command if this one was started by make."""
    if "next" in _silent.get():
        return
    note(f"next: {make if make is not None and 'MAKELEVEL' in os.environ else command}")
