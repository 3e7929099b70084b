"""A description of a data set as one HTML page that needs no network, and as a picture."""

from __future__ import annotations

from html import escape
from pathlib import Path

from crysldnet.data.describe import Description, Histogram
from crysldnet.data.elements import SYMBOLS

_SUSPICIOUS_SHOWN = 200
_STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --soft: #5b6675; --line: #d8dee6; --back: #ffffff; --card: #f6f8fa;
  --bar: #2f6db3; --tint: 47, 109, 179; }
@media (prefers-color-scheme: dark) { :root { --text: #e6eaf0; --soft: #9aa6b5; --line: #364150; --back: #12171e;
  --card: #1a212b; --bar: #6fa8e8; --tint: 111, 168, 232; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 1rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 1.75rem 0 0.5rem; }
.facts, .charts { display: grid; gap: 0.75rem; }
.facts { grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 0.6rem 0.75rem; }
.fact b { display: block; font-size: 1.35rem; }
.card h3 { font-size: 0.95rem; margin: 0; overflow-wrap: anywhere; }
.soft, figcaption { color: var(--soft); font-size: 0.85rem; }
figure { margin: 0; }
svg { display: block; width: 100%; height: 7rem; }
svg rect { fill: var(--bar); }
.axis { display: flex; justify-content: space-between; border-top: 1px solid var(--line); font-size: 0.8rem; }
.elements { min-width: 36rem; display: grid; grid-template-columns: repeat(18, 1fr); gap: 2px; }
.elements span { aspect-ratio: 1; min-width: 0; display: flex; flex-direction: column; align-items: center;
  justify-content: center; border: 1px solid var(--line); border-radius: 3px; font-size: clamp(11px, 1.9vw, 16px);
  line-height: 1.1; }
.elements small { font-size: 0.6em; color: inherit; }
.elements .none { opacity: 0.35; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.25rem 0.75rem 0.25rem 0; border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: minmax(5rem, max-content) 1fr; gap: 0.25rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def write_html(description: Description, path: Path) -> None:
    """Write the page."""
    path.write_text(page(description), encoding="utf-8")


def page(d: Description) -> str:
    """Return the page."""
    facts = [
        ("crystals", f"{d.crystals:,}"),
        ("atoms", f"{d.atoms:,}"),
        ("atoms a crystal", f"{d.atoms / d.crystals:.1f}"),
        ("elements", f"{len(d.elements)}"),
        ("suspicious rows", f"{len(d.suspicious):,}"),
        *((f"repeat a{'n' * (what == 'id')} {what}", f"{count:,}") for what, count in d.repeats.items()),
    ]
    charts = [
        _chart("Atoms a crystal", d.atoms_per_crystal, f"{d.crystals:,} crystals", whole=True),
        _chart("Volume of an atom (Å³)", d.volume_per_atom, f"{d.crystals:,} crystals"),
    ]
    for p in d.properties:
        low, five, middle, ninety_five, high = p.quantiles
        note = (
            f"{p.count:,} values, {p.missing:,} missing; mean {p.mean:.4g}, standard deviation {p.std:.4g}, "
            f"median {middle:.4g}; 90 % between {five:.4g} and {ninety_five:.4g}; from {low:.4g} to {high:.4g}"
        )
        charts.append(_chart(f"{p.name} ({p.unit})", p.histogram, note))
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(d.name)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(d.name)}</h1>",
            '<div class="facts">',
            *(f'<div class="card fact"><b>{value}</b>{escape(name)}</div>' for name, value in facts),
            "</div><h2>Distributions</h2>",
            f'<div class="charts">{"".join(charts)}</div>',
            "<h2>Elements</h2>",
            '<p class="soft">Number of crystals that have each; the deeper the color, the more.</p>',
            _periodic_table(d),
            "<h2>Suspicious rows</h2>",
            _suspicious(d),
            "<h2>Source</h2>",
            f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in d.about.items())}</dl>",
            "</body></html>",
        ]
    )


