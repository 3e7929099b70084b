"""Draw the explanation of a prediction: the structure with ringed atoms, a color bar, and a table that adds up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crysldnet.data.elements import SYMBOLS
from crysldnet.graphs.crystals import Crystals
from crysldnet.html import page as html
from crysldnet.html.structure_drawing import STYLE as DRAWING
from crysldnet.html.structure_drawing import draw_structure, element_legend, swatch

if TYPE_CHECKING:
    from crysldnet.models.explanation import Explanation

_LOW, _ZERO, _HIGH = (47, 109, 179), (225, 225, 225), (194, 87, 26)
"""Colors (RGB) of the most negative contribution, of none, and of the most positive."""


def _hex(color: Sequence[int]) -> str:
    return "#" + "".join(f"{c:02x}" for c in color)


STYLE = (
    DRAWING
    + f"""
.scale {{ height: 0.7rem; border: 1px solid var(--soft); print-color-adjust: exact;
  background: linear-gradient(to right, {_hex(_LOW)}, {_hex(_ZERO)}, {_hex(_HIGH)}); }}
"""
    + """
.explained { display: grid; grid-template-columns: minmax(8rem, 16rem) 1fr; gap: 1rem; margin: 1rem 0; }
@media (max-width: 36rem) { .explained { grid-template-columns: 1fr; } }
.explained p { margin: 0.3rem 0; }
.explained .structure { max-width: 16rem; margin: 0 auto; }
.explained .axis { border: 0; }
.explained .legend { text-align: center; }
.explained .legend span { margin: 0 0.6em; white-space: nowrap; }
.explained caption { text-align: left; color: var(--soft); font-size: 0.85rem; }
.explained th, .explained td { min-width: 0; position: static; background: none; vertical-align: middle; }
.explained td:first-child { min-width: 5.5rem; }
.explained .bar { width: 40%; padding: 0; }
.explained .bar span { display: block; position: relative; height: 0.8rem; }
.explained .bar i { position: absolute; top: 0; height: 100%; background: var(--series0); print-color-adjust: exact; }
.explained .bar i.up { background: var(--series1); }
.explained tr:last-child { font-weight: bold; }
"""
)
"""CSS of explanations and structure drawings."""


AVERAGE = (
    "The average training crystal has the mean of every feature and descriptor. No crystal is like that, so its value "
    "can be one that the property can't have, such as a negative band gap."
)
"""Explanation of the reference, for pages."""


def draw_explanation(
    crystal: Crystals, formula: str, heading: str, found: Explanation, unit: str, shown: int, lines: Sequence[str] = ()
) -> str:
    """Return a card with the structure, the color bar and the contributions.

    Args:
        crystal: one crystal.
        formula: its formula.
        heading: plain text beside the formula.
        found: the explanation.
        unit: unit of the target, or empty.
        shown: number of descriptors shown one by one, largest contributions first; the rest is summed.
        lines: more lines of plain text.
    """
    unit = "probability" if found.label is not None else unit
    top, decimals = float(np.abs(found.atoms).max(initial=0.0)), _decimals(found.prediction)
    suffix = f" {unit}" if unit and found.label is None else ""
    value = f"{found.prediction:.4g}{suffix}"
    said = value if found.label is None else f"probability of {found.label}: {found.prediction:.3f}"
    symbols = [SYMBOLS[int(z)] for z in crystal.numbers]
    has_atoms = top > 0
    drawn = draw_structure(
        crystal.lattice[0],
        crystal.numbers,
        crystal.frac_coords,
        rings=[_color(v / top) for v in found.atoms] if has_atoms else None,
        titles=[f"{s} {i}: {v:+.3g}{suffix}" for i, (s, v) in enumerate(zip(symbols, found.atoms, strict=True))]
        if has_atoms
        else None,
    )
    scale = _scale(top, unit) if has_atoms else '<p class="soft">Contributions of single atoms are unknown.</p>'
    more = "".join(f'<p class="soft">{escape(line)}</p>' for line in lines)
    return (
        f'<div class="card explained"><div>{drawn}{element_legend(crystal.numbers)}{scale}</div><div>'
        f"<h3>{html.formula(formula)} <span class=soft>{escape(heading)}</span></h3>"
        f"<p><b>{escape(said)}</b></p>{more}{_table(found, crystal.numbers, unit, shown, decimals)}</div></div>"
    )


def _table(found: Explanation, numbers: NDArray[np.uint8], unit: str, shown: int, decimals: int) -> str:
    """Return the rows from the average crystal to the prediction, each with a bar."""
    rows: list[tuple[str, float]] = []
    if np.abs(found.atoms).max(initial=0.0) > 0:
        for symbol, value in found.by_element(numbers).items():
            z = SYMBOLS.index(symbol)
            count = int((numbers == z).sum())
            rows.append((f"{swatch(z)}{symbol}, {count} atom{'s' * (count != 1)}", value))
    columns = sorted(found.columns.items(), key=lambda item: -abs(item[1]))
    rows += [(escape(name), value) for name, value in columns[:shown]]
    if rest := columns[shown:]:
        rows.append((f"{len(rest)} other{'s' * (len(rest) != 1)}", sum(value for _, value in rest)))
    top = max((abs(value) for _, value in rows), default=0.0) or 1.0
    body = "".join(
        f'<tr><td>{name}</td><td class="bar"><span>{_bar(value / top)}</span></td>'
        f'<td class="number">{value:+.{decimals}f}</td></tr>'
        for name, value in rows
    )
    end = '<tr><td>{}</td><td class="bar"></td><td class="number">{:.{}f}</td></tr>'
    return (
        f"<table><caption>Contributions{escape(f' ({unit})' if unit else '')}</caption>"
        f"{end.format('average training crystal', found.reference, decimals)}{body}"
        f"{end.format('prediction', found.total, decimals)}</table>"
    )


def _bar(share: float) -> str:
    """Return a bar from the middle, to the right for a positive share of the largest contribution."""
    width = 50 * abs(share)
    left, up = (50.0, ' class="up"') if share >= 0 else (50 - width, "")
    return f'<i{up} style="left:{left:.1f}%;width:{width:.1f}%"></i>'


def _scale(top: float, unit: str) -> str:
    """Return the color bar of the rings, from the most negative contribution to the most positive."""
    label = f"contribution of an atom{f' ({unit})' if unit else ''}"
    said = f"color bar of the rings: {label}, blue for {-top:.2g}, gray for 0, orange for {top:+.2g}"
    return (
        f'<div class="scale" role="img" aria-label="{escape(said)}"></div>'
        f'<div class="axis"><span>{-top:.2g}</span><span>0</span><span>{top:+.2g}</span></div>'
        f'<p class="soft">Rings: {escape(label)}</p>'
    )


def _color(share: float) -> str:
    """Return the color of a contribution as a share from -1 to 1 of the largest one."""
    end = _HIGH if share > 0 else _LOW
    return _hex([round(zero + abs(share) * (c - zero)) for zero, c in zip(_ZERO, end, strict=True)])


def _decimals(value: float) -> int:
    """Return the decimals of a prediction with four significant digits, at most six."""
    return 6 if value == 0 else min(6, max(0, 3 - math.floor(math.log10(abs(value)))))
