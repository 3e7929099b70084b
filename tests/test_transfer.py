"""A batch reaches a device in one copy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.split import Split
from crysldnet.graphs import transfer
from crysldnet.graphs.batch import CorruptionTargets, CrystalBatch
from crysldnet.graphs.corruption import Corruption
from crysldnet.graphs.spec import GraphSpec

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Count copies to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        source = [arg for arg in args if isinstance(arg, Tensor)]
        if isinstance(out, Tensor) and source and out.device != source[-1].device:
            self.count += 1
        return out


def data_module() -> CrystalDataModule:
    return CrystalDataModule(
        path="embedded:mp_starter",
        graph=GraphSpec(k=8),
        split=Split(by="random", seed=0),
        corruption=Corruption(mask_fraction=0.3, displacement=0.1, strain=0.05),
        with_clean=True,
        batch_size=8,
    )


@pytest.fixture(scope="module")
def module() -> CrystalDataModule:
    module = data_module()
    module.setup()
    return module


@pytest.fixture(scope="module")
def batch(module: CrystalDataModule) -> CrystalBatch:
    return next(iter(module.train_dataloader()))


def tensors_of(batch: CrystalBatch | CorruptionTargets, prefix: str = "") -> dict[str, Tensor]:
    found = {}
    for name, value in vars(batch).items():
        if isinstance(value, CrystalBatch | CorruptionTargets):
            found |= tensors_of(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            found[prefix + name] = value
    return found


def test_a_batch_crosses_in_one_copy_with_types_and_shapes(module: CrystalDataModule, batch: CrystalBatch) -> None:
    with Copies() as copies:
        moved = module.transfer_batch_to_device(batch, META, 0)
    assert copies.count == 1
    before, after = tensors_of(batch), tensors_of(moved)
    assert before.keys() == after.keys()
    assert {"undo.masked", "clean.positions"} <= before.keys()
    for name, tensor in before.items():
        assert (after[name].device, after[name].dtype, after[name].shape) == (META, tensor.dtype, tensor.shape)
    assert moved.largest == batch.largest


def test_separate_copies_would_be_counted(batch: CrystalBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "ONE_BY_ONE", ("meta",))
    with Copies() as copies:
        batch.to("meta")
    assert copies.count == len(tensors_of(batch))


def test_a_batch_that_was_packed_before_isnt_packed_again(batch: CrystalBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = batch._replaced(transfer.pack)
    monkeypatch.setattr(transfer, "pack", lambda *_, **__: pytest.fail("packed twice"))
    with Copies() as copies:
        packed.to("meta")
    assert copies.count == 1


@pytest.mark.parametrize("before", [lambda batch: batch, lambda batch: batch._replaced(transfer.pack)])
def test_a_packed_batch_has_the_same_values(
    batch: CrystalBatch, before: Callable[[CrystalBatch], CrystalBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "ONE_BY_ONE", ())  # treat the CPU as an accelerator
    moved = tensors_of(before(batch).to("cpu"))
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved.values()}) == 1
    for name, tensor in tensors_of(batch).items():
        assert torch.equal(moved[name], tensor), name
        assert moved[name].data_ptr() % transfer.ALIGNMENT == 0


def test_empty_and_strided_tensors_keep_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "ONE_BY_ONE", ())
    tensors = [torch.zeros(0, 3), torch.arange(6).reshape(2, 3).T, torch.tensor([True]), torch.tensor(2.5)]
    moved = transfer.copy_to(tensors, torch.device("cpu"))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, moved, strict=True))
    alone = transfer.copy_to(tensors[1:2], torch.device("cpu"))
    assert torch.equal(alone[0], tensors[1])


def test_one_tensor_changed_in_place_leaves_the_gradient_of_another(batch: CrystalBatch) -> None:
    packed = batch._replaced(transfer.pack)
    weight = torch.ones(3, requires_grad=True)
    loss = (packed.positions * weight).square().sum()
    packed.edge_vec.zero_()
    loss.backward()
    assert torch.allclose(weight.grad, 2 * batch.positions.square().sum(0), rtol=1e-4)


def test_on_the_cpu_nothing_is_copied(batch: CrystalBatch) -> None:
    assert all(a is b for a, b in zip(tensors_of(batch).values(), tensors_of(batch.to("cpu")).values(), strict=True))


def test_tensors_with_gradients_keep_them() -> None:
    tensors = [torch.ones(2, requires_grad=True), torch.zeros(3)]
    assert transfer.copy_to(tensors, META)[0].requires_grad
