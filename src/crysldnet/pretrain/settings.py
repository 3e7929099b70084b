"""Settings of pretraining, and the model built from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from crysldnet.build import build
from crysldnet.models.pretraining import PretrainingModel
from crysldnet.training.run_folder import RunConfig

Stage = Literal["vae", "diffusion"]


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """Length and learning rate of a stage: the learning rate is ``optimizer.lr`` times ``lr_factor``."""

    epochs: int
    lr_factor: float
    gradient_clip_val: float | None

    def __post_init__(self) -> None:
        if self.epochs < 1 or not self.lr_factor > 0:
            raise ValueError(f"epochs must be at least 1 and lr_factor over 0, not {self.epochs} and {self.lr_factor}")


@dataclass(frozen=True, kw_only=True)
class DiffusionStageSettings(StageSettings):
    """Settings of the second stage; fields with a default are newer than some runs that can still be resumed.

    Attributes:
        denoiser_lr_factor: learning rate of the denoiser relative to ``optimizer.lr``; null for ``lr_factor``.
        hold_encoder_epochs: initial epochs that train only the denoiser.
        clip_apart: clip the gradient of the denoiser separately. Sharded strategies clip all gradients together.
        new_draws: use different corruptions, noise and crystal order than the first stage.
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
        """Learning rate of the denoiser relative to the others."""
        return 1.0 if self.denoiser_lr_factor is None else self.denoiser_lr_factor / self.lr_factor


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Settings of both stages."""

    vae: StageSettings
    diffusion: DiffusionStageSettings


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Every key of ``conf/pretrain.yaml``."""

    stage: Literal["vae", "diffusion", "both"]
    init: str | None
    validate_in_train_mode: bool
    stages: Stages
    objective: dict[str, Any]
    denoiser: dict[str, Any]
    latent: dict[str, Any]
    diffusion: dict[str, Any]


def build_model(config: PretrainConfig, *, with_flow: bool) -> PretrainingModel:
    """Build the untrained model; the initial weights of the first stage don't depend on ``with_flow``."""
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
    """Return the seed for the corruptions, noise and crystal order of a stage."""
    if stage == "vae" or not config.stages.diffusion.new_draws:
        return config.seed
    return int(np.random.SeedSequence([config.seed, 2]).generate_state(1)[0])
