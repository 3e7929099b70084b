"""Train on a fold, select recipe and epoch on a part of its training crystals, and save its predictions."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from crysldnet.artifacts.model_file import load_property_model
from crysldnet.artifacts.provenance import encoder_file, pretraining_overlap
from crysldnet.data.datamodule import INFERENCE_BATCH, CrystalDataModule
from crysldnet.data.fingerprint import Fingerprints
from crysldnet.data.schema import table_from_crystals
from crysldnet.data.split import Rows
from crysldnet.data.store import CrystalStore, file_hash
from crysldnet.encoders.protocol import Encoder
from crysldnet.errors import ConfigError, DataError
from crysldnet.finetune.ensemble import fit_models
from crysldnet.finetune.results import prediction_row, write_predictions
from crysldnet.finetune.settings import make_data
from crysldnet.graphs.batch import cut, make_batch
from crysldnet.graphs.crystals import Crystals
from crysldnet.io import write_atomically
from crysldnet.models.predictor import TargetModel
from crysldnet.models.predictor import predict as predict_batches
from crysldnet.tools.matbench.settings import MatbenchConfig, Recipe
from crysldnet.tools.matbench.tasks import Source, crystals_of, target_values
from crysldnet.training.inputs import INPUTS, hashes_of, plugin_hashes, refuse_other_inputs
from crysldnet.training.run_folder import RunFolder


@dataclass(frozen=True)
class TaskRun:
    """What all folds of a task share."""

    config: MatbenchConfig
    recipes: list[Recipe]
    folder: RunFolder
    task: Any
    """The ``MatbenchTask``, loaded."""
    source: Source
    encoder: Encoder
    """The untrained encoder, which defines the graph."""
    device: str

    @property
    def name(self) -> str:
        """Name of the task."""
        return self.task.dataset_name

    @property
    def target(self) -> str:
        """Target column."""
        return self.task.metadata.target

    @property
    def folds(self) -> list[int]:
        """Folds to run."""
        return list(self.task.folds) if self.config.folds is None else self.config.folds

    @cached_property
    def overlap(self) -> dict[str, Any] | None:
        """Overlap of the task's crystals, each tested in one fold, with the pretraining set."""
        structures = self.task.df[self.task.metadata.input_type]
        table = table_from_crystals(crystals_of(structures), list(structures.index), {}, {}, {})
        return pretraining_overlap(self.config.pretrained, Fingerprints.of(CrystalStore.from_table(table)))

    @property
    def inputs(self) -> dict[str, str | None]:
        """Hashes of the files that determine the result in addition to the settings."""
        path = encoder_file(self.config.pretrained)
        return {"data_sha256": self.source.sha256, "pretrained_sha256": None if path is None else file_hash(path)}


def inner_rows(n: int, fraction: float, seed: int, fold: int) -> Rows:
    """Draw a fold's validation rows from its n training crystals; test rows are empty."""
    order = np.random.default_rng([seed, fold]).permutation(n)
    count = round(fraction * n)
    return {"train": np.sort(order[count:]), "val": np.sort(order[:count]), "test": np.empty(0, np.int64)}


def fold_folder(root: Path, task: str, fold: int) -> Path:
    """Return the folder of a fold's models and predictions in the run folder."""
    return root / task / f"fold_{fold}"


def is_done(root: Path, task: str, fold: int) -> bool:
    """Return whether a fold's predictions are saved."""
    return (fold_folder(root, task, fold) / "predictions.json").exists()


def _of_task(run: TaskRun, config: MatbenchConfig) -> MatbenchConfig:
    """Return the settings for this task only, without those of other tasks' targets."""
    return replace(
        config,
        data={**config.data, "targets": [run.target]},
        target_types={name: kind for name, kind in config.target_types.items() if name == run.target},
        target_per={name: per for name, per in config.target_per.items() if name == run.target},
        atomic_references=[name for name in config.atomic_references if name == run.target],
    )


