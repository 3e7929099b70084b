"""All folds of matbench_jdft2d and matbench_phonons, from scratch, pretrained, and taught labels of other properties.

python experiments/matbench/run.py --data FOLDER [--arms ARM …] [--parallel N] [--epochs N] [--members N]
python experiments/matbench/run.py --pretrained ENCODER --arms scratch pretrained …

FOLDER holds mp_cgcnn_train.parquet, which is pretrained on, mp_cgcnn_val.parquet and mp_cgcnn_test.parquet, and
mp_elasticity_train.parquet and mp_elasticity_val.parquet, whose labels the third arm learns before. ENCODER is an
encoder.safetensors that was pretrained before; it is refused where its pretraining set has a formula of either task.
Runs that are complete are not run again, so an interrupted study goes on where it stopped. What came out of each arm
is kept in arms.json, and the table and the plot show all arms that are there. Any key=value is given to all arms.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from crysldnet import evidence
from crysldnet.config import choices, conf_folder
from crysldnet.data.fingerprint import Fingerprints
from crysldnet.data.locations import open_store
from crysldnet.matbench.leaderboard import load_leaderboard, ranking
from crysldnet.matbench.scores import TaskScores
from crysldnet.training import checkpoint
from crysldnet.training.pretraining_set import pretraining_overlap

HERE = Path(__file__).parent
COMMAND = "python experiments/matbench/run.py"
TASKS = ("matbench_jdft2d", "matbench_phonons")
SEED = 0
LOG = "target_types={exfoliation_en: log, last phdos peak: log}"
ARMS = ["scratch", "pretrained", "labels"]
RECIPES = ["head=mean", f"head=attention '{LOG}'"]
"""Each fold takes the one of the lowest error on a tenth of its own training crystals."""
PRETRAINING = ["data.batch_size=64", "trainer.precision=bf16-mixed", "stages.vae.epochs=8", "stages.diffusion.epochs=4"]
EXCLUDE = [
    f"data.exclude={json.dumps([f'embedded:{task}' for task in TASKS])}",
    "data.exclude_by=formula",
    f"seed={SEED}",
]
LABELS = {
    "mp_cgcnn": ("formation_energy_per_atom", "band_gap"),
    "mp_elasticity": ("bulk_modulus_vrh", "shear_modulus_vrh"),
}
"""What the third arm learns before, all at once; no crystal needs to have every label."""
LEARNED = [name for names in LABELS.values() for name in names]
IMPLAUSIBLE = 5.0
"""eV/atom; formation energies beyond ± this are errors of the source."""


def pretrain(runs: Path, data: Path, encoder: str, further: list[str]) -> Path:
    """Pretrain without any formula of either task; return the encoder's file."""
    paths = {split: str(data / f"mp_cgcnn_{split}.parquet") for split in ("train", "val", "test")}
    arguments = [
        "data=custom",
        f"data.path={json.dumps(paths)}",
        f"encoder={encoder}",
        *PRETRAINING,
        *EXCLUDE,
        *further,
    ]
    evidence.launch(runs, "pretrain", "without_tasks", *arguments)
    return runs / "pretrain" / "without_tasks" / "encoder.safetensors"


def write_labelled(data: Path, split: str, path: Path) -> Path:
    """Put the crystals of both sources into one file, without values that can't be."""
    tables = []
    for source, names in LABELS.items():
        store = open_store(str(data / f"{source}_{split}.parquet"))
        table = store.to_table().select(["material_id", "lattice", "atomic_numbers", "frac_coords", *names])
        for name in names:
            values = store.numbers_of(name)
            good = np.abs(values) <= IMPLAUSIBLE if name == "formation_energy_per_atom" else values > 0
            good |= (name == "band_gap") & (values == 0)
            column = pa.array(values, mask=~good)
            table = table.set_column(
                table.column_names.index(name), table.schema.field(name).with_type(pa.float64()), column
            )
        ids = pa.array([f"{source}:{material}" for material in table["material_id"].to_pylist()])
        tables.append(table.set_column(0, table.schema.field(0), ids))
    pq.write_table(pa.concat_tables(tables, promote_options="default"), path)
    return path


