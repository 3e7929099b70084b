"""What the contest measured: errors of each task, and the change against the best of the others with its interval."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from crysldnet.io import write_atomically
from experiments import evidence


def write_errors(file: Path, errors: Mapping[str, Any]) -> None:
    """Write what was measured of a draw."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(errors, indent=1))


def read_errors(runs: Path, out: Path) -> dict[tuple[int, str, int], dict[str, dict[str, Any]]]:
    """Return the errors of the contestants by number of labels, task and draw: the recorded ones and the runs'."""
    found: dict[tuple[int, str, int], dict[str, dict[str, Any]]] = {}
    recorded = out / "errors.json"
    if recorded.exists():
        for key, errors in json.loads(recorded.read_text()).items():
            labels, task, seed = key.split("-", 1)[0], *key.split("-", 1)[1].rsplit("-", 1)
            found[int(labels), task, int(seed)] = errors
    for file in sorted((runs / "errors").glob("*.json")):
        task, labels, seed = file.stem.rsplit("-", 2)
        found.setdefault((int(labels), task.replace("_", " "), int(seed)), {}).update(json.loads(file.read_text()))
    return dict(sorted(found.items()))


def _against(
    of_size: Mapping[tuple[str, int], dict[str, Any]], name: str, best: str, draws: Sequence[int]
) -> tuple[list[float], float | None]:
    """Return the change of each draw in percent (geometric mean over tasks), and half the 95 % interval of the mean."""
    changes = []
    for draw in draws:
        ratios = [v[name]["mae"] / v[best]["mae"] for (_, seed), v in of_size.items() if seed == draw]
        changes.append(100 * float(np.expm1(np.mean(np.log(ratios)))))
    if len(changes) < 2:
        return changes, None
    return changes, float(stats.t.ppf(0.975, len(changes) - 1) * np.std(changes, ddof=1) / np.sqrt(len(changes)))


def records_of(runs: str, names: Sequence[str], ours: Collection[str], out: Path) -> list[evidence.Record]:
    """Return the records of all that was measured, and write every error into ``errors.json``.

    Of each contestant and size: the number of draws for which it has all tasks, the mean error of each task over them,
    the seconds, and the change of the error against the best of the others on the same draws, in percent: in each draw
    the geometric mean over tasks. The best of the others has the lowest mean logarithm of the error over all tasks and
    draws. The spread of the change is half the 95 % interval of t over draws.
    """
    every = read_errors(Path(runs), out)
    write_atomically(
        out / "errors.json",
        json.dumps({"-".join(map(str, key)): value for key, value in every.items()}, indent=0) + "\n",
    )
    records = []
    for labels in sorted({key[0] for key in every}):
        of_size = {key[1:]: value for key, value in every.items() if key[0] == labels}
        tasks = list(dict.fromkeys(task for task, _ in of_size))
        draws = {
            name: [
                seed
                for seed in sorted({seed for _, seed in of_size})
                if all(name in of_size.get((task, seed), {}) for task in tasks)
            ]
            for name in names
        }
        others = [n for n in names if n not in ours and n != "mean" and draws[n]]
        best = min(
            others, key=lambda n: np.mean([np.log(v[n]["mae"]) for v in of_size.values() if n in v]), default=None
        )
        for name in names:
            if not draws[name]:
                continue
            measured = {key: value[name] for key, value in of_size.items() if key[1] in draws[name]}
            mine = {
                "name": f"{name}, {labels:,} labels",
                "seeds": draws[name],
                "data": f"{labels:,} labels",
                "command": f"python -m experiments.few_labels.run labels=[{labels}] data=FOLDER",
                "commit": ", ".join(sorted({value["commit"] for value in measured.values()})),
            }
            records.append(evidence.summarise([float(len(draws[name]))], metric="draws", unit="", **mine))
            for task in tasks:
                values = [value["mae"] for key, value in measured.items() if key[0] == task]
                records.append(evidence.summarise(values, metric=task, unit="MAE", **mine))
            seconds = [value["seconds"] for value in measured.values()]
            records.append(evidence.summarise([float(np.mean(seconds))], metric="time", unit="s", **mine))
            if best is not None and name != best and set(draws[name]) <= set(draws[best]):
                changes, width = _against(of_size, name, best, draws[name])
                record = evidence.summarise(changes, metric=f"against {best}", unit="%", **mine)
                records.append(replace(record, spread=width))
    return records
