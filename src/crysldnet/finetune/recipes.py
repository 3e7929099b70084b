"""Train a property model by the recipe that is configured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from crysldnet.console import note
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.errors import ConfigError
from crysldnet.finetune.hybrid import check_recipe, train_hybrid
from crysldnet.finetune.settings import TrainingConfig, make_data, make_encoder
from crysldnet.finetune.training import Finetuned, train_network
from crysldnet.tabular.stack import LARGEST_KERNEL


def train(
    config: TrainingConfig,
    values: dict[str, Any],
    folder: Path,
    data: CrystalDataModule | None = None,
    loggers: list[Logger] | None = None,
) -> Finetuned:
    """Train a property model; write ``model.safetensors`` into the folder.

    Args:
        config: the settings.
        values: the same as plain values.
        folder: of the run.
        data: the crystals, by default those of the configuration.
        loggers: besides the CSV.
    """
    if config.recipe == "auto":
        data = make_data(config, make_encoder(config)[0]) if data is None else data
        config = _without_tables_where_they_cannot_help(config, data)
    chosen = train_network if config.recipe == "network" else train_hybrid
    return chosen(config, values, folder, data, loggers)


def _without_tables_where_they_cannot_help(config: TrainingConfig, data: CrystalDataModule) -> TrainingConfig:
    data.setup()
    count = len(data.rows["train"]) + len(data.rows["val"])
    reason = f"there are over {LARGEST_KERNEL:,} crystals" if count > LARGEST_KERNEL else ""
    try:
        check_recipe(replace(config, recipe="hybrid"))
    except ConfigError as error:
        reason = str(error)
    if not reason:
        return config
    note(f"recipe=auto trains a network alone: {reason}")
    return replace(config, recipe="network")
