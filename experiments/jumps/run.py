"""How far do predictions of each encoder move when every atom moves by 0.001 Å?

python -m experiments.jumps.run data=FOLDER [key=value …]

The keys are those of config.yaml beside this file. Runs that are complete are not run again, so an interrupted study
goes on where it stopped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import crysldnet
from crysldnet.data.datamodule import open_store
from crysldnet.graphs.crystals import Crystals
from crysldnet.inference import Predictor
from experiments import evidence

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "encoders.md"


@dataclass(frozen=True)
class Settings:
    """See config.yaml."""

    data: str
    files: dict[str, str]
    runs: str
    target: str
    train: int
    max_atoms: int
    move: float
    draws: int
    seeds: list[int]
    finetuning: list[str]
    arms: dict[str, list[str]]


def draw(settings: Settings) -> Path:
    """Write the training crystals, and return the file's path."""
    store = open_store(settings.files["train"])
    rows = np.flatnonzero(np.isfinite(store.numbers_of(settings.target)) & (store.crystals.sizes <= settings.max_atoms))
    rows = np.sort(np.random.default_rng(0).permutation(rows)[: settings.train])
    path = Path(settings.runs) / "train.parquet"
    pq.write_table(store.to_table().take(pa.array(rows)), path)
    return path


def displaced(crystals: Crystals, move: float, rng: np.random.Generator) -> Crystals:
    """Return the crystals with every atom moved by ``move`` Å in a random direction."""
    step = rng.normal(size=(len(crystals.numbers), 3))
    step *= move / np.linalg.norm(step, axis=1, keepdims=True)
    inverse = np.linalg.inv(np.asarray(crystals.lattice, np.float64))[crystals.crystal]
    frac = np.asarray(crystals.frac_coords, np.float64) + np.einsum("ni,nij->nj", step, inverse)
    return replace(crystals, frac_coords=frac.astype(np.float32))


def figures(
    model: Predictor, crystals: Crystals, y: np.ndarray, settings: Settings
) -> Iterator[tuple[str, str, float]]:
    """Give measure, unit and value of each figure of a model."""
    rng = np.random.default_rng(1)
    before = model.predict(crystals)
    value = before.values[:, 0]
    moved = [model.predict(displaced(crystals, settings.move, rng)).values[:, 0] for _ in range(settings.draws)]
    share = 100 * np.abs(np.array(moved) - value).ravel() / value.std()
    rounded = replace(crystals, frac_coords=np.round(crystals.frac_coords, 4))
    shift = 100 * np.abs(model.predict(rounded).values[:, 0] - value) / value.std()
    yield "median shift", "% of the spread", float(np.median(share))
    yield "99 % of shifts are below", "% of the spread", float(np.quantile(share, 0.99))
    yield "largest shift", "% of the spread", float(share.max())
    yield "4 decimals: 99 % of shifts are below", "% of the spread", float(np.quantile(shift, 0.99))
    yield "marked as near a cut", "% of the crystals", 100 * float(np.mean(["cutoff" in f for f in before.flags]))
    yield "test MAE", "GPa", float(np.abs(value - y).mean())


def main() -> None:
    """Train a model of each encoder, displace the test crystals, write results.json and the tables."""
    settings = evidence.settings(Settings, HERE, __doc__ or "", {"arms", "seeds"})
    commit, runs, train = evidence.current_commit(HERE), Path(settings.runs), draw(settings)
    store = open_store(settings.files["test"])
    y = store.numbers_of(settings.target)
    rows = np.flatnonzero(np.isfinite(y) & (store.crystals.sizes <= settings.max_atoms))
    crystals = store.crystals.take(rows)
    made = []
    for number, (name, arguments) in enumerate(settings.arms.items()):
        data = ["data=custom", f"data.path={train}", f"data.targets=[{settings.target}]"]
        measured: dict[tuple[str, str], list[float]] = defaultdict(list)
        for seed in settings.seeds:
            run = f"{number:02}_{arguments[0].removeprefix('encoder=')}-seed{seed}"
            evidence.launch(runs, "finetune", run, *data, *settings.finetuning, *arguments, f"seed={seed}")
            model = crysldnet.load(runs / "finetune" / run, device="cpu")
            for metric, unit, value in figures(model, crystals, y[rows], settings):
                measured[metric, unit].append(value)
        for (metric, unit), values in measured.items():
            record = evidence.summarise(
                values,
                name=name,
                metric=metric,
                unit=unit,
                seeds=settings.seeds,
                data=f"{settings.target} of mp_elasticity, ≤ {settings.max_atoms} atoms: {settings.train} crystals to "
                f"train on, {len(rows)} test crystals displaced {settings.draws} times",
                command="python -m experiments.jumps.run data=FOLDER",
                commit=commit,
            )
            made.append(record)
            print(f"{name}: {metric} {record.value:.3g} {unit}", flush=True)
    evidence.write(HERE, made)
    PAGE.write_text(evidence.render(PAGE.read_text(), made))


if __name__ == "__main__":
    main()
