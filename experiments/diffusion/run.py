"""Which form of latent diffusion teaches the encoder?

python -m experiments.diffusion.run data=FOLDER [key=value …]

Pretrains every arm with every seed, measures the frozen features and finetunes. The keys are those of config.yaml
beside this file. What is complete is not run again, so an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from crysldnet.artifacts import model_file
from crysldnet.io import write_atomically
from experiments import evidence
from experiments.diffusion import tables
from experiments.diffusion.probe import errors, features
from experiments.tasks import TASKS, Labelled, finetuning, formulas_of_store, load, open_files

HERE = Path(__file__).parent
CONTROL = "C1"
"""The arm that the others are compared with: stage 1 continued at equal compute."""

MAY_CHANGE = ("runs", "out", "seeds", "parts", "arms", "only", "first_stages", "second", "revised", "draws", "base",
              "finetuned", "finetuned_draws", "others", "others_epochs")  # fmt: skip
"""Settings that runs in the same folder may have otherwise."""


@dataclass(frozen=True)
class Settings:
    """See config.yaml."""

    data: str
    runs: str
    out: str | None
    seeds: list[int]
    parts: list[str]
    structures: list[str]
    max_atoms: int
    probe_atoms: int
    draws: dict[int, int]
    encoder: str
    pretraining: list[str]
    base: str
    first_stages: dict[str, list[str]]
    second: list[str]
    revised: list[str]
    arms: dict[str, list[str]]
    only: list[str] | None
    finetuned: dict[int, list[str]]
    finetuned_tasks: list[str]
    finetuned_draws: int
    finetuning: list[str]
    others: dict[str, list[str]]
    others_epochs: dict[str, int]


class Study:
    """The settings, and the crystals that were drawn for them."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.runs = settings, Path(settings.runs)
        self.folder = Path(settings.data)
        self.tasks: list[Labelled] = [load(task, self.folder, settings.probe_atoms) for task in TASKS]

    def prepare(self) -> None:
        """Write the crystals to pretrain on: small ones whose formulas no task has, each once."""
        seen = {f for files in {t.files for t in TASKS} for f in formulas_of_store(open_files(self.folder, files, []))}
        columns = ["material_id", "lattice", "atomic_numbers", "frac_coords"]
        validated: set[str] = set()
        for sources, name, most in ((["mp_cgcnn_val"], "val", 500), (self.settings.structures, "train", None)):
            tables = [pq.read_table(self.folder / f"{source}.parquet").select(columns) for source in sources]
            table = pa.concat_tables([t.cast(tables[0].schema) for t in tables])
            ids = table["material_id"].to_pylist()
            first = {id_: row for row, id_ in reversed(list(enumerate(ids))) if id_ not in validated}
            store = open_files(self.folder, tuple(sources), [])
            free = ~np.isin(formulas_of_store(store), list(seen)) & (store.crystals.sizes <= self.settings.max_atoms)
            free &= np.isin(np.arange(len(ids)), list(first.values()))
            rows = np.sort(np.random.default_rng(0).permutation(np.flatnonzero(free))[:most])
            validated |= {ids[row] for row in rows}
            out = self.runs / "data" / f"{name}.parquet"
            if not out.exists():
                out.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(table.take(pa.array(rows)), out)

    def _arguments(self, name: str) -> list[str]:
        """Return the settings of a first stage or an arm; one that begins with + stands for those of another one."""
        found: list[str] = []
        known = {**self.settings.first_stages, **self.settings.arms, "revised": self.settings.revised}
        for argument in known[name]:
            found += self._arguments(argument[1:]) if argument.startswith("+") else [argument]
        return found

    def pretrain(self, name: str, seed: int, *arguments: str) -> Path:
        """Pretrain once; return the folder of the run."""
        data = self.runs / "data"
        run = f"{name.replace(' ', '_')}-seed{seed}"
        evidence.launch(
            self.runs,
            "pretrain",
            run,
            f"encoder={self.settings.encoder}",
            "data=custom",
            "data.targets=null",
            f"data.path={{train: {data / 'train.parquet'}, val: {data / 'val.parquet'}}}",
            f"seed={seed}",
            *self.settings.pretraining,
            *arguments,
        )
        return self.runs / "pretrain" / run

    def first_stage(self, name: str, seed: int) -> Path:
        """Train a first stage, and measure its features."""
        folder = self.pretrain(name, seed, "stage=vae", *self._arguments(name))
        self.probe(folder)
        return folder

    def second_stage(self, name: str, seed: int) -> Path:
        """Train an arm from the base of a seed, and measure its features."""
        base = self.first_stage(self.settings.base, seed) / "vae" / "pretraining.safetensors"
        first = self._arguments(self.settings.base)
        second = [*self.settings.second, *self._arguments(name)]
        folder = self.pretrain(name, seed, "stage=diffusion", f"init={base}", *first, *second)
        self.probe(folder)
        return folder

    def probe(self, folder: Path) -> list[dict[str, Any]]:
        """Measure frozen features on every task, number of labels and draw; a file keeps what was found."""
        file = folder / "probe.json"
        if file.exists():
            return json.loads(file.read_text())
        torch.set_num_threads(1)
        encoder, _ = model_file.load_encoder(folder / "encoder.safetensors")
        found = []
        for labelled in self.tasks:
            of_layers = {
                "all": features(encoder, labelled.store, labelled.rows),
                "last": features(encoder, labelled.store, labelled.rows, all_layers=False),
            }
            for labels, draws in self.settings.draws.items():
                for seed in range(draws):
                    drawn = labelled.draw(labels, seed)
                    for layers, x in of_layers.items():
                        if drawn is None or (layers == "last" and (seed >= 5 or labels > 300)):
                            continue
                        measured = errors(x, labelled.values, *drawn)
                        known = {"task": labelled.task.name, "labels": labels, "draw": seed, "layers": layers}
                        found.append({**known, **{k: round(v, 6) for k, v in measured.items()}})
        write_atomically(file, json.dumps(found))
        return found

    def finetune(self, folder: Path, task: Labelled, labels: int, draw: int, *arguments: str) -> dict[str, Any]:
        """Finetune an encoder on one draw of a task; a sixth of the labels validate.

        Args:
            folder: of the pretraining run.
            task: what is learned.
            labels: how many crystals are labelled.
            draw: which draw of them; it seeds the run too.
            arguments: further settings.
        """
        data = self.runs / "labels" / f"{task.task.name.replace(' ', '_')}-{labels}-{draw}"
        task.write(labels, draw, data)
        return evidence.launch(
            self.runs,
            "finetune",
            f"{folder.name}-{data.name}",
            *finetuning(data, draw),
            f"pretrained={folder / 'encoder.safetensors'}",
            *self.settings.finetuning,
            *arguments,
        )

    def of_seed(self, seed: int) -> None:
        """Run the parts that are asked for, with one seed of pretraining."""
        settings = self.settings
        for name in settings.first_stages if "first" in settings.parts else ():
            self.first_stage(name, seed)
        for name in (settings.only or settings.arms) if "second" in settings.parts else ():
            self.second_stage(name, seed)
        draws = range(settings.finetuned_draws) if "finetune" in settings.parts else range(0)
        runs = [(labels, name) for labels, names in settings.finetuned.items() for name in names]
        for draw, (labels, name), task in product(draws, runs, self.tasks):
            if task.task.name in settings.finetuned_tasks:
                self.finetune(self.second_stage(name, seed), task, labels, draw)

    def write(self, out: Path) -> None:
        """Write what all complete runs of the folder, and the files already there, measured: errors, table, plot."""
        out.mkdir(parents=True, exist_ok=True)
        settings = self.settings
        first, arms = list(settings.first_stages), list(dict.fromkeys([settings.base, *settings.arms]))
        crystals = len(pq.read_table(self.runs / "data" / "train.parquet", columns=["material_id"]))
        known = {
            "data": f"{crystals:,} crystals of {' and '.join(settings.structures)} of ≤ {settings.max_atoms} atoms",
            "commit": evidence.current_commit(HERE),
        }
        records = []
        for part, names, control in (("first", first, first[0]), ("second", arms, CONTROL)):
            file = out / f"{part}_stages.json"
            errors = tables.read_measurements(file, names) | tables.collect(self.runs, names)
            if not errors:
                continue
            structures = f"structures=[{','.join(settings.structures)}] max_atoms={settings.max_atoms}"
            command = f"python -m experiments.diffusion.run parts=[{part}] {structures} data=FOLDER"
            records += tables.records_of(errors, names, control, {**known, "command": command})
            tables.write_measurements(errors, file)
        evidence.write(out, records)
        measured = [arm for arm in arms if any(name == arm for _, name, _ in errors)]
        tables.draw(errors, measured, CONTROL, out / "arms.png")


def main() -> None:
    """Run what is asked for; write what is measured."""
    settings = evidence.settings(Settings, HERE, __doc__ or "", MAY_CHANGE)
    study = Study(settings)
    study.prepare()
    for seed in settings.seeds:
        study.of_seed(seed)
    study.write(Path(settings.out or HERE))


if __name__ == "__main__":
    main()
