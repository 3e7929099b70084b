"""Which recipe of finetuning is good at 100 labels and at many?

python experiments/finetune_recipe/run.py --data FOLDER [--pretrained FILE] [--runs FOLDER] [--sizes N …]
    [--seeds N …] [--parallel N]

FOLDER holds mp_cgcnn_train.parquet. Without --pretrained a small encoder is pretrained on the crystals in the package
first. Runs that are complete are not run again, so an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crysldnet import evidence
from crysldnet.data.datamodule import open_store
from crysldnet.data.split import Split

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
SIZES = (100, 1000)
TARGET, UNIT = "formation_energy_per_atom", "eV/atom"
MAX_ATOMS = 20
HELD_OUT = {"inner": 300, "second": 1000}
IMPLAUSIBLE = 5.0
"""eV/atom; formation energies beyond ± this are errors of the source."""

EPOCHS, BATCH = 40, 32
BUDGETS = (0, 3000)
"""Of ``min_steps``."""
RATES = (1e-3, 2e-3)


@dataclass(frozen=True)
class Study:
    """Where the study is, and how much of it to run."""

    data: Path
    runs: Path
    encoder: Path
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    pool: ThreadPoolExecutor

    def errors(self, recipe: tuple[str, ...]) -> dict[int, list[float]]:
        """Return the MAE of each seed at each size, having trained what isn't there yet."""
        jobs = {
            (size, seed): self.pool.submit(finetune, self, size, recipe, seed)
            for size, seed in product(self.sizes, self.seeds)
        }
        return {size: [jobs[size, seed].result() for seed in self.seeds] for size in self.sizes}


def grid_recipe(steps: int, rate: float) -> tuple[str, ...]:
    """Return a budget and a learning rate as arguments."""
    return (f"min_steps={steps}", f"optimizer.lr={rate:g}")


def prepare(data: Path, runs: Path, size: int) -> dict[str, Path]:
    """Draw the crystals from the training file by formula: to train on, to choose the epoch on, and to compare on.

    Smaller training sets lie within larger ones.
    """
    files = {name: runs / "data" / f"{name}.parquet" for name in (f"train_{size}", *HELD_OUT)}
    if all(file.exists() for file in files.values()):
        return files
    (runs / "data").mkdir(parents=True, exist_ok=True)
    store = open_store(str(data / "mp_cgcnn_train.parquet"))
    values = store.numbers_of(TARGET)
    good = np.isfinite(values) & (np.abs(values) <= IMPLAUSIBLE) & (store.crystals.sizes <= MAX_ATOMS)
    parts = Split(by="formula", fractions=[0.8, 0.1, 0.1], seed=0).rows(store)
    chosen = {f"train_{size}": (parts["train"], size), "inner": (parts["val"], HELD_OUT["inner"])}
    chosen["second"] = (parts["test"], HELD_OUT["second"])
    table = store.to_table()
    table = table.select([c for c in table.column_names if c != "split"])
    for name, (rows, count) in chosen.items():
        rows = np.random.default_rng(0).permutation(rows[good[rows]])[:count]
        if len(rows) < count:
            raise SystemExit(f"{name}: {len(rows)} crystals are there, {count} were asked for")
        pq.write_table(table.take(pa.array(np.sort(rows))), files[name])
    return files


def finetune(study: Study, size: int, recipe: tuple[str, ...], seed: int) -> float:
    """Train one model; its best epoch is chosen on the first inner part, its MAE is that on the second."""
    files = {name: study.runs / "data" / f"{name}.parquet" for name in (f"train_{size}", *HELD_OUT)}
    paths = f"data.path={{train: {files[f'train_{size}']}, val: {files['inner']}, test: {files['second']}}}"
    passes = {f"min_steps={s}": max(1, -(-s // (EPOCHS * -(-size // BATCH)))) for s in BUDGETS}
    said = [f"{passes[a]}x" if a in passes else a for a in recipe]  # budgets that make no difference share a run
    name = "".join(c if c.isalnum() else "_" for c in "-".join(said))
    fixed = ["data=custom", f"data.targets=[{TARGET}]", paths, f"data.batch_size={BATCH}", f"epochs={EPOCHS}"]
    own = [f"pretrained={study.encoder}", f"seed={seed}", *recipe]
    summary = evidence.launch(study.runs, "finetune", f"{size}-{name}-{seed}", *fixed, *own)
    return float(summary["test/mae"])


def score(errors: dict[int, list[float]], best: dict[int, float]) -> float:
    """Return how much larger than the lowest of each size a recipe's errors are, as a mean factor over the sizes."""
    return float(np.exp(np.mean([np.log(np.mean(values) / best[size]) for size, values in errors.items()])))


def records(study: Study, found: dict[str, dict[int, list[float]]]) -> list[evidence.Record]:
    """Return every recipe's error at every size, and its mean factor over the lowest."""
    best = {size: min(float(np.mean(errors[size])) for errors in found.values()) for size in study.sizes}
    summaries = [json.loads(file.read_text()) for file in sorted((study.runs / "finetune").glob("*/summary.json"))]
    commits = dict.fromkeys(summary["code_version"].rpartition("+")[2] for summary in summaries)
    common = {
        "data": f"mp_cgcnn training file of ≤ {MAX_ATOMS} atoms, compared on {HELD_OUT['second']:,} held out",
        "command": "python experiments/finetune_recipe/run.py --data FOLDER",
        "commit": ", ".join(commits),
        "seeds": study.seeds,
    }
    made = []
    for name, errors in found.items():
        for size, values in errors.items():
            made.append(evidence.summarise(values, name=name, metric=f"MAE, {size:,} labels", unit=UNIT, **common))
        factor = [score(errors, best)]
        made.append(evidence.summarise(factor, name=name, metric="over the lowest", unit="factor", **common))
    return made


def main() -> None:
    """Try all pairs of a budget and a rate, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pretrained", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/finetune_recipe"))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--parallel", type=int, default=1)
    options = parser.parse_args()
    runs = options.runs.resolve()
    if options.pretrained is None:
        evidence.launch(runs, "pretrain", "small")
    encoder = (options.pretrained or runs / "pretrain" / "small" / "encoder.safetensors").resolve()
    for size in options.sizes:
        prepare(options.data, runs, size)
    with ThreadPoolExecutor(options.parallel) as pool:
        study = Study(options.data, runs, encoder, tuple(options.sizes), tuple(options.seeds), pool)
        grid = {pair: study.errors(grid_recipe(*pair)) for pair in product(BUDGETS, RATES)}
    named = {f"at least {s:,} steps, lr {r:g}": errors for (s, r), errors in grid.items()}
    evidence.write(HERE, records(study, named))


if __name__ == "__main__":
    main()
