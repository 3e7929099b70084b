"""Which encoder learns most from the same data, and at what cost? Formation energy and band gap, three seeds.

python -m experiments.encoders.run --data FOLDER [--runs FOLDER] [--parallel N] [--only ENCODER …]

FOLDER holds mp_cgcnn_train.parquet and mp_cgcnn_val.parquet. Runs that are complete are not run again, so an
interrupted study goes on where it stopped.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crysldnet.artifacts import model_file
from crysldnet.data.datamodule import open_store
from crysldnet.data.split import Split
from experiments import evidence

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
TARGETS = ("formation_energy_per_atom", "band_gap")
ENCODERS = (
    "cgcnn",
    "neighbor_attention_small",
    "cogn",
    "neighbor_attention",
    "potnet",
    "pddformer",
    "cartnet",
    "ecomformer",
    "icomformer",
    "matformer",
)
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
MAX_ATOMS = 12
SIZES = {"train": 3000, "inner": 400, "val": 1000}
TUNING = {"crystals": 1000, "epochs": 4}
EPOCHS = 8
IMPLAUSIBLE = 5.0
"""eV/atom; formation energies beyond ± this are errors of the source."""


def prepare(data: Path, runs: Path) -> dict[str, Path]:
    """Draw the crystals: training and inner validation, by formula, from the training file, and validation."""
    files = {name: runs / "data" / f"{name}.parquet" for name in SIZES}
    if all(file.exists() for file in files.values()):
        return files
    (runs / "data").mkdir(parents=True, exist_ok=True)
    for source, wanted in (("train", ("train", "inner")), ("val", ("val",))):
        store = open_store(str(data / f"mp_cgcnn_{source}.parquet"))
        values = np.stack([store.numbers_of(target) for target in TARGETS], axis=1)
        good = np.isfinite(values).all(axis=1) & (np.abs(values[:, 0]) <= IMPLAUSIBLE)
        good &= store.crystals.sizes <= MAX_ATOMS
        parts = Split(by="formula", fractions=[0.8, 0.2, 0.0], seed=0).rows(store)
        pools = {"train": parts["train"], "inner": parts["val"], "val": np.arange(len(store))}
        for name in wanted:
            rows = pools[name][good[pools[name]]]
            rows = np.sort(np.random.default_rng(0).permutation(rows)[: SIZES[name]])
            table = store.to_table()
            kept = [c for c in table.column_names if c != "split"]
            pq.write_table(table.select(kept).take(pa.array(rows)), files[name])
    return files


def train(runs: Path, encoder: str, name: str, *arguments: str) -> dict:
    """Train one model; its best epoch is chosen on inner validation."""
    return evidence.launch(
        runs,
        "finetune",
        f"{encoder}-{name}",
        "data=custom",
        "data.targets=[" + ",".join(TARGETS) + "]",
        f"encoder={encoder}",
        "data.batch_size=32",
        "min_steps=0",
        "trainer.precision=bf16-mixed",
        *arguments,
    )


def study(runs: Path, files: dict[str, Path], encoder: str, seeds: tuple[int, ...]) -> dict:
    """Choose the learning rate on inner validation, then train with each seed and evaluate once on validation."""
    inner = f"data.path={{train: {files['train']}, val: {files['inner']}}}"
    both = f"data.path={{train: {files['train']}, val: {files['inner']}, test: {files['val']}}}"
    share = f"data.split.train_fraction={TUNING['crystals'] / SIZES['train']}"
    tried = {
        rate: train(runs, encoder, f"lr{rate:g}", inner, share, f"epochs={TUNING['epochs']}", f"optimizer.lr={rate}")[
            "val/normalised_mae"
        ]
        for rate in RATES
    }
    rate = min(tried, key=lambda r: tried[r])
    runs_of = [
        train(runs, encoder, f"seed{seed}", both, f"seed={seed}", f"epochs={EPOCHS}", f"optimizer.lr={rate}")
        for seed in seeds
    ]
    model = runs / "finetune" / f"{encoder}-seed{seeds[0]}" / "model.safetensors"
    _, state = model_file.read(model, "property_model")
    counts = ("running_", "num_batches_tracked")
    parameters = sum(
        v.numel() for k, v in state.items() if k.startswith("encoder.") and not any(word in k for word in counts)
    )
    return {"rate": rate, "tried": tried, "runs": runs_of, "parameters": parameters}


def records(found: dict[str, dict]) -> list[evidence.Record]:
    """Return the figures of each encoder."""
    made = []
    for encoder, result in found.items():
        figures = {
            ("val MAE of formation energy", "eV/atom"): [run[f"test/mae/{TARGETS[0]}"] for run in result["runs"]],
            ("val MAE of band gap", "eV"): [run[f"test/mae/{TARGETS[1]}"] for run in result["runs"]],
            ("learning rate", "1"): [result["rate"]],
            ("parameters", "1"): [result["parameters"]],
        }
        for (metric, unit), values in figures.items():
            record = evidence.summarise(
                values,
                name=encoder,
                metric=metric,
                unit=unit,
                seeds=SEEDS if len(values) > 1 else [],
                data=f"mp_cgcnn of ≤ {MAX_ATOMS} atoms, {SIZES['train']} to train on and {SIZES['val']} to validate",
                command="python -m experiments.encoders.run --data FOLDER",
                commit=result["runs"][0]["code_version"].rpartition("+")[2],
            )
            made.append(record)
    return [*made, *(r for r in costs() if r.name in found)]


def costs() -> list[evidence.Record]:
    """Return the speed and the memory of a training step, as the benchmark measured them."""
    steps = evidence.read(HERE.parents[1] / "benchmarks" / "results.json")
    wanted = {("speed", "structures/s"), ("memory of a step", "MB")}
    return [r for r in steps if r.command == "python -m benchmarks.encoders" and (r.metric, r.unit) in wanted]


def plot_frontier(made: list[evidence.Record]) -> None:
    """Draw error over the cost of a training step; what nothing beats in both is joined by a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cost = {r.name: 1e3 / r.value for r in made if r.metric == "speed"}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axis, metric in zip(axes, ("val MAE of formation energy", "val MAE of band gap"), strict=True):
        points = sorted((cost[r.name], r.value, r.spread or 0.0, r.name) for r in made if r.metric == metric)
        best = [p for i, p in enumerate(points) if all(p[1] < q[1] for q in points[:i])]
        axis.step([p[0] for p in best], [p[1] for p in best], where="post", color="0.7", zorder=0)
        for x, y, spread, name in points:
            own = name.startswith("neighbor_attention")
            axis.errorbar(x, y, spread, fmt="o", color="tab:red" if own else "tab:blue", capsize=3)
            axis.annotate(name, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8, rotation=25)
        unit = next(r.unit for r in made if r.metric == metric)
        axis.set(xscale="log", xlabel="training step (ms/structure, one thread)", ylabel=f"{metric} ({unit})")
        axis.margins(x=0.2)
    figure.savefig(HERE / "frontier.png", dpi=130)
    plt.close(figure)


def main() -> None:
    """Run everything; write results.json, the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of mp_cgcnn_train.parquet and mp_cgcnn_val.parquet"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/encoders"), help="folder of the runs")
    parser.add_argument("--parallel", type=int, default=1, help="encoders trained at the same time")
    parser.add_argument("--only", nargs="+", default=ENCODERS, choices=ENCODERS, help="run these, and write nothing")
    settings = parser.parse_args()
    files = prepare(settings.data, settings.runs)
    with ThreadPoolExecutor(settings.parallel) as pool:
        found = dict(
            zip(
                settings.only,
                pool.map(lambda encoder: study(settings.runs, files, encoder, SEEDS), settings.only),
                strict=True,
            )
        )
    if set(settings.only) == set(ENCODERS):
        made = records(found)
        evidence.write(HERE, made)
        plot_frontier(made)


if __name__ == "__main__":
    main()
