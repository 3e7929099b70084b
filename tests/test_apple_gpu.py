"""On an Apple GPU, which has no float64, training sends and computes nothing in it, and mixes no devices.

No Apple GPU is here: PyTorch's fake tensors, which have types, shapes and devices but no values, take its place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import PEROVSKITE, ROCKSALT
from crysldnet import finetune, pretrain
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.errors import ConfigError, DeviceError
from crysldnet.finetune import training
from crysldnet.finetune.module import standardize
from crysldnet.models.exact_metric import ExactMetric
from crysldnet.platforms import double
from crysldnet.training.diagnostics import mean_losses
from crysldnet.training.strategies import ddp
from crysldnet.training.trainer import TrainerSettings
from encoders import CLASSES, batch_of, small
from tiny import finetune_config, pretrain_config, subset

GPU = torch.device("lazy:0")
"""The device that takes the place of ``mps``, which PyTorch doesn't know on other systems."""


class Refuse64(TorchDispatchMode):
    """Refuse float64 on the GPU; count what is computed there."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in [out] if isinstance(out, Tensor) else out if isinstance(out, tuple | list) else []:
            if isinstance(tensor, Tensor) and tensor.device.type == GPU.type:
                self.count += 1
                assert tensor.dtype not in (torch.float64, torch.complex128), f"{func} gives {tensor.dtype} on the GPU"
        return out


@contextmanager
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Refuse64]:
    """Compute with fake tensors, of which none on the GPU may be in float64."""
    with monkeypatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr("crysldnet.platforms.WITHOUT_FLOAT64", ("mps", GPU.type))
        patch.setattr("crysldnet.graphs.transfer.ONE_BY_ONE", ("cpu", "mps", GPU.type))
        with Refuse64() as counted:
            yield counted


def made(
    command: str, path: Path, monkeypatch: pytest.MonkeyPatch, *more: str
) -> tuple[pl.LightningModule, CrystalDataModule]:
    """Return the modules of a run just before it trains."""
    found: list[Any] = []

    class Stop(Exception):
        pass

    def stop(_name: str, _trainer: Any, module: pl.LightningModule, data: CrystalDataModule, *_: Any) -> None:
        found.extend((module, data))
        raise Stop

    line = [f"runs={path}", f"data.path={subset(path / 'd.parquet', train=24, val=8)}", "data.batch_size=4", *more]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain if command == "pretrain" else training, "fit_and_export", stop)
        compose = pretrain_config if command == "pretrain" else partial(finetune_config, "pretrained=none")
        config, values = compose(*line)
        with pytest.raises(Stop):
            (pretrain if command == "pretrain" else finetune).run(config, values)
    return found[0], found[1]


def move(module: torch.nn.Module) -> None:
    """Move a module as Lightning does."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # fake tensors can't replace the data of others
    try:
        module.to(GPU)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    for part in module.modules():
        if isinstance(part, ExactMetric):
            part.reset()


RUNS = {
    "pretrain": ("pretrain", ["stage=vae"]),
    "diffusion": ("pretrain", ["stage=both"]),
    "published objective": ("pretrain", ["stage=vae", "objective=published"]),
    "numbers": ("finetune", ["data.targets=[formation_energy_per_atom,band_gap]", "target_types={band_gap: hurdle}"]),
    "references": (
        "finetune",
        ["data.targets=[formation_energy_per_atom]", "atomic_references=[formation_energy_per_atom]"],
    ),
    "spread": ("finetune", ["data.targets=[band_gap]", "loss=laplace", "head=attention"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_training_and_validation_need_no_float64(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, more = RUNS[name]
    module, data = made(command, tmp_path, monkeypatch, *more)
    batches = [next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))]
    module._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    with gpu(monkeypatch) as counted:
        move(module)
        if name == "numbers":
            standardize(module.model, data, GPU, fresh=True)  # type: ignore[arg-type]
        for batch, stage in zip(batches, ("train", "val"), strict=True):
            sent = data.transfer_batch_to_device(batch, GPU, 0)
            assert sent.positions.device.type == GPU.type
            loss = module._step(sent, stage)  # type: ignore[operator]
            if stage == "train":
                assert (loss.device.type, loss.dtype) == (GPU.type, torch.float32)
                loss.backward()
                optimizer = torch.optim.SGD(module.parameters())
                assert module.gradient_norm(optimizer).dtype == torch.float32  # type: ignore[operator]
                assert mean_losses([module.step_losses])["train/loss"].dtype == torch.float32  # type: ignore[list-item]
        assert counted.count > 100
        sums = [m for part in module.modules() if isinstance(part, ExactMetric) for m in part.metric_state.values()]
        assert {m.dtype for m in sums if isinstance(m, Tensor)} == {torch.float64}
        assert {m.device.type for m in sums if isinstance(m, Tensor)} == {"cpu"}


@pytest.mark.parametrize("name", CLASSES)
def test_no_encoder_computes_in_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = small(name)
    batch = batch_of([ROCKSALT, PEROVSKITE], encoder, torch.float32)
    with gpu(monkeypatch) as counted:
        move(encoder)
        found = encoder(batch.to(GPU, non_blocking=True))
        assert (found.device.type, found.dtype) == (GPU.type, torch.float32)
        assert counted.count > 10


def test_float64_on_the_gpu_and_mixed_devices_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with gpu(monkeypatch):
        with pytest.raises(AssertionError, match="float64 on the GPU"):
            torch.ones(2).to(GPU).double()
        with pytest.raises(AssertionError, match="float64 on the GPU"):
            torch.ones(2, dtype=torch.float64).to(GPU)
        with pytest.raises(Exception, match="same device"):
            torch.ones(2).to(GPU) + torch.ones(2)
        assert double(torch.ones(2).to(GPU)).device.type == "cpu"
    assert double(torch.ones(2)).dtype == torch.float64


def test_an_apple_gpu_is_chosen_where_it_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="finds no Apple GPU"):
        TrainerSettings(accelerator="mps").check("auto")
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert TrainerSettings().resolve_accelerator() == "mps"
    assert TrainerSettings(accelerator="mps").device == "cpu"  # of predictions after training
    assert TrainerSettings(accelerator="cpu").resolve_accelerator() == "cpu"
    assert TrainerSettings(precision="64-true").resolve_accelerator() == "cpu"
    for settings in (
        TrainerSettings(accelerator="mps", precision="64-true"),
        TrainerSettings(accelerator="mps", precision="bf16-mixed"),
        TrainerSettings(accelerator="mps", devices=2),
    ):
        with pytest.raises(ConfigError, match=r"trainer\.accelerator=cpu"):
            settings.check(ddp() if settings.devices > 1 else "auto")
    with pytest.raises(DeviceError, match=r"trainer\.accelerator=mps uses"):
        TrainerSettings(accelerator="gpu").check("auto")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert TrainerSettings().resolve_accelerator() == "gpu"
