"""The LightningModule of property models."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor

from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.encoders.protocol import single_atom_statistics
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.spec import GraphSpec
from crysldnet.models.head import PropertyModel
from crysldnet.models.predictor import Prediction
from crysldnet.models.targets import Loss
from crysldnet.training.diagnostics import log_losses
from crysldnet.training.features import ReadTable, standardize
from crysldnet.training.fit import total_steps
from crysldnet.training.metrics import TargetMetrics
from crysldnet.training.optimizer import AdamW

Mode = Literal["full", "frozen", "gradual_unfreezing"]


class FinetuneModule(pl.LightningModule):
    """Train a :class:`PropertyModel`.

    Logs ``train/loss`` (normalized units) and ``val/…``, ``test/…``: MAE, RMSE and R² in physical units for regression,
    accuracy and so on for classification. The best epoch has the lowest ``monitor``.

    Args:
        model: the model to train.
        optimizer: its optimizer.
        loss: loss on normalized targets.
        mode: ``frozen`` computes the features of a frozen encoder once; ``gradual_unfreezing`` trains the head first,
            then the encoder layer by layer from the output, and all layers in the second half.
        layer_decay: factor of the learning rate from each layer to the one below.
        entropies: [T] entropy of the training classes, the baseline of the log loss.
        fresh: the encoder isn't pretrained.
    """

    def __init__(
        self,
        *,
        model: PropertyModel,
        optimizer: AdamW,
        loss: Loss = "l1",
        mode: Mode = "full",
        layer_decay: float = 1.0,
        entropies: list[float] | None = None,
        fresh: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.mode, self.layer_decay, self.fresh = mode, layer_decay, fresh
        self.step_losses: dict[str, Tensor] = {}
        self.metrics = TargetMetrics(model.targets, model.types, entropies)
        if mode == "frozen":
            model.freeze_encoder()
        self.predictions: list[tuple[Tensor, Prediction]] = []
        """Rows and predictions of the last test loop on this rank."""

    @property
    def monitor(self) -> str:
        """The metric that selects the best epoch."""
        return f"val/{self.metrics.selection}"

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule over all steps of the run."""
        steps = total_steps(self.trainer)
        if self.layer_decay == 1:
            return self.optimizer.build(self.model, steps)
        return self.optimizer.build(self.model, steps, lambda name: self.layer_decay ** self.model.depth_of(name))

    def on_fit_start(self) -> None:
        """Standardize the head's input, and cache the features of a frozen encoder."""
        data: CrystalDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        standardize(self.model, data, self.device, fresh=self.fresh)
        if self.mode == "frozen":
            self.model.cached = ReadTable.of(self.model, data, self.device)
            data.graph = GraphSpec(k=1)  # the head needs no edges

    def _is_open(self, name: str) -> bool:
        """Return whether a parameter is trained in this epoch."""
        half = max((self.trainer.max_epochs or 1) / 2, 1e-9)
        return self.model.depth_of(name) <= int(self.trainer.current_epoch / half * self.model.n_depths)

    def on_train_epoch_start(self) -> None:
        """Keep frozen parts in evaluation mode, without dropout or batch statistics updates."""
        if self.mode == "gradual_unfreezing":
            for name, part in self.model.encoder.named_modules():
                part.training = self._is_open(f"encoder.{name}")

    def on_after_backward(self) -> None:
        """Drop the gradients of frozen parts."""
        if self.mode == "gradual_unfreezing":
            for name, parameter in self.model.named_parameters():
                if not self._is_open(name):
                    parameter.grad = None

    def _step(self, batch: CrystalBatch, stage: Literal["train", "val", "test"]) -> Tensor:
        losses, predicted = self.model.losses(batch, self.loss)
        assert batch.targets is not None
        known = (~batch.targets.isnan()).sum()
        loss = losses.sum() / known.clamp_min(1)
        if stage == "train":
            self.step_losses = {"train/loss": loss.detach()}
        else:
            self.metrics.update(predicted, batch.targets, losses, self.model.error_scale)
        if stage == "test":
            self.predictions.append((batch.rows, predicted))
        return loss

    def training_step(self, batch: CrystalBatch, batch_idx: int) -> Tensor:
        """Return the loss."""
        with single_atom_statistics(self, batch):
            loss = self._step(batch, "train")
        log_losses(self, batch_idx)
        return loss

    def validation_step(self, batch: CrystalBatch, batch_idx: int) -> None:
        """Collect errors."""
        self._step(batch, "val")

    def test_step(self, batch: CrystalBatch, batch_idx: int) -> None:
        """Collect errors and predictions."""
        self._step(batch, "test")

    def _log_metrics(self, stage: str) -> None:
        values = self.metrics.compute()
        shown = values if stage == "val" else {k: v for k, v in values.items() if not k.startswith("normalised")}
        self.log_dict({f"{stage}/{name}": value.float() for name, value in shown.items()}, prog_bar=stage == "val")
        self.metrics.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_metrics("val")

    def on_test_epoch_start(self) -> None:
        """Clear earlier predictions."""
        self.predictions = []

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_metrics("test")
