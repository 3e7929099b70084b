"""Keys and values of earlier versions in files and on command lines; a note states the new name once."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from crysldnet.console import note

KEYS = {
    "model.": "latent.",
    "latent.log_variance": "latent.log_variance_init",
    "latent.normalise": "latent.normalize",
    "trainer.nodes": "trainer.num_nodes",
    "trainer.accumulate": "trainer.accumulate_grad_batches",
    "trainer.log_every": "trainer.log_every_n_steps",
    "trainer.time_limit_minutes": "trainer.max_time",
    "trainer.average_last": "trainer.swa_fraction",
    "trainer.max_bad_steps": "trainer.max_nonfinite_steps",
    "optimizer.final": "optimizer.min_lr_ratio",
    "gradient_clip": "gradient_clip_val",
    "stages.vae.gradient_clip": "stages.vae.gradient_clip_val",
    "stages.diffusion.gradient_clip": "stages.diffusion.gradient_clip_val",
    "element_references": "atomic_references",
}
"""Old dotted key to new name; nested keys follow. A key that ends in a dot is a group without a value."""
TARGET_TYPES = {"number": "regression", "two_part": "hurdle", "classes": "classification"}
VALUES = {
    "target_types.*": TARGET_TYPES,
    "mode": {"gradual": "gradual_unfreezing"},
    "encoder.variant": {"clean": "corrected"},
    "graph.potential": {"clean": "corrected"},
    "data.split.by": {"published": "official", "element": "leave_element_out", "cluster": "leave_cluster_out"},
    "strategy": {"single": "auto"},
    "defaults.strategy": {"single": "auto"},
    "strategy._target_": {"crysldnet.training.strategies.single": "crysldnet.training.strategies.auto"},
}
"""Pattern of a dotted key to its old values and their new names."""

_noted: set[str] = set()


def new_key(key: str) -> str:
    """Return the current name of a dotted key."""
    for old, new in KEYS.items():
        if key == old or key.startswith(f"{old.rstrip('.')}."):
            key = new + key[len(old) :]
    return key


def new_value(key: str, value: Any) -> Any:
    """Return a value, or nested values, with the current names of the key's values."""
    if isinstance(value, Mapping):
        return {name: new_value(f"{key}.{name}", item) for name, item in value.items()}
    if isinstance(value, list):
        return [new_value(key, item) for item in value]
    if isinstance(value, str):
        for pattern, names in VALUES.items():
            if value in names and fnmatchcase(key, pattern):
                return names[value]
    return value


def renamed(values: Mapping[Any, Any], prefix: str = "", *, quiet: bool = False) -> dict[Any, Any]:
    """Return nested plain values with current names.

    Args:
        values: content of a file.
        prefix: dotted key of the parent.
        quiet: print no note.
    """
    found: dict[Any, Any] = {}
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        below = isinstance(value, Mapping)
        now = new_key(f"{key}.")[:-1] if below else new_key(key)
        if not quiet:
            tell(key, now)
        if below:
            value = renamed(value, now, quiet=quiet)
        elif value != (other := new_value(now, value)):
            if not quiet:
                tell(f"{now}={value}", f"{now}={other}")
            value = other
        found[name if now == key else now.rpartition(".")[2]] = value
    return found


def renamed_argument(key: str, value: Any) -> tuple[str, Any]:
    """Return a command-line key and value with current names."""
    now, other = new_key(key), new_value(new_key(key), value)
    tell(key, now)
    if other != value:
        tell(f"{now}={value}", f"{now}={other}")
    return now, other


def tell(old: str, new: str) -> None:
    """Print a note about a new name once."""
    if old != new and old not in _noted:
        _noted.add(old)
        note(f"{old} is called {new} now; the old name still works")
