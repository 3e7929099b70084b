"""Which recipe of finetuning is good at 100 labels and at many?

python -m experiments.finetune_recipe.run data=FOLDER [key=value …]

The keys are those of config.yaml beside this file. Runs that are complete are not run again, so an interrupted study
goes on where it stopped.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import geometric_mean

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crysldnet.data.datamodule import open_store
from crysldnet.data.split import Split
from experiments import evidence

HERE = Path(__file__).parent
COMMAND = "python -m experiments.finetune_recipe.run data=FOLDER"
CHANGES = {"runs", "out", "parallel", "seeds", "sizes", "budgets", "rates"}
"""Settings that runs in one folder may have otherwise: their names tell them."""


@dataclass(frozen=True)
class Settings:
    """See config.yaml."""

    data: str
    file: str
    target: str
    pretrained: str | None
    runs: str
    out: str | None
    parallel: int
    seeds: list[int]
    sizes: list[int]
    budgets: list[int]
    rates: list[float]
    inner: int
    second: int
    max_atoms: int
    plausible: float
    epochs: int
    batch_size: int


@dataclass(frozen=True)
class Recipe:
    """A least number of steps and a learning rate."""

    steps: int
    rate: float

    @property
    def name(self) -> str:
        """As in the table."""
        return f"at least {self.steps:,} steps, lr {self.rate:g}"


@dataclass(frozen=True)
class Study:
    """The settings, and the encoder that all runs start from."""

    settings: Settings
    runs: Path
    encoder: Path

    def prepare(self, size: int) -> dict[str, Path]:
        """Draw the crystals by formula: to train on, to choose the epoch on, and to compare on.

        Smaller training sets lie within larger ones.
        """
        settings = self.settings
        counts = {f"train_{size}": size, "inner": settings.inner, "second": settings.second}
        files = {name: self.runs / "data" / f"{name}.parquet" for name in counts}
        if all(file.exists() for file in files.values()):
            return files
        (self.runs / "data").mkdir(parents=True, exist_ok=True)
        store = open_store(settings.file)
        values = store.numbers_of(settings.target)
        good = np.isfinite(values) & (np.abs(values) <= settings.plausible)
        good &= store.crystals.sizes <= settings.max_atoms
        parts = Split(by="formula", fractions=[0.8, 0.1, 0.1], seed=0).rows(store)
        table = store.to_table()
        table = table.select([c for c in table.column_names if c != "split"])
        for (name, count), part in zip(counts.items(), ("train", "val", "test"), strict=True):
            rows = np.random.default_rng(0).permutation(parts[part][good[parts[part]]])[:count]
            if len(rows) < count:
                raise SystemExit(f"{name}: {len(rows)} crystals are there, {count} were asked for")
            pq.write_table(table.take(pa.array(np.sort(rows))), files[name])
        return files

    def finetune(self, size: int, recipe: Recipe, seed: int) -> float:
        """Train one model; its best epoch is chosen on the first held-out part, its MAE is that on the second."""
        settings = self.settings
        train, inner, second = self.prepare(size).values()
        steps = settings.epochs * -(-size // settings.batch_size)
        passes = max(1, -(-recipe.steps // steps))  # budgets that make no difference share a run
        summary = evidence.launch(
            self.runs,
            "finetune",
            f"{size}-{passes}x-lr{recipe.rate:g}-{seed}".replace(".", "_"),
            "data=custom",
            f"data.targets=[{settings.target}]",
            f"data.path={{train: {train}, val: {inner}, test: {second}}}",
            f"data.batch_size={settings.batch_size}",
            f"epochs={settings.epochs}",
            f"pretrained={self.encoder}",
            f"seed={seed}",
            f"min_steps={recipe.steps}",
            f"optimizer.lr={recipe.rate:g}",
        )
        return float(summary["test/mae"])

    def records(self) -> list[evidence.Record]:
        """Train what isn't there yet; return the error of every recipe at every size."""
        settings = self.settings
        grid = [Recipe(*pair) for pair in product(settings.budgets, settings.rates)]
        for size in settings.sizes:
            self.prepare(size)
        with ThreadPoolExecutor(settings.parallel) as pool:
            jobs = {job: pool.submit(self.finetune, *job) for job in product(settings.sizes, grid, settings.seeds)}
            errors = {job: started.result() for job, started in jobs.items()}
        return [
            evidence.summarise(
                [errors[size, recipe, seed] for seed in settings.seeds],
                name=recipe.name,
                metric=f"MAE, {size:,} labels",
                unit=open_store(settings.file).units.get(settings.target, "1"),
                seeds=settings.seeds,
                data=f"{Path(settings.file).stem} of ≤ {settings.max_atoms} atoms, "
                f"compared on {settings.second:,} held out",
                command=COMMAND,
                commit=self.commits(size),
            )
            for size, recipe in product(settings.sizes, grid)
        ]

    def commits(self, size: int) -> str:
        """Return the commits that the runs of a size were made with."""
        summaries = sorted((self.runs / "finetune").glob(f"{size}-*/summary.json"))
        versions = [json.loads(file.read_text())["code_version"] for file in summaries]
        return ", ".join(dict.fromkeys(version.rpartition("+")[2] for version in versions))


def compare(records: list[evidence.Record]) -> list[evidence.Record]:
    """Return how much larger than the lowest of each size each recipe's error is, as a mean factor over the sizes."""
    sizes = list(dict.fromkeys(r.metric for r in records))
    best = {size: min(r.value for r in records if r.metric == size) for size in sizes}
    compared = []
    for name in dict.fromkeys(r.name for r in records):
        own = {r.metric: r for r in records if r.name == name}
        if len(own) == len(sizes):
            factor = geometric_mean(own[size].value / best[size] for size in sizes)
            compared.append(replace(own[sizes[-1]], metric="over the lowest", unit="factor", value=factor, spread=None))
    return compared


def main() -> None:
    """Try all pairs of a budget and a rate, and write what came out beside what was measured at other sizes."""
    settings = evidence.settings(Settings, HERE, __doc__ or "", CHANGES)
    runs, out = Path(settings.runs).resolve(), Path(settings.out or HERE)
    if settings.pretrained is None:
        evidence.launch(runs, "pretrain", "small")
    encoder = Path(settings.pretrained or runs / "pretrain" / "small" / "encoder.safetensors").resolve()
    records = Study(settings, runs, encoder).records()
    kept = evidence.read(out / "results.json") if (out / "results.json").exists() else []
    measured = {r.metric for r in records} | {"over the lowest"}
    alike = [r for r in kept if r.metric not in measured and (r.data, r.unit) == (records[0].data, records[0].unit)]
    records = sorted([*alike, *records], key=lambda r: (r.name, len(r.metric)))
    out.mkdir(parents=True, exist_ok=True)
    evidence.write(out, [*records, *compare(records)])


if __name__ == "__main__":
    main()
