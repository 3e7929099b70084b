"""Finetune on the properties of JARVIS-DFT (dft_3d) and write an entry of the JARVIS leaderboard.

Each property is an ordinary finetuning run on the official split, in RUN/finetune/PROPERTY. Finished ones are kept, so
resume=last continues with the next. parallel=N trains N properties at once. The test crystals are predicted once.

The split and the test values are those of the benchmark's files, splits=FOLDER with dft_3d_PROPERTY.json.zip, or those
stored with the data by crysldnet data download jarvis_dft_3d.

crysldnet jarvis validate FOLDER checks an entry and computes its errors.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crysldnet import __version__
from crysldnet.artifacts.provenance import describe_overlap, pretraining_overlap, refuse_seen_labels
from crysldnet.build import build
from crysldnet.config import arguments_for, settings_of
from crysldnet.console import did_you_mean, note
from crysldnet.data.catalog import published
from crysldnet.data.datasets import open_store
from crysldnet.data.fingerprint import Fingerprints
from crysldnet.data.store import CrystalStore
from crysldnet.errors import ConfigError, DataError
from crysldnet.finetune import run as finetune
from crysldnet.finetune.settings import EnsembleConfig, FinetuneConfig, make_encoder
from crysldnet.io import write_atomically
from crysldnet.tools.jarvis.benchmark import NAME, Benchmark, open_benchmark, properties, split_file
from crysldnet.tools.jarvis.entry import check_entry, print_checked, write_entry
from crysldnet.training.inputs import hashes_of
from crysldnet.training.processes import Job, check_parallel, own_command, places, run_all
from crysldnet.training.run_folder import RunFolder, is_complete
from crysldnet.training.trainer import TrainerSettings, checked_settings

__all__ = ["JarvisConfig", "run"]

OWN = ("properties", "splits", "parallel", "algorithm", "team", "email", "project_url", "git_url", "out")
"""Keys that aren't those of finetuning."""


@dataclass(frozen=True, kw_only=True)
class JarvisConfig(EnsembleConfig):
    """Every key of ``conf/jarvis.yaml``: those of finetuning, and the benchmark's own."""

    properties: list[str]
    splits: str | None
    parallel: int
    algorithm: str
    team: str
    email: str
    project_url: str
    git_url: list[str] = field(default_factory=list)
    out: str | None
    baselines: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.properties or len(set(self.properties)) < len(self.properties):
            raise ValueError(f"properties={self.properties}: name one property or more, each once")
        if self.data.get("path") == f"published:{NAME}":
            known = properties()
            for name in self.properties:
                if name not in known:
                    meant = did_you_mean(name, known, f"available: {', '.join(known)}", 0.5)
                    raise ValueError(f"properties: no property {name!r}; {meant}")
        if not re.fullmatch(r"[\w.+-]+", self.algorithm):
            raise ValueError(f"algorithm={self.algorithm!r}: letters, digits and . _ + - make a folder")
        for key in ("team", "email", "project_url"):
            if not getattr(self, key).strip():
                raise ValueError(f"{key}: an entry must state it")
        if not re.fullmatch(r"[^@\s]+@[^@\s.]+(\.[^@\s.]+)+", self.email):
            raise ValueError(f"email={self.email!r}: not an address, such as name@example.org")

    def of_property(self, name: str, folder: Path, values: Mapping[str, Any]) -> tuple[FinetuneConfig, dict[str, Any]]:
        """Return the settings of the finetuning run of a property, also as plain values."""
        begun = (folder / "finetune" / name / "config.yaml").exists()
        split = {**values["data"].get("split", {}), "by": "file", "file": str(split_path(folder, name))}
        own = {key: value for key, value in values.items() if key not in (*OWN, "defaults")}
        own |= {"data": {**values["data"], "targets": [name], "split": split}, "name": name, "runs": str(folder)}
        own |= {"resume": "last" if begun else None, "folds": 0}
        for key in ("target_types", "target_per"):
            own[key] = {target: value for target, value in values[key].items() if target == name}
        own["atomic_references"] = [target for target in values["atomic_references"] if target == name]
        known = {f.name for f in fields(FinetuneConfig)}
        return FinetuneConfig(**{key: value for key, value in own.items() if key in known}), own


def split_path(folder: Path, name: str) -> Path:
    """Return the split file of a property."""
    return folder / "splits" / f"{name}.json"


def entry_of(config: JarvisConfig, folder: Path) -> Path:
    """Return the folder of the entry of a run."""
    return (folder if config.out is None else Path(config.out)) / "contributions" / config.algorithm


