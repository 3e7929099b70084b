"""Which recipe of finetuning is good at 100 labels and at many?

python experiments/finetune_recipe/run.py --data FOLDER [--pretrained FILE] [--runs FOLDER] [--sizes N …]
    [--recipes NAME …] [--seeds N …] [--parallel N]

FOLDER holds mp_cgcnn_train.parquet. Without --pretrained a small encoder is pretrained on the crystals in the package
first. Runs that are complete are not run again, so an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
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
SIZES = (100, 1000, 10000)
TARGET, UNIT = "formation_energy_per_atom", "eV/atom"
MAX_ATOMS = 20
HELD_OUT = {"inner": 300, "second": 1000}
IMPLAUSIBLE = 5.0
"""eV/atom; formation energies beyond ± this are errors of the source."""

BASE = ("min_steps=3000",)
RECIPES: dict[str, tuple[str, ...]] = {
    "40 epochs": (),
    "40 epochs or 1,000 steps": ("min_steps=1000",),
    "40 epochs or 3,000 steps": BASE,
    "40 epochs or 10,000 steps": ("min_steps=10000",),
    "lr 5e-4": (*BASE, "optimizer.lr=5e-4"),
    "lr 1e-3": (*BASE, "optimizer.lr=1e-3"),
    "lr 4e-3": (*BASE, "optimizer.lr=4e-3"),
    "layer decay 0.7": (*BASE, "layer_decay=0.7"),
    "gradual": (*BASE, "mode=gradual"),
    "frozen": (*BASE, "mode=frozen"),
    "head atoms": (*BASE, "head=atoms"),
    "head attention": (*BASE, "head=attention"),
    "EMA 0.99": (*BASE, "trainer.ema_decay=0.99"),
    "average of the last quarter": (*BASE, "trainer.average_last=0.25"),
    "cosine": (*BASE, "optimizer.schedule=cosine", "optimizer.warmup=0.05"),
    "element energies": (*BASE, f"element_references=[{TARGET}]"),
    "from scratch": (*BASE, "pretrained=none"),
}
"""What each recipe changes; those below the first four change one thing of the third."""


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


def finetune(runs: Path, files: dict[str, Path], pretrained: Path, size: int, recipe: str, seed: int) -> dict:
    """Train one model; its best epoch is chosen on the first inner part and it is compared on the second."""
    name = "".join(c if c.isalnum() else "_" for c in recipe)
    paths = f"data.path={{train: {files[f'train_{size}']}, val: {files['inner']}, test: {files['second']}}}"
    start = [] if "pretrained=none" in RECIPES[recipe] else [f"pretrained={pretrained}"]
    arguments = ["data=custom", f"data.targets=[{TARGET}]", paths, f"seed={seed}", *start, *RECIPES[recipe]]
    return evidence.launch(runs, "finetune", f"{size}-{name}-{seed}", *arguments)


def record(recipe: str, size: int, seeds: list[int], results: list[dict]) -> evidence.Record:
    """Return the figure of one recipe at one size."""
    return evidence.summarise(
        [result["test/mae"] for result in results],
        name=recipe,
        metric=f"MAE with {size:,} labels",
        unit=UNIT,
        seeds=seeds,
        data=f"mp_cgcnn training file of ≤ {MAX_ATOMS} atoms, compared on {HELD_OUT['second']:,} held out",
        command="python experiments/finetune_recipe/run.py --data FOLDER",
        commit=results[0]["code_version"].rpartition("+")[2],
    )


def main() -> None:
    """Run what is asked for, and write everything that there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pretrained", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/finetune_recipe"))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--parallel", type=int, default=1)
    options = parser.parse_args()
    if options.pretrained is None:
        evidence.launch(options.runs, "pretrain", "small")
    encoder = options.pretrained or options.runs / "pretrain" / "small" / "encoder.safetensors"
    made = []
    with ThreadPoolExecutor(options.parallel) as pool:
        for size in options.sizes:
            files = prepare(options.data, options.runs, size)
            jobs = {
                (recipe, seed): pool.submit(finetune, options.runs, files, encoder, size, recipe, seed)
                for seed, recipe in product(options.seeds, options.recipes)
            }
            made += [
                record(recipe, size, options.seeds, [jobs[recipe, seed].result() for seed in options.seeds])
                for recipe in options.recipes
            ]
    evidence.write(HERE, made)


if __name__ == "__main__":
    main()
