"""What a run prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to standard output; numbers are right-aligned."""
    table = Table(title=title or None, title_justify="left", show_header=any(header))
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def note(text: str) -> None:
    """Print a line to standard error."""
    Console(stderr=True).print(text, highlight=False, soft_wrap=True, markup=False)
