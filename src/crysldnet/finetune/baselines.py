"""Baselines for a model on its test crystals: a constant, and trees on descriptors.

Shapes: ``n`` test crystals, ``T`` targets, ``D`` descriptors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crysldnet.console import SHOWN, note, print_table
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.descriptors import crystal_descriptors
from crysldnet.measures import of_name
from crysldnet.models.targets import TargetType
from crysldnet.tabular.members import fit_models
from crysldnet.training.bootstrap import baseline_header, baseline_rows, bootstrap

MOST_CRYSTALS = 20_000
"""Skip trees above this number of training and test crystals; they would take minutes."""
MOST_COLUMNS = 10
"""Skip trees above this number of outputs; each takes seconds."""
RESAMPLES = 2000

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Baselines = dict[str, dict[str, Any]]
"""Results of :func:`compare` by target."""


def fit_baselines(
    data: CrystalDataModule, types: Sequence[TargetType], train: Rows, test: Rows, *, total: bool
) -> dict[str, Floats]:
    """Return [n, T] predictions of a constant and, unless slow, of trees.

    Args:
        data: the crystals and their targets.
        types: types of the T targets.
        train: rows of the store to fit to.
        test: the n rows to predict.
        total: the targets are extensive, so values per atom are learned.
    """
    assert data.target_values is not None
    sizes = data.store.crystals.sizes
    atoms = sizes[:, None] if total else np.ones((len(sizes), 1))
    values = data.target_values[train] / atoms[train]
    found = {"constant": _constant(values, types) * atoms[test]}
    if _affordable(types, len(train) + len(test)):
        x = tabular_features(data, np.concatenate([train, test]))
        found["trees"] = _trees(x, values, types) * atoms[test]
    return found


def compare(
    predicted: Mapping[str, Floats], data: CrystalDataModule, types: Sequence[TargetType], test: Rows
) -> Baselines:
    """Compare predictions for the same crystals.

    Args:
        predicted: [n, T] predictions by ``model`` and baselines; class indices for classification.
        data: the crystals and their targets.
        types: types of the T targets.
        test: the n predicted rows.

    Returns:
        For each target with a known true value ``measure`` (such as ``mae``), ``unit``, ``crystals``, and
        for ``model``, ``constant`` and ``trees`` (if fitted) the ``error``, its 95 % ``interval``, and its excess over
        the model's, ``difference`` and ``difference_interval``; intervals are null for one crystal.
    """
    assert data.target_values is not None
    return {
        name: {
            "unit": data.units[place],
            **_of_target({k: v[:, place] for k, v in predicted.items()}, true, types[place]),
        }
        for place, name in enumerate(data.targets)
        if not np.isnan(true := data.target_values[test, place]).all()
    }


def tabular_features(data: CrystalDataModule, rows: Rows) -> Floats:
    """Return [n, D] inputs of tabular models for some rows: descriptors and the user's own columns."""
    computed = crystal_descriptors(data.store.crystals.take(rows)).values
    return computed if data.descriptor_values is None else np.hstack([computed, data.descriptor_values[rows]])


def _affordable(types: Sequence[TargetType], crystals: int) -> bool:
    columns = sum(1 if kind.classes is None else len(kind.classes) for kind in types)
    if crystals > MOST_CRYSTALS:
        note(f"no comparison with trees: {crystals:,} crystals, over {MOST_CRYSTALS:,}")
    elif columns > MOST_COLUMNS:
        note(f"no comparison with trees: {columns} numbers and classes to predict, over {MOST_COLUMNS}")
    return crystals <= MOST_CRYSTALS and columns <= MOST_COLUMNS


def _constant(values: Floats, types: Sequence[TargetType]) -> Floats:
    """Return the [T] best constant for the known values of each target."""
    return np.array(
        [kind.constant(own[~np.isnan(own)]) for own, kind in zip(values.T, types, strict=True)],
        np.float64,
    )


def _trees(x: Floats, values: Floats, types: Sequence[TargetType]) -> Floats:
    """Return [n, T] predictions for the last n rows of ``x`` by trees fitted to the first rows and their values."""
    found = np.empty((len(x) - len(values), len(types)))
    for place, kind in enumerate(types):
        known = np.flatnonzero(~np.isnan(values[:, place]))
        y = kind.table_outputs(values[known, place])
        model = fit_models(x[known], y, np.arange(len(known)), members=("boosted_trees",))["boosted_trees"]
        raw = model.predict(x[len(values) :])
        found[:, place] = kind.from_table(raw, np.zeros_like(raw)).value.numpy()
    return found


def _of_target(predicted: Mapping[str, Floats], true: Floats, kind: TargetType) -> dict[str, Any]:
    known = ~np.isnan(true)
    errors = np.stack([kind.errors(values[known], true[known]) for values in predicted.values()])
    means = errors.mean(axis=1)
    low = high = np.full(2 * len(means), np.nan)
    if known.sum() > 1:
        low, high, _ = bootstrap(errors, RESAMPLES, 0)
    ends = [None if np.isnan(a) else [float(a), float(b)] for a, b in zip(low, high, strict=True)]
    found: dict[str, Any] = {"measure": kind.measure.name}
    found["crystals"] = int(known.sum())
    for place, name in enumerate(predicted):
        found[name] = {"error": float(means[place]), "interval": ends[place]}
        if place:
            found[name] |= {
                "difference": float(means[place] - means[0]),
                "difference_interval": ends[len(means) + place],
            }
    return found


def flat_metrics(baselines: Baselines, targets: Sequence[str]) -> dict[str, float]:
    """Return the errors as metrics: ``test_trees/mae`` for one target, ``test_trees/mae/NAME`` for several."""
    return {
        f"test_{name}/{found['measure']}{f'/{target}' if len(targets) > 1 else ''}": found[name]["error"]
        for target, found in baselines.items()
        for name in ("constant", "trees")
        if name in found
    }


def print_baselines(baselines: Baselines) -> None:
    """Print a table for each target, up to a limit."""
    for target, found in islice(baselines.items(), SHOWN):
        title = f"{target}: {found['crystals']:,} test crystals"
        print_table(title, baseline_header(found), baseline_rows(found))


def verdict(baselines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each target that compares the test error with the constant and the trees.

    A difference counts if its 95 % interval excludes 0.

    Args:
        baselines: as returned by :func:`crysldnet.finetune.baselines.compare`.
    """
    return [_sentence(target, found) for target, found in islice(baselines.items(), SHOWN)]


def _sentence(target: str, found: Mapping[str, Any]) -> str:
    measure = of_name(found["measure"])
    unit = f" {own}" if (own := measure.unit_in({"": found["unit"]})) else ""
    others = {"constant": f"the {measure.baseline or 'best constant'}", "trees": "trees on descriptors"}
    compared = [_compared(found, name, title, unit) for name, title in others.items() if name in found]
    said = f"{target}: the {measure.title or measure.name} on {found['crystals']:,} test crystals is "
    return "; ".join([f"{said}{found['model']['error']:.4g}{unit}", *compared])


def _compared(found: Mapping[str, Any], name: str, title: str, unit: str) -> str:
    other, interval = found[name]["error"], found[name]["difference_interval"]
    if interval is None or interval[0] <= 0 <= interval[1]:
        return f"not distinguishable from {title} ({other:.4g}{unit})"
    better = interval[0] > 0
    share = f"{abs(1 - found['model']['error'] / other):.0%} " if other > 0 else ""
    return f"{share}{'below' if better else 'above'} {title} ({other:.4g}{unit})"
