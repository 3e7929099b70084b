"""Cross-validation: every crystal is predicted by a model trained on other formulas.

Each fold is an ordinary training run, of one model or an ensemble, in ``fold_i`` of the run folder. A last one, on all
crystals, gives the final model.

Shapes: ``n`` crystals, ``T`` targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crysldnet.artifacts.model_file import load_property_model
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.split import Rows
from crysldnet.errors import ConfigError
from crysldnet.finetune.baselines import Baselines, Floats, compare, fit_baselines
from crysldnet.finetune.ensemble import describe, fit_models, formula_parts
from crysldnet.finetune.settings import FinetuneConfig
from crysldnet.finetune.training import Predictions, evaluate, reported
from crysldnet.training.metrics import TargetMetrics


@dataclass(frozen=True)
class OutOfFold:
    """Results of all folds on their held-out crystals.

    Attributes:
        predictions: out-of-fold prediction of every crystal.
        fold: fold of every crystal, by row.
        scores: ``test/mae`` … and ``test_crystals`` per fold.
        metrics: the same over all crystals.
        compared: errors with intervals, and those of baselines fitted to the same crystals.
    """

    predictions: Predictions
    fold: dict[int, int]
    scores: list[dict[str, float]]
    metrics: dict[str, float]
    compared: Baselines


def divide(data: CrystalDataModule, config: FinetuneConfig) -> tuple[list[Rows], Rows]:
    """Return the rows of each fold, and those of the final training on all crystals, which has no test rows.

    All crystals of a reduced formula are in one fold. Crystals outside the test fold are divided into training and
    validation in the same way, by ``data.split.fractions``.

    Raises:
        ConfigError: there are fewer formulas than folds, or ``data.exclude`` is set.
    """
    if data.exclude:
        raise ConfigError(
            "folds: data.exclude keeps crystals out of training, but in a cross-validation each one is trained on and "
            "tested; leave one of both out",
            "folds",
        )
    pool = np.unique(np.concatenate([*data.rows.values(), data.calibration_rows]))
    part = formula_parts(data, pool, config.folds, [config.seed, 4], "folds")
    folds = [_with_validation(data, pool[part != i], config) | {"test": pool[part == i]} for i in range(config.folds)]
    return folds, _with_validation(data, pool, config)


def _with_validation(data: CrystalDataModule, rows: NDArray[np.int64], config: FinetuneConfig) -> Rows:
    train, val, _ = data.split.fractions
    nothing = np.empty(0, np.int64)
    if not val:
        return {"train": rows, "val": nothing, "test": nothing}
    part = formula_parts(data, rows, max(2, round((train + val) / val)), [config.seed, 5], "folds")
    return {"train": rows[part != 0], "val": rows[part == 0], "test": nothing}


def cross_validate(
    config: FinetuneConfig,
    values: dict[str, Any],
    folder: Path,
    name: str,
    data: CrystalDataModule,
    folds: Sequence[Rows],
    device: str,
) -> OutOfFold:
    """Train the missing folds in sequence and predict the held-out crystals of each.

    Args:
        config: the settings.
        values: the same as plain values.
        folder: fold i is saved in ``fold_i``.
        name: run name for loggers.
        data: the crystals.
        folds: rows of each fold from :func:`divide`.
        device: device for predicting.
    """
    predictions: Predictions = {}
    fold_of: dict[int, int] = {}
    scores: list[dict[str, float]] = []
    others: list[dict[str, Floats]] = []
    whole: TargetMetrics | None = None
    for i, rows in enumerate(folds):
        files = fit_models(config, values, folder / f"fold_{i}", data, rows, f"{name}-fold_{i}")
        models = [load_property_model(file)[0].to(device) for file in files]
        types, test = models[0].types, rows["test"]
        own = TargetMetrics(data.targets, types, sync_on_compute=False)
        whole = whole or TargetMetrics(data.targets, types, sync_on_compute=False)
        found = evaluate(models, data, test, [own, whole])
        predictions |= found
        fold_of |= dict.fromkeys(found, i)
        scores.append({"test_crystals": len(test), **reported(own, "test")})
        describe(f"fold {i + 1} of {len(folds)}", scores[-1])
        if config.baselines:
            total = config.head.get("readout") == "sum"
            others.append(fit_baselines(data, types, config.fitted_rows(rows), test, total=total))
    assert whole is not None
    tested = np.concatenate([rows["test"] for rows in folds])
    joined = {key: np.concatenate([own[key] for own in others]) for key in (others[0] if others else ())}
    model = np.array([[of_target[0] for of_target in predictions[row]] for row in tested.tolist()])
    compared = compare({"model": model, **joined}, data, types, tested)
    return OutOfFold(dict(sorted(predictions.items())), fold_of, scores, reported(whole, "test"), compared)
