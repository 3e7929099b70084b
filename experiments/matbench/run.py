"""All folds of matbench_jdft2d and matbench_phonons: from scratch, pretrained, and by models on tables.

python -m experiments.matbench.run data=FOLDER [key=value …]
python -m experiments.matbench.run pretrained=ENCODER [key=value …]
python -m experiments.matbench.run arms=[frozen,hybrid] [key=value …]

The keys are those of config.yaml beside this file. Runs that are complete are not run again, so an interrupted study
goes on where it stopped. What came out of each arm is kept in arms.json, and the table and the plot show those
that are there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from crysldnet.artifacts import model_file
from crysldnet.artifacts.provenance import encoder_file, pretraining_overlap
from crysldnet.config import choices, conf_folder
from crysldnet.data.datasets import open_store
from crysldnet.data.fingerprint import Fingerprints
from crysldnet.tools.matbench.scores import TaskScores, load_leaderboard, ranking
from experiments import evidence

HERE = Path(__file__).parent
COMMAND = "python -m experiments.matbench.run data=FOLDER"
TASKS = ("matbench_jdft2d", "matbench_phonons")
ALGORITHMS = {
    "scratch": "CrysLDNet-scratch",
    "pretrained": "CrysLDNet",
    "frozen": "CrysLDNet-frozen",
    "hybrid": "CrysLDNet-hybrid",
}
"""Arm to its name in a submission."""
NETWORKS = ("scratch", "pretrained")
"""Arms that need a pretraining run."""


@dataclass(frozen=True)
class OnIncluded:
    """An arm that uses an included encoder, see config.yaml."""

    encoder: str
    tasks: list[str]
    seeds: list[int]
    recipes: list[str]


@dataclass(frozen=True)
class Settings:
    """See config.yaml."""

    data: str | None
    files: dict[str, str]
    pretrained: str | None
    runs: str
    out: str | None
    arms: list[Literal["scratch", "pretrained", "frozen", "hybrid"]]
    parallel: int
    seed: int
    encoder: str
    pretraining: list[str]
    recipes: list[str]
    members: int
    finetuning: list[str]
    frozen: OnIncluded
    hybrid: OnIncluded

    def __post_init__(self) -> None:
        if self.data is None and self.pretrained in (None, "none") and set(self.arms) & set(NETWORKS):
            raise ValueError("give data=FOLDER to pretrain on, or pretrained=ENCODER, or arms=[frozen,hybrid]")

    @property
    def on_included(self) -> dict[str, OnIncluded]:
        """The arms that use an included encoder, by name."""
        return {"frozen": self.frozen, "hybrid": self.hybrid}


@dataclass(frozen=True)
class Study:
    """The settings, and where the runs are."""

    settings: Settings
    runs: Path

    def pretrain(self) -> Path:
        """Pretrain without any formula of the tasks; return the encoder's file."""
        settings = self.settings
        evidence.launch(
            self.runs,
            "pretrain",
            "without_tasks",
            "stage=both",
            "data=custom",
            f"data.path={json.dumps({split: str(Path(file).absolute()) for split, file in settings.files.items()})}",
            f"encoder={settings.encoder}",
            f"data.exclude={json.dumps([f'embedded:{task}' for task in TASKS])}",
            "data.exclude_by=formula",
            f"seed={settings.seed}",
            *settings.pretraining,
        )
        return self.runs / "pretrain" / "without_tasks" / "encoder.safetensors"

    def audit(self, encoder: Path) -> None:
        """Refuse an encoder that has seen a formula of a task."""
        for task in TASKS:
            counts = pretraining_overlap(str(encoder), Fingerprints.of(open_store(f"embedded:{task}")))
            if counts is None or counts["formulas"] != 0:
                raise SystemExit(f"{encoder}: its pretraining set isn't free of the formulas of {task}: {counts}")
            print(f"{task}: none of {counts['pretraining_crystals']:,} pretraining crystals has one of its formulas")

    def launch(self, arm: str, encoder: Path | None) -> dict[str, Any]:
        """Run an arm; return what is kept of it. Scratch and pretrained share all settings but the weights."""
        settings = self.settings
        if (own := settings.on_included.get(arm)) is not None:
            every = [
                self._scores(arm, f"{arm}_{seed}", own.tasks, own.recipes, seed, f"pretrained={own.encoder}")
                for seed in own.seeds
            ]
            more = {
                "data": f"five folds, embedded crystals, recipe={arm} on {own.encoder}",
                "seeds": own.seeds,
                "of_seeds": {task: [mean_of(scores[task]) for scores in every] for task in own.tasks},
            }
            return self._described(every[0], **more)
        start = f"pretrained={encoder}"
        if arm == "scratch":
            assert encoder is not None
            start = f"encoder={encoder_choice(model_file.read(encoder, 'encoder')[0]['encoder'], self.runs)}"
        keys = [start, f"ensemble={settings.members}", "ensemble_by=folds", *settings.finetuning]
        scores = self._scores(arm, arm, TASKS, settings.recipes, settings.seed, *keys)
        data = f"five folds, embedded crystals, ensembles of {settings.members}, {' '.join(settings.finetuning)}"
        return self._described(scores, data=data, seeds=[settings.seed])

    def _scores(
        self, arm: str, name: str, tasks: Sequence[str], recipes: list[str], seed: int, *keys: str
    ) -> dict[str, Any]:
        summary = evidence.launch(
            self.runs,
            "matbench",
            name,
            f"algorithm={ALGORITHMS[arm]}",
            f"tasks={json.dumps(tasks)}",
            f"recipes={json.dumps(recipes)}",
            f"seed={seed}",
            f"parallel={self.settings.parallel}",
            *keys,
        )
        return {task: summary["tasks"][task]["scores"] for task in tasks}

    def _described(self, scores: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {
            "commit": evidence.current_commit(HERE),
            **more,
            "machine": evidence.describe_machine(),
            "date": date.today().isoformat(),
            "scores": scores,
        }


def mean_of(scores: dict[str, Any]) -> float:
    """Return the mean over the folds of the error of a task."""
    return float(np.mean([fold["mae"] for fold in scores.values()]))


def encoder_choice(config: dict[str, Any], folder: Path) -> str:
    """Return the name of an encoder's configuration, or write it to a file in a folder where it has none."""
    for name in choices("encoder"):
        if yaml.safe_load((conf_folder() / "encoder" / f"{name}.yaml").read_text()) == config:
            return name
    path = folder / "encoder.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def scores_of(arm: dict[str, Any], task: str) -> TaskScores:
    """Return the scores of an arm in the folds of a task."""
    scores = arm["scores"][task]
    return TaskScores(task, {fold: scores[f"fold_{fold}"] for fold in range(len(scores))}, {}, "embedded")


def records_of(arms: dict[str, dict[str, Any]]) -> list[evidence.Record]:
    """Return mean and spread over the folds, ranks, and the gain over the first arm fold by fold."""
    records = []

    def record(task: str, arm: str, metric: str, values: list[float], unit: str, ddof: int = 0) -> None:
        made = evidence.summarise(
            [float(np.mean(values))],
            name=f"{task}, {arm}",
            metric=metric,
            unit=unit,
            seeds=arms[arm]["seeds"],
            data=f"{task}, {arms[arm]['data']}",
            command=COMMAND,
            commit=arms[arm]["commit"],
        )
        spread = float(np.std(values, ddof=ddof)) if len(values) > 1 else None  # the leaderboard's has ddof=0
        records.append(replace(made, spread=spread, machine=arms[arm]["machine"], date=arms[arm]["date"]))

    for task in TASKS:
        entries = len(load_leaderboard()["tasks"][task]["entries"])
        for name, arm in arms.items():
            if task not in arm["scores"]:
                continue
            scores = scores_of(arm, task)
            folds = [scores.folds[fold]["mae"] for fold in sorted(scores.folds)]
            record(task, name, "MAE", folds, scores.unit)
            if "of_seeds" in arm:
                record(task, name, "MAE, over seeds", arm["of_seeds"][task], scores.unit, ddof=1)
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
            if task not in arm["scores"]:
                continue
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
    settings = evidence.settings(Settings, HERE, __doc__ or "", {"runs", "out", "parallel", "arms"})
    study, out = Study(settings, Path(settings.runs).absolute()), Path(settings.out or HERE)
    for folder in (study.runs, out):
        folder.mkdir(parents=True, exist_ok=True)
    encoder = None  # compose() gives pretrained=none where an encoder is named
    if set(settings.arms) & set(NETWORKS):
        encoder = study.pretrain() if settings.pretrained in (None, "none") else Path(settings.pretrained).absolute()
        study.audit(encoder)
    for included in {own.encoder for arm, own in settings.on_included.items() if arm in settings.arms}:
        study.audit(encoder_file(included))
    kept = out / "arms.json"
    for arm in settings.arms:
        made = study.launch(arm, encoder)
        before = json.loads(kept.read_text()) if kept.exists() else {}  # the other may have ended meanwhile
        arms = {name: {**before, arm: made}[name] for name in ALGORITHMS if name in (arm, *before)}
        kept.write_text(json.dumps(arms, indent=1) + "\n")
        draw(arms, out / "leaderboard.png")
        evidence.write(out, records_of(arms))


if __name__ == "__main__":
    main()
