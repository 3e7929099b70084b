"""Train a property model on labelled crystals, from a pretrained encoder or from scratch.

Chooses the best epoch on the validation split and reads the test split once, at the end. Writes model.safetensors for
``crysldnet predict`` and predictions_test.csv with the ids. With ensemble=N it trains N models that predict together.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import Logger

from crysldnet.build import build
from crysldnet.finetune.ensemble import member_rows, train_ensemble
from crysldnet.finetune.results import finish
from crysldnet.finetune.settings import FinetuneConfig, TrainingConfig, make_data, make_encoder, make_types
from crysldnet.finetune.training import Finetuned, make_model, train
from crysldnet.training.loggers import describe_data
from crysldnet.training.pretraining_set import encoder_file
from crysldnet.training.run_folder import RunFolder
from crysldnet.training.trainer import TrainerSettings
from crysldnet.training.wandb_run import publish

__all__ = ["FinetuneConfig", "Finetuned", "TrainingConfig", "make_encoder", "run", "train"]


def run(config: FinetuneConfig, values: dict[str, Any]) -> int:
    """Finetune; return the exit status.

    Args:
        config: the settings.
        values: the same as plain values, to be saved with everything that the run writes.
    """
    settings: TrainerSettings = build(config.trainer, "trainer")
    settings.check(build(config.strategy, "strategy"))
    encoder, encoder_config, _ = make_encoder(config)  # what is wrong stops here, before a folder is made
    data = make_data(config, encoder)
    make_model(config, encoder, data, make_types(config, data))
    if config.ensemble > 1:
        member_rows(data, config)
    data.steps_per_epoch(settings.world_size, settings.accumulate)
    folder = RunFolder(config.runs, "finetune", config.name, resume=config.resume is not None)
    values = {**values, "encoder": encoder_config}
    folder.save_config(values)
    folder.save_split(data.split_text())

    def make_loggers() -> list[Logger]:
        about = values | describe_data(data)
        return build(config.logger, "logger", folder=folder.path, name=folder.name, config=about)

    if config.ensemble > 1:
        result = train_ensemble(config, values, folder.path, folder.name, data)
        loggers = make_loggers()
        for logger in loggers:
            logger.log_metrics(result.metrics, 0)
    else:
        loggers = make_loggers()
        result = train(config, values, folder.path, loggers=loggers)
    finish(folder, result, config)
    publish(loggers, folder.path, encoder_file(config.pretrained))
    return 0
