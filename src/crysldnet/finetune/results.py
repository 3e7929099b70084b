"""Output of a finetuning run: test predictions, plots, summary and table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from crysldnet.artifacts.provenance import pretraining_overlap, print_overlap
from crysldnet.console import SHOWN, listed, note, print_table, suggest_next
from crysldnet.data.fingerprint import Fingerprints
from crysldnet.finetune.baselines import Baselines, compare, fit_baselines, flat_metrics, print_baselines, verdict
from crysldnet.finetune.cross_validation import OutOfFold
from crysldnet.finetune.settings import FinetuneConfig
from crysldnet.finetune.training import Finetuned
from crysldnet.io import write_csv
from crysldnet.measures import find
from crysldnet.training import plots
from crysldnet.training.run_folder import RunFolder


def write_predictions(path: Path, rows: Iterable[Sequence[str]], *more: str) -> None:
    """Write true values and predictions of test crystals as CSV.

    Args:
        path: output file.
        rows: rows from :func:`prediction_row`.
        more: names of additional columns.
    """
    write_csv(path, [["material_id", "target", "true", "prediction", "unit", "std", "probability", *more], *rows])


def prediction_row(
    material_id: str, target: str, unit: str, labels: list[str] | None, true: float, predicted: Sequence[float]
) -> list[str]:
    """Return the CSV row for one target of one crystal.

    Args:
        material_id: id of the crystal.
        target: target name.
        unit: unit of the values, or empty.
        labels: class names, None for a number. Classes are given by index.
        true: true value, NaN if unknown.
        predicted: value, standard deviation and probability of the predicted class, NaN if unavailable.
    """
    value, std, probability = predicted
    return [material_id, target, _cell(true, labels), _cell(value, labels), unit, _cell(std), _cell(probability)]


def _tested(result: Finetuned, folds: OutOfFold | None) -> Iterator[list[str]]:
    rows, data = list(result.predictions), result.data
    assert data.target_values is not None
    for material_id, row in zip(data.store.ids_at(np.array(rows, np.int64)), rows, strict=True):
        for place, target in enumerate(data.targets):
            true, predicted = data.target_values[row, place], result.predictions[row][place]
            cells = prediction_row(material_id, target, data.units[place], data.labels[place], true, predicted)
            yield [*cells, *([str(folds.fold[row])] if folds else [])]


def _cell(value: float, labels: list[str] | None = None) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.9g}" if labels is None else labels[int(value)]


def _plot_parity(folder: Path, result: Finetuned) -> None:
    rows = list(result.predictions)
    predicted = np.array([result.predictions[row] for row in rows])[:, :, 0]
    assert result.data.target_values is not None
    for place, target in enumerate(result.data.targets[:SHOWN]):
        if result.data.labels[place] is None:
            name = plots.file_name(target)
            true = result.data.target_values[rows, place]
            plots.parity(true, predicted[:, place], folder / f"parity_{name}.png", target, result.data.units[place])


def baselines_of(result: Finetuned, config: FinetuneConfig) -> Baselines:
    """Compare the test errors with those of a constant and of trees; empty on ranks other than the first.

    Baselines are fitted to the training crystals, for an ensemble by folds to those of all members.
    """
    is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    if not (config.baselines and result.predictions and is_first):
        return {}
    data, model = result.data, result.model
    test = np.array(list(result.predictions), np.int64)
    total = config.head.get("readout") == "sum"
    others = fit_baselines(data, model.types, config.fitted_rows(data.rows), test, total=total)
    own = np.array(list(result.predictions.values()))[:, :, 0]
    return compare({"model": own, **others}, data, model.types, test)


@rank_zero_only
def finish(
    folder: RunFolder,
    result: Finetuned,
    config: FinetuneConfig,
    baselines: Baselines,
    folds: OutOfFold | None = None,
) -> None:
    """Write and print the result; the summary comes last.

    Args:
        folder: run folder.
        result: training result; with ``folds`` it has their predictions.
        config: the settings.
        baselines: errors of the baselines.
        folds: cross-validation results.
    """
    members = [f"member_{i}" for i in range(config.ensemble)] if config.ensemble > 1 else []
    if result.predictions:
        more = ["fold"] if folds else []
        write_predictions(folder.path / "predictions_test.csv", _tested(result, folds), *more)
        _plot_parity(folder.path / "plots", result)
    if not members:
        curves = ["train/loss", "val/mae", "val/r2"] if None in result.data.labels else ["train/loss", "val/accuracy"]
        plots.learning_curves(
            folder.path / "metrics.csv", folder.path / "plots" / "curves.png", curves, listed(result.data.targets, 3)
        )
    tested = Fingerprints.of(result.data.store, np.array(list(result.predictions), np.int64))
    overlap = pretraining_overlap(config.pretrained, tested)
    folder.finish(
        {
            "command": "finetune",
            "recipe": config.recipe,
            "seed": config.seed,
            "pretrained": config.pretrained,
            "train_crystals": result.info["train_crystals"],
            "data_sha256": result.data.store.hash,
            "left_out": result.data.left_out,
            "pretraining_overlap": overlap,
            "calibration": result.info["calibration"],
            **({"blend": result.info["blend"]} if "blend" in result.info and not members else {}),
            **({"members": members, "ensemble_by": config.ensemble_by} if members else {}),
            **({"folds": folds.scores} if folds else {}),
            **({"baselines": baselines} if baselines else {}),
            **result.metrics,
            **flat_metrics(baselines, result.data.targets),
        }
    )
    _print_metrics(result, "out of fold" if folds else "test")
    print_baselines(baselines)
    for sentence in verdict(baselines):
        note(sentence)
    print_overlap(overlap)
    written = [str(folder.path / name) for name in members] or [str(folder.path / "model.safetensors")]
    print_table("", ["written", ""], [["model" if not members else "members", place] for place in written])
    suggest_next(f"crysldnet predict FILES model={folder.path}", f'make predict FILES="…" MODEL={folder.path}')
    suggest_next(f"crysldnet report {folder.path}")


def _print_metrics(result: Finetuned, test: str) -> None:
    metrics: dict[str, Any] = result.metrics
    splits = [s for s in ("val", "test_members", "test") if any(name.startswith(f"{s}/") for name in metrics)]
    names = dict.fromkeys(name.split("/", 1)[1] for name in metrics if name.split("/")[0] in splits)
    units = dict(zip(result.data.targets, result.data.units, strict=True))
    hidden = set(result.data.targets[SHOWN:])
    rows = []
    for name in names:
        kind, _, target = name.partition("/")
        if target not in hidden and all(f"{split}/{name}" in metrics for split in splits):
            measure, _ = find(f"val/{name}")
            unit = measure.unit_in(units, target)
            title = (measure.title or kind) + (f" {target}" if target else "")
            rows.append(
                [title + (f" ({unit})" if unit else ""), *(f"{metrics[f'{split}/{name}']:.4f}" for split in splits)]
            )
    titles = [test if split == "test" else split.replace("_", ", ") for split in splits]
    print_table(listed(result.data.targets), ["", *titles], rows)
