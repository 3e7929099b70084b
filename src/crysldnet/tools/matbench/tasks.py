"""A Matbench task: folds from the official package, crystals from the user's file or from this package."""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crysldnet.console import did_you_mean
from crysldnet.data.datasets import EMBEDDED, EMBEDDED_TARGETS
from crysldnet.data.store import CrystalStore, file_hash
from crysldnet.errors import ConfigError, DataError
from crysldnet.graphs.crystals import Crystals, from_lists

MATMINER_DATA = "MATMINER_DATA"
UNREADABLE = (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError)
"""Errors raised by readers of damaged files."""


def import_matbench() -> Any:
    """Return ``matbench.bench``, imported on first use because it takes seconds and reads a large file of folds."""
    try:
        from matbench import bench
    except ImportError as error:
        raise ConfigError(
            f"matbench isn't installed ({error}): pip install 'crysldnet[matbench]' && "
            "pip install --no-deps matbench==0.6",
            "tasks",
        ) from None
    logging.getLogger("matbench").setLevel(logging.ERROR)
    return bench


def all_metadata() -> Any:
    """Return Matbench's metadata of its tasks by name."""
    import_matbench()
    from matbench.metadata import mbv01_metadata

    return mbv01_metadata


def task_metadata(task: str) -> Any:
    """Return Matbench's metadata of a task.

    Raises:
        ConfigError: the task doesn't exist or has no structures.
    """
    metadata = all_metadata()
    fit = [name for name, m in metadata.items() if m.input_type == "structure"]
    if task in fit:
        return metadata[task]
    if task not in metadata:
        hint = did_you_mean(task, metadata, f"available: {', '.join(fit)}")
        raise ConfigError(f"tasks: Matbench has no task {task!r}; {hint}", "tasks")
    raise ConfigError(
        f"tasks: {task} can't be run: it gives compositions without structures, and the encoders need structures; "
        f"those that can be are: {', '.join(fit)}",
        "tasks",
    )


@dataclass(frozen=True)
class Source:
    """Source of a task's crystals."""

    name: str
    sha256: str
    official: bool

    @property
    def label(self) -> str:
        """Label for readers of the scores."""
        return "the official file" if self.official else f"not the official file ({self.name})"


def find_file(task: str) -> Path | None:
    """Return the user's file of a task, where matminer would look for it."""
    from matminer import datasets

    home = os.environ.get(MATMINER_DATA) or Path(datasets.__file__).parent
    file = Path(home).expanduser() / f"{task}.json.gz"
    return file if file.is_file() else None


def open_embedded(task: str) -> tuple[CrystalStore, Source]:
    """Return the included crystals of a task, and their source."""
    parquet = EMBEDDED / f"{task}.parquet"
    return CrystalStore.open(parquet), Source(f"embedded:{task}, re-encoded", file_hash(parquet), official=False)


def write_embedded(task: str, target: str, path: Path) -> Source:
    """Write the included crystals of a task as a file that matminer can read."""
    import pandas
    from matminer.utils.io import store_dataframe_as_json
    from pymatgen.core import Structure

    store, source = open_embedded(task)
    c = store.crystals
    atoms = [slice(begin, end) for begin, end in zip(c.ptr[:-1], c.ptr[1:], strict=True)]
    frame = pandas.DataFrame(
        {
            "structure": [
                Structure(lattice, c.numbers[own].tolist(), c.frac_coords[own].astype(np.float64))
                for lattice, own in zip(c.lattice, atoms, strict=True)
            ],
            target: store.numbers_of(EMBEDDED_TARGETS[task]),
        }
    )
    store_dataframe_as_json(frame, str(path), compression="gz", pbar=False)
    return source


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def find_source(name: str) -> Path | None:
    """Return the file of a task's crystals, or None if they are included in this package.

    Raises:
        ConfigError: the task can't be run.
        DataError: its crystals are missing.
    """
    metadata = task_metadata(name)
    file = find_file(name)
    if file is None and name not in EMBEDDED_TARGETS:
        raise DataError(
            f"{name}: its crystals aren't here; put {name}.json.gz ({metadata.url}) into a folder and name that "
            f"folder in the environment variable {MATMINER_DATA}. Without a file available: "
            f"{', '.join(EMBEDDED_TARGETS)}"
        )
    return file


def task_hashes(names: Sequence[str]) -> dict[str, str]:
    """Return the sha256 of the crystal file of each task.

    Raises:
        ConfigError: a task can't be run.
        DataError: its crystals are missing.
    """
    files = {name: find_source(name) for name in names}
    return {name: file_hash(file or EMBEDDED / f"{name}.parquet") for name, file in files.items()}


def _source_of(name: str, file: Path) -> Source:
    sha256 = file_hash(file)
    return Source(file.name, sha256, official=sha256 == task_metadata(name).hash)


def load_task(task: Any) -> Source:
    """Load the crystals of a ``MatbenchTask``, and return their source.

    Raises:
        DataError: the file is missing or damaged.
    """
    name, metadata = task.dataset_name, task.metadata
    file = find_source(name)
    with tempfile.TemporaryDirectory() as temporary:
        if file is None:
            source = write_embedded(name, metadata.target, Path(temporary) / f"{name}.json.gz")
        else:
            source = _source_of(name, file)
        with _environment(MATMINER_DATA, temporary if file is None else str(file.parent)):
            try:
                task.load()
            except UNREADABLE as error:
                raise DataError(f"{file}: not a readable data set of Matbench ({error})") from error
    if len(task.df) != metadata.n_samples:
        raise DataError(f"{file}: it has {len(task.df)} crystals, {name} has {metadata.n_samples}")
    return source


def read_targets(name: str) -> tuple[dict[str, float | bool], Source]:
    """Return a task's true targets by id, without building structures, and their source.

    Raises:
        DataError: the file is missing or damaged.
    """
    metadata = task_metadata(name)
    file = find_source(name)
    if file is None:
        store, source = open_embedded(name)
        values = store.numbers_of(EMBEDDED_TARGETS[name]).tolist()
        return dict(zip(store.ids.to_pylist(), values, strict=True)), source
    try:
        content = json.loads(gzip.decompress(file.read_bytes()))
        place = content["columns"].index(metadata.target)
        values = [row[place] for row in content["data"]]
    except UNREADABLE as error:
        raise DataError(f"{file}: not a readable data set of Matbench ({error})") from error
    digits = math.floor(math.log10(len(values))) + 1  # numbering of the package
    prefix = name.replace("matbench", "mb").replace("_", "-")
    return {f"{prefix}-{i:0{digits}d}": value for i, value in enumerate(values, 1)}, _source_of(name, file)


def target_values(task: Any, targets: Any) -> NDArray:
    """Return the targets of a task [n] as a store column: numbers, or booleans for classification."""
    return targets.to_numpy(bool if task.metadata.task_type == "classification" else np.float64)


def crystals_of(structures: Any) -> Crystals:
    """Convert a pandas series of pymatgen structures."""
    for name, structure in structures.items():
        if not structure.is_ordered:
            raise DataError(f"{name}: an atom site is shared by several species or partly empty")
    return from_lists(
        [structure.lattice.matrix for structure in structures],
        [np.array(structure.atomic_numbers, np.uint8) for structure in structures],
        [structure.frac_coords for structure in structures],
    )