def learn_labels(runs: Path, data: Path, encoder: Path) -> Path:
    """Train the encoder on labels of other properties, without any formula of either task; return the model."""
    paths = {split: str(write_labelled(data, split, runs / f"labels_{split}.parquet")) for split in ("train", "val")}
    arguments = [
        "data=custom",
        f"data.path={json.dumps(paths)}",
        f"data.targets={json.dumps(LEARNED)}",
        "target_types={bulk_modulus_vrh: log, shear_modulus_vrh: log}",
        f"pretrained={encoder}",
        "optimizer.lr=1e-3",
        "epochs=8",
        "data.batch_size=64",
        "trainer.precision=bf16-mixed",
        *EXCLUDE,
    ]
    evidence.launch(runs, "finetune", "labels", *arguments)
    return runs / "finetune" / "labels" / "model.safetensors"


def audit(encoder: Path) -> None:
    """Refuse an encoder that has seen a formula of either task."""
    for task in TASKS:
        counts = pretraining_overlap(str(encoder), Fingerprints.of(open_store(f"embedded:{task}")))
        if counts is None or counts["formulas"] != 0:
            raise SystemExit(f"{encoder}: its pretraining set isn't free of the formulas of {task}: {counts}")
        print(f"{task}: none of {counts['pretraining_crystals']:,} pretraining crystals has one of its formulas")


def encoder_choice(config: dict[str, Any], path: Path) -> str:
    """Return the name of an encoder's configuration, or write it to a file where it has none."""
    for name in choices("encoder"):
        if yaml.safe_load((conf_folder() / "encoder" / f"{name}.yaml").read_text()) == config:
            return name
    path.write_text(yaml.safe_dump(config))
    return str(path)


