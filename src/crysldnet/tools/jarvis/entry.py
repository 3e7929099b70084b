"""Write and check an entry of the JARVIS leaderboard.

An entry is a folder ``contributions/NAME`` of the leaderboard's repository: predictions of each property in
``AI-SinglePropertyPrediction-PROPERTY-dft_3d-test-mae.csv.zip`` with the columns id and prediction, ``metadata.json``
and ``run.sh``.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crysldnet.console import note, print_table
from crysldnet.errors import DataError
from crysldnet.io import whole_file, write_atomically
from crysldnet.tools.jarvis.benchmark import DATASET, read_split

STEM = f"AI-SinglePropertyPrediction-{{}}-{DATASET}-test-mae"
METADATA, SCRIPT = "metadata.json", "run.sh"
TEXTS = (
    "model_name project_url date_submitted author_email database_version team_name language os software_used "
    "hardware_used"
).split()
"""Keys of the metadata that hold text."""
_ANY_TIME = (1980, 1, 1, 0, 0, 0)
"""Time of files in archives, so that the same predictions give the same bytes."""


@dataclass
class Checked:
    """What a check of an entry found.

    Attributes:
        problems: why it isn't valid; empty if it is.
        scores: number of predictions and MAE of each property; NaN where the true values aren't known.
    """

    problems: list[str] = field(default_factory=list)
    scores: dict[str, tuple[int, float]] = field(default_factory=dict)


def write_entry(
    folder: Path, predictions: Mapping[str, Mapping[str, float]], metadata: Mapping[str, Any], script: str
) -> None:
    """Write an entry.

    Args:
        folder: the entry, which may exist.
        predictions: values by id for each property.
        metadata: content of ``metadata.json``.
        script: content of ``run.sh``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in predictions.items():
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["id", "prediction"])
        writer.writerows([id_, f"{value:.9g}"] for id_, value in values.items())
        stem = STEM.format(name)
        with whole_file(folder / f"{stem}.csv.zip") as file, zipfile.ZipFile(file, "w") as archive:
            about = zipfile.ZipInfo(f"{stem}.csv", _ANY_TIME)
            archive.writestr(about, text.getvalue(), zipfile.ZIP_DEFLATED)
    write_atomically(folder / METADATA, json.dumps(metadata, indent=4, ensure_ascii=False) + "\n")
    write_atomically(folder / SCRIPT, script)


def check_entry(folder: Path, truth: Mapping[str, Mapping[str, float] | Sequence[str]]) -> Checked:
    """Check an entry as the leaderboard reads it, and compute its errors.

    Args:
        folder: the entry.
        truth: test values by id, or test ids, for each property that it must have.
    """
    found = Checked()
    found.problems += _check_metadata(folder)
    if not (folder / SCRIPT).is_file() or not (folder / SCRIPT).read_text(encoding="utf-8").startswith("#!"):
        found.problems.append(f"{SCRIPT}: missing, or it doesn't start with #!")
    present = present_in(folder)
    for path in sorted(folder.glob("*.zip")):
        if path not in present.values():
            found.problems.append(f"{path.name}: not a name of a regression on {DATASET}")
    found.problems += [f"{STEM.format(name)}.csv.zip: missing" for name in truth if name not in present]
    if not present and not truth:
        found.problems.append("no predictions")
    for name, path in present.items():
        try:
            values = read_predictions(path)
        except DataError as error:
            found.problems.append(str(error))
            continue
        true = truth.get(name)
        if true is not None and values.keys() != {*true}:
            lost, more = {*true} - values.keys(), values.keys() - {*true}
            found.problems.append(f"{path.name}: test crystals without a prediction: {len(lost)}; others: {len(more)}")
        known = true if isinstance(true, Mapping) else {}
        errors = [abs(value - known[id_]) for id_, value in values.items() if id_ in known]
        found.scores[name] = len(values), sum(errors) / len(errors) if errors else math.nan
    return found


def present_in(folder: Path) -> dict[str, Path]:
    """Return the files of predictions in an entry by property."""
    pattern = re.compile(re.escape(STEM).replace(r"\{\}", r"(\w+)") + r"\.csv\.zip")
    return {match[1]: path for path in sorted(folder.glob("*.csv.zip")) if (match := pattern.fullmatch(path.name))}


def _check_metadata(folder: Path) -> list[str]:
    try:
        content = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [f"{METADATA}: missing"]
    except ValueError as error:
        return [f"{METADATA}: not JSON ({error})"]
    if not isinstance(content, dict):
        return [f"{METADATA}: it must hold keys and values"]
    problems = [f"{METADATA}: {key} must be text" for key in TEXTS if not str(content.get(key) or "").strip()]
    if not re.fullmatch(r"\d\d-\d\d-\d{4}", str(content.get("date_submitted"))):
        problems.append(f"{METADATA}: date_submitted must be MM-DD-YYYY")
    if not isinstance(content.get("time_taken_seconds"), int | float):
        problems.append(f"{METADATA}: time_taken_seconds must be a number")
    if not isinstance(content.get("git_url"), list):
        problems.append(f"{METADATA}: git_url must be a list")
    return problems


def read_predictions(path: Path) -> dict[str, float]:
    """Read the predictions of a property by id.

    Raises:
        DataError: the file isn't such an archive, or an id occurs twice, or a value isn't a finite number.
    """
    name = path.name.removesuffix(".zip")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.namelist() != [name]:
                raise ValueError(f"it must hold {name} and nothing else")
            rows = list(csv.DictReader(io.StringIO(archive.read(name).decode(), newline="")))
        if not rows or not {"id", "prediction"} <= rows[0].keys():
            raise ValueError("it must have rows with the columns id and prediction")
        values = {row["id"]: float(row["prediction"]) for row in rows}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path.name}: {error}") from error
    if len(values) < len(rows):
        raise DataError(f"{path.name}: ids that occur again: {len(rows) - len(values)}")
    if bad := [id_ for id_, value in values.items() if not math.isfinite(value)]:
        raise DataError(f"{path.name}: the prediction of {bad[0]} isn't finite")
    return values


def print_checked(folder: Path, found: Checked, units: Mapping[str, str]) -> None:
    """Print the errors and the problems of an entry."""
    rows = [
        [f"{name} ({units[name]})" if units.get(name) else name, f"{count:,}", "–" if math.isnan(mae) else f"{mae:.4g}"]
        for name, (count, mae) in found.scores.items()
    ]
    print_table("JARVIS leaderboard", ["property", "test crystals", "MAE"], rows)
    for problem in found.problems:
        note(f"{folder}: {problem}")
    state = f"NOT VALID, problems: {len(found.problems)}" if found.problems else "valid"
    print_table("", ["", ""], [["entry", str(folder)], ["state", state]])


def main(arguments: argparse.Namespace) -> int:
    """Check an entry and print the result; return 1 if it has problems."""
    folder: Path = arguments.folder
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    truth = {}
    if arguments.splits is not None:
        truth = {name: read_split(arguments.splits, name)[1]["test"] for name in present_in(folder)}
    found = check_entry(folder, truth)
    print_checked(folder, found, {})
    return 1 if found.problems else 0
