"""How well do few labels serve, with this package and without?

python -m experiments.few_labels.run data=FOLDER [key=value …]

Every contestant learns the same labelled crystals of each task, size and draw, and is tested on the same others. The
keys are those of config.yaml beside this file. What was measured is kept, so an interrupted study goes on where it
stopped, and one more contestant costs itself alone.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from experiments import evidence
from experiments.few_labels import features
from experiments.few_labels.tables import read_errors, records_of, write_errors
from experiments.tasks import TASKS, Labelled, finetuning, load

HERE = Path(__file__).parent
THREADS = "OMP_NUM_THREADS=1"


@dataclass(frozen=True)
class Settings:
    """See config.yaml."""

    data: str
    runs: str
    out: str | None
    labels: list[int]
    draws: int
    max_atoms: int
    tasks: list[str] | None
    contestants: list[str]
    ours: dict[str, list[str]]


@dataclass(frozen=True)
class Drawn:
    """One draw of a task: which crystals are labelled, which are tested, and the folder of their files."""

    labelled: Labelled
    labels: int
    seed: int
    train: np.ndarray
    test: np.ndarray
    folder: Path


Measured = tuple[float, float]
"""Mean absolute error on the test crystals; processor seconds for training and predictions of the test crystals."""


def _mean(drawn: Drawn, _: Settings) -> Measured:
    y = drawn.labelled.values
    return float(np.abs(y[drawn.test] - np.median(y[drawn.train])).mean()), 0.0


def _library(make: Callable[[int], Any], name: str, drawn: Drawn, settings: Settings) -> Measured:
    """Fit a model of scikit-learn to the features of matminer or CHGNet."""
    x, each = features.read(drawn.labelled, name, getattr(features, name), Path(settings.runs))
    y, start = drawn.labelled.values, time.process_time()
    model = make(drawn.seed).fit(x[drawn.train], y[drawn.train])
    error = float(np.abs(model.predict(x[drawn.test]) - y[drawn.test]).mean())
    return error, time.process_time() - start + each * len(drawn.train)


def _finetune(name: str, arguments: list[str], drawn: Drawn, settings: Settings) -> Measured:
    """Run ``crysldnet finetune`` on the files of a draw."""
    before = _children()
    summary = evidence.launch(
        Path(settings.runs),
        "finetune",
        f"{drawn.folder.name}-{name.replace(' ', '_').replace(',', '')}",
        *finetuning(drawn.folder, drawn.seed),
        "baselines=false",
        *arguments,
    )
    spent = _children() - before
    return summary["test/mae"], spent if spent > 1 else summary["wall_time_s"]


def _children() -> float:
    """Return the processor time of the programs that were started, in seconds."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def _random_forest(seed: int) -> Any:
    from sklearn.ensemble import RandomForestRegressor

    return RandomForestRegressor(500, max_features=1 / 3, random_state=seed)


def _extra_trees(seed: int) -> Any:
    from sklearn.ensemble import ExtraTreesRegressor

    return ExtraTreesRegressor(500, max_features=1 / 3, random_state=seed)


def _boosted_trees(seed: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingRegressor

    return HistGradientBoostingRegressor(learning_rate=0.05, max_iter=300, min_samples_leaf=5, random_state=seed)


def _ridge(_: int) -> Any:
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), RidgeCV(np.logspace(-4, 4, 33)))


def _gaussian_process(seed: int) -> Any:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    kernel = ConstantKernel(1.0) * RBF(8.0) + WhiteKernel(0.1)
    return make_pipeline(
        StandardScaler(), GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=1, random_state=seed)
    )


def contestants(settings: Settings) -> dict[str, tuple[str | None, Callable[[Drawn, Settings], Measured]]]:
    """Return every contestant by name: the library that it needs, and what measures it."""
    others: dict[str, tuple[str | None, Callable[[Drawn, Settings], Measured]]] = {
        "mean": (None, _mean),
        "random forest": ("matminer", partial(_library, _random_forest, "magpie")),
        "extra trees": ("matminer", partial(_library, _extra_trees, "magpie")),
        "boosted trees": ("matminer", partial(_library, _boosted_trees, "magpie")),
        "CHGNet + ridge": ("chgnet", partial(_library, _ridge, "chgnet")),
        "CHGNet + GP": ("chgnet", partial(_library, _gaussian_process, "chgnet")),
    }
    return others | {name: (None, partial(_finetune, name, given)) for name, given in settings.ours.items()}


def measure(settings: Settings) -> None:
    """Measure every contestant on every draw; a file for each keeps what was found."""
    runs = Path(settings.runs)
    known = contestants(settings)
    if unknown := [name for name in settings.contestants if name not in known]:
        raise SystemExit(f"contestants={'; '.join(unknown)}: not one of {'; '.join(known)}")
    out, commit = Path(settings.out or HERE), evidence.current_commit(HERE)
    recorded = read_errors(runs, out)
    chosen = [t for t in TASKS if settings.tasks is None or t.name in settings.tasks]
    tasks = [load(task, Path(settings.data), settings.max_atoms) for task in chosen]
    for labels, seed, labelled in product(settings.labels, range(settings.draws), tasks):
        key = f"{labelled.task.name.replace(' ', '_')}-{labels}-{seed}"
        folder = runs / "draws" / key
        if not labelled.write(labels, seed, folder):
            continue
        train, test = labelled.draw(labels, seed)  # type: ignore[misc]
        drawn = Drawn(labelled, labels, seed, train, test, folder)
        file = runs / "errors" / f"{key}.json"
        errors = recorded.get((labels, labelled.task.name, seed), {})
        for name in settings.contestants:
            if name in errors:
                continue
            needed, one = known[name]
            if needed and find_spec(needed) is None:
                continue
            error, seconds = one(drawn, settings)
            errors[name] = {"mae": round(error, 6), "seconds": round(seconds, 1), "commit": commit}
            write_errors(file, errors)


def main() -> None:
    """Measure, and write the tables."""
    may_change = {"runs", "out", "labels", "draws", "tasks", "contestants", "ours"}
    settings = evidence.settings(Settings, HERE, __doc__ or "", may_change)
    measure(settings)
    out = Path(settings.out or HERE)
    out.mkdir(parents=True, exist_ok=True)
    evidence.write(out, records_of(settings.runs, settings.contestants, settings.ours, out))


if __name__ == "__main__":
    main()
