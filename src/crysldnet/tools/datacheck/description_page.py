"""A data set description as an offline HTML page or an image."""

from __future__ import annotations

from html import escape
from pathlib import Path

from crysldnet.console import SHOWN, drawable
from crysldnet.html import page as html
from crysldnet.tools.datacheck.describe import Description, Histogram

_SUSPICIOUS_SHOWN = 200


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
        _chart("Volume per atom (Å³)", d.volume_per_atom, f"{d.crystals:,} crystals"),
    ]
    for p in d.properties[:SHOWN]:
        low, five, middle, ninety_five, high = p.quantiles
        note = (
            f"{p.count:,} values, {p.missing:,} missing; mean {p.mean:.4g}, standard deviation {p.std:.4g}, "
            f"median {middle:.4g}; 90 % between {five:.4g} and {ninety_five:.4g}; from {low:.4g} to {high:.4g}"
        )
        charts.append(_chart(f"{p.name} ({p.unit})", p.histogram, note))
    more = len(d.properties) - SHOWN
    elements = {
        symbol: html.ElementCell(f"{count:,}", (count / max(d.elements.values())) ** 0.5, f"{count:,} crystals")
        for symbol, count in d.elements.items()
    }
    return html.page(
        d.name,
        [
            html.facts(facts),
            "<h2>Distributions</h2>",
            f'<div class="charts">{"".join(charts)}</div>',
            f'<p class="soft">and {more:,} more properties</p>' if more > 0 else "",
            "<h2>Elements</h2>",
            '<p class="soft">Number of crystals with each element; darker means more.</p>',
            html.periodic_table(elements, "none"),
            "<h2>Suspicious rows</h2>",
            _suspicious(d),
            "<h2>Source</h2>",
            f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in d.about.items())}</dl>",
        ],
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
        f'<svg class="bars" viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f"{bars}</svg>"
        f'<div class="axis"><span>{first:.4g}</span><span>highest bar {tallest:,}</span><span>{last:.4g}</span></div>'
        f"<figcaption>{escape(note)}</figcaption></figure>"
    )


def _span(histogram: Histogram, i: int, whole: bool) -> str:
    low, high = histogram.edges[i], histogram.edges[i + 1]
    return f"{low + 0.5:.0f} to {high - 0.5:.0f}" if whole else f"{low:.4g} to {high:.4g}"


def _suspicious(d: Description) -> str:
    if not d.suspicious:
        return "<p>None.</p>"
    shown = d.suspicious[:_SUSPICIOUS_SHOWN]
    rows = html.table(["id", "why"], [(s.id, s.reason) for s in shown])
    more = f'<p class="soft">and {len(d.suspicious) - len(shown):,} more</p>' if len(d.suspicious) > len(shown) else ""
    return rows + more


def write_png(description: Description, path: Path) -> None:
    """Plot sizes, volumes, the thirty most common elements and the first properties."""
    from matplotlib.figure import Figure

    d = description
    panels = [
        ("atoms a crystal", d.atoms_per_crystal),
        ("volume per atom (Å³)", d.volume_per_atom),
        *((f"{p.name} ({p.unit})", p.histogram) for p in d.properties[:SHOWN]),
    ]
    columns = 3
    rows = 1 + -(-len(panels) // columns)
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    axis = figure.add_subplot(grid[0, :])
    commonest = sorted(d.elements.items(), key=lambda item: -item[1])[:30]
    axis.bar([symbol for symbol, _ in commonest], [count for _, count in commonest])
    axis.set_ylabel("crystals")
    title = f"{d.name}: {d.crystals:,} crystals, {len(d.elements)} elements, the most common shown"
    axis.set_title(drawable(title))
    axes = [axis]
    for place, (title, histogram) in enumerate(panels):
        axis = figure.add_subplot(grid[1 + place // columns, place % columns])
        axis.stairs(histogram.counts, histogram.edges, fill=True)
        axis.set(xlabel=drawable(title), ylabel="crystals")
        axes.append(axis)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, format="png")
