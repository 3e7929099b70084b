"""The pretraining model: encoder, latent space, objective and, in the second stage, latent diffusion.

Shapes: ``N`` atoms, ``D`` width of the encoder, ``d`` width of the latent.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crysldnet.encoders.protocol import Encoder, features_of_layers
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.measures import Measure, register
from crysldnet.models.flow import FlowOutput, LatentFlow
from crysldnet.models.latent import Latent, Posterior
from crysldnet.models.objectives import Measures, Objective, Reconstruction
from crysldnet.models.readout import mean_and_spread

SHOWN: dict[str, Any] = {"better": None, "shown": True}
register(
    Measure(
        "diffusion_error",
        "diffusion error",
        baseline="Gaussian guess",
        learned="latent diffusion",
        plotted=True,
        shown=True,
    ),
    Measure("features_spread", "encoder output: spread", form="{:.3f}", plotted=True, **SHOWN),
    Measure("features_rank", "encoder output: effective rank", form="{:.1f}", plotted=True, **SHOWN),
    Measure("latent_spread", "latent: spread", better=None),
    Measure("latent_rank", "latent: effective rank", form="{:.1f}", **SHOWN),
)


class PretrainingOutput(NamedTuple):
    """Result of one step."""

    terms: dict[str, Tensor]
    """Weighted loss terms; the loss is their sum."""
    measures: Measures
    features: Tensor
    """[N, D] encoder output."""
    latent: Latent


class PretrainingModel(nn.Module):
    """A variational autoencoder of crystals, with latent diffusion if ``flow`` is given.

    Stage 1 (no flow): reconstruction + KL. Stage 2 (flow): the same, unless ``flow.reconstruction`` is off, plus the
    diffusion loss; encoder and denoiser are trained together.

    Args:
        encoder: the encoder to pretrain.
        posterior: its latent space.
        objective: the reconstruction objective.
        flow: the latent diffusion model.
    """

    def __init__(
        self, *, encoder: Encoder, posterior: Posterior, objective: Objective, flow: LatentFlow | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.posterior, self.objective, self.flow = encoder, posterior, objective, flow
        self.teacher: nn.ModuleDict | None = None
        self.condition: nn.Sequential | None = None
        if objective.condition == "crystal":
            pooled = 2 * encoder.depth * encoder.width
            last = nn.Linear(pooled, posterior.latent_dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.condition = nn.Sequential(nn.LayerNorm(pooled, elementwise_affine=False), last)
        if flow is not None:
            if not flow.reconstruction:
                self.objective.requires_grad_(False)
                self.posterior.requires_grad_(flow.latent == "posterior")
            if flow.has_teacher:
                self.teacher = nn.ModuleDict({"encoder": copy.deepcopy(encoder), "posterior": copy.deepcopy(posterior)})
                self.teacher.requires_grad_(False)

    @property
    def reconstructs(self) -> bool:
        """Whether the reconstruction loss is on."""
        return self.flow is None or self.flow.reconstruction

    @property
    def needs_clean(self) -> bool:
        """Whether batches must also hold the clean crystals."""
        return self.condition is not None or (self.flow is not None and self.flow.target == "clean")

    def start_teacher(self) -> None:
        """Set the teacher to the current encoder."""
        if self.teacher is not None:
            self.teacher["encoder"].load_state_dict(self.encoder.state_dict())
            self.teacher["posterior"].load_state_dict(self.posterior.state_dict())

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Update the teacher toward the encoder by one step."""
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
        """Return the loss terms and metrics of a batch."""
        every_layer = self.flow is not None and self.flow.condition == "crystal"
        layers = features_of_layers(self.encoder, batch) if every_layer else [self.encoder(batch)]
        features = layers[-1]
        latent = self.posterior(features)
        terms: dict[str, Tensor] = {}
        measures: Measures = {}
        if self.reconstructs:
            reconstruction = self._reconstruct(latent.sample, batch)
            terms |= reconstruction.terms
            terms["kl"] = self.posterior.kl_weight * self.posterior.kl(latent)
            terms |= self.posterior.penalties(latent, batch.crystal, batch.num_crystals)
            measures |= reconstruction.measures
        if self.flow is not None:
            found = self._diffuse(self.flow, layers, latent, batch)
            terms["diffusion"] = self.flow.weight * found.loss
            measures |= found.measures
        return PretrainingOutput(terms, measures, features, latent)

    def _reconstruct(self, z: Tensor, batch: CrystalBatch) -> Reconstruction:
        """Reconstruct from latents [N, d], conditioned on the clean crystal if the objective requires it.

        In evaluation, the metrics are unconditioned, and conditioned ones have separate names.
        """
        if self.condition is None:
            return self.objective(z, batch)
        assert batch.clean is not None
        pooled = mean_and_spread(features_of_layers(self.encoder, batch.clean), batch.crystal, batch.num_crystals)
        told, share = self.condition(pooled), self.objective.condition_share
        if self.training:
            chosen = torch.rand(len(told), 1, dtype=z.dtype, device=z.device) < share
            return self.objective(z + (told * chosen).index_select(0, batch.crystal), batch)
        without, with_it = self.objective(z, batch), self.objective(z + told.index_select(0, batch.crystal), batch)
        terms = {name: torch.lerp(term, with_it.terms[name], share) for name, term in without.terms.items()}
        named = {f"{k}_conditioned": v for k, v in with_it.measures.items() if not k.endswith("_baseline")}
        return Reconstruction(terms, without.measures | named)

    def _diffuse(self, flow: LatentFlow, layers: list[Tensor], latent: Latent, batch: CrystalBatch) -> FlowOutput:
        z = layers[-1] if flow.latent == "features" else latent.sample
        target, condition = self._target(z, batch), None
        if flow.condition == "atoms":
            z, condition = target, layers[-1]
        elif flow.condition == "crystal":
            z, condition = target, mean_and_spread(layers, batch.crystal, batch.num_crystals)
        elif flow.target == "joint_target_only":
            z = z.detach()
        return flow(z, target, batch.crystal, batch.sizes, batch.largest, condition)

    def _target(self, z: Tensor, batch: CrystalBatch) -> Tensor:
        if self.teacher is None:
            return z
        assert self.flow is not None
        seen = batch.clean if self.flow.target == "clean" else batch
        assert seen is not None
        with torch.no_grad():
            self.teacher.eval()
            features = self.teacher["encoder"](seen)
            return features if self.flow.latent == "features" else self.teacher["posterior"](features).mean
