"""Train several models as one: with other seeds, or each with another part of the training crystals for validation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from rich.console import Console

from crysldnet.build import build
from crysldnet.data.batch import make_batch
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.fingerprint import formulas_of
from crysldnet.data.sampler import BatchSampler
from crysldnet.data.split import Rows
from crysldnet.errors import ConfigError
from crysldnet.finetune.settings import FinetuneConfig, make_data, make_encoder
from crysldnet.finetune.training import Finetuned, Predictions, rows_of, train
from crysldnet.models.ensemble import combine
from crysldnet.training.atomic import write_atomically
from crysldnet.training.calibrate import calibrate
from crysldnet.training.checkpoint import load_property_model
from crysldnet.training.loggers import describe_data
from crysldnet.training.metrics import TargetMetrics
from crysldnet.training.pretraining_set import encoder_file
from crysldnet.training.trainer import TrainerSettings
from crysldnet.training.wandb_run import publish


def member_rows(data: CrystalDataModule, config: FinetuneConfig) -> list[Rows]:
    """Return the rows of each member; the test rows are the same for all.

    By folds, training and validation crystals are divided anew into as many parts as there are members, all crystals
    of a reduced formula into the same one; each member validates on one and trains on the others.

    Raises:
        ConfigError: there are fewer formulas than folds.
    """
    if config.ensemble_by == "seeds":
        return [data.rows] * config.ensemble
    pool = np.sort(np.concatenate([data.rows["train"], data.rows["val"]]))
    formulas, which = np.unique(formulas_of(data.store.crystals.take(pool)), return_inverse=True)
    if len(formulas) < config.ensemble:
        raise ConfigError(
            f"ensemble={config.ensemble}: there are {len(formulas)} formulas, fewer than folds", "ensemble"
        )
    fold = np.random.default_rng([config.seed, 3]).permutation(len(formulas)) % config.ensemble
    parts: NDArray[np.int64] = fold[which]
    return [
        {"train": pool[parts != i], "val": pool[parts == i], "test": data.rows["test"]} for i in range(config.ensemble)
    ]


def member_seed(seed: int, member: int) -> int:
    """Return the seed of a member; ensembles of neighbouring seeds have no member in common."""
    return int(np.random.SeedSequence([seed, member]).generate_state(1)[0]) if member else seed


def train_ensemble(
    config: FinetuneConfig, values: dict[str, Any], folder: Path, name: str, data: CrystalDataModule
) -> Finetuned:
    """Train the members that aren't there yet, one after another, and evaluate them together.

    Args:
        config: the settings.
        values: the same as plain values.
        folder: member i is kept in its ``member_i``.
        name: of the run, for loggers.
        data: the crystals.
    """
    results, parts = [], member_rows(data, config)
    for i, rows in enumerate(parts):
        path = folder / f"member_{i}"
        own = replace(config, seed=member_seed(config.seed, i))
        if not (path / "model.safetensors").exists():
            _train_member(own, {**values, "seed": own.seed}, path, data, rows, f"{name}-member_{i}")
        info = load_property_model(path)[1]
        _tell(i, config.ensemble, info["metrics"])
        results.append(info)
    settings: TrainerSettings = build(config.trainer, "trainer")
    device = "cuda" if settings.resolve_accelerator() == "gpu" else "cpu"
    together = _together(folder, results, data, device)
    apart = config.ensemble_by == "folds" and not data.calibration_fraction
    _calibrate(folder, together, [rows["val"] for rows in parts] if apart else None, device)
    return together


@rank_zero_only
def _calibrate(folder: Path, result: Finetuned, held_out: list[NDArray[np.int64]] | None, device: str) -> None:
    members = range(len(list(folder.glob("member_*/model.safetensors"))))
    files = [folder / f"member_{i}" / "model.safetensors" for i in members]
    out, drawn = folder / "calibration.safetensors", folder / "plots"
    result.info["calibration"] = calibrate(files, out, result.data, held_out=held_out, drawn=drawn, device=device)


def _train_member(
    config: FinetuneConfig, values: dict[str, Any], path: Path, data: CrystalDataModule, rows: Rows, name: str
) -> None:
    encoder, _, _ = make_encoder(config)
    own = make_data(config, encoder, store=data.store, rows=rows)
    path.mkdir(parents=True, exist_ok=True)
    rank_zero_only(write_atomically)(path / "split.json", own.split_text())
    loggers = build(config.logger, "logger", folder=path, name=name, config=values | describe_data(own))
    train(config, values, path, data=own, loggers=loggers)
    publish(loggers, path, encoder_file(config.pretrained))


@rank_zero_only
def _tell(member: int, count: int, metrics: dict[str, float]) -> None:
    shown = ", ".join(
        f"{name} {value:.4g}" for name, value in metrics.items() if name.count("/") == 1 and "train" not in name
    )
    Console(stderr=True).print(f"member {member + 1} of {count}: {shown}", highlight=False, soft_wrap=True)


def _together(folder: Path, infos: list[dict[str, Any]], data: CrystalDataModule, device: str) -> Finetuned:
    """Evaluate the mean prediction on the test split; on validation the members' own figures are averaged."""
    loaded = [load_property_model(folder / f"member_{i}")[0].to(device) for i in range(len(infos))]
    model = loaded[0]
    scores = TargetMetrics(model.targets, model.types, sync_on_compute=False).to(device)
    predictions: Predictions = {}
    assert data.target_values is not None
    for rows in _batches(data, data.rows["test"]):
        batch = make_batch(data.store.crystals.take(rows), model.encoder.graph).to(device)
        with torch.inference_mode():
            combined = combine([member.predict(batch) for member in loaded], model.types)
        true = torch.from_numpy(data.target_values[rows]).float().to(device)
        scores.update(combined, true, torch.zeros_like(true), model.std)
        predictions |= rows_of(rows, combined)
    metrics = {
        f"{'test_members' if name.startswith('test/') else name.split('/')[0]}/{name.split('/', 1)[1]}": float(
            np.mean([info["metrics"][name] for info in infos])
        )
        for name in infos[0]["metrics"]
        if "/" in name
    }
    if predictions:
        values = {k: v for k, v in scores.compute().items() if k != "nll" and not k.startswith("normalised")}
        metrics |= {f"test/{name}": float(value) for name, value in values.items()}
    return Finetuned(model.cpu(), infos[0], metrics, data, dict(sorted(predictions.items())))


def _batches(data: CrystalDataModule, rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    if len(rows):
        sizes = data.store.crystals.sizes[rows]
        budget = data.share_of_a_step(1).for_any(sizes)
        yield from (chosen for chosen, *_ in BatchSampler(rows, sizes, None, budget, shuffle=False))
