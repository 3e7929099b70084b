"""Where metrics go besides the run folder's CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, WandbLogger

from crysldnet.build import Part
from crysldnet.errors import ConfigError


def csv(*, folder: Part[Path], name: Part[str], config: Part[dict[str, Any]]) -> list[Logger]:
    """Log to the run folder's ``metrics.csv`` alone, which every run writes."""
    del folder, name, config
    return []


def wandb(
    *,
    folder: Part[Path],
    name: Part[str],
    config: Part[dict[str, Any]],
    project: str = "crysldnet",
    entity: str | None = None,
    group: str | None = None,
    tags: list[str] | None = None,
    mode: Literal["online", "offline", "disabled"] | None = None,
) -> list[Logger]:
    """Log to Weights & Biases too.

    Args:
        folder, name, config: of the run.
        project, entity, group, tags: as in W&B.
        mode: ``offline`` needs no account and no network (``wandb sync`` later); by default WANDB_MODE decides.

    Raises:
        ConfigError: wandb isn't installed.
    """
    try:
        import wandb as library
    except ImportError:
        raise ConfigError("logger=wandb needs the wandb package: pip install 'crysldnet[wandb]'", "logger") from None
    settings = library.Settings(console="off")
    logger = WandbLogger(
        name=name, save_dir=folder, project=project, entity=entity, group=group, tags=tags, mode=mode, settings=settings
    )
    logger.log_hyperparams(config)
    return [logger]
