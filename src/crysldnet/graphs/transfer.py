"""Copy many tensors to a device at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes; each tensor starts at a multiple, which vectorized kernels need."""
ONE_BY_ONE = ("cpu", "mps")
"""Devices to which tensors are copied separately, and waited for."""


def pack(tensors: Sequence[Tensor], *, pin: bool = False) -> list[Tensor]:
    """Return copies of CPU tensors that share one storage, page-locked if requested."""
    offsets, total = [], 0
    for tensor in tensors:
        offsets.append(total)
        total += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(total, dtype=torch.uint8, pin_memory=pin)
    packed = _in_buffer(buffer, tensors, offsets)
    for copy, tensor in zip(packed, tensors, strict=True):
        copy.copy_(tensor)
    return packed


def is_packed(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors are contiguous and share one storage."""
    contiguous = all(tensor.is_contiguous() for tensor in tensors)
    return contiguous and len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def copy_to(tensors: Sequence[Tensor], device: torch.device, *, non_blocking: bool = False) -> list[Tensor]:
    """Copy tensors to a device: from the CPU to an accelerator as one buffer, else one by one."""
    differentiable = any(tensor.requires_grad for tensor in tensors)
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    if not tensors or differentiable or not on_cpu or device.type in ONE_BY_ONE:
        return [tensor.to(device, non_blocking=non_blocking and device.type not in ONE_BY_ONE) for tensor in tensors]
    packed = tensors if is_packed(tensors) else pack(tensors, pin=device.type == "cuda")
    buffer = torch.empty(0, dtype=torch.uint8).set_(packed[0].untyped_storage())
    starts = [int(tensor.storage_offset()) * tensor.element_size() for tensor in packed]
    return _in_buffer(buffer.to(device, non_blocking=non_blocking), packed, starts)


def _in_buffer(buffer: Tensor, like: Sequence[Tensor], starts: Sequence[int]) -> list[Tensor]:
    """Return tensors of the same types and shapes at given bytes of a buffer.

    They aren't views for autograd, so that changing one in place doesn't invalidate the others.
    """
    storage = buffer.untyped_storage()
    return [
        torch.empty(0, dtype=tensor.dtype, device=buffer.device).set_(
            storage, start // tensor.element_size(), tensor.shape, _strides(tensor.shape)
        )
        for tensor, start in zip(like, starts, strict=True)
    ]


def _strides(shape: Sequence[int]) -> list[int]:
    """Return the strides of a contiguous tensor."""
    return [math.prod(shape[place + 1 :]) for place in range(len(shape))]
