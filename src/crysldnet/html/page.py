"""Offline HTML pages with one template and style, light or dark following the reader's system, and their parts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from crysldnet.console import escaped
from crysldnet.data.elements import SYMBOLS

SERIES = ("#2f6db3", "#c2571a", "#2b8a57", "#8a4fbf", "#a87b00", "#c2385e", "#168a99", "#69707d")
"""Colors of lines and points on a light page, in order of use."""
_SERIES_DARK = ("#6fa8e8", "#f0935a", "#62c48f", "#bd92ea", "#d8b04a", "#f0809f", "#57c3d1", "#a5adba")
LIGHT = {"text": "#1c2430", "soft": "#5b6675", "line": "#d8dee6", "back": "#ffffff", "card": "#f6f8fa"}
"""Colors of a light page by CSS variable."""
_DARK = {"text": "#e6eaf0", "soft": "#9aa6b5", "line": "#364150", "back": "#12171e", "card": "#1a212b"}


def _variables(colors: dict[str, str], series: Sequence[str], tint: str) -> str:
    whole = {**colors, "bar": series[0], "tint": tint, **{f"series{i}": color for i, color in enumerate(series)}}
    return " ".join(f"--{name}: {value};" for name, value in whole.items())


_STYLE = (
    f"""
:root {{ color-scheme: light dark; {_variables(LIGHT, SERIES, "47, 109, 179")} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(_DARK, _SERIES_DARK, "111, 168, 232")} }} }}
"""
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 1rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 1.75rem 0 0.5rem; overflow-wrap: anywhere; }
h3 { font-size: 0.95rem; margin: 1.25rem 0 0.4rem; overflow-wrap: anywhere; }
.facts, .charts, .cards { display: grid; gap: 0.75rem; }
.facts { grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.cards { grid-template-columns: repeat(auto-fill, minmax(min(100%, 10rem), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 0.6rem 0.75rem;
  min-width: 0; }
.fact { overflow-wrap: anywhere; }
.facts + .charts { margin-top: 0.75rem; }
.fact b { display: block; font-size: 1.2rem; line-height: 1.3; }
.card h3 { margin: 0; }
.soft, figcaption { color: var(--soft); font-size: 0.85rem; }
figure { margin: 0; }
svg { display: block; width: 100%; }
svg.bars { height: 7rem; }
svg.bars rect { fill: var(--bar); }
.axis { display: flex; justify-content: space-between; border-top: 1px solid var(--line); font-size: 0.8rem; }
.elements { min-width: 40rem; display: grid; grid-template-columns: repeat(18, 1fr); gap: 2px; }
.elements span { aspect-ratio: 1; min-width: 0; display: flex; flex-direction: column; align-items: center;
  justify-content: center; border: 1px solid var(--line); border-radius: 3px; font-size: clamp(11px, 1.9vw, 16px);
  line-height: 1.1; }
.elements small { font-size: max(9px, 0.6em); color: inherit; }
.elements .none { opacity: 0.35; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.25rem 0.75rem 0.25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th, td { overflow-wrap: anywhere; min-width: 6.75rem; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--back); min-width: 7.5rem; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: minmax(5rem, max-content) 1fr; gap: 0.25rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""
)


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """Return a whole page; control characters, which file names may contain, are escaped.

    Args:
        title: plain text.
        body: HTML.
        style: additional CSS of this page.
    """
    lines = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *body,
        "</body></html>",
    ]
    return escaped("\n".join(lines))


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return cards with a name and a short value each, plain text."""
    cards = (f'<div class="card fact"><b>{escape(value)}</b>{escape(name)}</div>' for name, value in pairs)
    return f'<div class="facts">{"".join(cards)}</div>'


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: bool = False,
    attributes: Sequence[dict[str, str]] = (),
) -> str:
    """Return a table of plain text, which scrolls if wider than the page.

    Args:
        header: column names.
        rows: cells.
        numbers: all columns but the first are numeric.
        attributes: attributes of each row.
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        right = ["", *[' class="number"' if numbers else ""] * (len(cells) - 1)]
        return "".join(f"<{tag}{c}>{escape(cell)}</{tag}>" for c, cell in zip(right, cells, strict=True))

    own = iter(["".join(f' {name}="{escape(value)}"' for name, value in row.items()) for row in attributes])
    body = "".join(f"<tr{next(own, '')}>{line('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{line("th", header)}</tr>{body}</table></div>'


def formula(text: str) -> str:
    """Return a formula with subscripts."""
    return re.sub(r"(\d+)", r"<sub>\1</sub>", escape(text))


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
