"""What makes training fast stays true: compiled layers, mixed precision, no waiting for the device inside a step."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import trainer as benchmark
from crysldnet.data.store import CrystalStore
from crysldnet.encoders.neighbor_attention import bucket
from crysldnet.finetune import train
from crysldnet.graphs.batch import CrystalBatch, make_batch
from crysldnet.graphs.corruption import Corruption
from crysldnet.models.dit import DiT
from crysldnet.models.flow import LatentFlow
from crysldnet.models.head import PropertyHead, PropertyModel
from crysldnet.models.latent import Posterior
from crysldnet.models.objectives import Denoising
from crysldnet.models.pretraining import PretrainingModel
from crysldnet.training import trainer
from crysldnet.training.module import StepModule
from crysldnet.training.nan_guard import CheckedStep
from encoders import CLASSES, small
from tiny import finetune_config, subset

WAITS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}
"""Operations that need a value on the host, so that a GPU's queue runs empty."""

FUSED = "aten::_fused_adamw_"


def batches(starter: CrystalStore, encoder: torch.nn.Module, count: int, size: int = 32) -> list[CrystalBatch]:
    rng = np.random.default_rng(0)
    rows = np.flatnonzero(starter.crystals.sizes <= 12)
    return [
        make_batch(starter.crystals.take(rng.choice(rows, size, replace=False)), encoder.graph) for _ in range(count)
    ]


def operations(step: Callable[[], object]) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    return {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize("name", CLASSES)
def test_a_finetuning_step_never_waits_for_the_device(name: str, starter: CrystalStore) -> None:
    encoder = small(name)
    head = PropertyHead(width=encoder.width, outputs=1)
    model = PropertyModel(encoder=encoder, head=head, targets=["a"], units=[""])
    (batch,) = batches(starter, encoder, 1)
    batch.targets = torch.zeros(32, 1)
    done = operations(lambda: model.loss(batch, "l1")[0].backward())
    assert "aten::mm" in done
    assert not done & WAITS


@pytest.mark.parametrize("target", ["joint", "ema"])
def test_a_pretraining_step_never_waits_for_the_device(target: str, starter: CrystalStore) -> None:
    encoder = small("neighbor_attention")
    corruption = Corruption(displacement=0.1, strain=0.05)
    model = PretrainingModel(
        encoder=encoder,
        posterior=Posterior(width=encoder.width, latent_dim=8),
        objective=Denoising(latent_dim=8, corruption=corruption),
        flow=LatentFlow(denoiser=DiT(latent_dim=8, width=16, layers=1, heads=2), latent_dim=8, target=target),
    )
    crystals, undo = corruption.apply(starter.crystals.take(np.arange(16)), np.random.default_rng(0))
    batch = make_batch(crystals, encoder.graph, undo=undo)
    done = operations(lambda: torch.stack(list(model(batch).terms.values())).sum().backward())
    assert not done & WAITS


class Profiled(pl.Callback):
    """Keeps the operations of some steps that log nothing, without those inside the fused optimizer.

    On a CPU it reads the number of steps that it has taken.
    """

    def __init__(self) -> None:
        self.steps: list[set[str]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in (2, 5, 6):
            self.profiler = profile(activities=[ProfilerActivity.CPU])
            self.profiler.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step - 1 in (2, 5, 6):
            self.profiler.__exit__(None, None, None)
            self.steps.append({event.name for event in self.profiler.events() if not self._of_fused(event.cpu_parent)})

    def _of_fused(self, event: Any) -> bool:
        return event is not None and (event.name == FUSED or self._of_fused(event.cpu_parent))


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_step_of_the_trainer_never_waits_for_the_device(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the device skips nonfinite steps, and the host only reads the result of the step before."""
    monkeypatch.setattr(StepModule, "skips_on_device", True)
    read: list[Tensor] = []
    monkeypatch.setattr(CheckedStep, "was_finite", lambda step: read.append(step.bad) or True)
    watch = Profiled()
    benchmark.train(command, "embedded:mp_starter", 2, 16, tmp_path, watch)
    assert len(read) == 16
    assert not torch.stack(read).any()
    assert len(watch.steps) == 3
    for done in watch.steps:
        assert FUSED in done
        assert not done & WAITS


def test_the_trainer_takes_the_steps_of_a_bare_loop(tmp_path: Path) -> None:
    watch = benchmark.BareLoop()
    module = benchmark.train("finetune", "embedded:mp_starter", 2, 32, tmp_path, watch)
    assert len(watch.bare) == len(watch.trainer) == 30
    ours, bare = module.state_dict(), watch.model.state_dict()
    assert all(torch.equal(ours[f"model.{name}"], value) for name, value in bare.items())


def test_a_wait_is_noticed() -> None:
    assert operations(lambda: float(torch.ones(3).sum())) & WAITS
    assert operations(lambda: torch.arange(3)[torch.ones(3) > 0]) & WAITS


def test_buckets_are_few_and_waste_little() -> None:
    sizes = np.arange(1, 5000)
    padded = np.array([bucket(int(n)) for n in sizes])
    assert (padded >= sizes).all()
    assert (padded[64:] <= 1.13 * sizes[64:]).all()
    assert len(np.unique(padded[1023:4096])) <= 17


@pytest.mark.distributed
def test_compiled_layers_give_the_same_features_and_are_not_compiled_again(starter: CrystalStore) -> None:
    encoder = small("neighbor_attention")

    def shape(batch: CrystalBatch) -> tuple[int, int]:
        assert batch.slots is not None
        return bucket(batch.num_atoms + 1), bucket(len(batch.slots))

    several = batches(starter, encoder, 60)
    (common, _), *_ = Counter(map(shape, several)).most_common()
    several = [batch for batch in several if shape(batch) == common]
    assert len({batch.num_atoms for batch in several}) > 3
    eager = [encoder(batch) for batch in several]
    encoder.compile_layers()
    encoder(several[0]).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, expected in zip(several, eager, strict=True):
            found = encoder(batch)
            found.sum().backward()
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.distributed
def test_compilation_and_mixed_precision_work_through_configuration(tmp_path: Path) -> None:
    data = subset(tmp_path / "few.parquet", train=64, val=16, test=16, max_atoms=8)
    results = {}
    arms = {"plain": [], "compiled": ["trainer.compile=true"], "bf16": ["trainer.precision=bf16-mixed"]}
    for name, settings in arms.items():
        config, values = finetune_config(
            f"data.path={data}",
            "encoder=neighbor_attention",
            "epochs=2",
            "trainer.accelerator=cpu",
            *settings,
            tiny_encoder=("encoder.width=16", "encoder.layers=1", "encoder.heads=2", "encoder.channels=2"),
        )
        results[name] = train(config, values, tmp_path / name).metrics["val/mae"]
    assert results["compiled"] == pytest.approx(results["plain"], rel=1e-3)
    assert results["bf16"] == pytest.approx(results["plain"], rel=0.1)
    assert results["bf16"] != results["plain"]


def test_freed_memory_is_kept_where_the_system_has_glibc() -> None:
    trainer.keep_freed_memory()
    library = ctypes.CDLL("libc.so.6")
    assert library.mallopt(trainer.TRIM_THRESHOLD, trainer.KEPT) == 1
    assert library.mallopt(trainer.MMAP_MAX, 0) == 1
