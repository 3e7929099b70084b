"""Does pretraining help on the embedded set? Formation energy, few and all labels, three seeds.

python -m experiments.starter.run [--runs FOLDER] [--parallel N]

Runs that are complete are not run again, so an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments import evidence

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
EPOCHS = {0.1: 100, 1.0: 40}
"""Share of the training labels to epochs: fewer labels are seen more often, as many steps as they need."""


def study(runs: Path, seed: int) -> dict[tuple[str, float], dict]:
    """Pretrain with a seed, then finetune both arms with it."""
    evidence.launch(runs, "pretrain", f"seed{seed}", "stage=both", "stages.vae.epochs=20", f"seed={seed}")
    encoder = runs / "pretrain" / f"seed{seed}" / "encoder.safetensors"
    results = {}
    for share, epochs in EPOCHS.items():
        for arm, pretrained in (("scratch", "none"), ("pretrained", str(encoder))):
            results[arm, share] = evidence.launch(
                runs,
                "finetune",
                f"{arm}-{share:g}-seed{seed}",
                f"seed={seed}",
                f"pretrained={pretrained}",
                f"epochs={epochs}",
                "min_steps=0",
                f"data.split.train_fraction={share}",
            )
    return results


def main() -> None:
    """Run everything and write results.json and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/starter"), help="folder of the runs")
    parser.add_argument("--parallel", type=int, default=1, help="seeds run at the same time")
    settings = parser.parse_args()
    settings.runs.mkdir(parents=True, exist_ok=True)
    commit = evidence.current_commit(HERE)
    with ThreadPoolExecutor(settings.parallel) as pool:
        results = list(pool.map(lambda seed: study(settings.runs, seed), SEEDS))
    records = []
    for share in EPOCHS:
        for arm in ("scratch", "pretrained"):
            for split in ("val", "test"):
                records.append(
                    evidence.summarise(
                        [r[arm, share][f"{split}/mae"] for r in results],
                        name=f"{arm}, {share:.0%} of the labels",
                        metric=f"{split} MAE of formation energy",
                        unit="eV/atom",
                        seeds=SEEDS,
                        data=f"mp_starter, {results[0][arm, share]['train_crystals']} training crystals",
                        command="python -m experiments.starter.run",
                        commit=commit,
                    )
                )
    evidence.write(HERE, records)


if __name__ == "__main__":
    main()
