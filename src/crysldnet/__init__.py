"""CrysLDNet: latent diffusion pretraining and finetuning of crystal graph encoders."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crysldnet.api.estimators import CrystalClassifier, CrystalRegressor, CrystalTransformer
    from crysldnet.api.runs import Run, finetune, pretrain
    from crysldnet.inference import load, load_encoder

__version__ = "0.2.0"
__all__ = [
    "CrystalClassifier",
    "CrystalRegressor",
    "CrystalTransformer",
    "__version__",
    "finetune",
    "load",
    "load_encoder",
    "pretrain",
]

_PLACES = {
    "CrystalClassifier": "api.estimators",
    "CrystalRegressor": "api.estimators",
    "CrystalTransformer": "api.estimators",
    "load": "inference",
    "load_encoder": "inference",
}
"""Module of each public name, imported on first use so that ``import crysldnet`` stays fast."""


class CommandModule(ModuleType):
    """A callable command module: ``crysldnet.finetune(epochs=5)``."""

    def __call__(self, **settings: Any) -> Run:
        """Run the command; see :func:`crysldnet.api.runs.finetune`."""
        from crysldnet.api.runs import run_command

        return run_command(self.__name__.rpartition(".")[2], settings)


def __getattr__(name: str) -> Any:
    if name in ("finetune", "pretrain"):
        return import_module(f"crysldnet.{name}")
    if name in _PLACES:
        return getattr(import_module(f"crysldnet.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'crysldnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
