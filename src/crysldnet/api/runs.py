"""Run a command from Python with keyword arguments in place of ``key=value``."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crysldnet import cli
from crysldnet.config import argument, compose
from crysldnet.errors import ConfigError

if TYPE_CHECKING:
    from crysldnet.inference import Embedder, Predictor


@dataclass(frozen=True)
class Run:
    """A complete run.

    Attributes:
        folder: run folder.
        summary: the content of its ``summary.json``.
    """

    folder: Path
    summary: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float | None]:
        """Metrics by name, such as ``test/mae/band_gap``; for pretraining with the stage, ``vae/val/loss``."""
        stages = {s: self.summary.get(s, {}) for s in ("vae", "diffusion")}
        own = {name: value for name, value in self.summary.items() if "/" in name}
        return own | {f"{stage}/{name}": value for stage, values in stages.items() for name, value in values.items()}

    @cached_property
    def model(self) -> Embedder | Predictor:
        """The model, loaded on first use: a predictor, or after pretraining an encoder."""
        from crysldnet.inference import load, load_encoder

        return load_encoder(self.folder) if self.summary["command"] == "pretrain" else load(self.folder)

    def __repr__(self) -> str:
        main = [(name, value) for name, value in self.metrics.items() if name.startswith(("test/mae", "test/accuracy"))]
        return f"Run({', '.join([repr(str(self.folder)), *(f'{name}={value:.4g}' for name, value in main)])})"


def finetune(**settings: Any) -> Run:
    """Train a property model, like ``crysldnet finetune``.

    Args:
        settings: configuration keys and values. ``__`` replaces the dot in a key, as in
            ``data__path="my.store"``; a mapping sets several keys of a group, as in ``optimizer={"lr": 1e-3}``.

    Raises:
        ConfigError: a key is unknown or its value is invalid.
        DataError: the crystals are invalid.
    """
    return run_command("finetune", settings)


def pretrain(**settings: Any) -> Run:
    """Pretrain an encoder, like ``crysldnet pretrain``; arguments and errors as in :func:`finetune`."""
    return run_command("pretrain", settings)


def run_command(command: str, settings: Mapping[str, Any]) -> Run:
    """Run ``pretrain`` or ``finetune`` without changing the caller's random states and warning filters."""
    from lightning.pytorch.utilities.seed import isolate_rng

    from crysldnet.signals import RUN_NAME
    from crysldnet.training.run_folder import find_run

    words = arguments_of(command, dotted(command, settings))
    values = compose(command, [word for word in words if not word.startswith("data")]).values  # data may be files
    before = os.environ.get(RUN_NAME)
    with warnings.catch_warnings(), isolate_rng():
        cli.run([command, *words])
    named = os.environ.get(RUN_NAME)  # unchanged if the run was already complete
    if named is not None and named != before:
        folder: Path | None = Path(values["runs"]) / command / named.partition(":")[2]
    else:
        folder = find_run(values["runs"], command, values["name"])
    assert folder is not None
    return Run(folder, json.loads((folder / "summary.json").read_text()))


def dotted(command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain values by dotted key; mappings for groups are flattened."""
    groups = compose(command).groups
    found: dict[str, Any] = {}
    for name, value in settings.items():
        key = name.replace("__", ".")
        if isinstance(value, Mapping) and key.split(".")[0] in groups:
            found |= dotted(command, {f"{key}.{inner}": item for inner, item in value.items()})
        else:
            found[key] = _plain(key, value)
    return found


def _plain(key: str, value: Any) -> Any:
    """Return a value as plain YAML."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(key, item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(key, item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"{key}: {type(value).__name__} can't be a value of the configuration", key)


def arguments_of(command: str, values: Mapping[str, Any]) -> list[str]:
    """Return the command-line words that set these values."""
    groups = compose(command).groups
    return [
        f"{key}=[{','.join(map(str, value))}]" if key in groups and isinstance(value, list) else argument(key, value)
        for key, value in values.items()
    ]
