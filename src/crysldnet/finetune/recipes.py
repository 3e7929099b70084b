"""Train a property model with the configured recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from lightning.pytorch.loggers import Logger

from crysldnet.console import note
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.errors import ConfigError
from crysldnet.finetune.hybrid import FEWEST, check_recipe, train_hybrid
from crysldnet.finetune.settings import TrainingConfig, make_data, make_encoder
from crysldnet.finetune.training import Finetuned, train_network

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
        check_recipe(replace(config, recipe="frozen"))
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
