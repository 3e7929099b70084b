"""Content of a run's inputs, which must be unchanged on resume."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from crysldnet import plugins
from crysldnet.data.store import file_hash
from crysldnet.errors import ConfigError

if TYPE_CHECKING:
    from crysldnet.data.datamodule import CrystalDataModule

INPUTS = "inputs.json"
"""File name in the run folder."""


def hashes_of(**files: str | None) -> dict[str, str]:
    """Return the sha256 of each file named by a configuration key."""
    from crysldnet.artifacts.provenance import encoder_file

    paths = {key: encoder_file(name) for key, name in files.items()}
    return {key: file_hash(path) for key, path in paths.items() if path is not None}


def plugin_hashes(names: Sequence[str]) -> dict[str, str]:
    """Return the sha256 of each plugin; for a package, that of the sha256 of its files."""
    hashes = {name: [file_hash(file) for file in files] for name, files in plugins.files_of(names).items()}
    return {
        name: own[0] if len(own) == 1 else hashlib.sha256("".join(own).encode()).hexdigest()
        for name, own in hashes.items()
    }


def inputs_of(data: CrystalDataModule, **files: str | None) -> dict[str, Any]:
    """Return the inputs that determine a run besides settings and crystal ids, as plain values.

    Args:
        data: the crystals, set up.
        files: initial files named in the configuration, by key.
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
    """Reject a resume with inputs that differ from the original ones.

    Raises:
        ConfigError: naming the first difference.
    """
    for name, then, found in _differences("", before, now):
        if name.startswith(("files.", "plugins.")):
            key = name.removeprefix("files.")
            raise ConfigError(
                f"{key}: the file isn't the one that the run in {folder} was started with: its sha256 was {then}, and "
                f"is {found} now; restore that file, or start another run",
                key,
            )
        raise ConfigError(
            f"the run in {folder} was started with other data: {name} was {then!r} then, and is {found!r} now; "
            "restore them, or start another run",
            "data",
        )


def _differences(name: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the innermost keys whose values differ, with both values; keys missing in older versions are ignored."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in before if not name else {**before, **now}:
            yield from _differences(f"{name}.{key}" if name else key, before.get(key), now.get(key))
    elif before != now:
        yield name, before, now
