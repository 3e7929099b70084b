"""What a run was begun with, by content: a run that is resumed must find the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from crysldnet.data.store import file_hash
from crysldnet.errors import ConfigError

if TYPE_CHECKING:
    from crysldnet.data.datamodule import CrystalDataModule

INPUTS = "inputs.json"
"""File of the run folder."""


def hashes_of(**files: str | None) -> dict[str, str]:
    """Return the sha256 of each file that a key of the configuration names, where it names one."""
    from crysldnet.artifacts.provenance import encoder_file

    paths = {key: encoder_file(name) for key, name in files.items()}
    return {key: file_hash(path) for key, path in paths.items() if path is not None}


def inputs_of(data: CrystalDataModule, **files: str | None) -> dict[str, Any]:
    """Return what decides the numbers of a run besides its settings and the ids of its crystals, as plain values.

    Args:
        data: the crystals, set up.
        files: by key, what the configuration names as the file to start from.
    """
    store = data.store
    targets = {
        name: {"unit": unit, "type": _kind(store.type_of(name)), "classes": classes}
        for name, unit, classes in zip(data.targets, data.units, data.labels, strict=True)
    }
    values = data.target_values if data.target_values is not None else np.empty(0)
    descriptors = {}
    if data.descriptor_values is not None:
        descriptors = {
            "descriptors": dict(zip(data.descriptors, data.descriptor_units, strict=True)),
            "descriptor_values_sha256": _sha256(data.descriptor_values),
        }
    return {
        "files": hashes_of(**files),
        "dataset": store.metadata.get("dataset"),
        "targets": targets,
        "target_values_sha256": _sha256(values),
        **descriptors,
        "excluded": data.excluded,
    }


def _sha256(values: NDArray[np.float64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _kind(type_: pa.DataType) -> str:
    return "truth" if pa.types.is_boolean(type_) else "text" if pa.types.is_string(type_) else "number"


def refuse_other_inputs(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other inputs than a run was begun with.

    Raises:
        ConfigError: naming the first that differs.
    """
    for name, then, found in _differences("", before, now):
        if name.startswith("files."):
            key = name.removeprefix("files.")
            raise ConfigError(
                f"{key}: the file isn't the one that the run in {folder} was begun with: its sha256 was {then}, and is "
                f"{found} now; bring that file back, or begin another run",
                key,
            )
        raise ConfigError(
            f"the run in {folder} was begun with other data: {name} was {then!r} then, and is {found!r} now; "
            "bring them back, or begin another run",
            "data",
        )


def _differences(name: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Give the innermost names whose values differ, and both values; what a version didn't keep doesn't count."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in before if not name else {**before, **now}:
            yield from _differences(f"{name}.{key}" if name else key, before.get(key), now.get(key))
    elif before != now:
        yield name, before, now