def run(config: JarvisConfig, values: dict[str, Any], choices: Mapping[str, Any] | None = None) -> int:
    """Finetune on all properties; return the exit status.

    Args:
        config: the settings.
        values: the same as plain values, saved with the run's output.
        choices: configuration files by group.
    """
    checked_settings(config.trainer, config.strategy)
    _check(config)
    make_encoder(config)
    store = open_store(config.data["path"])
    splits = None if config.splits is None else Path(config.splits)
    benchmarks = {name: open_benchmark(store, name, splits) for name in config.properties}
    overlaps = {name: _overlap(config, store, benchmark) for name, benchmark in benchmarks.items()}
    folder = RunFolder(config.runs, "jarvis", config.name, resume=config.resume is not None)
    texts = {name: split_file(store, benchmark) for name, benchmark in benchmarks.items()}
    used = {name: json.loads(text)["sha256"] for name, text in texts.items()}
    inputs = {"files": hashes_of(pretrained=config.pretrained), "data_sha256": store.hash, "splits": used}
    folder.save_inputs(inputs, config.plugins)
    for name, text in texts.items():
        split_path(folder.path, name).parent.mkdir(exist_ok=True)
        write_atomically(split_path(folder.path, name), text)
    folder.save_config(values, choices)
    _train(config, folder.path)
    entry = entry_of(config, folder.path)
    predictions = {name: _predictions(folder.path, name) for name in benchmarks}
    write_entry(entry, predictions, _metadata(config, folder.path), _script(values))
    found = check_entry(entry, {name: benchmark.truth for name, benchmark in benchmarks.items()})
    if found.problems:
        raise DataError(f"{entry}: not a valid entry: {'; '.join(found.problems)}")
    told = {
        name: {
            "mae": found.scores[name][1],
            "unit": benchmark.unit,
            **{f"{split}_crystals": len(rows) for split, rows in benchmark.rows.items()},
            "test_crystals_with_training_formula": benchmark.shared_formulas,
            "split": benchmark.source,
            "pretraining_overlap": overlaps[name],
        }
        for name, benchmark in benchmarks.items()
    }
    for name, benchmark in benchmarks.items():
        if benchmark.shared_formulas:
            count, of = benchmark.shared_formulas, len(benchmark.rows["test"])
            note(f"{name}: {count:,} of {of:,} test crystals have the reduced formula of a training or validation one")
        if (counts := overlaps[name]) is not None:
            note(f"{name}: {describe_overlap(counts)}")
    folder.finish({"command": "jarvis", "properties": told, "seed": config.seed, "entry": str(entry), "valid": True})
    print_checked(entry, found, {name: benchmark.unit for name, benchmark in benchmarks.items()})
    return 0


def _check(config: JarvisConfig) -> None:
    for key in ("targets", "split"):
        if key in config.data:
            raise ConfigError(f"data.{key}: the benchmark decides that", f"data.{key}")
    config.check_targets(config.properties, "among properties")
    check_parallel(config.parallel, config.trainer, "property")
    if config.out is not None and config.resume is None and (entry := entry_of(config, Path())).exists():
        raise ConfigError(f"{entry} already exists; choose another algorithm or out", "out")


def _overlap(config: JarvisConfig, store: CrystalStore, benchmark: Benchmark) -> dict[str, Any] | None:
    """Return how many test crystals were in pretraining, and refuse a model that has learned labels of them."""
    found = pretraining_overlap(config.pretrained, Fingerprints.of(store, np.asarray(benchmark.rows["test"])))
    refuse_seen_labels(config.pretrained, benchmark.property, config.data["path"], found)
    return found


def _train(config: JarvisConfig, folder: Path) -> None:
    """Finetune on the properties that aren't finished, each in its own process."""
    jobs = []
    for name in config.properties:
        if not is_complete(folder / "finetune" / name):
            command = own_command("jarvis", "property", str(folder), name)
            jobs.append(Job(name, command, folder / "logs" / f"{name}.txt"))
    settings: TrainerSettings = build(config.trainer, "trainer")
    run_all(jobs, places(config.parallel, settings.device) if config.parallel > 1 else [{}], "properties")


def _predictions(folder: Path, name: str) -> dict[str, float]:
    """Read the test predictions of a property by id."""
    with (folder / "finetune" / name / "predictions_test.csv").open(newline="", encoding="utf-8") as file:
        return {row["material_id"]: float(row["prediction"]) for row in csv.DictReader(file)}


def _metadata(config: JarvisConfig, folder: Path) -> dict[str, Any]:
    """Return the content of ``metadata.json``."""
    finished = [folder / "finetune" / name / "summary.json" for name in config.properties]
    taken = sum(float(json.loads(path.read_text()).get("wall_time_s") or 0.0) for path in finished)
    settings: TrainerSettings = build(config.trainer, "trainer")
    cpu, path = platform.processor() or platform.machine(), config.data["path"]
    return {
        "model_name": config.algorithm,
        "project_url": config.project_url,
        "date_submitted": datetime.now().strftime("%m-%d-%Y"),
        "author_email": config.email,
        "database_version": published()[NAME].version if path == f"published:{NAME}" else Path(path).name,
        "team_name": config.team,
        "time_taken_seconds": round(taken, 2),
        "language": "python",
        "os": platform.system().lower(),
        "software_used": f"crysldnet {__version__}, torch {torch.__version__}",
        "hardware_used": torch.cuda.get_device_name() if settings.device == "cuda" else f"CPU ({cpu})",
        "git_url": config.git_url,
    }


def _script(values: Mapping[str, Any]) -> str:
    """Return a shell script that repeats the run."""
    typed = sys.argv[2:] if sys.argv[1:2] == ["jarvis"] else arguments_for("jarvis", values, ("name", "runs", "resume"))
    words = [word for word in typed or [] if not word.startswith(("resume=", "--resume="))]
    return f"#!/bin/bash\npip install crysldnet=={__version__}\n{shlex.join(['crysldnet', 'jarvis', *words])}\n"


def main(arguments: argparse.Namespace) -> int:
    """Run ``crysldnet jarvis property RUN PROPERTY``: finetune on one property of an existing run; return the status.

    A run starts it for each property. You can also start it yourself or with a scheduler; the run with ``resume=last``
    then uses the result.
    """
    path = arguments.run.absolute()
    config, values = settings_of("jarvis", path, JarvisConfig)
    if arguments.property not in config.properties:
        known = ", ".join(config.properties)
        raise ConfigError(f"{path}: {arguments.property} isn't one of its properties, {known}", "property")
    if is_complete(path / "finetune" / arguments.property):
        return 0
    return finetune(*config.of_property(arguments.property, path, values))
