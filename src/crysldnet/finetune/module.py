"""The LightningModule of property models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.encoders.protocol import batch_statistics, single_atom_statistics
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.spec import GraphSpec
from crysldnet.models.head import PropertyModel
from crysldnet.models.predictor import Prediction
from crysldnet.models.targets import Loss
from crysldnet.platforms import double
from crysldnet.training.fit import total_steps
from crysldnet.training.metrics import TargetMetrics
from crysldnet.training.module import StepModule
from crysldnet.training.optimizer import AdamW

Mode = Literal["full", "frozen", "gradual_unfreezing"]


class FinetuneModule(StepModule):
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

        def factor(name: str) -> float:
            return 1.0 if self.layer_decay == 1 else self.layer_decay ** self.model.depth_of(name)

        return self.optimizer.build(self.model, total_steps(self.trainer), factor, fused=self.skips_on_device)

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
            return self._step(batch, "train")

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


@torch.no_grad()
def read_batches(
    model: PropertyModel, data: CrystalDataModule, rows: NDArray[np.int64], device: torch.device
) -> Iterator[Tensor]:
    """Yield the head's inputs for rows of the store, batch by batch."""
    for batch in data.batches(rows, model.encoder.graph):
        yield model.head.read(model.encoder, batch.to(device))


def standardize(model: PropertyModel, data: CrystalDataModule, device: torch.device, *, fresh: bool) -> None:
    """Set mean and standard deviation of the head's inputs from the training split, if it needs them.

    Args:
        model: on its device.
        data: training data.
        device: device of the model.
        fresh: the encoder's running batch statistics, if any, are uninitialized, so use those of each batch.
    """
    if model.head.layers_read == "last" or bool(model.head.standardized):
        return
    count, total, square = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    with batch_statistics(model.encoder, own=fresh):
        for read in read_batches(model, data, data.rows["train"], device):
            read = double(read)
            count, total, square = count + len(read), total + read.sum(0), square + read.square().sum(0)
    center = total / count
    spread = (square / count - center.square()).clamp_min(0.0).sqrt()
    model.head.standardize(center.float().to(device), spread.float().to(device))


@dataclass(frozen=True)
class ReadTable:
    """Cached inputs of a head: 4 I bytes per crystal or atom.

    Attributes:
        values: [all crystals or atoms, I].
        begin: [crystals of the store] first row of each crystal, −1 for crystals that aren't cached.
        per_crystal: one row per crystal, else one per atom.
    """

    values: Tensor
    begin: Tensor
    per_crystal: bool

    @classmethod
    def of(cls, model: PropertyModel, data: CrystalDataModule, device: torch.device) -> ReadTable:
        """Compute the inputs for all crystals of a data module on a device."""
        rows, single = np.concatenate(list(data.rows.values())), model.head.per_crystal
        sizes = np.ones_like(rows) if single else data.store.crystals.sizes[rows]
        begin = torch.full((len(data.store),), -1)
        begin[torch.from_numpy(rows)] = torch.from_numpy(np.cumsum(sizes) - sizes)
        return cls(torch.cat(list(read_batches(model, data, rows, device))), begin.to(device), single)

    def __call__(self, batch: CrystalBatch) -> Tensor:
        """Return the head's inputs for a batch."""
        first = self.begin[batch.rows]
        if self.per_crystal:
            return self.values.index_select(0, first)
        first = first - batch.sizes.cumsum(0) + batch.sizes
        place = torch.arange(batch.num_atoms, device=first.device) + first.index_select(0, batch.crystal)
        return self.values.index_select(0, place)
