"""CrysLDNet: latent diffusion pretraining and finetuning of crystal graph encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crysldnet.inference import load, load_encoder

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_encoder"]


def __getattr__(name: str) -> Any:
    """Import what loads models when it is asked for, so that ``import crysldnet`` stays light."""
    if name in ("load", "load_encoder"):
        from crysldnet import inference

        return getattr(inference, name)
    raise AttributeError(f"module 'crysldnet' has no attribute {name!r}")
