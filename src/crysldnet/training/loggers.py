"""Where metrics go besides the run folder's CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger

from crysldnet.build import Part
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.errors import ConfigError
from crysldnet.training.run_folder import code_version
from crysldnet.training.wandb_run import WandbRun


def describe_data(data: CrystalDataModule) -> dict[str, Any]:
    """Return what a logger keeps of the data: its hash, and the units of its targets."""
    return {"data_sha256": data.store.hash, "target_units": dict(zip(data.targets, data.units, strict=True))}


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
    notes: str | None = None,
    mode: Literal["online", "offline", "disabled"] | None = None,
) -> list[Logger]:
    """Log to Weights & Biases too.

    Args:
        folder, name: of the run.
        config: of the run, with whatever else is to be kept beside it; ``target_units`` are the units of the errors.
        project, entity, group, tags, notes: as in W&B.
        mode: ``offline`` needs no account and no network (``wandb sync`` later); by default WANDB_MODE decides.

    Raises:
        ConfigError: wandb isn't installed.
    """
    try:
        import wandb as library
    except ImportError:
        raise ConfigError("logger=wandb needs the wandb package: pip install 'crysldnet[wandb]'", "logger") from None
    logger = WandbRun(
        target_units=config.get("target_units", {}),
        name=name,
        save_dir=folder,
        project=project,
        entity=entity,
        group=group,
        tags=tags,
        notes=notes,
        mode=mode,
        settings=library.Settings(console="off"),
    )
    logger.log_hyperparams({**config, "code_version": code_version()})
    return [logger]
