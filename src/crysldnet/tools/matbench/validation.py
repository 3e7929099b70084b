"""Check a submission folder like Matbench's own pull request test, and recompute its scores.

That test is ``scripts/test_submission.py`` of https://github.com/materialsproject/matbench: required files, required
fields of ``info.json``, and that the official package loads ``results.json.gz`` and considers it valid. It checks
neither targets nor scores, accepts NaN, and doesn't report what it found, so these checks are added here.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crysldnet.console import note, print_table
from crysldnet.errors import CrysldnetError, DataError
from crysldnet.tools.matbench.scores import TaskScores, official_scores, print_scores, taken_names, true_roc_auc
from crysldnet.tools.matbench.settings import BENCHMARK
from crysldnet.tools.matbench.submission import INFO, RESULTS
from crysldnet.tools.matbench.tasks import import_matbench, read_targets, task_metadata

NOT_EMPTY = ("authors", "algorithm", "algorithm_long", "bibtex_refs", "requirements")
"""Required fields of ``info.json``; ``notes`` must exist but may be empty."""
BANNED = ".ipynb_checkpoints"
MAX_BYTES = 10_000_000
"""Maximum size of any file but the results."""
MOST_RESULTS = 500_000_000
"""Maximum size of the unpacked results, in bytes."""
FOLD_KEYS = {"data", "parameters", "scores"}
TOLERANCE = 1e-9
"""Relative tolerance between stated and recomputed scores."""


@dataclass
class Checked:
    """Result of a check.

    Attributes:
        problems: descriptions; empty if the folder is valid.
        algorithm: name in ``info.json``.
        scores: scores of the tasks that could be scored.
    """

    problems: list[str] = field(default_factory=list)
    algorithm: str = ""
    scores: list[TaskScores] = field(default_factory=list)


def check_submission(folder: Path) -> Checked:
    """Check a submission folder.

    Raises:
        DataError: the folder doesn't exist.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    checked = Checked()
    checked.problems += _file_problems(folder)
    checked.algorithm, problems = _check_info(folder / INFO)
    checked.problems += problems
    if (folder / RESULTS).is_file():
        try:
            content = _read_results(folder / RESULTS)
        except DataError as error:
            checked.problems.append(str(error))
        else:
            _check_results(content, checked)
    return checked


def _file_problems(folder: Path) -> list[str]:
    problems = []
    if not folder.resolve().name.startswith(f"{BENCHMARK}_"):
        problems.append(f"the folder's name must be {BENCHMARK}_ALGORITHM, not {folder.resolve().name}")
    problems += [f"{name} is missing" for name in (RESULTS, INFO) if not (folder / name).is_file()]
    if not [*folder.glob("*.py"), *folder.glob("*.ipynb")]:
        problems.append("there is neither a .py nor an .ipynb file that repeats the run")
    if (folder / BANNED).exists():
        problems.append(f"{BANNED} must not be in it")
    for path in sorted(folder.iterdir()):
        if not path.exists():
            problems.append(f"{path.name} is a link to nothing")
        elif path.name != RESULTS and path.stat().st_size > MAX_BYTES:
            problems.append(f"{path.name} has {path.stat().st_size / 1e6:.1f} MB; all but the results may have 10")
    return problems


def _check_info(path: Path) -> tuple[str, list[str]]:
    """Return the algorithm's name and problems."""
    if not path.is_file():
        return "", []
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return "", [f"{INFO} isn't JSON ({error})"]
    if not isinstance(info, dict):
        return "", [f"{INFO} must hold an object, not {type(info).__name__}"]
    problems = [f"{INFO}: {name} is missing or empty" for name in NOT_EMPTY if not info.get(name)]
    if "notes" not in info:
        problems.append(f"{INFO}: notes is missing")
    if info.get("algorithm") and not isinstance(info["algorithm"], str):
        return "", [*problems, f"{INFO}: algorithm must be a name, not {info['algorithm']!r}"]
    algorithm = info.get("algorithm") or ""
    if algorithm in taken_names():
        problems.append(f"{INFO}: the leaderboard has an algorithm {algorithm!r} already; names must be unique")
    return algorithm, problems


