"""Attribute predictions to atoms and descriptors.

Compares each prediction with that for an average training crystal, and divides the difference among the atoms (for
networks) and the descriptors (for trees and kernel ridge). The reference and all contributions sum to the prediction.

  crysldnet explain model=runs/finetune/latest files="my_cifs/*.cif"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from crysldnet.console import note
from crysldnet.data.elements import SYMBOLS, formulas_of
from crysldnet.data.output import open_table
from crysldnet.errors import ConfigError
from crysldnet.graphs.crystals import Crystals
from crysldnet.html import page as html
from crysldnet.html.structure_drawing import draw_structure
from crysldnet.inference import Predictor, check_for, load
from crysldnet.inference.command import Account, Refusals, named_files
from crysldnet.inference.descriptors import beside, columns_needed, given_descriptors, with_descriptors
from crysldnet.io import write_atomically
from crysldnet.models.explanation import Explanation, explain
from crysldnet.readers.stream import Chunk, CrystalStream, StreamSettings

LARGEST_PAGE = 200
"""Maximum number of crystals on a page; a table has no limit."""
_STYLE = """
.explained { display: grid; grid-template-columns: minmax(8rem, 12rem) 1fr; gap: 1rem; margin: 1rem 0; }
@media (max-width: 36rem) { .explained { grid-template-columns: 1fr; } }
.structure line { stroke: var(--soft); stroke-width: 0.4; }
.structure circle { stroke: var(--text); stroke-width: 0.3; }
.parts { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr max-content; gap: 0.1rem 0.75rem; }
.parts span { overflow-wrap: anywhere; }
.bar { position: relative; min-width: 4rem; }
.bar i { position: absolute; top: 20%; height: 60%; background: var(--series0); }
.bar i.up { background: var(--series1); }
"""


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Every key of ``conf/explain.yaml``."""

    model: str
    files: str | list[str]
    out: str
    target: str | None
    shown: int
    descriptors: dict[str, float]
    max_atoms: int
    plugins: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.shown < 1:
            raise ValueError(f"shown must be 1 or more, not {self.shown}")


class Explained(NamedTuple):
    """A crystal and the explanation of its prediction."""

    id: str
    source: str
    formula: str
    crystal: Crystals
    found: Explanation

    @property
    def elements(self) -> dict[str, float]:
        """Contributions of the atoms summed by element, largest first."""
        sums = np.bincount(self.crystal.numbers, self.found.atoms)
        found = {SYMBOLS[z]: float(sums[z]) for z in np.unique(self.crystal.numbers)}
        return dict(sorted(found.items(), key=lambda item: -abs(item[1])))


def explain_portion(model: Predictor, portion: Chunk, place: int) -> Explained:
    """Explain the prediction of one target for the only crystal of a portion."""
    batch = portion.batches[model.encoder.graph]
    if (needed := model.members[0].descriptors) is not None:
        batch = replace(batch, descriptors=torch.from_numpy(beside(portion, needed.names)).float())
    mean = None
    if model.knowledge is not None:
        training = model.knowledge.training_set
        mean = (training.features * training.scale).mean(dim=0)
    found = explain(model.members, batch, place, mean)
    return Explained(portion.ids[0], portion.sources[0], formulas_of(portion.crystals)[0], portion.crystals, found)


def explain_crystals(model: Predictor, structures: Any, target: str | None = None) -> list[Explained]:
    """Explain the predictions of one target for crystals.

    Args:
        model: from :func:`crysldnet.load`.
        structures: as in :meth:`Predictor.predict`, with the columns of the model's descriptors.
        target: target name; required if the model has several.

    Raises:
        ConfigError: the target is missing or unknown.
        DataError: a crystal is invalid, or the target is a hurdle.
    """
    place, account = place_of(model, target), Refusals("raise")
    found = []
    for portion in _stream(model, structures, {}, 1000):
        account.take(portion)
        found += [explain_portion(model, portion, place)] if portion.ids else []
    return found


def _stream(
    model: Predictor, structures: Any, given: Mapping[str, NDArray[np.float64]], max_atoms: int
) -> CrystalStream:
    """Yield crystals one by one with what the model needs."""
    columns = columns_needed([model.members[0].descriptors], given)
    settings = StreamSettings(batch_size=1, max_atoms=max_atoms)
    return CrystalStream(structures, [model.encoder.graph], settings, columns, check_for([model]))


