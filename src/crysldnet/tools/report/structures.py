"""Find the structures of a run's test crystals in its data or in a Matbench task, and show the worst predictions."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from crysldnet.data.catalog import published
from crysldnet.data.datasets import EMBEDDED_TARGETS, open_store
from crysldnet.data.elements import reduced_formula
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError
from crysldnet.graphs.crystals import Crystals
from crysldnet.html import page as html
from crysldnet.html.structure_drawing import draw_structure
from crysldnet.tools.report.predictions import Predictions
from crysldnet.tools.report.run_files import Run

TOLERANCE = 1e-5
"""Relative tolerance; a run's true values have six digits."""


class TestedCrystals(NamedTuple):
    """Test crystals in the order of the predictions, with the store and the rows that they are in."""

    crystals: Crystals
    store: CrystalStore
    rows: NDArray[np.int64]


def find_structures(run: Run, name: str, opened: dict[str, CrystalStore]) -> TestedCrystals:
    """Find test crystals of a run by their ids.

    Args:
        run: run with predictions.
        name: name of the predictions.
        opened: cache of open stores by path, to which this one is added.

    Raises:
        DataError: the data is missing, lacks a crystal, or has a different true value.
    """
    p = run.predictions[name]
    path, column = _of_task(name, p.target) if run.command == "matbench" else (_test_data(run), p.target)
    if path not in opened:
        opened[path] = open_store(path)
    store = opened[path]
    found = pc.index_in(pa.array(p.ids, pa.string()), value_set=store.ids.cast(pa.string()).combine_chunks())
    lost = [id_ for id_, row in zip(p.ids, found.to_pylist(), strict=True) if row is None]
    if lost:
        raise DataError(f"{path} has changed since: {len(lost)} of {len(p.ids)} test crystals aren't in it ({lost[0]})")
    rows = found.to_numpy(zero_copy_only=False).astype(np.int64)
    _compare_values(p, store, column, rows)
    return TestedCrystals(store.crystals.take(rows), store, rows)


def _test_data(run: Run) -> str:
    path = (run.config.get("data") or {}).get("path")
    path = path.get("test") if isinstance(path, dict) else path
    if not isinstance(path, str):
        raise DataError(f"{run.path / 'config.yaml'}: data.path names no data for the test split")
    return path


def _of_task(task: str, target: str) -> tuple[str, str]:
    """Return the source of a Matbench run's crystals with Matbench ids, and the target column."""
    if task in EMBEDDED_TARGETS:
        return f"embedded:{task}", EMBEDDED_TARGETS[task]
    if task not in published():
        raise DataError(f"{task}: no data set of this package has its structures")
    return f"published:{task}", target


def _compare_values(p: Predictions, store: CrystalStore, column: str, rows: NDArray[np.int64]) -> None:
    if p.classes is not None or column not in store.column_names:
        return
    values = store.numbers_of(column)[rows]
    wrong = np.flatnonzero(np.abs(values - p.true) > TOLERANCE * np.abs(values) + 1e-12)
    if len(wrong):
        i = int(wrong[0])
        raise DataError(
            f"{store.name} has another value than was tested on: {p.target} of {p.ids[i]} was {p.true[i]:.6g} "
            f"and is {values[i]:.6g}"
        )


def cell_parameters(lattice: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """Return lengths in Å and angles in degrees of a lattice [3, 3]."""
    lengths = np.linalg.norm(lattice, axis=1)
    angles = []
    for i, j in ((1, 2), (0, 2), (0, 1)):
        cosine = float(lattice[i] @ lattice[j] / (lengths[i] * lengths[j]))
        angles.append(math.degrees(math.acos(min(1.0, max(-1.0, cosine)))))
    return lengths.tolist(), angles


def space_group(crystals: Crystals, i: int) -> str:
    """Return symbol and number of a crystal's space group at a tolerance of 0.01 Å; empty if not found."""
    import spglib

    one = crystals.take(np.array([i], np.int64))
    cell = (one.lattice[0].tolist(), one.frac_coords.tolist(), one.numbers.tolist())
    try:
        found = spglib.get_spacegroup(cell, symprec=0.01)
    except spglib.SpglibError:
        return ""
    return found or ""


def worst_places(p: Predictions, count: int) -> list[int]:
    """Return the indices of the worst predictions, worst first, excluding correct and unknown ones.

    For classes, the most confident errors are the worst.
    """
    far = np.nan_to_num(p.errors, nan=-1.0)
    order = np.argsort(-far if p.probability is None else -far * np.nan_to_num(p.probability), kind="stable")
    return [int(i) for i in order if p.errors[i] > 0][:count]


def worst_cards(p: Predictions, crystals: Crystals | None, places: Sequence[int]) -> str:
    cards = []
    for i in places:
        lines = [] if crystals is None else _structure_lines(crystals, i)
        true, predicted = (_value(p, values[i]) for values in (p.true, p.predicted))
        std = f" ± {p.std[i]:.4g}" if p.std is not None and not np.isnan(p.std[i]) else ""
        if p.probability is not None and not np.isnan(p.probability[i]):
            std = f" ({p.probability[i]:.1%})"
        lines.append(f"{escape(p.ids[i])}")
        lines.append(f"true {escape(true)}<br>predicted {escape(predicted + std)}")
        error = f"<b>off by {p.errors[i]:.4g}</b><br>" if p.classes is None else ""
        drawn = lines.pop(0) if crystals is not None else ""
        cards.append(f'<div class="card">{drawn}{error}{"<br>".join(lines)}</div>')
    return f'<div class="cards">{"".join(cards)}</div>'


def _value(p: Predictions, value: float) -> str:
    return f"{value:.4g}" if p.classes is None else p.classes[int(value)]


def _symbol(group: str) -> str:
    """Return the symbol of a space group with its screw axes as subscripts."""
    return re.sub(r"_(\d)", r"<sub>\1</sub>", escape(group))


def _structure_lines(crystals: Crystals, i: int) -> list[str]:
    """Return a structure drawing, and lines with formula, space group and cell."""
    begin, end = int(crystals.ptr[i]), int(crystals.ptr[i + 1])
    lattice, numbers = crystals.lattice[i], crystals.numbers[begin:end]
    lengths, angles = cell_parameters(lattice)
    group = space_group(crystals, i)
    cell = " ".join(f"{length:.2f}" for length in lengths) + " Å, " + " ".join(f"{angle:.0f}" for angle in angles) + "°"
    atoms = f"{end - begin} atom{'s' * (end - begin > 1)}"
    return [
        draw_structure(lattice, numbers, crystals.frac_coords[begin:end]),
        f"{html.formula(reduced_formula(numbers))}{f', {_symbol(group)}' if group else ''}",
        f'<span class="soft">{atoms}, {cell}</span>',
    ]
