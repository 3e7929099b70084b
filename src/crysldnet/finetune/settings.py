"""The settings of finetuning, and what is made from them before training: encoder, data, kinds of targets."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np

from crysldnet.build import TARGET, build
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.encoders.protocol import Encoder
from crysldnet.errors import CheckpointError, ConfigError, DataError
from crysldnet.models.target import Classes, Loss, Named, TargetType, make_number
from crysldnet.training import checkpoint
from crysldnet.training.pretraining_set import encoder_file


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a property model is trained: the keys that all commands which do so share.

    Those with a value here are newer than some runs that may still be resumed.
    """

    pretrained: str | None
    mode: Literal["full", "frozen", "gradual"] = "full"
    seed: int
    name: str | None
    runs: str
    resume: Literal["last"] | None
    target_types: dict[str, Named] = field(default_factory=dict)
    element_references: list[str] = field(default_factory=list)
    epochs: int
    min_steps: int = 0
    patience: int | None = None
    loss: Loss
    layer_decay: float = 1.0
    gradient_clip: float | None
    data: dict[str, Any]
    encoder: dict[str, Any]
    head: dict[str, Any]
    optimizer: dict[str, Any]
    trainer: dict[str, Any]
    strategy: dict[str, Any]
    logger: dict[str, Any]

    def __post_init__(self) -> None:
        if self.seed < 0 or self.epochs < 1:
            raise ValueError(f"seed must be 0 or more and epochs at least 1, not {self.seed} and {self.epochs}")
        if self.min_steps < 0 or (self.patience is not None and self.patience < 1):
            raise ValueError(
                f"min_steps={self.min_steps} must be 0 or more, patience={self.patience} 1 or more or null"
            )
        for name, named in self.target_types.items():
            if named != "classes":
                try:
                    make_number(named, None)
                except ValueError as error:
                    raise ValueError(f"target_types.{name}: {error}") from None
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be over 0 and at most 1, not {self.layer_decay}")
        if self.mode != "full" and self.pretrained in (None, "none"):
            raise ValueError(f"mode={self.mode} needs a pretrained encoder; give pretrained=FILE, or mode=full")
        apart = self.mode != "full" or self.layer_decay != 1
        if apart and str(self.strategy.get(TARGET)).rpartition(".")[2] not in ("single", "ddp"):
            raise ValueError("sharding joins layers; set mode=full and layer_decay=1, or choose strategy=ddp")
        if self.mode == "frozen" and self.layer_decay != 1:
            raise ValueError(
                "layer_decay slows the encoder's layers, and mode=frozen trains none; leave one of them out"
            )

    def passes(self, steps_per_epoch: int) -> int:
        """Return how often an epoch goes through the training crystals, so that a run has ``min_steps`` steps."""
        return max(1, -(-self.min_steps // (self.epochs * max(steps_per_epoch, 1))))


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Every key of ``conf/finetune.yaml``."""

    ensemble: int = 1
    ensemble_by: Literal["seeds", "folds"] = "seeds"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ensemble < 1:
            raise ValueError(f"ensemble must be 1 or more, not {self.ensemble}")


def make_encoder(config: TrainingConfig) -> tuple[Encoder, dict[str, Any], dict[str, Any]]:
    """Return the encoder, its plain configuration and the provenance of its weights."""
    path = encoder_file(config.pretrained)
    if path is None:
        return build(config.encoder, "encoder"), config.encoder, {}
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file; make one with crysldnet pretrain, or start from scratch with pretrained=none"
        )
    encoder, info = checkpoint.load_encoder(path)
    provenance = info["provenance"]
    if "targets" in info:  # a finetuned model
        learned = {key: info.get(key) for key in ("targets", "train_crystals", "data_sha256", "code_version")}
        provenance = {**provenance, "labels": [*provenance.get("labels", []), learned]}
    return encoder, info["encoder"], provenance


def make_data(config: TrainingConfig, encoder: Encoder, **parts: Any) -> CrystalDataModule:
    """Return the crystals, opened and split.

    Args:
        config: the settings.
        encoder: it says which graph it needs.
        parts: a store and rows in place of the path's.
    """
    data: CrystalDataModule = build(
        config.data, "data", graph=encoder.graph, seed=config.seed, target_types=config.target_types, **parts
    )
    if not data.targets:
        raise ConfigError("data.targets: name the columns to predict, as data.targets=[formation_energy_per_atom]")
    data.setup()
    return data


def make_types(config: TrainingConfig, data: CrystalDataModule) -> list[TargetType]:
    """Return what kind of target each column is, having checked every value that is used.

    Raises:
        ConfigError: a setting names a target that isn't predicted.
        DataError: a value can't be, or the training split has one class alone.
    """
    for key in ("target_types", "element_references"):
        for name in getattr(config, key):
            if name not in data.targets:
                close = get_close_matches(name, data.targets, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"they are: {', '.join(data.targets)}"
                raise ConfigError(f"{key}: {name!r} is not among data.targets; {hint}", key)
    assert data.target_values is not None
    types: list[TargetType] = []
    rows = np.concatenate(list(data.rows.values()))
    for place, (name, labels) in enumerate(zip(data.targets, data.labels, strict=True)):
        spread = config.loss if config.loss in ("laplace", "gaussian") else None
        named = config.target_types.get(name, "number")
        kind: TargetType
        kind = make_number(named, spread) if labels is None else Classes(tuple(labels))
        known = rows[~np.isnan(data.target_values[rows, place])]
        bad, wanted = kind.wrong(data.target_values[known, place])
        if bad.any():
            first = known[bad.argmax()]
            raise DataError(
                f"{data.store.name}: {name!r} is treated as {named!r}, so it must be {wanted}, but "
                f"{data.store.ids_at(np.array([first]))[0]} (row {first}) has {data.target_values[first, place]:g} "
                f"({bad.sum()} such rows); leave them out, or choose another kind with target_types"
            )
        trained = data.train_targets()[:, place]
        if np.isnan(trained).all():
            raise DataError(
                f"{data.store.name}: no training crystal has a value of {name!r}; leave it out of data.targets, or "
                "split otherwise"
            )
        if isinstance(kind, Classes) and len(np.unique(trained[~np.isnan(trained)])) == 1:
            only = kind.labels[int(trained[~np.isnan(trained)][0])]
            raise DataError(f"{data.store.name}: every training crystal has {name}={only}; there is nothing to learn")
        types.append(kind)
    return types
