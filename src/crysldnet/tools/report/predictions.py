"""Read the test predictions that a run wrote as CSV. Needs neither the model nor torch."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crysldnet.console import from_spreadsheet
from crysldnet.errors import DataError

COLUMNS = ("material_id", "target", "true", "prediction", "unit")


@dataclass(frozen=True)
class Predictions:
    """Predictions of one target for test crystals.

    Attributes:
        target: target name.
        unit: unit of the values; empty if not stated, and for classes.
        ids: [n] crystal ids.
        true: [n] true values, NaN if unknown; for classes the index in ``classes``.
        predicted: [n] predictions, always known.
        std: [n] standard deviations, or None.
        classes: class names; None for a number.
        probability: [n] probability of the predicted class; None for a number.
        folds: [n] test fold of each crystal in Matbench or cross-validation; None without folds.
    """

    target: str
    unit: str
    ids: list[str]
    true: NDArray[np.float64]
    predicted: NDArray[np.float64]
    std: NDArray[np.float64] | None = None
    classes: list[str] | None = None
    probability: NDArray[np.float64] | None = None
    folds: NDArray[np.int64] | None = None

    def of_fold(self, fold: int) -> Predictions:
        """Return the predictions of one fold."""
        assert self.folds is not None
        own = np.flatnonzero(self.folds == fold)
        return replace(
            self,
            ids=[self.ids[i] for i in own],
            true=self.true[own],
            predicted=self.predicted[own],
            std=None if self.std is None else self.std[own],
            probability=None if self.probability is None else self.probability[own],
            folds=self.folds[own],
        )

    @property
    def errors(self) -> NDArray[np.float64]:
        """[n] absolute errors, or 1 for a wrong class and 0 for a right one; NaN if unknown."""
        if self.classes is None:
            return np.abs(self.predicted - self.true)
        return np.where(np.isnan(self.true), np.nan, self.predicted != self.true)

    @property
    def measure(self) -> str:
        """Name of the mean error."""
        return "MAE" if self.classes is None else "error rate"

    @property
    def suffix(self) -> str:
        """The unit for titles."""
        return f" ({self.unit})" if self.unit else ""


def read_predictions(file: Path, types: Mapping[str, str], *more: str) -> dict[str, Predictions]:
    """Read the predictions of each target.

    Args:
        file: CSV file.
        types: target types from the configuration, by name.
        more: required columns in addition to ``COLUMNS``.

    Raises:
        DataError: the file is damaged; the message names file and line.
    """
    rows = _read_rows(file, [*COLUMNS, *more])
    if not rows:
        raise DataError(f"{file}: it has no rows; restore it, or train again")
    targets = dict.fromkeys(row["target"] for row in rows)
    return {
        target: _of_target(
            [row for row in rows if row["target"] == target],
            classes=types.get(target) in ("classes", "classification"),
            file=file,
        )
        for target in targets
    }


def _read_rows(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            missing = [name for name in columns if name not in (reader.fieldnames or [])]
            if missing:
                raise DataError(f"{file}: it lacks the column {missing[0]}; restore it, or train again")
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{file}, line {reader.line_num}: cut off; restore it, or train again")
                rows.append({name: from_spreadsheet(cell) for name, cell in row.items()} | {"": str(reader.line_num)})
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: unreadable ({error}); restore it, or train again") from error


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _of_target(rows: list[dict[str, str]], *, classes: bool, file: Path) -> Predictions:
    target, unit, ids = rows[0]["target"], rows[0]["unit"], [row["material_id"] for row in rows]
    folds = np.array(_numbers(rows, "fold", file), np.int64) if "fold" in rows[0] else None
    known = [row["true"] for row in rows if row["true"] != ""]
    named = any(row.get("probability") for row in rows) or (known and not any(map(_is_number, known)))
    if classes or named:
        labels = sorted({row[name] for row in rows for name in ("true", "prediction")} - {""})
        place = {label: float(i) for i, label in enumerate(labels)} | {"": math.nan}
        true, predicted = (np.array([place[row[name]] for row in rows]) for name in ("true", "prediction"))
        probability = _numbers(rows, "probability", file, or_nothing=True)
        return Predictions(target, "", ids, true, predicted, None, labels, probability, folds)
    predicted = _numbers(rows, "prediction", file)
    true, std = (_numbers(rows, name, file, or_nothing=True) for name in ("true", "std"))
    return Predictions(target, unit, ids, true, predicted, None if np.isnan(std).all() else std, folds=folds)


def _numbers(rows: list[dict[str, str]], name: str, file: Path, *, or_nothing: bool = False) -> NDArray[np.float64]:
    """Return a column [n], NaN for allowed empty cells."""
    for row in rows:
        text = row.get(name, "")
        if not (_is_number(text) or (text == "" and or_nothing)):
            raise DataError(
                f"{file}, line {row['']}: {name} of {row['material_id']} is {text!r}, not a number; "
                "restore the file, or train again"
            )
    return np.array([float(row.get(name) or "nan") for row in rows])