def launch(arm: str, runs: Path, encoder: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Run an arm with the same encoder configuration, recipes and seed as the others; return what is kept of it."""
    if arm == "scratch":
        same = encoder_choice(checkpoint.read(encoder, "encoder")[0]["encoder"], runs / "encoder.yaml")
        own = (f"encoder={same}", "algorithm=CrysLDNet-scratch")
    elif arm == "pretrained":
        own = (f"pretrained={encoder}", "algorithm=CrysLDNet")
    else:
        labelled = learn_labels(runs, settings.data.absolute(), encoder)
        own = (f"pretrained={labelled}", "algorithm=CrysLDNet-labels")
    summary = evidence.launch(
        runs,
        "matbench",
        arm,
        *own,
        f"tasks={json.dumps(TASKS)}",
        f"recipes={json.dumps(RECIPES)}",
        f"ensemble={settings.members}",
        "ensemble_by=folds",
        f"epochs={settings.epochs}",
        "min_steps=0",
        "data.batch_size=32",
        "optimizer.lr=1e-3",
        "trainer.precision=bf16-mixed",
        f"seed={SEED}",
        f"parallel={settings.parallel}",
        *settings.further,
    )
    return {
        "commit": evidence.current_commit(HERE),
        "data": f"five folds, embedded crystals, ensembles of {settings.members}, {settings.epochs} epochs",
        "machine": evidence.describe_machine(),
        "date": date.today().isoformat(),
        "scores": {task: summary["tasks"][task]["scores"] for task in TASKS},
    }


def scores_of(arm: dict[str, Any], task: str) -> TaskScores:
    """Return the scores of an arm in the folds of a task."""
    scores = arm["scores"][task]
    return TaskScores(task, {fold: scores[f"fold_{fold}"] for fold in range(len(scores))}, {}, "embedded")


def records_of(arms: dict[str, dict[str, Any]]) -> list[evidence.Record]:
    """Return mean and spread over the folds, ranks, and the gain over the first arm fold by fold."""
    records = []

    def record(task: str, arm: str, metric: str, values: list[float], unit: str) -> None:
        made = evidence.summarise(
            [float(np.mean(values))],
            name=f"{task}, {arm}",
            metric=metric,
            unit=unit,
            seeds=[SEED],
            data=f"{task}, {arms[arm]['data']}",
            command=COMMAND,
            commit=arms[arm]["commit"],
        )
        spread = float(np.std(values)) if len(values) > 1 else None  # over the folds, as the leaderboard states it
        records.append(replace(made, spread=spread, machine=arms[arm]["machine"], date=arms[arm]["date"]))

    for task in TASKS:
        entries = len(load_leaderboard()["tasks"][task]["entries"])
        for name, arm in arms.items():
            scores = scores_of(arm, task)
            folds = [scores.folds[fold]["mae"] for fold in sorted(scores.folds)]
            record(task, name, "MAE", folds, scores.unit)
            place = next(place for place in ranking(name, scores) if place.own)
            record(task, name, f"rank, beside {entries} entries", [place.rank], "1")
            if name != "scratch" and "scratch" in arms:
                scratch = scores_of(arms["scratch"], task).folds
                gain = [100 * (1 - mae / scratch[fold]["mae"]) for fold, mae in enumerate(folds)]
                record(task, name, "lower than from scratch, fold by fold", gain, "%")
    return records


def draw(arms: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the arms among the entries of the leaderboard; bars are standard deviations over the folds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        rows = [(name, mean, std, False) for name, mean, std in load_leaderboard()["tasks"][task]["entries"]]
        rows = [row for row in rows if row[0] != "Dummy"]  # it would squeeze all others together
        for name, arm in arms.items():
            scores = scores_of(arm, task)
            rows.append((f"this work, {name}", scores.mean(), scores.std(), True))
        rows.sort(key=lambda row: -row[1])
        for place, (_, mean, std, own) in enumerate(rows):
            axes.errorbar(mean, place, xerr=std, fmt="o", color="tab:red" if own else "tab:gray", capsize=2)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_xlabel(f"MAE ({scores.unit})")
        axes.set_title(task)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run everything and write results.json, the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the Parquet files to pretrain on")
    parser.add_argument("--pretrained", type=Path, metavar="ENCODER", help="encoder.safetensors of an earlier run")
    parser.add_argument("--runs", type=Path, default=Path("runs/matbench-study"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json, README.md and the plot")
    parser.add_argument("--encoder", default="neighbor_attention_small", help="configuration to pretrain with --data")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="what to run; earlier results are kept")
    parser.add_argument("--parallel", type=int, default=1, help="folds at the same time")
    parser.add_argument("--epochs", type=int, default=60, help="of each model")
    parser.add_argument("--members", type=int, default=4, help="models of a fold that predict together")
    parser.add_argument("--pretraining", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of it")
    parser.add_argument("further", nargs="*", metavar="KEY=VALUE", help="further settings of all arms")
    settings = parser.parse_args()
    if settings.data is None and settings.pretrained is None:
        parser.error("give --data FOLDER or --pretrained ENCODER")
    if settings.data is None and "labels" in settings.arms:
        parser.error("the arm labels needs --data; without it: --arms scratch pretrained")
    runs: Path = settings.runs.absolute()
    runs.mkdir(parents=True, exist_ok=True)
    encoder = (
        settings.pretrained.absolute()
        if settings.pretrained is not None
        else pretrain(runs, settings.data.absolute(), settings.encoder, settings.pretraining)
    )
    audit(encoder)
    kept = settings.out / "arms.json"
    for arm in settings.arms:
        made = launch(arm, runs, encoder, settings)
        arms = {**(json.loads(kept.read_text()) if kept.exists() else {}), arm: made}  # others may have ended meanwhile
        arms = {name: arms[name] for name in ARMS if name in arms}
        kept.write_text(json.dumps(arms, indent=1) + "\n")
        draw(arms, settings.out / "leaderboard.png")
        evidence.write(settings.out, records_of(arms))


if __name__ == "__main__":
    main()
