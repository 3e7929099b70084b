"""The model that is pretrained: encoder, latent space, objective and, in the second stage, latent diffusion.

Shapes: ``N`` atoms, ``D`` width of the encoder, ``d`` width of the latent.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crysldnet.data.batch import CrystalBatch
from crysldnet.encoders.protocol import Encoder
from crysldnet.models.flow import LatentFlow
from crysldnet.models.latent import Latent, Posterior
from crysldnet.models.objectives import Measures, Objective


class PretrainingOutput(NamedTuple):
    """One step's result."""

    terms: dict[str, Tensor]
    """Weighted loss terms; the loss is their sum."""
    measures: Measures
    features: Tensor
    """[N, D] the encoder's output."""
    latent: Latent


class PretrainingModel(nn.Module):
    """A variational autoencoder of crystals, with latent diffusion where ``flow`` is given.

    Stage 1 (no flow): reconstruction + KL. Stage 2 (flow): the same, unless ``flow.reconstruction`` is off, plus the
    diffusion loss; encoder and denoiser are trained together.

    Args:
        encoder: the encoder to be pretrained.
        posterior: its latent space.
        objective: what is reconstructed.
        flow: the latent diffusion model.
    """

    def __init__(
        self, *, encoder: Encoder, posterior: Posterior, objective: Objective, flow: LatentFlow | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.posterior, self.objective, self.flow = encoder, posterior, objective, flow
        self.teacher: nn.ModuleDict | None = None
        if flow is not None:
            if not flow.reconstruction:
                self.objective.requires_grad_(False)
                self.posterior.requires_grad_(flow.latent == "posterior")
            if flow.target != "joint":
                self.teacher = nn.ModuleDict({"encoder": copy.deepcopy(encoder), "posterior": copy.deepcopy(posterior)})
                self.teacher.requires_grad_(False)

    @property
    def reconstructs(self) -> bool:
        """Whether the reconstruction loss is on."""
        return self.flow is None or self.flow.reconstruction

    def start_teacher(self) -> None:
        """Set the teacher to the encoder as it is now."""
        if self.teacher is not None:
            self.teacher["encoder"].load_state_dict(self.encoder.state_dict())
            self.teacher["posterior"].load_state_dict(self.posterior.state_dict())

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Move the teacher towards the encoder by one step."""
        if self.teacher is None or self.flow is None or self.flow.ema_decay == 1.0:
            return
        for name, module in (("encoder", self.encoder), ("posterior", self.posterior)):
            online = module.state_dict()
            for key, slow in self.teacher[name].state_dict().items():
                if slow.is_floating_point():
                    slow.lerp_(online[key], 1.0 - self.flow.ema_decay)
                else:
                    slow.copy_(online[key])

    def forward(self, batch: CrystalBatch) -> PretrainingOutput:
        """Return the loss terms and measures of a batch."""
        features = self.encoder(batch)
        latent = self.posterior(features)
        terms: dict[str, Tensor] = {}
        measures: Measures = {}
        if self.reconstructs:
            reconstruction = self.objective(latent.sample, batch)
            terms |= reconstruction.terms
            terms["kl"] = self.posterior.kl_weight * self.posterior.kl(latent)
            measures |= reconstruction.measures
        if self.flow is not None:
            z = features if self.flow.latent == "features" else latent.sample
            terms["diffusion"] = self.flow.weight * self.flow(
                z, self._target(z, batch), batch.crystal, batch.sizes, batch.largest
            )
        return PretrainingOutput(terms, measures, features, latent)

    def _target(self, z: Tensor, batch: CrystalBatch) -> Tensor:
        if self.teacher is None:
            return z
        with torch.no_grad():
            self.teacher.eval()
            features = self.teacher["encoder"](batch)
            assert self.flow is not None
            return features if self.flow.latent == "features" else self.teacher["posterior"](features).mean
