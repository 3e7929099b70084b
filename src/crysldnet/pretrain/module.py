"""The LightningModule of pretraining."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.encoders.protocol import single_atom_statistics
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.models.latent import LatentStatistics
from crysldnet.models.pretraining import PretrainingModel
from crysldnet.training.fit import total_steps
from crysldnet.training.metrics import Means
from crysldnet.training.module import StepModule
from crysldnet.training.optimizer import AdamW
from crysldnet.training.strategies import SHARDED, name_of


class PretrainModule(StepModule):
    """Train a :class:`PretrainingModel`, with or without latent diffusion.

    Logs ``train/…`` and, each epoch, ``val/…``: every loss term (``val/loss/…``), masked accuracy and that of
    always guessing the most common species, errors of lattice (Å, degrees) and coordinates (Å) and those of the
    corrupted input, spread and effective rank of the encoder output and of the latent mean.

    Args:
        model: the model to train.
        optimizer: its optimizer.
        denoiser_lr: learning rate of the denoiser relative to the others.
        hold_encoder_epochs: initial epochs that train only the denoiser.
        clip_apart: clip the gradient of the denoiser separately.
        validate_in_train_mode: keep dropout and batch statistics on in validation, as in the published code.
    """

    def __init__(
        self,
        *,
        model: PretrainingModel,
        optimizer: AdamW,
        denoiser_lr: float = 1.0,
        hold_encoder_epochs: int = 0,
        clip_apart: bool = False,
        validate_in_train_mode: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.optimizer = model, optimizer
        self.denoiser_lr, self.hold_encoder_epochs, self.clip_apart = denoiser_lr, hold_encoder_epochs, clip_apart
        self.validate_in_train_mode = validate_in_train_mode
        self._teacher_step = 0
        self.means = Means()
        self.feature_statistics = LatentStatistics(model.encoder.width)
        self.latent_statistics = LatentStatistics(model.posterior.latent_dim)

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule over all steps of the stage."""

        def factor(name: str) -> float:
            return self.denoiser_lr if _of_denoiser(name) else 1.0

        return self.optimizer.build(self.model, total_steps(self.trainer), factor, fused=self.skips_on_device)

    def _parts(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the parameters of the denoiser and all others."""
        named = list(self.model.named_parameters())
        return [p for name, p in named if _of_denoiser(name)], [p for name, p in named if not _of_denoiser(name)]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Freeze everything but the denoiser in the first epochs, if configured."""
        if self.trainer.current_epoch < self.hold_encoder_epochs:
            for parameter in self._parts()[1]:
                parameter.grad = None
            self._norm = None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of all gradients together, or that of the denoiser separately."""
        sharded = name_of(self.trainer.strategy) in SHARDED
        if not self.clip_apart or sharded or self.model.flow is None or gradient_clip_val is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for part in self._parts():
            nn.utils.clip_grad_norm_(part, gradient_clip_val)
        self._norm = None

    def _step(self, batch: CrystalBatch, stage: Literal["train", "val"]) -> Tensor:
        output = self.model(batch)
        loss = torch.stack(list(output.terms.values())).sum()
        if stage == "train":
            terms = {f"train/{name}": value.detach() for name, value in output.terms.items()}
            self.step_losses = {"train/loss": loss.detach(), **terms}
            return loss
        count = torch.tensor(float(batch.num_crystals), device=loss.device)
        measures = {"loss": (loss * count, count)}
        measures |= {f"loss/{name}": (value * count, count) for name, value in output.terms.items()}
        measures |= output.measures
        if batch.undo is not None:
            hidden = batch.undo.masked
            guessed = ((batch.undo.numbers == self._commonest_species()) & hidden).sum()
            measures["masked_accuracy_baseline"] = (guessed, hidden.sum())
        self.means.update(measures)
        self.feature_statistics.update(output.features)
        self.latent_statistics.update(output.latent.mean)
        return loss

    def _commonest_species(self) -> int:
        data: CrystalDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return data.commonest_species

    def training_step(self, batch: CrystalBatch, batch_idx: int) -> Tensor:
        """Return the loss."""
        with single_atom_statistics(self, batch):
            return self._step(batch, "train")

    def on_train_start(self) -> None:
        """Record the steps that a resumed run has completed."""
        self._teacher_step = self.trainer.global_step

    def on_train_batch_end(self, outputs: Any, batch: CrystalBatch, batch_idx: int) -> None:
        """Update the teacher, if any."""
        if self.trainer.global_step != self._teacher_step:  # once per optimizer step, not per batch
            self._teacher_step = self.trainer.global_step
            self.model.update_teacher()

    def validation_step(self, batch: CrystalBatch, batch_idx: int) -> None:
        """Collect metrics."""
        self._step(batch, "val")

    def on_validation_model_eval(self) -> None:
        """Switch to evaluation mode, unless configured as published."""
        if not self.validate_in_train_mode:
            super().on_validation_model_eval()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole split."""
        values = {f"val/{name}": value for name, value in self.means.compute().items()}
        for title, statistics in (("features", self.feature_statistics), ("latent", self.latent_statistics)):
            values |= {f"val/{title}_{name}": value for name, value in statistics.compute().items()}
            statistics.reset()
        self.means.reset()
        self.log_dict({name: value.float() for name, value in values.items()})


def _of_denoiser(name: str) -> bool:
    return name.startswith("flow.")
