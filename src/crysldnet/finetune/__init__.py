"""Train a property model on labeled crystals, from a pretrained encoder or from scratch.

Selects the best epoch on the validation split and evaluates the test split once at the end. Writes model.safetensors
for ``crysldnet predict`` and predictions_test.csv with the ids. With ensemble=N it trains an ensemble of N models.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch.loggers import Logger

from crysldnet import CommandModule
from crysldnet.artifacts.provenance import encoder_file
from crysldnet.build import build
from crysldnet.data.split import Rows
from crysldnet.finetune.baselines import flat_metrics
from crysldnet.finetune.cross_validation import cross_validate, divide
from crysldnet.finetune.ensemble import member_rows, resolve, train, train_ensemble
from crysldnet.finetune.results import baselines_of, finish
from crysldnet.finetune.settings import (
    FinetuneConfig,
    TrainingConfig,
    make_data,
    make_encoder,
    make_types,
    note_other_units,
)
from crysldnet.finetune.training import Finetuned, make_model
from crysldnet.training.inputs import inputs_of
from crysldnet.training.loggers import describe_data
from crysldnet.training.run_folder import RunFolder
from crysldnet.training.trainer import checked_settings
from crysldnet.training.wandb_run import publish

__all__ = ["FinetuneConfig", "Finetuned", "TrainingConfig", "make_encoder", "run", "train"]

sys.modules[__name__].__class__ = CommandModule


def run(config: FinetuneConfig, values: dict[str, Any], choices: Mapping[str, Any] | None = None) -> int:
    """Finetune; return the exit status.

    Args:
        config: the settings.
        values: the same as plain values, saved with the run's output.
        choices: configuration files by group.
    """
    settings = checked_settings(config.trainer, config.strategy)
    config.check_recipe()
    encoder, encoder_config, provenance = make_encoder(config)  # errors stop here, before a folder is created
    data = make_data(config, encoder)
    config = resolve(config, data)
    folds: list[Rows] = []
    if config.folds:
        folds, rows = divide(data, config)
        data = make_data(config, encoder, store=data.store, rows=rows)
    note_other_units(provenance, data)
    make_model(config, encoder, data, make_types(config, data))
    if config.ensemble > 1:
        member_rows(data, config)
    data.steps_per_epoch(settings.world_size, settings.accumulate_grad_batches)
    folder = RunFolder(config.runs, "finetune", config.name, resume=config.resume is not None)
    values = {**values, "encoder": encoder_config}
    folder.save_split(data.split_text())
    folder.save_inputs(inputs_of(data, pretrained=config.pretrained), config.plugins)
    folder.save_config(values, choices)

    def make_loggers() -> list[Logger]:
        about = values | describe_data(data)
        return build(config.logger, "logger", folder=folder.path, name=folder.name, config=about)

    tested = None
    if folds:
        tested = cross_validate(config, values, folder.path, folder.name, data, folds, settings.device)
    if config.ensemble > 1:
        result = train_ensemble(config, values, folder.path, folder.name, data)
        loggers, logged = make_loggers(), result.metrics
    else:
        loggers, logged = make_loggers(), {}
        result = train(config, values, folder.path, data=data if folds else None, loggers=loggers)
    if tested is not None:
        logged = {**logged, **tested.metrics}
        metrics = {**result.metrics, **tested.metrics}
        result = replace(result, metrics=metrics, predictions=tested.predictions)
    baselines = tested.compared if tested is not None else baselines_of(result, config)
    for logger in loggers:
        logger.log_metrics({**logged, **flat_metrics(baselines, result.data.targets)}, 0)
    finish(folder, result, config, baselines, tested)
    publish(loggers, folder.path, encoder_file(config.pretrained))
    return 0
