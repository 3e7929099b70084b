"""Find the structures of a run's test crystals in its data or in a Matbench task."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from crysldnet.data.catalog import published
from crysldnet.data.datasets import EMBEDDED_TARGETS, open_store
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError
from crysldnet.graphs.crystals import Crystals
from crysldnet.tools.report.predictions import Predictions
from crysldnet.tools.report.run_files import Run

TOLERANCE = 1e-5
"""Relative tolerance; a run's true values have six digits."""


def find_structures(run: Run, name: str, opened: dict[str, CrystalStore]) -> Crystals:
    """Find test crystals of a run by their ids.

    Args:
        run: run with predictions.
        name: name of the predictions.
        opened: cache of open stores by path, to which this one is added.

    Returns:
        The crystals in the order of the predictions.

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
    return store.crystals.take(rows)


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
