"""Settings of finetuning, and the objects built from them before training: encoder, data, target types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crysldnet.artifacts import model_file
from crysldnet.artifacts.provenance import encoder_file
from crysldnet.build import build
from crysldnet.console import did_you_mean, listed, note
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.split import Rows
from crysldnet.data.units import same_unit
from crysldnet.encoders.protocol import Encoder
from crysldnet.errors import ConfigError, DataError
from crysldnet.models.descriptors import Descriptors
from crysldnet.models.per import Per, bulk_of, no_area
from crysldnet.models.targets import Classes, Loss, Named, Number, TargetType, make_type, reads_classes
from crysldnet.training.run_folder import RunConfig
from crysldnet.training.strategies import SHARDED, name_of
from crysldnet.training.trainer import TrainerSettings

SMALLEST_SPREAD = 1e-30
"""Minimum standard deviation of training values; squares of smaller numbers underflow in single precision."""
LEAST_RELATIVE_SPREAD = 1e-6
"""Minimum standard deviation relative to the largest value; single precision has seven digits."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RunConfig):
    """Settings for training a property model, shared by all commands that do so.

    Fields with a default are newer than some runs that can still be resumed.
    """

    recipe: Literal["network", "frozen", "hybrid", "auto"] = "network"
    networks: int = 5
    pretrained: str | None
    mode: Literal["full", "frozen", "gradual_unfreezing"] = "full"
    target_types: dict[str, Named] = field(default_factory=dict)
    target_per: dict[str, Per] = field(default_factory=dict)
    atomic_references: list[str] = field(default_factory=list)
    epochs: int
    min_steps: int = 0
    patience: int | None = None
    loss: Loss
    layer_decay: float = 1.0
    gradient_clip_val: float | None
    head: dict[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {self.epochs}")
        if self.networks < 2:
            raise ValueError(f"networks must be 2 or more, not {self.networks}")
        if self.min_steps < 0 or (self.patience is not None and self.patience < 1):
            raise ValueError(
                f"min_steps={self.min_steps} must be 0 or more, patience={self.patience} 1 or more or null"
            )
        for name, named in self.target_types.items():
            try:
                make_type(named, None, [] if reads_classes(named) else None)
            except ValueError as error:
                raise ValueError(f"target_types.{name}: {error}") from None
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be over 0 and at most 1, not {self.layer_decay}")
        if self.mode != "full" and self.pretrained in (None, "none"):
            raise ValueError(f"mode={self.mode} needs a pretrained encoder; give pretrained=FILE, or mode=full")
        apart = self.mode != "full" or self.layer_decay != 1
        if apart and name_of(build(self.strategy, "strategy")) in SHARDED:
            raise ValueError("sharding joins layers; set mode=full and layer_decay=1, or choose strategy=ddp")
        if self.mode == "frozen" and self.layer_decay != 1:
            raise ValueError(
                "layer_decay slows the encoder's layers, and mode=frozen trains none; leave one of them out"
            )

    def check_recipe(self) -> None:
        """Reject settings that tabular models don't support.

        Raises:
            ConfigError: several processes, or a head that sums over atoms.
        """
        if self.recipe in ("network", "auto"):
            return
        settings: TrainerSettings = build(self.trainer, "trainer")
        if settings.world_size > 1:
            raise ConfigError(f"recipe={self.recipe} works in one process; set trainer.devices=1", "trainer.devices")
        if self.head.get("readout") == "sum":
            raise ConfigError(
                f"recipe={self.recipe} predicts properties that don't grow with the cell; choose another head than "
                "sum, or recipe=network",
                "head",
            )

    def check_targets(self, targets: Sequence[str], what: str) -> None:
        """Reject settings of something other than the targets, which are ``what``.

        Raises:
            ConfigError: a setting names a target that isn't predicted.
        """
        for key in ("target_types", "target_per", "atomic_references"):
            for name in getattr(self, key):
                if name not in targets:
                    hint = did_you_mean(name, targets, f"they are: {listed(targets)}")
                    raise ConfigError(f"{key}: {name!r} is not {what}; {hint}", key)

    def passes(self, steps_per_epoch: int) -> int:
        """Return how often an epoch repeats the training crystals so that a run has ``min_steps`` steps."""
        return max(1, -(-self.min_steps // (self.epochs * max(steps_per_epoch, 1))))


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig(TrainingConfig):
    """Settings for training one model or an ensemble."""

    ensemble: int = 1
    ensemble_by: Literal["seeds", "folds"] = "seeds"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ensemble < 1:
            raise ValueError(f"ensemble must be 1 or more, not {self.ensemble}")

    def fitted_rows(self, rows: Rows) -> NDArray[np.int64]:
        """Return the rows to which weights are fitted; ensembles by folds include the validation rows."""
        shared = self.recipe != "network" or (self.ensemble > 1 and self.ensemble_by == "folds")
        return np.concatenate([rows["train"], rows["val"]]) if shared else rows["train"]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(EnsembleConfig):
    """Every key of ``conf/finetune.yaml``."""

    folds: int = 0
    baselines: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds < 0 or self.folds == 1:
            raise ValueError(f"folds must be 2 or more, or 0 for no cross-validation, not {self.folds}")


def member_seed(seed: int, member: int) -> int:
    """Return the seed of a member; ensembles with adjacent seeds share no member."""
    return int(np.random.SeedSequence([seed, member]).generate_state(1)[0]) if member else seed


def make_encoder(config: TrainingConfig) -> tuple[Encoder, dict[str, Any], dict[str, Any]]:
    """Return the encoder, its plain configuration and the provenance of its weights."""
    path = encoder_file(config.pretrained)
    if path is None:
        return build(config.encoder, "encoder"), config.encoder, {}
    encoder, info = model_file.load_encoder(path)
    provenance = info["provenance"]
    if "targets" in info:  # a finetuned model
        learned = {key: info.get(key) for key in ("targets", "units", "train_crystals", "data_sha256", "code_version")}
        provenance = {**provenance, "labels": [*provenance.get("labels", []), learned]}
    return encoder, info["encoder"], provenance


def note_other_units(provenance: Mapping[str, Any], data: CrystalDataModule) -> None:
    """Print a note if a target has a different unit than in earlier training of the weights."""
    for learned in provenance.get("labels", []):
        before = dict(zip(learned["targets"], learned.get("units") or [], strict=False))
        for name, unit in zip(data.targets, data.units, strict=True):
            if name in before and not same_unit(before[name] or None, unit or None):
                said = f"in {unit}" if unit else "without a unit"
                note(f"{name} was learned in {before[name] or 'no unit'} before, and stands here {said}")


def make_data(config: TrainingConfig, encoder: Encoder, **parts: Any) -> CrystalDataModule:
    """Return the crystals, opened and split.

    Args:
        config: the settings.
        encoder: defines the graph.
        parts: store and rows to use in place of ``data.path``.
    """
    types = {name: Classes.name if reads_classes(named) else named for name, named in config.target_types.items()}
    data: CrystalDataModule = build(
        config.data, "data", graph=encoder.graph, seed=config.seed, target_types=types, **parts
    )
    if not data.targets:
        raise ConfigError("data.targets: name the columns to predict, as data.targets=[formation_energy_per_atom]")
    data.setup()
    return data


def make_descriptors(data: CrystalDataModule) -> Descriptors | None:
    """Return the descriptors that a model reads, fitted to the training crystals; None without descriptors.

    Raises:
        DataError: a descriptor is constant in the training crystals.
    """
    if data.descriptor_values is None:
        return None
    descriptors = Descriptors(data.descriptors, data.descriptor_units)
    descriptors.fit(data.descriptor_values[data.rows["train"]])
    return descriptors


def make_types(config: TrainingConfig, data: CrystalDataModule) -> list[TargetType]:
    """Return the type of each target after checking all used values.

    Raises:
        ConfigError: a setting names a target that isn't predicted.
        DataError: a value is invalid for its type, or the training split has a single class.
    """
    config.check_targets(data.targets, "among data.targets")
    assert data.target_values is not None
    types: list[TargetType] = []
    rows = np.concatenate(list(data.rows.values()))
    for place, (name, labels) in enumerate(zip(data.targets, data.labels, strict=True)):
        spread = config.loss if config.loss in ("laplace", "gaussian") else None
        named = config.target_types.get(name, Number.name)
        kind = make_type(named, spread, labels)
        known = rows[~np.isnan(data.target_values[rows, place])]
        bad, wanted = kind.wrong(data.target_values[known, place])
        if bad.any():
            first = known[bad.argmax()]
            raise DataError(
                f"{data.store.name}: {name!r} is treated as {named!r}, so it must be {wanted}, but "
                f"{data.store.ids_at(np.array([first]))[0]} (row {first}) has {data.target_values[first, place]:g} "
                f"({bad.sum()} such rows); leave them out, or choose another kind with target_types"
            )
        _refuse_nothing_to_learn(data, place, kind)
        if config.target_per.get(name) == "area" and len(bulk := known[bulk_of(data.store.crystals.take(known))]):
            first_id = data.store.ids_at(bulk[:1])[0]
            raise DataError(f"{data.store.name}: {no_area(first_id)}; {len(bulk)} crystals have none: leave them out")
        types.append(kind)
    return types


def class_entropies(types: Sequence[TargetType], data: CrystalDataModule) -> list[float]:
    """Return the [T] entropy of the training classes, 1 for numbers."""
    values = data.train_targets()
    return [kind.entropy(values[:, i]) for i, kind in enumerate(types)]


def _refuse_nothing_to_learn(data: CrystalDataModule, place: int, kind: TargetType) -> None:
    """Reject a target that can't be learned from the training crystals: no value, a single value, or too little
    variation.

    Raises:
        DataError: the target can't be learned.
    """
    name, trained = data.targets[place], data.train_targets()[:, place]
    trained = trained[~np.isnan(trained)]
    if not len(trained):
        raise DataError(
            f"{data.store.name}: no training crystal has a value of {name!r}; leave it out of data.targets, or split "
            "otherwise"
        )
    if len(np.unique(trained)) == 1:
        only = f"{trained[0]:g}" if kind.classes is None else kind.classes[int(trained[0])]
        every = "the only training crystal with a value" if len(trained) == 1 else "every training crystal"
        raise DataError(f"{data.store.name}: {every} has {name}={only}; there is nothing to learn")
    if kind.classes is not None:
        return
    spread, size = float(np.std(trained)), float(np.abs(trained).max())
    if spread < SMALLEST_SPREAD or spread < LEAST_RELATIVE_SPREAD * size:
        raise DataError(
            f"{data.store.name}: the training values of {name!r} differ by {spread:.3g} at a size of {size:.3g}, which "
            "single precision, in which models are trained, can't resolve; use another unit, or subtract a constant"
        )
