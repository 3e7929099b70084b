"""Train a property model with the configured recipe, or an ensemble of models.

The models of an ensemble have different seeds, or each is validated on a different part of the training crystals.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from crysldnet.artifacts.model_file import load_property_model
from crysldnet.build import build
from crysldnet.console import note
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.elements import formula_groups
from crysldnet.data.split import Rows
from crysldnet.errors import ConfigError
from crysldnet.finetune.hybrid import FEWEST, train_hybrid
from crysldnet.finetune.settings import EnsembleConfig, TrainingConfig, make_data, make_encoder, member_seed
from crysldnet.finetune.training import Finetuned, evaluate, reported, train_network, train_part
from crysldnet.training.calibrate import calibrate
from crysldnet.training.inputs import hashes_of
from crysldnet.training.metrics import TargetMetrics
from crysldnet.training.trainer import TrainerSettings

Config = TypeVar("Config", bound=TrainingConfig)
FEW = 1000
"""Up to this number of crystals, recipe=auto trains no network."""


def train(
    config: TrainingConfig,
    values: dict[str, Any],
    folder: Path,
    data: CrystalDataModule | None = None,
    loggers: list[Logger] | None = None,
) -> Finetuned:
    """Train a property model and write ``model.safetensors`` to the folder.

    Args:
        config: the settings.
        values: the same as plain values.
        folder: run folder.
        data: the crystals, by default those of the configuration.
        loggers: in addition to the CSV.
    """
    if config.recipe == "auto":
        data = make_data(config, make_encoder(config)[0]) if data is None else data
        config = resolve(config, data)
    chosen = train_network if config.recipe == "network" else train_hybrid
    return chosen(config, values, folder, data, loggers)


def resolve(config: Config, data: CrystalDataModule) -> Config:
    """Replace ``recipe=auto``: frozen for few crystals, else a network."""
    if config.recipe != "auto":
        return config
    data.setup()
    count = len(data.rows["train"]) + len(data.rows["val"])
    assert data.target_values is not None
    known = ~np.isnan(data.target_values[np.concatenate([data.rows["train"], data.rows["val"]])])
    reason = f"{count:,} crystals to learn from are over {FEW:,}" if count > FEW else ""
    if known.sum(axis=0).min() < FEWEST:
        reason = f"a target has fewer than {FEWEST} values"
    try:
        replace(config, recipe="frozen").check_recipe()
    except ConfigError as error:
        reason = str(error)
    if reason:
        note(f"recipe=auto finetunes a network: {reason}")
        return replace(config, recipe="network")
    note(
        f"recipe=auto: for {count:,} crystals, trees and kernel ridge on an encoder's features and descriptors "
        "(recipe=frozen); recipe=network finetunes the encoder, recipe=hybrid does both and takes longest"
    )
    return replace(config, recipe="frozen")


def member_rows(data: CrystalDataModule, config: EnsembleConfig) -> list[Rows]:
    """Return the rows of each member; the test rows are the same for all.

    With ``folds``, training and validation crystals are divided by reduced formula into as many parts as members; each
    member validates on one part and trains on the others.

    Raises:
        ConfigError: there are fewer formulas than folds.
    """
    if config.ensemble_by == "seeds":
        return [data.rows] * config.ensemble
    pool = np.sort(np.concatenate([data.rows["train"], data.rows["val"]]))
    parts = formula_parts(data, pool, config.ensemble, [config.seed, 3], "ensemble")
    return [
        {"train": pool[parts != i], "val": pool[parts == i], "test": data.rows["test"]} for i in range(config.ensemble)
    ]


def formula_parts(
    data: CrystalDataModule, rows: NDArray[np.int64], count: int, seed: Sequence[int], key: str
) -> NDArray[np.int64]:
    """Assign each row to one of ``count`` parts, [n]; all crystals of a reduced formula are in one part.

    Args:
        data: the crystals.
        rows: [n] rows of the store.
        count: number of parts.
        seed: seed of the assignment.
        key: the setting that requires it, for messages.

    Raises:
        ConfigError: there are fewer formulas than parts.
    """
    which = formula_groups(data.store.crystals, rows)
    formulas = int(which.max(initial=-1)) + 1
    if formulas < count:
        raise ConfigError(f"{key}: {len(rows)} crystals of {formulas} formulas can't make {count} parts", key)
    return (np.random.default_rng(seed).permutation(formulas) % count)[which]


def train_ensemble(
    config: EnsembleConfig, values: dict[str, Any], folder: Path, name: str, data: CrystalDataModule
) -> Finetuned:
    """Train the missing members in sequence and evaluate the ensemble.

    Args:
        config: the settings.
        values: the same as plain values.
        folder: member i is saved in ``member_i``.
        name: run name for loggers.
        data: the crystals.
    """
    results, parts = [], member_rows(data, config)
    for i, rows in enumerate(parts):
        path = folder / f"member_{i}"
        own = replace(config, seed=member_seed(config.seed, i))
        info = train_member(own, {**values, "seed": own.seed}, path, data, rows, f"{name}-member_{i}")
        describe(f"member {i + 1} of {config.ensemble}", info["metrics"])
        results.append(info)
    settings: TrainerSettings = build(config.trainer, "trainer")
    result = _together(folder, results, data, settings.device)
    apart = config.ensemble_by == "folds" and not data.calibration_fraction
    _calibrate(folder, result, [rows["val"] for rows in parts] if apart else None, settings.device)
    return result


def fit_models(
    config: EnsembleConfig, values: dict[str, Any], path: Path, data: CrystalDataModule, rows: Rows, name: str
) -> list[Path]:
    """Train a missing model or ensemble on some rows; return the folder of each model.

    Arguments as in :func:`train_member`.
    """
    if config.ensemble == 1:
        train_member(config, values, path, data, rows, name)
        return [path]
    own = make_data(config, make_encoder(config)[0], store=data.store, rows=rows)
    train_ensemble(config, values, path, name, own)
    return [path / f"member_{i}" for i in range(config.ensemble)]


@rank_zero_only
def _calibrate(folder: Path, result: Finetuned, held_out: list[NDArray[np.int64]] | None, device: str) -> None:
    members = range(len(list(folder.glob("member_*/model.safetensors"))))
    files = [folder / f"member_{i}" / "model.safetensors" for i in members]
    out, drawn = folder / "calibration.safetensors", folder / "plots"
    result.info["calibration"] = calibrate(files, out, result.data, held_out=held_out, drawn=drawn, device=device)


def train_member(
    config: EnsembleConfig, values: dict[str, Any], path: Path, data: CrystalDataModule, rows: Rows, name: str
) -> dict[str, Any]:
    """Train a model on some rows in a folder unless it exists; return the metadata of its file.

    Raises:
        ConfigError: the existing model was trained on other crystals or from another file.
    """
    split = path / "split.json"
    if split.exists():
        before = json.loads(split.read_text())
        if any(before[name] != data.store.ids_at(own) for name, own in rows.items()):
            raise ConfigError(f"{path}: started with another split of the crystals; start another run", "resume")
    if not (path / "model.safetensors").exists():
        train_part(train, config, values, path, data, rows, name)
    info = load_property_model(path)[1]
    start = hashes_of(pretrained=config.pretrained).get("pretrained")
    if info.get("pretrained_sha256", start) != start:
        raise ConfigError(
            f"{path}: this model started from a file of sha256 {info['pretrained_sha256']}, and that of "
            f"pretrained={config.pretrained} is {start} now; restore that file, or start another run",
            "pretrained",
        )
    return info


@rank_zero_only
def describe(title: str, metrics: Mapping[str, float]) -> None:
    """Print the metrics of a member or fold in one line."""
    shown = ", ".join(
        f"{name} {value:.4g}" for name, value in metrics.items() if name.count("/") == 1 and "train" not in name
    )
    note(f"{title}: {shown}")


def _together(folder: Path, infos: list[dict[str, Any]], data: CrystalDataModule, device: str) -> Finetuned:
    """Evaluate the mean prediction on the test split; the members' validation metrics are averaged."""
    loaded = [load_property_model(folder / f"member_{i}")[0].to(device) for i in range(len(infos))]
    model = loaded[0]
    scores = TargetMetrics(model.targets, model.types, sync_on_compute=False)
    predictions = evaluate(loaded, data, data.rows["test"], [scores])
    metrics = {
        f"{'test_members' if name.startswith('test/') else name.split('/')[0]}/{name.split('/', 1)[1]}": float(
            np.mean([info["metrics"][name] for info in infos])
        )
        for name in infos[0]["metrics"]
        if "/" in name
    }
    if predictions:
        metrics |= reported(scores, "test")
    return Finetuned(model.cpu(), infos[0], metrics, data, predictions)
