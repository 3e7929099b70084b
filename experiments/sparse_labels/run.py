"""What does each stage of pretraining add, from 1 % to 100 % of the labels?

python experiments/sparse_labels/run.py --data FOLDER [--runs FOLDER] [--parallel N]

FOLDER holds mp_cgcnn_train.parquet, mp_cgcnn_val.parquet and mp_cgcnn_test.parquet. Runs that are complete are not run
again, so an interrupted study goes on where it stopped.
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

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
SHARES = (0.01, 0.05, 0.2, 1.0)
TARGETS = {"formation_energy_per_atom": "eV/atom", "band_gap": "eV"}
MAX_ATOMS = 20
IMPLAUSIBLE = 5.0
"""eV/atom; formation energies beyond ± this are errors of the source."""
SIZES = {"train": 5_000, "val": 1_000, "test": 2_000}
UNLABELLED = 10_000
ENCODER = "encoder=pddformer_small"
PRETRAINING = ("stages.vae.epochs=8", "stages.diffusion.epochs=3", "data.batch_size=64", "trainer.precision=bf16-mixed")
EPOCHS, MIN_STEPS = 12, 1_000


def prepare(data: Path, folder: Path) -> dict[str, Path]:
    """Draw labelled crystals of each split, and others of the training split, labels or not, for pretraining."""
    files = {name: folder / f"{name}.parquet" for name in (*SIZES, "unlabelled")}
    if all(file.exists() for file in files.values()):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in SIZES.items():
        store = open_store(str(data / f"mp_cgcnn_{split}.parquet"))
        small = store.crystals.sizes <= MAX_ATOMS
        values = np.stack([store.numbers_of(target) for target in TARGETS], axis=1)
        rows = np.flatnonzero(small & np.isfinite(values).all(axis=1) & (np.abs(values[:, 0]) <= IMPLAUSIBLE))
        drawn = np.sort(np.random.default_rng(0).permutation(rows)[:count])
        table = store.to_table()
        table = table.select([c for c in table.column_names if c != "split"])
        pq.write_table(table.take(pa.array(drawn)), files[split])
        if split == "train":
            rows = np.sort(np.random.default_rng(1).permutation(np.flatnonzero(small))[:UNLABELLED])
            pq.write_table(table.take(pa.array(rows)), files["unlabelled"])
    return files


def pretrain(runs: Path, files: dict[str, Path], seed: int) -> dict[str, str]:
    """Pretrain both stages; return the encoder of each arm."""
    common = (
        ENCODER,
        "data=custom",
        "data.targets=null",
        f"data.path={files['unlabelled']}",
        f"seed={seed}",
        *PRETRAINING,
    )
    evidence.launch(runs, "pretrain", f"vae-seed{seed}", *common, "stage=vae")
    first = runs / "pretrain" / f"vae-seed{seed}"
    init = f"init={first / 'vae' / 'pretraining.safetensors'}"
    evidence.launch(runs, "pretrain", f"diffusion-seed{seed}", *common, "stage=diffusion", init)
    second = runs / "pretrain" / f"diffusion-seed{seed}"
    return {
        "scratch": "none",
        "autoencoder": str(first / "encoder.safetensors"),
        "autoencoder and latent diffusion": str(second / "encoder.safetensors"),
    }


def study(runs: Path, files: dict[str, Path], seed: int) -> dict[tuple[str, float], dict]:
    """Pretrain with a seed, then finetune every arm with it."""
    results = {}
    for share, (arm, pretrained) in product(SHARES, pretrain(runs, files, seed).items()):
        results[arm, share] = evidence.launch(
            runs,
            "finetune",
            f"{arm.replace(' ', '_')}-{share:g}-seed{seed}",
            *([ENCODER] if pretrained == "none" else []),
            "data=custom",
            f"data.targets=[{','.join(TARGETS)}]",
            f"data.path={{train: {files['train']}, val: {files['val']}, test: {files['test']}}}",
            f"data.split.train_fraction={share}",
            f"pretrained={pretrained}",
            f"seed={seed}",
            f"epochs={EPOCHS}",
            f"min_steps={MIN_STEPS}",
        )
    return results


def plot(records: list[evidence.Record]) -> None:
    """Draw the test error of each arm over the number of labels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(TARGETS), figsize=(10, 4.2), layout="constrained")
    for axis, (target, unit) in zip(axes, TARGETS.items(), strict=True):
        for arm in dict.fromkeys(r.name.partition(", ")[0] for r in records):
            mine = [r for r in records if r.name.startswith(f"{arm}, ") and r.metric.endswith(f"MAE of {target}")]
            labels = [SIZES["train"] * share for share in SHARES]
            axis.errorbar(labels, [r.value for r in mine], [r.spread or 0.0 for r in mine], capsize=3, label=arm)
        axis.set(xscale="log", yscale="log", xlabel="labelled crystals", ylabel=f"test MAE of {target} ({unit})")
    axes[0].legend(frameon=False)
    figure.savefig(HERE / "labels.png", dpi=130)
    plt.close(figure)


def main() -> None:
    """Run everything; write results.json, the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the mp_cgcnn files")
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse_labels"), help="folder of the runs")
    parser.add_argument("--parallel", type=int, default=1, help="seeds run at the same time")
    settings = parser.parse_args()
    commit = evidence.current_commit(HERE)
    files = prepare(settings.data, settings.runs / "data")
    with ThreadPoolExecutor(settings.parallel) as pool:
        results = list(pool.map(lambda seed: study(settings.runs, files, seed), SEEDS))
    records = []
    for arm in dict.fromkeys(arm for arm, _ in results[0]):
        for share, (target, unit) in product(SHARES, TARGETS.items()):
            records.append(
                evidence.summarise(
                    [result[arm, share][f"test/mae/{target}"] for result in results],
                    name=f"{arm}, {share:.0%} of the labels",
                    metric=f"test MAE of {target}",
                    unit=unit,
                    seeds=SEEDS,
                    data=f"mp_cgcnn of ≤ {MAX_ATOMS} atoms, {SIZES['train']:,} labelled crystals to train on",
                    command="python experiments/sparse_labels/run.py --data FOLDER",
                    commit=commit,
                )
            )
    evidence.write(HERE, records)
    plot(records)


if __name__ == "__main__":
    main()
