"""The settings of pretraining, and the model that they describe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from crysldnet.build import build
from crysldnet.models.pretraining import PretrainingModel

Stage = Literal["vae", "diffusion"]


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """Length and pace of a stage: the learning rate is ``optimizer.lr`` times ``lr_factor``."""

    epochs: int
    lr_factor: float
    gradient_clip_val: float | None

    def __post_init__(self) -> None:
        if self.epochs < 1 or not self.lr_factor > 0:
            raise ValueError(f"epochs must be at least 1 and lr_factor over 0, not {self.epochs} and {self.lr_factor}")


@dataclass(frozen=True, kw_only=True)
class DiffusionStageSettings(StageSettings):
    """Those of the second stage; the keys with a value here are newer than some runs that may still be resumed.

    Attributes:
        denoiser_lr_factor: the denoiser's learning rate is ``optimizer.lr`` times this; that of the others if null.
        hold_encoder_epochs: epochs at the start in which the denoiser alone is trained.
        clip_apart: clip the gradient of the denoiser apart from the others'. Sharded strategies clip all together.
        new_draws: other corruptions, noise and order of crystals than the first stage had in the same epochs.
    """

    denoiser_lr_factor: float | None = None
    hold_encoder_epochs: int = 0
    clip_apart: bool = False
    new_draws: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.denoiser_lr_factor is not None and not self.denoiser_lr_factor > 0:
            raise ValueError(f"denoiser_lr_factor must be over 0 or null, not {self.denoiser_lr_factor}")
        if not 0 <= self.hold_encoder_epochs < self.epochs:
            raise ValueError(
                f"hold_encoder_epochs={self.hold_encoder_epochs} must be at least 0 and below epochs={self.epochs}"
            )

    @property
    def denoiser_lr(self) -> float:
        """The denoiser's learning rate as a factor of the others'."""
        return 1.0 if self.denoiser_lr_factor is None else self.denoiser_lr_factor / self.lr_factor


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Settings of both stages."""

    vae: StageSettings
    diffusion: DiffusionStageSettings


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Every key of ``conf/pretrain.yaml``."""

    plugins: list[str] = field(default_factory=list)
    stage: Literal["vae", "diffusion", "both"]
    seed: int
    name: str | None
    runs: str
    resume: Literal["last"] | None
    init: str | None
    validate_in_train_mode: bool
    stages: Stages
    data: dict[str, Any]
    encoder: dict[str, Any]
    objective: dict[str, Any]
    denoiser: dict[str, Any]
    optimizer: dict[str, Any]
    trainer: dict[str, Any]
    strategy: dict[str, Any]
    logger: dict[str, Any]
    latent: dict[str, Any]
    diffusion: dict[str, Any]

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, not {self.seed}")


def build_model(config: PretrainConfig, *, with_flow: bool) -> PretrainingModel:
    """Build the model with fresh weights; those of the first stage don't depend on ``with_flow``."""
    torch.manual_seed(config.seed)
    encoder = build(config.encoder, "encoder")
    posterior = build(config.latent, "latent", width=encoder.width)
    objective = build(config.objective, "objective", latent_dim=posterior.latent_dim)
    flow = None
    if with_flow and config.diffusion.get("weight") != 0:
        features = config.diffusion.get("latent") == "features"
        latent_dim = encoder.width if features else posterior.latent_dim
        told = {"atoms": encoder.width, "crystal": 2 * encoder.depth * encoder.width}
        parts = {"condition_dim": told[name]} if (name := config.diffusion.get("condition")) in told else {}
        denoiser = build(config.denoiser, "denoiser", latent_dim=latent_dim, **parts)
        flow = build(config.diffusion, "diffusion", denoiser=denoiser, latent_dim=latent_dim)
    return PretrainingModel(encoder=encoder, posterior=posterior, objective=objective, flow=flow)


def stage_seed(config: PretrainConfig, stage: Stage) -> int:
    """Return the seed of a stage's corruptions, noise and order of crystals."""
    if stage == "vae" or not config.stages.diffusion.new_draws:
        return config.seed
    return int(np.random.SeedSequence([config.seed, 2]).generate_state(1)[0])