def fold_data(run: TaskRun, fold: int, recipe: Recipe | None = None) -> CrystalDataModule:
    """Return the training data of a fold: its training part, split for validation."""
    structures, targets = run.task.get_train_and_val_data(fold)
    unit = run.task.metadata.unit
    table = table_from_crystals(
        crystals_of(structures),
        list(structures.index),
        {run.target: target_values(run.task, targets)},
        {run.target: unit} if unit else {},
        {"dataset": run.name, "source": run.source.label},
    )
    store = CrystalStore.from_table(table, f"training part of fold {fold} of {run.name}")
    rows = inner_rows(len(store), run.config.validation_fraction, run.config.seed, fold)
    return make_data(_of_task(run, (recipe or run.recipes[0]).config), run.encoder, store=store, rows=rows)


def predict(models: list[TargetModel], crystals: Crystals) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Return the joint prediction of models for B crystals.

    Returns:
        [B] values in physical units, or for classification the probability of true; and [B] standard deviations or
        None.
    """
    graph = models[0].encoder.graph
    parts = (crystals.take(np.arange(start, stop)) for start, stop in cut(crystals.sizes, *INFERENCE_BATCH))
    found = predict_batches(models, (make_batch(part, graph) for part in parts)).to(torch.float64)
    values = found.value[:, 0] if found.probability is None else found.probability[:, 0, 1]
    std = None if found.std is None or bool(found.std.isnan().all()) else found.std[:, 0].numpy()
    return values.numpy(), std


def run_fold(run: TaskRun, fold: int) -> None:
    """Train on a fold and save its predictions, unless they exist."""
    if is_done(run.folder.path, run.name, fold):
        read_fold(run, fold)
        return
    folder = fold_folder(run.folder.path, run.name, fold)
    _train_fold(run, fold, folder)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # the other processes read the files of the first one


def _refuse_other_inputs(run: TaskRun) -> None:
    """Reject a crystal, encoder or plugin file that was replaced since the start of the run.

    Raises:
        ConfigError: a file was replaced.
    """
    file = run.folder.path / INPUTS
    if file.exists():
        before = json.loads(file.read_text())
        files, plugins = hashes_of(pretrained=run.config.pretrained), plugin_hashes(run.config.plugins)
        now = {"files": files, "tasks": {run.name: run.source.sha256}, "plugins": plugins}
        refuse_other_inputs(run.folder.path, {**before, "tasks": {run.name: before["tasks"].get(run.name)}}, now)


def _train_fold(run: TaskRun, fold: int, folder: Path) -> None:
    _refuse_other_inputs(run)
    recipe, tried = _choose_recipe(run, fold, folder)
    alone = recipe.config.ensemble == 1
    paths = _train_alone(run, recipe, fold, folder) if alone else _train(run, recipe, fold, folder)
    _refuse_other_inputs(run)  # unchanged since the last model was started
    chosen: dict[str, float | str] = {**tried, "recipe": recipe.text} if run.config.recipes else {}
    _keep_predictions(run, fold, paths, fold_data(run, fold, recipe), chosen)


def _choose_recipe(run: TaskRun, fold: int, folder: Path) -> tuple[Recipe, dict[str, float]]:
    """Train every recipe once; return the one with the lowest validation error, and the errors of all."""
    if len(run.recipes) == 1:
        return run.recipes[0], {}
    errors = {}
    for number, recipe in enumerate(run.recipes):
        info = load_property_model(_train_alone(run, recipe, fold, folder)[0])[1]
        errors[number] = info["metrics"]["val/mae" if "val/mae" in info["metrics"] else "val/log_loss"]
    best = min(errors, key=errors.__getitem__)
    return run.recipes[best], {f"validation_error_of_recipe_{number}": error for number, error in errors.items()}


def _train(run: TaskRun, recipe: Recipe, fold: int, folder: Path) -> list[Path]:
    """Train the missing models of a fold; return the folder of each model."""
    name = f"{run.folder.name}-{folder.relative_to(run.folder.path).as_posix().replace('/', '-')}"
    data = fold_data(run, fold, recipe)
    return fit_models(_of_task(run, recipe.config), recipe.values, folder, data, data.rows, name)


def _train_alone(run: TaskRun, recipe: Recipe, fold: int, folder: Path) -> list[Path]:
    """Train one model with a recipe, in its own folder if there are several."""
    own = replace(recipe, config=replace(recipe.config, ensemble=1))
    return _train(run, own, fold, folder / f"recipe_{run.recipes.index(recipe)}" if len(run.recipes) > 1 else folder)


@rank_zero_only
def _keep_predictions(
    run: TaskRun, fold: int, paths: list[Path], data: CrystalDataModule, parameters: dict[str, float | str]
) -> None:
    """Predict the test crystals with the exported models."""
    loaded = [load_property_model(path) for path in paths]
    structures = run.task.get_test_data(fold, include_target=False)
    models = [model.to(run.device) for model, _ in loaded]
    predicted, std = predict(models, crystals_of(structures))
    if not np.isfinite(predicted).all():
        raise DataError(f"fold {fold} of {run.name}: {int((~np.isfinite(predicted)).sum())} predictions are not finite")
    sizes: dict[str, float] = {"train_crystals": len(data.rows["train"]), "validation_crystals": len(data.rows["val"])}
    for metric in ("mae", "log_loss"):
        found = [info["metrics"][f"val/{metric}"] for _, info in loaded if f"val/{metric}" in info["metrics"]]
        if found:
            sizes[f"validation_{metric}"] = float(np.mean(found))
    record = {
        "fold": fold,
        **run.inputs,
        "parameters": {**sizes, "models": len(models), **parameters},
        "ids": list(structures.index),
        "predictions": predicted.tolist(),
        "std": None if std is None else std.tolist(),
    }
    write_atomically(fold_folder(run.folder.path, run.name, fold) / "predictions.json", json.dumps(record))


def read_fold(run: TaskRun, fold: int) -> dict[str, Any]:
    """Read a fold's saved predictions.

    Raises:
        ConfigError: they were made from different files.
        DataError: they are for different crystals.
    """
    path = fold_folder(run.folder.path, run.name, fold) / "predictions.json"
    record = json.loads(path.read_text())
    for key, value in run.inputs.items():
        if record[key] != value:
            raise ConfigError(
                f"{path}: made with other files ({key} differs); finish the run with those, or choose another name"
            )
    if record["ids"] != list(run.task.get_test_data(fold, include_target=False).index):
        raise DataError(f"{path}: the kept predictions are of other crystals")
    return record


def record_folds(run: TaskRun) -> None:
    """Record every fold with the official package, and the standard deviations of regression predictions."""
    for fold in run.folds:
        record = read_fold(run, fold)
        std = None
        if record["std"] is not None and run.task.metadata.task_type == "regression":
            # If members agree exactly, their spread is 0, for which the package computes an interval of NaN.
            std = np.maximum(np.array(record["std"], np.float64), np.finfo(np.float64).eps)
        predictions = np.array(record["predictions"], np.float64)
        run.task.record(fold, predictions, std=std, params=record["parameters"])


@rank_zero_only
def write_tested(run: TaskRun) -> None:
    """Write true values and predictions of the test crystals for reports after all folds.

    Probabilities become classes at the package's threshold.
    """
    from matbench.constants import CLF_THRESH

    labels = ["false", "true"] if run.task.metadata.task_type == "classification" else None
    rows = []
    for fold in run.folds:
        record = read_fold(run, fold)
        predicted = np.full((len(record["ids"]), 3), np.nan)  # value, standard deviation, class probability
        predicted[:, 0] = record["predictions"]
        if record["std"] is not None:
            predicted[:, 1] = record["std"]
        if labels is not None:
            probability = predicted[:, 0].copy()
            predicted[:, 0] = probability > CLF_THRESH
            predicted[:, 2] = np.where(probability > CLF_THRESH, probability, 1 - probability)
        true = target_values(run.task, run.task.get_test_data(fold, include_target=True)[1]).astype(np.float64)
        for id_, value, own in zip(record["ids"], true.tolist(), predicted.tolist(), strict=True):
            cells = prediction_row(id_, run.target, run.task.metadata.unit or "", labels, value, own)
            rows.append([*cells, str(fold)])
    write_predictions(run.folder.path / run.name / "predictions.csv", rows, "fold")
