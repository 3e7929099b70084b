"""Read the files of a finished run. Needs neither the model nor torch."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from crysldnet.build import from_yaml
from crysldnet.errors import DataError
from crysldnet.tools.report.predictions import Predictions, read_predictions
from crysldnet.training.plots import Curves, read_curves

COMMANDS = ("finetune", "pretrain", "matbench")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: run folder.
        name: run name.
        config: resolved configuration.
        summary: content of summary.json.
        curves: metrics by part (a stage or task; "" for a single one) and line title (a fold or member; "" for a
            single one).
        predictions: predictions by target; for a Matbench run by task, because two tasks may have the same target.
    """

    path: Path
    name: str
    config: dict[str, Any]
    summary: dict[str, Any]
    curves: dict[str, dict[str, Curves]]
    predictions: dict[str, Predictions] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command of the run."""
        return self.summary["command"]

    @property
    def data(self) -> dict[str, str]:
        """Hashes of the data and the pretrained encoder, if in the summary."""
        told = {"": self.summary, **{f" {task}": of_task for task, of_task in matbench_tasks(self.summary).items()}}
        return {
            f"{key}{task}": str(of[key])
            for task, of in told.items()
            for key in ("data_sha256", "pretrained_sha256")
            if of.get(key) is not None
        }


def read_run(path: Path) -> Run:
    """Read the folder of a run.

    Raises:
        DataError: it isn't a run, isn't finished, or a file is missing or damaged; the message names it.
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
    return Run(path, path.absolute().name, config, summary, curves, _read_tested(path, config, summary))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = from_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not readable as YAML ({error}); restore it, or train again") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: it must hold keys and values; restore it, or train again")
    config.pop("defaults", None)  # choices of groups
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
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: damaged ({error}); restore it, or train again") from error
    command = summary.get("command") if isinstance(summary, dict) else None
    if command == "sweep":
        raise DataError(f"{path}: a sweep; name its runs, which are in {path}/finetune or {path}/pretrain")
    if command not in COMMANDS:
        raise DataError(f"{file}: it doesn't say which command was run ({', '.join(COMMANDS)}); restore it")
    return summary


def matbench_tasks(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a Matbench run's summary of each task."""
    return {name: dict(told) for name, told in summary.get("tasks", {}).items() if isinstance(told.get("scores"), dict)}


def _parts(path: Path, summary: Mapping[str, Any]) -> dict[str, dict[str, Path]]:
    """Return the folders with a metrics.csv, which must exist, by part and line."""
    command = summary["command"]
    if command == "pretrain":
        return {stage: {"": path / stage} for stage in ("vae", "diffusion") if summary.get(stage)}
    if command == "matbench":
        return {
            task: {
                folder.relative_to(path / task).as_posix().replace("_", " ").replace("/", ", "): folder
                for fold in told["scores"]
                for folder in _trained(path / task / fold)
            }
            for task, told in matbench_tasks(summary).items()
        }
    return {"": {member.replace("_", " "): path / member for member in summary.get("members", [])} or {"": path}}


def _trained(fold: Path) -> list[Path]:
    """Return the folders of the models that a fold predicts with or selected from."""
    return sorted(fold.glob("member_*")) or sorted(fold.glob("recipe_*")) or [fold]


def _read_metrics(file: Path, run: Path) -> Curves:
    try:
        curves = read_curves(file)
    except FileNotFoundError:
        raise DataError(f"{file}: missing although {run} is finished; restore it, or train again") from None
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file}: damaged ({error}); restore it, or train again") from error
    if not curves:
        raise DataError(f"{file}: it has no epoch with a loss or a validation; restore it, or train again")
    return curves


def _read_tested(path: Path, config: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Predictions]:
    types = config.get("target_types") or {}
    if summary["command"] == "matbench":
        files = {task: path / task / "predictions.csv" for task in matbench_tasks(summary)}
        tables = {task: read_predictions(file, types, "fold") for task, file in files.items() if file.exists()}
        return {task: predictions for task, table in tables.items() for predictions in table.values()}
    file = path / "predictions_test.csv"
    if file.exists():
        return read_predictions(file, types)
    if any(name.startswith("test/") for name in summary):
        raise DataError(f"{file}: missing although summary.json has errors of the test split; restore it")
    return {}
