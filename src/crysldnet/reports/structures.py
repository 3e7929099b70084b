"""Find the structures of a run's test crystals, in the data that its configuration names."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from crysldnet.data.crystals import Crystals
from crysldnet.data.locations import open_store
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError
from crysldnet.reports.run_files import Predictions, Run

TOLERANCE = 1e-5
"""Relative; predictions_test.csv has six digits."""


@dataclass(frozen=True)
class Structures:
    """The test crystals of a run.

    Attributes:
        crystals: their structures.
        place: id to the place among them.
    """

    crystals: Crystals
    place: dict[str, int]

    def of(self, predictions: Predictions) -> Crystals:
        """Return the crystals in the order of the predictions."""
        return self.crystals.take(np.array([self.place[id_] for id_ in predictions.ids], np.int64))


def find_structures(run: Run, opened: dict[str, CrystalStore]) -> Structures:
    """Find a finetuning run's test crystals by their ids.

    Args:
        run: its predictions name the crystals.
        opened: stores that other runs have opened, by path; this one is added.

    Raises:
        DataError: the data isn't there, lacks a crystal, or has another true value for one.
    """
    node = run.config.get("data") or {}
    path = node.get("path")
    path = path.get("test") if isinstance(path, dict) else path
    if not isinstance(path, str):
        raise DataError(f"{run.path / 'config.yaml'}: data.path names no data for the test split")
    if path not in opened:
        opened[path] = open_store(path)
    store = opened[path]
    ids = list(dict.fromkeys(id_ for p in run.predictions.values() for id_ in p.ids))
    rows = pc.index_in(pa.array(ids, pa.string()), value_set=store.ids.cast(pa.string()).combine_chunks())
    lost = [id_ for id_, row in zip(ids, rows.to_pylist(), strict=True) if row is None]
    if lost:
        raise DataError(f"{path} has changed since: {len(lost)} of {len(ids)} test crystals aren't in it ({lost[0]})")
    index = rows.to_numpy(zero_copy_only=False).astype(np.int64)
    found = Structures(store.crystals.take(index), {id_: place for place, id_ in enumerate(ids)})
    for p in run.predictions.values():
        _compare_values(p, store, index[[found.place[id_] for id_ in p.ids]])
    return found


def _compare_values(p: Predictions, store: CrystalStore, rows: NDArray[np.int64]) -> None:
    if p.classes is not None or p.target not in store.column_names:
        return
    values = store.numbers_of(p.target)[rows]
    wrong = np.flatnonzero(np.abs(values - p.true) > TOLERANCE * np.abs(values) + 1e-12)
    if len(wrong):
        i = int(wrong[0])
        raise DataError(
            f"{store.name} has changed since: {p.target} of {p.ids[i]} was {p.true[i]:.6g} and is {values[i]:.6g}"
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
    """Return the symbol and number of a crystal's space group at a tolerance of 0.01 Å; empty where none is found."""
    import spglib

    one = crystals.take(np.array([i], np.int64))
    cell = (one.lattice[0].tolist(), one.frac_coords.tolist(), one.numbers.tolist())
    try:
        found = spglib.get_spacegroup(cell, symprec=0.01)
    except spglib.SpglibError:
        return ""
    return found or ""
