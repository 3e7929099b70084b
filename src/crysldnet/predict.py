"""Predict the properties of crystals in CIF or POSCAR files with a finetuned model."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from crysldnet.data.batch import make_batch
from crysldnet.data.crystals import Crystals, faults, from_lists
from crysldnet.data.elements import reduced_formula
from crysldnet.errors import CrysldnetError, DataError, DeviceError
from crysldnet.models.head import PropertyModel
from crysldnet.training.checkpoint import load_property_model

HEADER = ["file", "formula", "prediction", "unit", "target"]


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Every key of ``conf/predict.yaml``."""

    model: str
    files: str | list[str]
    out: str
    batch_size: int
    max_atoms: int
    device: Literal["auto", "cpu", "gpu"]


@torch.inference_mode()
def predict_crystals(model: PropertyModel, crystals: Crystals) -> NDArray[np.float64]:
    """Return predictions [B, T] in physical units."""
    batch = make_batch(crystals, model.encoder.graph).to(next(model.parameters()).device)
    return model(batch).double().cpu().numpy()


def run(config: PredictConfig, _values: dict[str, Any]) -> int:
    """Predict; return the exit status: 0 unless every file was refused.

    Files that can't be used are reported on standard error with the reason; the rest is predicted.
    """
    from crysldnet.data.structure_files import find_structure_files

    model, _ = load_property_model(config.model)
    if config.device == "gpu" and not torch.cuda.is_available():
        raise DeviceError("device=gpu: this machine has no GPU; use device=cpu")
    model = model.to(
        "cuda" if config.device == "gpu" or (config.device == "auto" and torch.cuda.is_available()) else "cpu"
    )
    files = find_structure_files(config.files)
    refused = written = 0
    with _sink(config.out) as sink:
        writer = csv.writer(sink)
        writer.writerow(HEADER)
        chunks = [files[start : start + config.batch_size] for start in range(0, len(files), config.batch_size)]
        for chunk in track(chunks, "Predicting", disable=len(chunks) < 2, transient=True):
            crystals, names, reasons = _read(chunk, config.max_atoms)
            for reason in reasons:
                print(f"refused: {reason}", file=sys.stderr)  # noqa: T201
            refused += len(reasons)
            if names:
                written += _write(writer, model, crystals, names)
        if not written:
            raise DataError(f"none of the {len(files)} files could be used")
    print(f"{written} crystals predicted, {refused} files refused: {config.out}", file=sys.stderr)  # noqa: T201
    return 0


def _read(files: list[Path], max_atoms: int) -> tuple[Crystals, list[Path], list[str]]:
    """Return the crystals that can be used, the files they are from, and why the others can't."""
    from crysldnet.data.structure_files import read_structure

    read, names, refused = [], [], []
    for file in files:
        try:
            read.append(read_structure(file))
            names.append(file)
        except CrysldnetError as error:
            refused.append(str(error))
    crystals = from_lists(*zip(*read, strict=True)) if read else from_lists([], [], [])
    sound = []
    for place, reason in enumerate(faults(crystals, max_atoms=max_atoms)):
        if reason is None:
            sound.append(place)
        else:
            refused.append(f"{names[place]}: {reason}")
    return crystals.take(np.array(sound, np.int64)), [names[place] for place in sound], refused


@contextmanager
def _sink(out: str) -> Iterator[IO[str]]:
    """Open the output; a file appears under its name when it is whole."""
    if out == "-":
        yield sys.stdout
        return
    path = Path(out)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("w", newline="") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise DataError(f"can't write {out}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def _write(writer: Any, model: PropertyModel, crystals: Crystals, names: list[Path]) -> int:
    predicted = predict_crystals(model, crystals)
    for i, name in enumerate(names):
        formula = reduced_formula(crystals.numbers[crystals.ptr[i] : crystals.ptr[i + 1]])
        for place, target in enumerate(model.targets):
            writer.writerow([str(name), formula, f"{predicted[i, place]:.6g}", model.units[place], target])
    return len(names)
