"""Which settings may change when a run is resumed."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from crysldnet.config.compose import FILES, Composition
from crysldnet.config.files import read_saved
from crysldnet.console import note
from crysldnet.errors import ConfigError

FREE = (
    *("name", "runs", "resume", "logger", "strategy.timeout_minutes"),
    *(f"data.{key}" for key in ("num_workers", "keep_edges_mb", "graph_on")),
    *(
        f"trainer.{key}"
        for key in ("progress_bar", "log_every_n_steps", "activation_checkpointing", "keep_checkpoints")
    ),
    *(f"trainer.{key}" for key in ("checkpoint_every_steps", "checkpoint_every_minutes", "max_time")),
    *("baselines", "parallel", "folds", "out", "algorithm", "authors"),
)
"""Keys that can't change a result."""
EXECUTION = (
    "strategy",
    *(f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "compile", "deterministic")),
)
"""Keys that change a result in its last digits. They may change, with a message."""
LENGTH = {
    "pretrain": ("stages.vae.epochs", "stages.diffusion.epochs"),
    "finetune": ("epochs",),
    "matbench": (),
    "jarvis": (),
}
"""Keys of each command that set the length of training, for which learning rates are planned."""
ALSO = {
    command: (*keys, "trainer.accumulate_grad_batches", "trainer.max_nonfinite_steps")
    for command, keys in LENGTH.items()
    if keys
}
"""Further keys of each command that may change, with a message. All folds of a benchmark are trained alike."""


def refuse_changed(command: str, composition: Composition, saved: Path, *, complete: bool) -> set[str]:
    """Reject a resume with incompatible settings and print what changes a result; return the keys that differ.

    Args:
        command: pretrain, finetune or matbench.
        composition: the current configuration.
        saved: the ``config.yaml`` of the run.
        complete: whether the run is complete.
    """
    before, _ = read_saved(saved)
    given = [name for name in composition.given if name not in composition.groups]
    compared = (("split.json", ("data.path",)), ("inputs.json", FILES))  # by content, when the run continues
    free = [*FREE, *(key for file, keys in compared if (saved.parent / file).exists() for key in keys)]
    changed = set()
    for name, then, now in _differences("", before, composition.values, given):
        changed.add(name.partition(".")[0])
        length = name in LENGTH[command]
        if complete and length:
            raise ConfigError(
                f"{name}: the run in {saved.parent} is complete with {name}={then}, for which its learning rates were "
                f"planned; for {name}={now} begin another, name=…",
                name,
            )
        if _is_in(name, free):
            continue
        if not _is_in(name, (*EXECUTION, *ALSO.get(command, ()))):
            raise ConfigError(
                f"{name}: the run in {saved.parent} was started with {name}={then}, not {now}; "
                "resume it unchanged, or start another",
                name,
            )
        effect = "its learning rates stay as they were planned" if length else "its results may change"
        note(f"{name} is {now} from here on, and was {then} at the start of the run; {effect}")
    return changed


def pin_files(composition: Composition) -> Composition:
    """Replace links such as ``latest`` in the initial files of a run, which may later point elsewhere."""
    values, links = dict(composition.values), dict(composition.links)
    for key in FILES:
        named = values.get(key)
        if isinstance(named, str) and (pinned := _without_links(named)) != named:
            values[key], links[key] = pinned, named
    return replace(composition, values=values, links=links)


def _without_links(name: str) -> str:
    path = Path(name)
    real = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    if not path.exists() or real == Path.cwd() / path:
        return name
    relative = os.path.relpath(real)
    return str(real) if path.is_absolute() or relative.startswith("..") else relative


def _is_in(name: str, keys: Collection[str]) -> bool:
    return any(name == key or name.startswith(f"{key}.") for key in keys)


def _differences(key: str, before: Any, now: Any, given: Collection[str]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the innermost keys whose values differ, with both values.

    Keys unknown to an earlier version are ignored unless given now.
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for part in {**now, **(before if key else {})}:
            name = f"{key}.{part}" if key else part
            if part in before or _is_given(name, given):
                yield from _differences(name, before.get(part), now.get(part), given)
    elif before != now:
        yield key, before, now


def _is_given(key: str, given: Collection[str]) -> bool:
    """Return whether the command line sets a key, a part of it, or a group that contains it."""
    return any(one == key or one.startswith(f"{key}.") or key.startswith(f"{one}.") for one in given)
