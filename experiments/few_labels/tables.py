"""What the contest measured: errors of each task, and the change against the best of the others with its interval."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from crysldnet.io import write_atomically
from experiments import evidence

OURS = ("frozen", "descriptors alone", "network", "scratch", "hybrid", "other encoder")
"""Beginnings of the names of contestants that are this package's."""


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


def records_of(runs: str, names: Sequence[str], out: Path) -> list[evidence.Record]:
    """Return the records of all that was measured, and write every error into ``errors.json``.

    Of each contestant and size: the mean error of each task over the draws that all contestants of the size have, the
    seconds, and the change of the error against the best of the others (the one with the lowest mean logarithm of the
    error over all tasks), in percent: in each draw the geometric mean over tasks. Its spread is half the 95 % interval
    of t over draws.
    """
    every = read_errors(Path(runs), out)
    write_atomically(
        out / "errors.json",
        json.dumps({"-".join(map(str, key)): value for key, value in every.items()}, indent=0) + "\n",
    )
    records = []
    for labels in sorted({key[0] for key in every}):
        of_size = {key[1:]: value for key, value in every.items() if key[0] == labels}
        present = [n for n in names if any(n in value for value in of_size.values())]
        complete = {key: value for key, value in of_size.items() if all(n in value for n in present)}
        if not complete:
            continue
        draws = sorted({seed for _, seed in complete})
        known = {
            "seeds": draws,
            "data": f"{labels:,} labels",
            "command": f"python -m experiments.few_labels.run labels=[{labels}] data=FOLDER",
            "commit": ", ".join(sorted({v["commit"] for value in complete.values() for v in value.values()})),
        }
        others = [n for n in present if not n.startswith(OURS) and n != "mean"]
        log = {n: np.mean([np.log(value[n]["mae"]) for value in complete.values()]) for n in present}
        best = min(others, key=lambda n: log[n]) if others else None
        for name in present:
            mine = {"name": f"{name}, {labels:,} labels", **known}
            for task in dict.fromkeys(task for task, _ in complete):
                values = [v[name]["mae"] for (t, _), v in complete.items() if t == task]
                records.append(evidence.summarise(values, metric=task, unit="MAE", **mine))
            seconds = [v[name]["seconds"] for v in complete.values()]
            records.append(evidence.summarise([float(np.mean(seconds))], metric="time", unit="s", **mine))
            if best is not None and name != best:
                of_draw = defaultdict(list)
                for (_, seed), value in complete.items():
                    of_draw[seed].append(np.log(value[name]["mae"] / value[best]["mae"]))
                means = [100 * float(np.expm1(np.mean(v))) for v in of_draw.values()]
                record = evidence.summarise(means, metric=f"against {best}", unit="%", **mine)
                width = (
                    stats.t.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / np.sqrt(len(means))
                    if len(means) > 1
                    else None
                )
                records.append(replace(record, spread=width))
    return records