def _read_results(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        start = file.read(100)
    if start[:2] != b"\x1f\x8b":
        plain = " but plain JSON, as matbench 0.6 writes it; compress it" if start.lstrip()[:1] == b"{" else ""
        raise DataError(f"{RESULTS} isn't gzip{plain}")
    try:
        with gzip.open(path) as unpacked:
            text = unpacked.read(MOST_RESULTS + 1)
        if len(text) > MOST_RESULTS:
            raise ValueError(f"over {MOST_RESULTS // 10**6} MB when unpacked")
        content = json.loads(text)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise DataError(f"{RESULTS} is damaged ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict) or not content["tasks"]:
        raise DataError(f"{RESULTS} holds no tasks")
    return content


def _check_results(content: dict[str, Any], checked: Checked) -> None:
    for task, entry in content["tasks"].items():
        try:
            checked.problems += _check_task(task, entry, checked)
        except (CrysldnetError, AttributeError, KeyError, TypeError, ValueError) as error:
            checked.problems.append(f"{task}: {error}")
    try:
        benchmark = import_matbench().MatbenchBenchmark.from_dict(json.loads(json.dumps(content)))
        if not benchmark.is_valid:
            checked.problems.append("the official package finds the results not valid")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        said = str(error.args[0]) if error.args else repr(error)
        checked.problems.append(f"the official package refuses the results: {said.splitlines()[0]}")


def _check_task(task: str, entry: Mapping[str, Any], checked: Checked) -> list[str]:
    from matbench.metadata import mbv01_validation

    task_metadata(task)
    splits, results = mbv01_validation.splits[task], entry["results"]
    problems = [f"{task}: {fold} isn't one of its folds" for fold in results if fold not in splits]
    sound = {}
    for fold, split in splits.items():
        found = _fold_problems(results.get(fold) or {}, list(split.test), task_metadata(task).task_type)
        problems += [f"{task}, {fold}: {problem}" for problem in found]
        if not found:
            sound[fold] = results[fold]
    true, source = read_targets(task)
    scores, areas = {}, {}
    for number, fold in enumerate(splits):
        if fold in sound:
            ids = list(splits[fold].test)
            values, predicted = [true[i] for i in ids], [sound[fold]["data"][i] for i in ids]
            scores[number] = official_scores(task, values, predicted)
            problems += [f"{task}, {fold}: {p}" for p in _differences(sound[fold]["scores"], scores[number])]
            if task_metadata(task).task_type == "classification":
                areas[number] = true_roc_auc(values, [float(p) for p in predicted])
    if len(scores) == len(splits):
        checked.scores.append(TaskScores(task, scores, areas, source.label))
    return problems


def _fold_problems(fold: Mapping[str, Any], ids: Sequence[str], task_type: str) -> list[str]:
    """Return problems with a fold's predictions, except their scores."""
    if not fold.get("data"):
        return ["it has no predictions; all folds must be recorded"]
    problems = [f"{key} is missing" for key in sorted(FOLD_KEYS - fold.keys())]
    problems += [f"{key} doesn't belong there" for key in sorted(fold.keys() - FOLD_KEYS - {"uncertainty"})]
    missing, surplus = sorted(set(ids) - fold["data"].keys()), sorted(fold["data"].keys() - set(ids))
    if missing:
        problems.append(f"{len(missing)} of its test crystals have no prediction ({', '.join(missing[:3])})")
    if surplus:
        problems.append(f"{len(surplus)} predictions aren't of its test crystals ({', '.join(surplus[:3])})")
    classification = task_type == "classification"
    kinds = (bool, float) if classification else (float,)
    for name, value in fold["data"].items():
        if not isinstance(value, kinds):
            problems.append(f"the prediction for {name} is {value!r}, not {' or '.join(k.__name__ for k in kinds)}")
        elif not math.isfinite(value):
            problems.append(f"the prediction for {name} is {value}")
        elif classification and not 0 <= value <= 1:
            problems.append(f"the prediction for {name} is {value}, not a probability")
    problems += _uncertainty_problems(fold.get("uncertainty"), fold["data"].keys())
    return problems if len(problems) < 4 else [*problems[:3], f"and {len(problems) - 3} more"]


def _uncertainty_problems(uncertainty: Mapping[str, Any] | None, ids: Any) -> list[str]:
    if not uncertainty:
        return []
    problems = []
    if uncertainty.keys() != ids:
        problems.append("its uncertainties are of other crystals than its predictions")
    for name, values in uncertainty.items():
        numbers = [v for v in values.values() if v is not None]
        if not all(isinstance(v, float) and math.isfinite(v) for v in numbers):
            problems.append(f"the uncertainty of {name} isn't finite")
    return problems


def _differences(stated: Mapping[str, float], scores: Mapping[str, float]) -> list[str]:
    problems = []
    for metric, value in scores.items():
        said = stated.get(metric)
        if not isinstance(said, float):
            problems.append(f"no score {metric}")
        elif not math.isclose(said, value, rel_tol=TOLERANCE):
            problems.append(f"it states {metric} {said:.6g}, and its predictions give {value:.6g}")
    return problems


def main(arguments: argparse.Namespace) -> int:
    """Check a submission folder and print the result; return 1 if it has problems."""
    folder: Path = arguments.folder
    checked = check_submission(folder)
    for scores in checked.scores:
        print_scores(f"{scores.task}, recomputed", checked.algorithm, scores)
    for problem in checked.problems:
        note(f"{folder}: {problem}")
    state = f"NOT VALID, problems: {len(checked.problems)}" if checked.problems else "valid"
    print_table("", ["", ""], [["submission", str(folder)], ["state", state]])
    return 1 if checked.problems else 0
