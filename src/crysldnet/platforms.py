"""What differs from one machine to another: devices and memory."""

from __future__ import annotations

_OF_THE_CPU = ("can't allocate memory", "not enough memory: you tried to allocate")
"""What torch's allocator for CPUs says."""


def no_gpu() -> str:
    """Return why there is no GPU to compute on, as far as torch knows."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs alone; for a GPU install a build of torch for CUDA"
    return "torch finds no GPU on this machine (does nvidia-smi list one?)"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, of a GPU or of the machine."""
    named = type(error).__name__ == "OutOfMemoryError"  # torch's, which needn't be imported for this
    return isinstance(error, MemoryError) or named or any(text in str(error) for text in _OF_THE_CPU)