def _chart(title: str, histogram: Histogram, note: str, *, whole: bool = False) -> str:
    tallest, width = max([*histogram.counts, 1]), 100 / len(histogram.counts)
    bars = "".join(
        f'<rect x="{i * width:.2f}" y="{100 - 100 * count / tallest:.2f}" width="{width * 0.92:.2f}" '
        f'height="{100 * count / tallest:.2f}"><title>{_span(histogram, i, whole)}: {count:,}</title></rect>'
        for i, count in enumerate(histogram.counts)
    )
    first, last = histogram.edges[0] + 0.5 * whole, histogram.edges[-1] - 0.5 * whole
    label = escape(f"Histogram of {title}, the highest bar {tallest:,}")
    return (
        f'<figure class="card"><h3>{escape(title)}</h3>'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{label}">{bars}</svg>'
        f'<div class="axis"><span>{first:.4g}</span><span>highest bar {tallest:,}</span><span>{last:.4g}</span></div>'
        f"<figcaption>{escape(note)}</figcaption></figure>"
    )


def _span(histogram: Histogram, i: int, whole: bool) -> str:
    low, high = histogram.edges[i], histogram.edges[i + 1]
    return f"{low + 0.5:.0f} to {high - 0.5:.0f}" if whole else f"{low:.4g} to {high:.4g}"


def _place(z: int) -> tuple[int, int]:
    """Return row and column of an element in the periodic table, lanthanides and actinides below it."""
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


def _periodic_table(d: Description) -> str:
    most = max(d.elements.values(), default=1)
    cells = []
    for z, symbol in enumerate(SYMBOLS[1:], 1):
        row, column = _place(z)
        count = d.elements.get(symbol, 0)
        tint = f"background: rgba(var(--tint), {0.1 + 0.6 * (count / most) ** 0.5:.2f});" if count else ""
        cells.append(
            f'<span class="{"" if count else "none"}" style="grid-row: {row}; grid-column: {column}; {tint}" '
            f'title="{symbol}: {count:,} crystals">{symbol}{f"<small>{count:,}</small>" if count else ""}</span>'
        )
    return f'<div class="scroll"><div class="elements">{"".join(cells)}</div></div>'


def _suspicious(d: Description) -> str:
    if not d.suspicious:
        return "<p>None.</p>"
    shown = d.suspicious[:_SUSPICIOUS_SHOWN]
    rows = "".join(f"<tr><td>{escape(s.id)}</td><td>{escape(s.reason)}</td></tr>" for s in shown)
    more = f'<p class="soft">and {len(d.suspicious) - len(shown):,} more</p>' if len(d.suspicious) > len(shown) else ""
    return f'<div class="scroll"><table><tr><th>id</th><th>why</th></tr>{rows}</table></div>{more}'


def write_png(description: Description, path: Path) -> None:
    """Draw sizes, volumes, the thirty commonest elements and every property."""
    from matplotlib.figure import Figure

    d = description
    panels = [
        ("atoms a crystal", d.atoms_per_crystal),
        ("volume of an atom (Å³)", d.volume_per_atom),
        *((f"{p.name} ({p.unit})", p.histogram) for p in d.properties),
    ]
    columns = 3
    rows = 1 + -(-len(panels) // columns)
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    axis = figure.add_subplot(grid[0, :])
    commonest = sorted(d.elements.items(), key=lambda item: -item[1])[:30]
    axis.bar([symbol for symbol, _ in commonest], [count for _, count in commonest])
    axis.set_ylabel("crystals")
    axis.set_title(f"{d.name}: {d.crystals:,} crystals, {len(d.elements)} elements, the commonest shown")
    axes = [axis]
    for place, (title, histogram) in enumerate(panels):
        axis = figure.add_subplot(grid[1 + place // columns, place % columns])
        axis.stairs(histogram.counts, histogram.edges, fill=True)
        axis.set(xlabel=title, ylabel="crystals")
        axes.append(axis)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, format="png")
