"""Attribute predictions to atoms and descriptors.

Compares each prediction with that for an average training crystal, and divides the difference among the atoms (for
networks) and the descriptors (for trees and kernel ridge). The reference and all contributions sum to the prediction.

  crysldnet explain model=runs/finetune/latest files="my_cifs/*.cif"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import pyarrow as pa

from crysldnet.console import note
from crysldnet.data.elements import SYMBOLS
from crysldnet.data.output import open_table
from crysldnet.html import page as html
from crysldnet.html.explanation import AVERAGE, STYLE, draw_explanation
from crysldnet.inference import load
from crysldnet.inference.command import Account, named_files
from crysldnet.inference.descriptors import given_descriptors, with_descriptors
from crysldnet.inference.explain import Explained, explain_crystals, explain_portion, stream_of
from crysldnet.io import write_atomically

__all__ = ["ExplainConfig", "explain_crystals", "run"]

LARGEST_PAGE = 200
"""Maximum number of crystals on a page; a table has no limit."""


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


def run(config: ExplainConfig, _values: dict[str, Any]) -> int:
    """Write the page or table; return the exit status."""
    model = load(config.model, device="cpu")
    place = model.place_of(config.target)
    is_page = config.out.endswith((".html", ".htm"))
    output = None if is_page else open_table(config.out)
    account = Account(config.out, "explained")
    given = given_descriptors(config.descriptors, model.descriptors)
    stream = stream_of(model, named_files(config.files, account), given, config.max_atoms)
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
        f"training crystal. Orange raises the value, blue lowers it. {AVERAGE}</p>",
        *(draw_explanation(one.crystal, one.formula, one.id, one.found, unit, config.shown) for one in kept),
    ]
    return html.page(f"Explanations: {target}", body, STYLE)
