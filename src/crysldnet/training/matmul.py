"""Precision of float32 matrix products on GPUs."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_only

from crysldnet.console import note

MatmulPrecision = Literal["highest", "high", "medium"]
FORMATS: dict[MatmulPrecision, str] = {"highest": "float32", "high": "TF32", "medium": "bfloat16 or TF32"}
"""Format of the factors on a GPU with tensor cores."""


def set_matmul_precision(chosen: MatmulPrecision | None, accelerator: Literal["cpu", "gpu", "mps"]) -> None:
    """Set the precision of float32 matrix products on GPUs, by default ``high``, and print it; do nothing elsewhere."""
    if accelerator != "gpu":
        return
    precision: MatmulPrecision = chosen or "high"
    torch.set_float32_matmul_precision(precision)
    rank_zero_only(note)(
        f"matrix products of float32 are computed in {FORMATS[precision]} (trainer.matmul_precision={precision})"
    )