def run(config: ExplainConfig, _values: dict[str, Any]) -> int:
    """Write the page or table; return the exit status."""
    model = load(config.model, device="cpu")
    place = place_of(model, config.target)
    is_page = config.out.endswith((".html", ".htm"))
    output = None if is_page else open_table(config.out)
    account = Account(config.out, "explained")
    given = given_descriptors(config.descriptors, model.descriptors)
    stream = _stream(model, named_files(config.files, account), given, config.max_atoms)
    kept: list[Explained] = []
    with account.progress(stream.total) as advance:
        for portion in with_descriptors(stream, given):
            if portion.ids:
                kept.append(explain_portion(model, portion, place))
            advance(portion)
            if is_page and len(kept) == LARGEST_PAGE:
                note(f"a page is limited to {LARGEST_PAGE} crystals; use out=explanations.csv for all")
                break
        account.refuse_nothing_used()
    target, unit = model.targets[place], model.units[place]
    if output is None:
        write_atomically(Path(config.out), _page(kept, target, unit, config))
    else:
        with output:
            for one in kept:
                output.append(_table(one, target, unit))
    account.finish(stream.unstated())
    return 0


def place_of(model: Predictor, target: str | None) -> int:
    """Return the index of a target in a model; a single target needs no name.

    Raises:
        ConfigError: the name is missing or unknown.
    """
    name = target or model.targets[0]
    if name not in model.targets or (target is None and len(model.targets) > 1):
        raise ConfigError(f"target: choose one of {', '.join(model.targets)}", "target")
    return model.targets.index(name)


def _table(one: Explained, target: str, unit: str) -> pa.Table:
    """Return a row for the reference, each atom and each descriptor."""
    symbols = [SYMBOLS[z] for z in one.crystal.numbers]
    parts = [("reference", "average training crystal", one.found.reference)]
    parts += [("atom", f"{symbol} {i}", value) for i, (symbol, value) in enumerate(zip(symbols, one.found.atoms))]  # noqa: B905
    parts += [("descriptor", name, value) for name, value in one.found.columns.items()]
    count = len(parts)
    return pa.table(
        {
            "id": [one.id] * count,
            "source": [one.source] * count,
            "formula": [one.formula] * count,
            "target": [target] * count,
            "class": pa.array([one.found.label] * count, pa.string()),
            "prediction": [one.found.prediction] * count,
            "unit": ["probability" if one.found.label is not None else unit] * count,
            "kind": [kind for kind, _, _ in parts],
            "name": [name for _, name, _ in parts],
            "contribution": [float(value) for _, _, value in parts],
        }
    )


def _page(kept: Sequence[Explained], target: str, unit: str, config: ExplainConfig) -> str:
    body = [
        f"<p>What {escape(config.model)} predicts for {escape(target)}, compared with its prediction for an average "
        "training crystal. Orange raises the value, blue lowers it. Atoms have the color of their contribution.</p>",
        *(_card(one, unit, config.shown) for one in kept),
    ]
    return html.page(f"Explanations: {target}", body, _STYLE)


def _card(one: Explained, unit: str, shown: int) -> str:
    found, crystal = one.found, one.crystal
    suffix = f" {unit}" if unit and found.label is None else ""
    columns = sorted(found.columns.items(), key=lambda item: -abs(item[1]))
    parts = [*one.elements.items()] if np.abs(found.atoms).max(initial=0.0) > 0 else []
    parts += columns[:shown]
    if rest := columns[shown:]:
        parts.append((f"{len(rest)} other descriptors", sum(value for _, value in rest)))
    top = max((abs(value) for _, value in parts), default=0.0) or 1.0
    drawn = draw_structure(
        crystal.lattice[0], crystal.numbers, crystal.frac_coords, colors=[_color(v, found.atoms) for v in found.atoms]
    )
    said = f"probability of {found.label}: {found.prediction:.3f}" if found.label is not None else ""
    return (
        f'<div class="card explained"><div>{drawn}</div><div>'
        f"<h3>{html.formula(one.formula)} <span class=soft>{escape(one.id)}</span></h3>"
        f"<p><b>{escape(said or f'{found.prediction:.4g}{suffix}')}</b>, "
        f"average crystal {found.reference:.4g}{escape(suffix)}</p>"
        f'<div class="parts">{"".join(_bar(name, value, top) for name, value in parts)}</div></div></div>'
    )


def _bar(name: str, value: float, top: float) -> str:
    width = 50 * abs(value) / top
    left = 50 if value >= 0 else 50 - width
    up = ' class="up"' if value >= 0 else ""
    bar = f'<span class="bar"><i{up} style="left:{left:.1f}%;width:{width:.1f}%"></i></span>'
    return f'<span>{escape(name)}</span>{bar}<span class="number">{value:+.3g}</span>'


def _color(value: float, atoms: np.ndarray) -> str:
    """Return the color of a contribution: gray for zero, blue for the most negative, orange for the most positive."""
    share = float(value) / max(float(np.abs(atoms).max()), 1e-12)
    end = (194, 87, 26) if share > 0 else (47, 109, 179)
    mixed = (round(225 + abs(share) * (c - 225)) for c in end)
    return "#" + "".join(f"{c:02x}" for c in mixed)
