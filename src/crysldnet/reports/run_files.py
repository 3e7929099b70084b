"""Read what a finished run left in its folder. Needs neither the model nor torch."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from crysldnet.errors import DataError
from crysldnet.training.plots import Curves, read_curves

COLUMNS = ("material_id", "target", "true", "prediction", "unit")
COMMANDS = ("finetune", "pretrain", "matbench")


@dataclass(frozen=True)
class Predictions:
    """Predictions of one target on the test split.

    Attributes:
        target: its name.
        unit: of the values; empty where none is stated, and for classes.
        ids: [n] of the crystals.
        true: [n], NaN where unknown. Of classes, their place in ``classes``.
        predicted: [n] likewise, always known.
        std: [n] standard deviations; None where the model gave none.
        classes: names of the classes; None for a number.
    """

    target: str
    unit: str
    ids: list[str]
    true: NDArray[np.float64]
    predicted: NDArray[np.float64]
    std: NDArray[np.float64] | None = None
    classes: list[str] | None = None

    @property
    def errors(self) -> NDArray[np.float64]:
        """[n] absolute errors, or 1 for a wrong class and 0 for a right one; NaN where the truth is unknown."""
        if self.classes is None:
            return np.abs(self.predicted - self.true)
        return np.where(np.isnan(self.true), np.nan, self.predicted != self.true)

    @property
    def measure(self) -> str:
        """What the mean of the errors is called."""
        return "MAE" if self.classes is None else "share of wrong classes"

    @property
    def suffix(self) -> str:
        """The unit, for titles."""
        return f" ({self.unit})" if self.unit else ""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its folder.
        name: of the run.
        config: as it was resolved.
        summary: what it wrote last.
        curves: of each part (a stage or a task; "" where there is one), title of a line (a fold or member; "" where
            there is one) to its metrics.
        predictions: of each target.
    """

    path: Path
    name: str
    config: dict[str, Any]
    summary: dict[str, Any]
    curves: dict[str, dict[str, Curves]]
    predictions: dict[str, Predictions] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command that made it."""
        return self.summary["command"]


def read_run(path: Path) -> Run:
    """Read the folder of a run.

    Raises:
        DataError: it isn't one, it isn't finished, or a file is missing or damaged; the message names it.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; name the folder of a run, as runs/finetune/latest")
    path = path.resolve() if path.is_symlink() else path
    if not (path / "config.yaml").is_file():
        raise DataError(f"{path}: not the folder of a run (no config.yaml); name one, as runs/finetune/latest")
    config = _read_config(path / "config.yaml")
    summary = _read_summary(path)
    curves = {
        part: {line: _read_metrics(folder / "metrics.csv", path) for line, folder in lines.items()}
        for part, lines in _parts(path, summary).items()
    }
    predictions = {}
    if summary["command"] == "finetune":
        predictions = _read_tested(path, config, summary)
    return Run(path, path.absolute().name, config, summary, curves, predictions)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not readable as YAML ({error}); bring it back, or train again") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: it must hold keys and values; bring it back, or train again")
    return config


def _read_summary(path: Path) -> dict[str, Any]:
    file = path / "summary.json"
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{file}: missing, so the run isn't finished; finish it with crysldnet {path.parent.name} "
            f"name={path.absolute().name} resume=last"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: damaged ({error}); bring it back, or train again") from error
    command = summary.get("command") if isinstance(summary, dict) else None
    if command == "sweep":
        raise DataError(f"{path}: a sweep; name its runs, which are in {path}/finetune or {path}/pretrain")
    if command not in COMMANDS:
        raise DataError(f"{file}: it doesn't say which command was run ({', '.join(COMMANDS)}); bring it back")
    return summary


def matbench_tasks(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a Matbench run's summary says of each task."""
    return {name: dict(told) for name, told in summary.get("tasks", {}).items() if isinstance(told.get("scores"), dict)}


def _parts(path: Path, summary: Mapping[str, Any]) -> dict[str, dict[str, Path]]:
    """Return the folders that have a metrics.csv, which must be there, by part and line."""
    command = summary["command"]
    if command == "pretrain":
        return {stage: {"": path / stage} for stage in ("vae", "diffusion") if summary.get(stage)}
    if command == "matbench":
        return {
            task: {
                folder.relative_to(path / task).as_posix().replace("_", " ").replace("/", ", "): folder
                for fold in told["scores"]
                for folder in sorted((path / task / fold).glob("member_*")) or [path / task / fold]
            }
            for task, told in matbench_tasks(summary).items()
        }
    return {"": {member.replace("_", " "): path / member for member in summary.get("members", [])} or {"": path}}


def _read_metrics(file: Path, run: Path) -> Curves:
    try:
        curves = read_curves(file)
    except FileNotFoundError:
        raise DataError(f"{file}: missing although {run} is finished; bring it back, or train again") from None
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file}: damaged ({error}); bring it back, or train again") from error
    if not curves:
        raise DataError(f"{file}: it has no epoch with a loss or a validation; bring it back, or train again")
    return curves


def _read_tested(path: Path, config: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Predictions]:
    file = path / "predictions_test.csv"
    if not file.exists():
        if any(name.startswith("test/") for name in summary):
            raise DataError(f"{file}: missing although summary.json has errors of the test split; bring it back")
        return {}
    types = config.get("target_types") or {}
    rows = _read_rows(file)
    if not rows:
        raise DataError(f"{file}: it has no rows; bring it back, or train again")
    targets = dict.fromkeys(row["target"] for row in rows)
    return {
        target: _of_target(
            [row for row in rows if row["target"] == target],
            classes=types.get(target) == "classes",
            file=file,
        )
        for target in targets
    }


def _read_rows(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise DataError(f"{file}: it lacks the column {missing[0]}; bring it back, or train again")
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{file}, line {reader.line_num}: cut off; bring it back, or train again")
                rows.append({**row, "": str(reader.line_num)})
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: unreadable ({error}); bring it back, or train again") from error


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _of_target(rows: list[dict[str, str]], *, classes: bool, file: Path) -> Predictions:
    first = rows[0]
    known = [row for row in rows if row["true"] != ""]
    if classes or (known and not any(_is_number(row["true"]) for row in known)):
        labels = sorted({row[name] for row in rows for name in ("true", "prediction")} - {""})
        place = {label: float(i) for i, label in enumerate(labels)} | {"": math.nan}
        true, predicted = (np.array([place[row[name]] for row in rows]) for name in ("true", "prediction"))
        return Predictions(first["target"], "", [r["material_id"] for r in rows], true, predicted, None, labels)
    for row in rows:
        for name in ("true", "prediction", "std"):
            text = row.get(name, "")
            if not (_is_number(text) or (text == "" and name != "prediction")):
                raise DataError(
                    f"{file}, line {row['']}: {name} of {row['material_id']} is {text!r}, not a number; "
                    "bring the file back, or train again"
                )
    true, predicted, std = (
        np.array([float(row.get(name) or "nan") for row in rows]) for name in ("true", "prediction", "std")
    )
    return Predictions(
        first["target"],
        first["unit"],
        [row["material_id"] for row in rows],
        true,
        predicted,
        None if np.isnan(std).all() else std,
    )
