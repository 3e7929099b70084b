"""Measure what the Trainer with its callbacks adds to a training step.

python -m benchmarks.trainer [--data FILE.parquet] [--steps N] [--batch N]

The Trainer of ``crysldnet pretrain`` and ``crysldnet finetune`` trains a tiny encoder on batches that are already in
memory. Before each of its steps, a bare loop takes the same step with a copy of the module: forward, backward,
clipping, optimizer and schedule. One thread, single precision, processor time. Epochs, validations and checkpoints
aren't included.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.encoders import make_encoder
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.split import Split
from crysldnet.finetune.module import FinetuneModule
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.corruption import Corruption
from crysldnet.models.head import PropertyHead, PropertyModel
from crysldnet.models.latent import Posterior
from crysldnet.models.objectives import Denoising
from crysldnet.models.pretraining import PretrainingModel
from crysldnet.pretrain.module import PretrainModule
from crysldnet.training.fit import fit, total_steps
from crysldnet.training.optimizer import AdamW
from crysldnet.training.trainer import TrainerSettings, make_trainer
from experiments import evidence

HERE = Path(__file__).parent
COMMAND = "python -m benchmarks.trainer"
TINY: dict[str, object] = {"width": 16, "layers": 1, "messages": 16, "heads": 2, "channels": 2}
CLIP = 1.0
TARGET = "formation_energy_per_atom"
IN_MEMORY = 16
"""Batches of an epoch."""
FIRST = 5
"""Steps that aren't counted."""


class BareLoop(pl.Callback):
    """Take every step of the Trainer in a bare loop first, and time both.

    Attributes:
        model: the model that the bare loop trains.
        bare: seconds of processor time of each step of the bare loop.
        trainer: the same of the Trainer, until it starts the next step of the epoch.
    """

    def __init__(self) -> None:
        self.model: nn.Module = nn.Identity()
        self.bare: list[float] = []
        self.trainer: list[float] = []
        self._left: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the model, and make another optimizer for it."""
        self.model = copy.deepcopy(pl_module.model)  # type: ignore[arg-type]
        made = pl_module.optimizer.build(self.model, total_steps(trainer))  # type: ignore[operator,union-attr]
        self._optimizer, self._schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: CrystalBatch, batch_idx: int
    ) -> None:
        """Take a step."""
        begun = time.process_time()
        if self._left is not None:
            self.trainer.append(begun - self._left)
        self._optimizer.zero_grad()
        self._loss(batch).backward()
        nn.utils.clip_grad_norm_([p for group in self._optimizer.param_groups for p in group["params"]], CLIP)
        self._optimizer.step()
        self._schedule.step()
        self._left = time.process_time()
        self.bare.append(self._left - begun)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Don't count the end of the epoch."""
        self._left = None
        del self.bare[len(self.trainer) :]

    def _loss(self, batch: CrystalBatch) -> torch.Tensor:
        if isinstance(self.model, PretrainingModel):
            return torch.stack(list(self.model(batch).terms.values())).sum()
        losses, _ = self.model.losses(batch, "l1")  # type: ignore[operator]
        return losses.sum() / len(losses)


def make_module(command: str) -> tuple[pl.LightningModule, Corruption | None]:
    """Return the tiny module of a command, and how its crystals are corrupted."""
    encoder, optimizer = make_encoder("neighbor_attention_small", **TINY), AdamW(lr=1e-4)
    if command == "finetune":
        head = PropertyHead(width=encoder.width, outputs=1)
        model = PropertyModel(encoder=encoder, head=head, targets=[TARGET], units=["eV/atom"])
        return FinetuneModule(model=model, optimizer=optimizer), None
    corruption = Corruption(displacement=0.1, strain=0.05)
    return (
        PretrainModule(
            model=PretrainingModel(
                encoder=encoder,
                posterior=Posterior(width=encoder.width, latent_dim=4),
                objective=Denoising(latent_dim=4, hidden=16, corruption=corruption),
            ),
            optimizer=optimizer,
        ),
        corruption,
    )


def train(
    command: str,
    data: str,
    batch: int,
    steps: int,
    folder: Path,
    watch: pl.Callback,
    accelerator: Literal["cpu", "gpu"] = "cpu",
) -> pl.LightningModule:
    """Train with the Trainer of a command.

    Args:
        command: pretrain or finetune.
        data: the crystals.
        batch: crystals per step.
        steps: number of steps.
        folder: for the files of the run.
        watch: callback before all others.
        accelerator: where to train.
    """
    module, corruption = make_module(command)
    crystals = CrystalDataModule(
        path=data,
        graph=module.model.encoder.graph,  # type: ignore[union-attr,arg-type]
        targets=[TARGET] if command == "finetune" else None,
        split=Split(by="random", fractions=[1.0, 0.0, 0.0]),
        corruption=corruption,
        batch_size=batch,
        max_crystal_atoms=20,
    )
    crystals.setup()
    crystals.rows["train"] = crystals.rows["train"][: IN_MEMORY * batch]
    held: Any = list(crystals.train_dataloader())
    crystals.train_dataloader = lambda: DataLoader(held, batch_size=None)  # type: ignore[method-assign]
    trainer = make_trainer(
        TrainerSettings(accelerator=accelerator),
        "auto",
        folder=folder,
        epochs=-(-steps // len(held)),
        seed=0,
        gradient_clip_val=CLIP,
        owner={},
    )
    trainer.callbacks.insert(0, watch)  # type: ignore[attr-defined]
    fit(trainer, module, crystals)
    return module


def main() -> None:
    """Measure; write results.json and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="embedded:mp_starter")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=640)
    settings = parser.parse_args()
    commit = evidence.current_commit(HERE)
    torch.set_num_threads(1)
    records = []
    what = f"{Path(settings.data).stem}, {IN_MEMORY} batches of {settings.batch} crystals in memory"
    for command in ("pretrain", "finetune"):
        with tempfile.TemporaryDirectory() as folder:
            watch = BareLoop()
            train(command, settings.data, settings.batch, settings.steps, Path(folder), watch)
        bare, whole = watch.bare[FIRST:], watch.trainer[FIRST:]
        more = [w - b for w, b in zip(whole, bare, strict=True)]
        for metric, values in (("bare loop", bare), ("Trainer", whole), ("Trainer more than the bare loop", more)):
            milliseconds = [1e3 * value for value in values]
            records.append(
                evidence.timed(
                    milliseconds,
                    name=command,
                    metric=metric,
                    unit="ms a step",
                    data=what,
                    command=COMMAND,
                    commit=commit,
                )
            )
    evidence.write(HERE, records)
    print(evidence.table_by_name(records))


if __name__ == "__main__":
    main()
