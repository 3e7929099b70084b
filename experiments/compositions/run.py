"""How good are this package's tabular models on composition descriptors alone, on four Matbench tasks?

python -m experiments.compositions.run data=FOLDER [key=value …]

The keys are those of config.yaml beside this file. Results of a fold are kept in ``runs``, so an interrupted study
continues where it stopped.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pymatgen.core import Composition

from crysldnet.descriptors.composition import N_ELEMENTS, composition_features
from crysldnet.io import write_atomically
from crysldnet.tabular.stack import FittedStack, fit_stack
from experiments import evidence

HERE = Path(__file__).parent
WITH_FRACTIONS = "descriptors and fractions"
BOARD = json.loads((HERE / "leaderboard.json").read_text())["tasks"]


@dataclass(frozen=True)
class Settings:
    """See config.yaml."""

    data: str
    runs: str
    out: str | None
    tasks: dict[str, str]
    features: list[str]
    seeds: list[int]


@dataclass(frozen=True)
class Task:
    """The compositions of one task.

    Attributes:
        name: as in Matbench.
        amounts: [n, 119] amount of each element, divided by their sum.
        values: [n] targets; 0 and 1 for classes.
        fold: [n] the official fold in which a composition is tested.
    """

    name: str
    amounts: NDArray[np.float64]
    values: NDArray[np.float64]
    fold: NDArray[np.int64]

    @classmethod
    def read(cls, folder: Path, name: str, target: str) -> Task:
        """Read a task's file."""
        table = pq.read_table(folder / f"comp_{name}.parquet")
        amounts = np.zeros((len(table), N_ELEMENTS))
        for row, formula in enumerate(table["formula"].to_pylist()):
            for element, amount in Composition(formula).items():
                amounts[row, element.Z] = amount
        amounts /= amounts.sum(axis=1, keepdims=True)
        return cls(name, amounts, table[target].to_numpy().astype(float), table["matbench_test_fold"].to_numpy())

    @property
    def classes(self) -> bool:
        """Whether the target is a class."""
        return BOARD[self.name]["metric"] == "rocauc"

    def features(self, kind: str) -> NDArray[np.float64]:
        """Return [n, D] the descriptors, and the fractions of the elements if ``kind`` has them."""
        blocks = [composition_features(self.amounts).values]
        if kind == WITH_FRACTIONS:
            blocks.append(self.amounts[:, self.amounts.any(axis=0)])
        return np.concatenate(blocks, axis=1)

    def score(self, true: NDArray[np.float64], predicted: NDArray[np.float64], threshold: float) -> float:
        """Return the error or, for classes, the ROC AUC of thresholded predictions, as on the leaderboard."""
        if not self.classes:
            return float(np.abs(true - predicted).mean())
        positive = predicted >= threshold
        return float((positive[true == 1].mean() + (~positive[true == 0]).mean()) / 2)


def best_threshold(task: Task, fitted: FittedStack) -> float:
    """Return the threshold with the best out-of-fold score; 0 for numbers, which need none."""
    if not task.classes:
        return 0.0
    found = np.linspace(0.05, 0.95, 91)
    scores = [task.score(fitted.y[:, 0], fitted.value[:, 0], threshold) for threshold in found]
    return float(found[int(np.argmax(scores))])


def run_fold(task: Task, features: list[str], fold: int, seed: int) -> dict[str, float | str]:
    """Fit the members with each kind of features, select one by its out-of-fold score, and test it."""
    started = time.process_time()
    train, test = np.flatnonzero(task.fold != fold), np.flatnonzero(task.fold == fold)
    candidates = []
    for kind in features:
        x, y = task.features(kind), task.values[train, None]
        fitted = fit_stack(x[train], y, np.arange(len(train)), absolute=not task.classes, seed=seed)
        threshold = best_threshold(task, fitted)
        validated = task.score(y[:, 0], fitted.value[:, 0], threshold)
        predicted = fitted.stack.combine(fitted.stack.predict(x[test].astype(np.float32)))[0][:, 0]
        tested = task.score(task.values[test], predicted, threshold)
        candidates.append({"features": kind, "validation": validated, "test": tested})
    best = (max if task.classes else min)(candidates, key=lambda candidate: candidate["validation"])
    return {**best, "seconds": time.process_time() - started}


def main() -> None:
    """Run every fold of every task and seed; write results.json and the table."""
    settings = evidence.settings(Settings, HERE, __doc__ or "", {"runs", "out", "tasks", "seeds"})
    out, records = Path(settings.out or HERE), []
    for name, target in settings.tasks.items():
        task = Task.read(Path(settings.data), name, target)
        every: list[list[dict[str, float | str]]] = []
        for seed in settings.seeds:
            file = Path(settings.runs) / f"{name}-{seed}.json"
            if not file.exists():
                folds = [run_fold(task, settings.features, fold, seed) for fold in range(5)]
                write_atomically(file, json.dumps(folds, indent=1) + "\n")
            every.append(json.loads(file.read_text()))
            print(name, seed, [round(fold["test"], 4) for fold in every[-1]], flush=True)
        records += records_of(task, settings.seeds, every)
    out.mkdir(parents=True, exist_ok=True)
    evidence.write(out, records)


def records_of(task: Task, seeds: list[int], every: list[list[dict[str, float | str]]]) -> list[evidence.Record]:
    """Return the mean over folds with its spread over seeds, the rank, the best entry and the time of a task."""
    entries, classes = BOARD[task.name]["entries"], task.classes
    means = [float(np.mean([fold["test"] for fold in folds])) for folds in every]
    mine = float(np.mean(means))
    ahead = sum(value > mine if classes else value < mine for _, value, _ in entries)
    known = {
        "name": f"{task.name}, {'ROC AUC' if classes else 'MAE in ' + BOARD[task.name]['unit']}",
        "seeds": seeds,
        "data": f"{len(task.values):,} compositions, five folds",
        "command": "python -m experiments.compositions.run data=FOLDER",
        "commit": evidence.current_commit(HERE),
    }
    seconds = [float(np.mean([fold["seconds"] for fold in folds])) for folds in every]
    chosen = [fold["features"] == WITH_FRACTIONS for folds in every for fold in folds]
    return [
        evidence.summarise(means, metric="this package", unit="1", **known),
        evidence.summarise([ahead + 1.0], metric="rank", unit="1", **known),
        evidence.summarise([float(len(entries))], metric="entries beside it", unit="1", **known),
        evidence.summarise([entries[0][1]], metric="first entry of the leaderboard", unit="1", **known),
        evidence.summarise([100 * float(np.mean(chosen))], metric="fits with fractions", unit="%", **known),
        evidence.summarise(seconds, metric="processor time of a fold", unit="s", **known),
    ]


if __name__ == "__main__":
    main()
