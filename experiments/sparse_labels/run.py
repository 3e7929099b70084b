"""What does each stage of pretraining add, from 1 % to 100 % of the labels?

python -m experiments.sparse_labels.run data=FOLDER [key=value …]

The keys are those of config.yaml beside this file. Runs that are complete are not run again, so an interrupted study
goes on where it stopped.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crysldnet.data.datamodule import open_store
from experiments import evidence

HERE = Path(__file__).parent
SPLITS = ("train", "val", "test")
ARMS = ("scratch", "autoencoder", "autoencoder and latent diffusion")


@dataclass(frozen=True)
class Settings:
    """See config.yaml."""

    data: str
    files: dict[str, str]
    runs: str
    out: str | None
    parallel: int
    seeds: list[int]
    targets: list[str]
    shares: list[float]
    sizes: dict[str, int]
    unlabelled: int
    max_atoms: int
    plausible: dict[str, float]
    encoder: str
    pretraining: list[str]
    finetuning: list[str]


@dataclass(frozen=True)
class Study:
    """The settings, and the files that were drawn for them."""

    settings: Settings
    runs: Path
    files: dict[str, Path]

    def pretrain(self, seed: int) -> dict[str, str]:
        """Pretrain both stages; return what each arm starts from."""
        settings = self.settings
        common = [
            f"encoder={settings.encoder}",
            "data=custom",
            "data.targets=null",
            f"data.path={self.files['unlabelled']}",
            f"seed={seed}",
            *settings.pretraining,
        ]
        evidence.launch(self.runs, "pretrain", f"vae-seed{seed}", *common, "stage=vae")
        first = self.runs / "pretrain" / f"vae-seed{seed}"
        init = f"init={first / 'vae' / 'pretraining.safetensors'}"
        evidence.launch(self.runs, "pretrain", f"diffusion-seed{seed}", *common, "stage=diffusion", init)
        second = self.runs / "pretrain" / f"diffusion-seed{seed}"
        encoders = ("none", *(str(run / "encoder.safetensors") for run in (first, second)))
        return dict(zip(ARMS, encoders, strict=True))

    def of_seed(self, seed: int) -> dict[tuple[str, float], dict]:
        """Pretrain with a seed, then finetune every arm with it."""
        settings, results = self.settings, {}
        for share, (arm, pretrained) in product(settings.shares, self.pretrain(seed).items()):
            results[arm, share] = evidence.launch(
                self.runs,
                "finetune",
                f"{arm.replace(' ', '_')}-{share:g}-seed{seed}",
                *([f"encoder={settings.encoder}"] if pretrained == "none" else []),
                "data=custom",
                f"data.targets=[{','.join(settings.targets)}]",
                f"data.path={{{', '.join(f'{split}: {self.files[split]}' for split in SPLITS)}}}",
                f"data.split.train_fraction={share}",
                f"pretrained={pretrained}",
                f"seed={seed}",
                *settings.finetuning,
            )
        return results


def prepare(settings: Settings, folder: Path) -> dict[str, Path]:
    """Draw labelled crystals of each split, and others of the training split, labels or not, for pretraining."""
    files = {name: folder / f"{name}.parquet" for name in (*SPLITS, "unlabelled")}
    if all(file.exists() for file in files.values()):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        store = open_store(settings.files[split])
        good = small = store.crystals.sizes <= settings.max_atoms
        for target in settings.targets:
            values = store.numbers_of(target)
            good = good & np.isfinite(values) & (np.abs(values) <= settings.plausible.get(target, np.inf))
        drawn = np.random.default_rng(0).permutation(np.flatnonzero(good))[: settings.sizes[split]]
        table = store.to_table()
        table = table.select([c for c in table.column_names if c != "split"])
        pq.write_table(table.take(pa.array(np.sort(drawn))), files[split])
        if split == "train":
            drawn = np.random.default_rng(1).permutation(np.flatnonzero(small))[: settings.unlabelled]
            pq.write_table(table.take(pa.array(np.sort(drawn))), files["unlabelled"])
    return files


def records_of(study: Study, results: list[dict[tuple[str, float], dict]]) -> list[evidence.Record]:
    """Return the mean error and its spread over seeds of every arm, share and target."""
    settings = study.settings
    units = open_store(str(study.files["test"])).units
    known = {
        "seeds": settings.seeds,
        "data": f"{Path(settings.files['train']).stem} of ≤ {settings.max_atoms} atoms, "
        f"{settings.sizes['train']:,} labelled crystals to train on",
        "command": "python -m experiments.sparse_labels.run data=FOLDER",
        "commit": evidence.current_commit(HERE),
    }
    records = []
    for arm, share, target in product(ARMS, settings.shares, settings.targets):
        several = f"/{target}" if len(settings.targets) > 1 else ""
        errors = [result[arm, share][f"test/mae{several}"] for result in results]
        name, metric = f"{arm}, {share:.0%} of the labels", f"test MAE of {target}"
        records.append(evidence.summarise(errors, name=name, metric=metric, unit=units.get(target, "1"), **known))
    return records


def draw(records: list[evidence.Record], settings: Settings, path: Path) -> None:
    """Draw the test error of each arm over the number of labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(settings.targets), 4.2), layout="constrained")
    labels = [settings.sizes["train"] * share for share in settings.shares]
    for axes, target in zip(figure.subplots(1, len(settings.targets), squeeze=False)[0], settings.targets, strict=True):
        for arm in ARMS:
            mine = [r for r in records if r.name.startswith(f"{arm}, ") and r.metric.endswith(f"MAE of {target}")]
            axes.errorbar(labels, [r.value for r in mine], [r.spread or 0.0 for r in mine], capsize=3, label=arm)
        axes.set(xscale="log", yscale="log", xlabel="labelled crystals", ylabel=f"{mine[0].metric} ({mine[0].unit})")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run everything; write results.json, the table and the plot."""
    settings = evidence.settings(Settings, HERE, __doc__ or "", {"runs", "out", "parallel", "seeds", "shares"})
    runs, out = Path(settings.runs), Path(settings.out or HERE)
    study = Study(settings, runs, prepare(settings, runs / "data"))
    with ThreadPoolExecutor(settings.parallel) as pool:
        records = records_of(study, list(pool.map(study.of_seed, settings.seeds)))
    out.mkdir(parents=True, exist_ok=True)
    evidence.write(out, records)
    draw(records, settings, out / "labels.png")


if __name__ == "__main__":
    main()
