"""Train on a fold, choose the best epoch on a part of its training crystals, and keep its predictions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from crysldnet.build import build
from crysldnet.data.crystals import Crystals
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.fingerprint import Fingerprints
from crysldnet.data.graph import GraphSpec
from crysldnet.data.sampler import BatchSampler, Budget
from crysldnet.data.schema import table_from_crystals
from crysldnet.data.split import Rows
from crysldnet.data.store import CrystalStore
from crysldnet.errors import ConfigError, DataError
from crysldnet.finetune import Finetuned, train
from crysldnet.matbench.settings import MatbenchConfig
from crysldnet.matbench.tasks import Source, crystals_of, file_hash
from crysldnet.models.head import PropertyModel
from crysldnet.predict import predict_crystals
from crysldnet.training.checkpoint import load_property_model
from crysldnet.training.pretraining_set import encoder_file, pretraining_overlap
from crysldnet.training.run_folder import RunFolder, write_atomically


@dataclass(frozen=True)
class Run:
    """What all folds of a run share."""

    config: MatbenchConfig
    values: dict[str, Any]
    folder: RunFolder
    benchmark: Any
    source: Source
    graph: GraphSpec
    provenance: dict[str, Any]
    """Of the pretrained encoder; empty where there is none."""
    device: str

    @property
    def task(self) -> Any:
        """The ``MatbenchTask``."""
        return self.benchmark.tasks_map[self.config.task]

    @property
    def folds(self) -> list[int]:
        """The folds to run."""
        return list(self.task.folds) if self.config.folds is None else self.config.folds

    @property
    def complete(self) -> bool:
        """Whether they are all."""
        return len(self.folds) == len(self.task.folds)

    @cached_property
    def overlap(self) -> dict[str, Any] | None:
        """What the task's crystals, each of which is tested on in one fold, share with the pretraining set."""
        structures = self.task.df[self.task.metadata.input_type]
        table = table_from_crystals(crystals_of(structures), list(structures.index), {}, {}, {})
        return pretraining_overlap(self.config.pretrained, Fingerprints.of(CrystalStore.from_table(table)))

    @property
    def inputs(self) -> dict[str, str | None]:
        """Hashes of the files that decide the result besides the settings."""
        path = encoder_file(self.config.pretrained)
        return {"data_sha256": self.source.sha256, "pretrained_sha256": None if path is None else file_hash(path)}


def inner_rows(n: int, fraction: float, seed: int, fold: int) -> Rows:
    """Draw a fold's validation rows from its n training crystals; there are no test rows."""
    order = np.random.default_rng([seed, fold]).permutation(n)
    count = round(fraction * n)
    return {"train": np.sort(order[count:]), "val": np.sort(order[:count]), "test": np.empty(0, np.int64)}


def fold_folder(run: Run, fold: int) -> Path:
    """Return where a fold's model and predictions are kept."""
    return run.folder.path / f"fold_{fold}"


def fold_data(run: Run, fold: int) -> CrystalDataModule:
    """Return the data of a fold's training: its training part alone, split for validation."""
    structures, targets = run.task.get_train_and_val_data(fold)
    metadata = run.task.metadata
    table = table_from_crystals(
        crystals_of(structures),
        list(structures.index),
        {metadata.target: targets.to_numpy(np.float64)},
        {metadata.target: metadata.unit},
        {"dataset": run.config.task, "source": run.source.label},
    )
    store = CrystalStore.from_table(table, f"training part of fold {fold} of {run.config.task}")
    rows = inner_rows(len(store), run.config.validation_fraction, run.config.seed, fold)
    node = {**run.config.data, "targets": [metadata.target]}
    types = run.config.target_types
    return build(node, "data", graph=run.graph, seed=run.config.seed, store=store, rows=rows, target_types=types)


def predict(model: PropertyModel, crystals: Crystals, batch_size: int, max_atoms: int | None) -> NDArray[np.float64]:
    """Return [B] predictions in physical units."""
    sizes = crystals.sizes
    atoms = None if max_atoms is None else max(max_atoms, int(sizes.max()))
    predicted = np.empty(len(crystals))
    for rows, *_ in BatchSampler(
        np.arange(len(crystals)), sizes, None, Budget(crystals=batch_size, atoms=atoms), shuffle=False
    ):
        predicted[rows] = predict_crystals(model, crystals.take(rows))[:, 0]
    return predicted


def run_fold(run: Run, fold: int) -> None:
    """Train on a fold and keep its predictions, unless they are there already."""
    folder = fold_folder(run, fold)
    if (folder / "predictions.json").exists():
        _read_fold(run, fold)
        return
    loggers = build(
        run.config.logger, "logger", folder=folder, name=f"{run.folder.name}-fold_{fold}", config=run.values
    )
    result = train(run.config, run.values, folder, data=fold_data(run, fold), loggers=loggers)
    for logger in loggers:  # else the next fold would be logged into this one
        getattr(logger.experiment, "finish", lambda: None)()
    _keep_predictions(run, fold, result)


@rank_zero_only
def _keep_predictions(run: Run, fold: int, result: Finetuned) -> None:
    """Predict the test crystals with the model as it was exported."""
    model, _ = load_property_model(fold_folder(run, fold))
    structures = run.task.get_test_data(fold, include_target=False)
    data = result.data
    predicted = predict(model.to(run.device), crystals_of(structures), data.batch_size, data.max_atoms)
    if not np.isfinite(predicted).all():
        raise DataError(f"fold {fold}: {int((~np.isfinite(predicted)).sum())} predictions are not finite")
    parameters: dict[str, float] = {
        "train_crystals": len(data.rows["train"]),
        "validation_crystals": len(data.rows["val"]),
    }
    if "val/mae" in result.metrics:
        parameters["validation_mae"] = result.metrics["val/mae"]
    record = {
        "fold": fold,
        **run.inputs,
        "parameters": parameters,
        "ids": list(structures.index),
        "predictions": predicted.tolist(),
    }
    write_atomically(fold_folder(run, fold) / "predictions.json", json.dumps(record))


def _read_fold(run: Run, fold: int) -> dict[str, Any]:
    path = fold_folder(run, fold) / "predictions.json"
    record = json.loads(path.read_text())
    for key, value in run.inputs.items():
        if record[key] != value:
            raise ConfigError(
                f"{path}: made with other files ({key} differs); finish the run with those, or choose another name"
            )
    return record


def score_folds(run: Run) -> dict[int, dict[str, float]]:
    """Let the official package record and score every fold."""
    for fold in run.folds:
        record = _read_fold(run, fold)
        if record["ids"] != list(run.task.get_test_data(fold, include_target=False).index):
            raise DataError(f"fold {fold}: the kept predictions are of other crystals")
        predictions = np.array(record["predictions"], np.float64)
        run.task.record(fold, predictions, params=record["parameters"])
    return {fold: dict(run.task.results[run.task.folds_map[fold]].scores) for fold in run.folds}
