"""The training loss in files and loggers is the mean over the steps since the last logged one, resumed or not."""

import csv
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from crysldnet import finetune, pretrain
from crysldnet.artifacts import model_file
from crysldnet.errors import Interrupted
from crysldnet.finetune.module import FinetuneModule
from crysldnet.pretrain.module import PretrainModule
from crysldnet.training.diagnostics import Diagnostics, mean_losses
from tiny import finetune_config, pretrain_config, repeatable, subset

STEPS = 12
"""Two epochs of 24 crystals, four in a batch."""
EVERY = 5


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return subset(tmp_path_factory.mktemp("small") / "data.parquet", train=24, val=8)


def train(command: str, data: Path, path: Path, *more: str) -> tuple[dict[str, torch.Tensor], Path]:
    """Return the weights and the file of metrics of a run."""
    line = [f"runs={path}", "name=a", f"data.path={data}", "data.batch_size=4", *more]
    if command == "pretrain":
        config, values = pretrain_config("stage=vae", "stages.vae.epochs=2", *line)
        assert pretrain.run(config, values) == 0
        folder = path / "pretrain" / "a" / "vae"
        return model_file.read(folder / "pretraining.safetensors", "pretraining")[1], folder / "metrics.csv"
    config, values = finetune_config("data.targets=[formation_energy_per_atom]", "epochs=2", *line)
    assert finetune.run(config, values) == 0
    folder = path / "finetune" / "a"
    return model_file.read(folder / "model.safetensors", "property_model")[1], folder / "metrics.csv"


def losses_in(metrics: Path) -> dict[int, dict[str, float]]:
    """Return each logged training loss and its terms by step, counted from 1."""
    with metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    terms = [n for n in rows[0] if n.startswith("train/") and n.split("/")[1] not in ("grad_norm", "memory_mb")]
    terms = [name for name in terms if not name.endswith("_per_s")]
    return {int(row["step"]) + 1: {name: float(row[name]) for name in terms} for row in rows}


def seen(patch: pytest.MonkeyPatch, kind: type) -> list[dict[str, float]]:
    """Record the losses of every batch, apart from what logs them."""
    original, found = kind._step, []  # type: ignore[attr-defined]

    def step(self, batch, stage):  # type: ignore[no-untyped-def]
        loss = original(self, batch, stage)
        if stage == "train":
            found.append({name: float(value) for name, value in self.step_losses.items()})
        return loss

    patch.setattr(kind, "_step", step)
    return found


@pytest.mark.parametrize(("command", "kind"), [("pretrain", PretrainModule), ("finetune", FinetuneModule)])
def test_a_logged_loss_is_the_mean_of_the_steps_since_the_last(
    command: str, kind: type, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = seen(monkeypatch, kind)
    weights, each = train(command, small, tmp_path / "each", "trainer.log_every_n_steps=1")
    single, batches = losses_in(each), list(batches)
    same, few = train(command, small, tmp_path / "few", f"trainer.log_every_n_steps={EVERY}")
    windows = losses_in(few)
    assert list(single) == list(range(1, STEPS + 1))
    assert list(windows) == [5, 10]
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    for step, losses in windows.items():
        for name, value in losses.items():
            of_steps = [single[i][name] for i in range(step - EVERY + 1, step + 1)]
            assert value == pytest.approx(np.mean(of_steps), rel=1e-6)
            assert value == pytest.approx(np.mean([b[name] for b in batches[step - EVERY : step]]), rel=1e-6)
            assert len(set(of_steps)) == EVERY
    assert len(windows[5]) == (1 if command == "finetune" else 5)


@pytest.mark.parametrize("more", [[], ["trainer.accumulate_grad_batches=2"]])
def test_an_interrupted_window_is_completed_after_resuming(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    every = "trainer.log_every_n_steps=3"
    with monkeypatch.context() as patch:
        batches = seen(patch, FinetuneModule)
        weights, whole = train("finetune", small, tmp_path / "whole", every, *more)
    original, count = FinetuneModule.training_step, iter(range(1000))

    def stopped(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        if next(count) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneModule, "training_step", stopped)
        with pytest.raises(Interrupted):
            train("finetune", small, tmp_path / "cut", every, *more)
    resumed, metrics = train("finetune", small, tmp_path / "cut", every, "resume=last", *more)
    assert repeatable(metrics) == repeatable(whole)
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    size = 3 * (2 if more else 1)
    assert len(losses_in(whole)) == 4
    for step, losses in losses_in(whole).items():
        own = batches[step * size // 3 - size : step * size // 3]
        assert losses["train/loss"] == pytest.approx(np.mean([b["train/loss"] for b in own]), rel=1e-6)


def test_a_skipped_step_does_not_count() -> None:
    steps = [{"train/loss": torch.tensor(v), "train/kl": torch.tensor(torch.nan)} for v in (1.0, torch.inf, 4.0)]
    means = mean_losses(steps)
    assert float(means["train/loss"]) == 2.5
    assert means["train/kl"].isnan()
    callback, other = Diagnostics(), Diagnostics()
    callback._losses = [{"train/loss": torch.tensor(0.1)}]
    other.load_state_dict(callback.state_dict())
    assert torch.equal(other._losses[0]["train/loss"], torch.tensor(0.1))
