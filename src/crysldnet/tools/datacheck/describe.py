"""``crysldnet data describe``: contents of a data set, and suspicious rows to check before training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crysldnet.console import SHOWN, lines_of
from crysldnet.data.datasets import open_selected
from crysldnet.data.elements import SYMBOLS, element_pairs, formulas_of
from crysldnet.data.fingerprint import volumes_per_atom
from crysldnet.data.matching import duplicates
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError
from crysldnet.graphs.neighbors import neighbor_list
from crysldnet.io import replacing

SHORTEST_BOND = 1.0
"""Å; the shortest bond without hydrogen, in N2, has 1.10."""
SHORTEST_BOND_OF_HYDROGEN = 0.7
"""Å; in H2 it has 0.74."""
VOLUME_PER_ATOM = (4.0, 200.0)
"""Å³; diamond has 5.7, cesium 115. Layers with vacuum have more."""
LARGEST_FORMATION_ENERGY = 5.0
"""eV/atom."""
_BINS = 30
_CHUNK = 4096


@dataclass(frozen=True)
class Histogram:
    """Counts between edges: ``counts[i]`` from ``edges[i]`` to ``edges[i + 1]``."""

    edges: list[float]
    counts: list[int]

    @classmethod
    def of(cls, values: NDArray, *, whole: bool = False) -> Histogram:
        """Count finite values in equal bins; ``whole`` puts the edges between integers."""
        if not len(values):
            return cls([0.0, 1.0], [0])
        if whole:
            width = max(1, int(np.ceil((values.max() - values.min() + 1) / _BINS)))
            edges = np.arange(values.min() - 0.5, values.max() + width, width)
        else:
            edges = np.histogram_bin_edges(values, _BINS)
        return cls(edges.tolist(), np.histogram(values, edges)[0].tolist())


@dataclass(frozen=True)
class PropertyStatistics:
    """Statistics of a numeric column: name, unit, count, distribution."""

    name: str
    unit: str
    count: int
    missing: int
    mean: float
    std: float
    quantiles: list[float]
    """Minimum, 5 %, median, 95 %, maximum."""
    histogram: Histogram


@dataclass(frozen=True)
class Suspicious:
    """A row to check: id and reason."""

    id: str
    reason: str


@dataclass(frozen=True)
class Description:
    """Contents of a data set.

    Attributes:
        name: name as given.
        about: source, license, citation, and sha256 of a published set's files.
        crystals, atoms: counts.
        atoms_per_crystal, volume_per_atom: histograms, the second in Å³.
        elements: number of crystals per element symbol, by atomic number.
        properties: numeric columns.
        texts: number of values per text column.
        repeats: number of duplicates by kind.
        suspicious: rows to check.
    """

    name: str
    about: dict[str, str]
    crystals: int
    atoms: int
    atoms_per_crystal: Histogram
    volume_per_atom: Histogram
    elements: dict[str, int]
    properties: list[PropertyStatistics]
    texts: dict[str, int]
    repeats: dict[str, int]
    suspicious: list[Suspicious]


def describe(name: str, *, structures: bool = True) -> Description:
    """Describe a data set.

    Args:
        name: as in :func:`crysldnet.data.datasets.open_part`.
        structures: also find duplicate structures, which takes longest.
    """
    store = open_selected(name)
    crystals = store.crystals
    if not len(store):
        raise DataError(f"{name}: it has no crystals")
    properties, texts = _columns(store)
    return Description(
        name=name,
        about={key: store.metadata.get(key, "not stated") for key in ("source", "license", "citation")}
        | {key: store.metadata[key] for key in ("sha256",) if key in store.metadata},
        crystals=len(store),
        atoms=len(crystals.numbers),
        atoms_per_crystal=Histogram.of(crystals.sizes, whole=True),
        volume_per_atom=Histogram.of(volumes_per_atom(crystals)),
        elements=_elements(store),
        properties=properties,
        texts=texts,
        repeats=_repeats(store, structures),
        suspicious=find_suspicious(store),
    )


def _elements(store: CrystalStore) -> dict[str, int]:
    counts = np.bincount(element_pairs(store.crystals)[1], minlength=len(SYMBOLS))
    return {SYMBOLS[z]: int(count) for z, count in enumerate(counts) if z and count}


def _columns(store: CrystalStore) -> tuple[list[PropertyStatistics], dict[str, int]]:
    properties, texts = [], {}
    for name in store.column_names:
        if not store.is_numeric(name):
            texts[name] = sum(text is not None for text in store.texts_of(name))
            continue
        values = store.numbers_of(name)
        known = values[np.isfinite(values)]
        quantiles = np.quantile(known, [0, 0.05, 0.5, 0.95, 1]).tolist() if len(known) else [float("nan")] * 5
        mean, std = (float(known.mean()), float(known.std())) if len(known) else (float("nan"),) * 2
        missing = len(values) - len(known)
        unit = store.units.get(name, "no unit stated")
        properties.append(
            PropertyStatistics(name, unit, len(known), missing, mean, std, quantiles, Histogram.of(known))
        )
    return properties, texts


def _repeats(store: CrystalStore, structures: bool) -> dict[str, int]:
    repeats = {
        "id": len(store) - len(set(store.ids.to_pylist())),
        "reduced formula": len(store) - len(set(formulas_of(store.crystals))),
    }
    return repeats | ({"structure": len(duplicates(store))} if structures else {})


def find_suspicious(store: CrystalStore) -> list[Suspicious]:
    """Find overlapping atoms, implausible volumes and implausible formation energies."""
    reasons: dict[int, str] = {}
    for row, (distance, pair) in sorted(_short_bonds(store).items()):
        reasons.setdefault(row, f"atoms overlap: {pair} {distance:.2f} Å apart")
    volumes = volumes_per_atom(store.crystals)
    smallest, largest = VOLUME_PER_ATOM
    for row in np.flatnonzero((volumes < smallest) | (volumes > largest)).tolist():
        reasons.setdefault(row, f"{volumes[row]:.3g} Å³ per atom (outside {smallest:g} to {largest:g})")
    for name in store.column_names:
        if "formation" in name and store.units.get(name, "").startswith("eV/atom"):
            values = store.numbers_of(name)
            for row in np.flatnonzero(np.abs(values) > LARGEST_FORMATION_ENERGY).tolist():
                reasons.setdefault(row, f"{name} is {values[row]:.3g} eV/atom")
    rows = sorted(reasons)
    return [
        Suspicious(id_, reasons[row]) for row, id_ in zip(rows, store.ids_at(np.array(rows, np.int64)), strict=True)
    ]


def _short_bonds(store: CrystalStore) -> dict[int, tuple[float, str]]:
    """Return the shortest implausible distance of each row that has one, and its two elements."""
    found: dict[int, tuple[float, str]] = {}
    for start in range(0, len(store), _CHUNK):
        c = store.crystals.take(np.arange(start, min(start + _CHUNK, len(store))))
        near = neighbor_list(c.lattice, c.frac_coords, c.ptr, radius=SHORTEST_BOND)
        distance = np.linalg.norm(near.vector, axis=1)
        ends = c.numbers[near.source], c.numbers[near.target]
        limit = np.where((ends[0] == 1) | (ends[1] == 1), SHORTEST_BOND_OF_HYDROGEN, SHORTEST_BOND)
        short = np.flatnonzero(distance < limit)
        for edge in short[np.argsort(-distance[short])]:  # the shortest of a crystal comes last and is kept
            pair = "–".join(sorted(SYMBOLS[int(end[edge])] for end in ends))
            found[start + int(c.crystal[near.target[edge]])] = (float(distance[edge]), pair)
    return found


def as_text(d: Description) -> str:
    """Return a description as text for a terminal."""
    lines = [
        d.name,
        f"  crystals  {d.crystals:,}",
        f"  atoms     {d.atoms:,}, {d.atoms / d.crystals:.1f} a crystal",
        *_bars("atoms a crystal", d.atoms_per_crystal, whole=True),
        *_bars("volume per atom (Å³)", d.volume_per_atom),
        f"  elements  {len(d.elements)}, in how many crystals:",
        *_wrapped([f"{symbol} {count:,}" for symbol, count in sorted(d.elements.items(), key=lambda item: -item[1])]),
    ]
    for p in d.properties[:SHOWN]:
        low, five, middle, ninety_five, high = p.quantiles
        lines += [
            f"  property  {p.name} ({p.unit}): {p.count:,} values, {p.missing:,} missing",
            f"            mean {p.mean:.4g}, standard deviation {p.std:.4g}; from {low:.4g} to {high:.4g}, "
            f"median {middle:.4g}, 90 % between {five:.4g} and {ninety_five:.4g}",
        ]
    if (more := len(d.properties) - SHOWN) > 0:
        lines.append(f"            and {more:,} more properties")
    lines += [f"  text      {name}: {count:,} values" for name, count in islice(d.texts.items(), SHOWN)]
    if (more := len(d.texts) - SHOWN) > 0:
        lines.append(f"            and {more:,} more columns of text")
    lines += [f"  repeats   {count:,} crystals have the {what} of an earlier one" for what, count in d.repeats.items()]
    lines.append(f"  suspicious {len(d.suspicious):,} rows")
    lines += [f"            {s.id}: {s.reason}" for s in d.suspicious[:SHOWN]]
    lines += [f"            and {len(d.suspicious) - SHOWN:,} more"] if len(d.suspicious) > SHOWN else []
    lines += [f"  {key:<9} {text}" for key, text in d.about.items()]
    return lines_of(lines)


def _bars(title: str, histogram: Histogram, *, whole: bool = False) -> list[str]:
    """Return a small histogram of at most ten lines."""
    step = -(-len(histogram.counts) // 10)
    counts = [sum(histogram.counts[i : i + step]) for i in range(0, len(histogram.counts), step)]
    edges = [*histogram.edges[::step], histogram.edges[-1]]
    lines = [f"            {title}"]
    for count, low, high in zip(counts, edges[: len(counts)], edges[1 : len(counts) + 1], strict=True):
        span = f"{low + 0.5:.0f}–{high - 0.5:.0f}" if whole else f"{low:.3g}–{high:.3g}"
        lines.append(f"            {span:>13} {'█' * round(30 * count / max(max(counts), 1)):<30} {count:,}")
    return lines


def _wrapped(words: Sequence[str]) -> list[str]:
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > 96:
            lines.append("")
        lines[-1] += f"{word:<11}"
    return [f"            {line.rstrip()}" for line in lines]


def run(arguments: argparse.Namespace) -> int:
    """Print the description, write the requested files, and return the exit status."""
    from crysldnet.tools.datacheck.description_page import write_html, write_png

    description = describe(arguments.store, structures=not arguments.no_structures)
    sys.stdout.write(as_text(description) + "\n")
    for out, write in ((arguments.html, write_html), (arguments.png, write_png)):
        if out is None:
            continue
        with replacing(Path(out)) as partial:
            write(description, partial)
        sys.stdout.write(f"written: {out}\n")
    return 0
