"""Periodic table as HTML with a value and a tint per element, styled by ``crysldnet.html.page``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from crysldnet.data.elements import SYMBOLS


@dataclass(frozen=True)
class ElementCell:
    """Content of an element's cell.

    Attributes:
        text: a few characters below the symbol.
        share: color intensity from 0 to 1.
        title: tooltip.
    """

    text: str
    share: float
    title: str


def place_of(z: int) -> tuple[int, int]:
    """Return row and column of an element, with lanthanides and actinides below the table."""
    if z in (1, 2):
        return 1, 1 if z == 1 else 18
    for row, noble in enumerate((10, 18, 36, 54, 86, 118), 2):
        if z <= noble:
            before = {10: 2, 18: 10, 36: 18, 54: 36, 86: 54, 118: 86}[noble]
            step = z - before
            if noble in (86, 118) and 3 <= step <= 17:
                return row + 3, step
            return row, step if step <= 2 else 18 - (noble - z)
    raise ValueError(f"no element {z}")


def periodic_table(cells: Mapping[str, ElementCell], absent: str) -> str:
    """Return the table.

    Args:
        cells: cells by symbol; other elements are pale.
        absent: tooltip of the other elements.
    """
    spans = []
    for z, symbol in enumerate(SYMBOLS[1:], 1):
        row, column = place_of(z)
        cell = cells.get(symbol)
        tint = "" if cell is None else f"background: rgba(var(--tint), {0.1 + 0.6 * cell.share:.2f});"
        title = f"{symbol}: {absent if cell is None else cell.title}"
        spans.append(
            f'<span class="{"none" if cell is None else ""}" style="grid-row: {row}; grid-column: {column}; {tint}" '
            f'title="{escape(title)}">{symbol}{"" if cell is None else f"<small>{escape(cell.text)}</small>"}</span>'
        )
    return f'<div class="scroll"><div class="elements">{"".join(spans)}</div></div>'
