"""Ready-to-use models: predictions with uncertainty and embeddings for crystals from any source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from crysldnet.artifacts import model_file, weights
from crysldnet.artifacts.provenance import labelled_crystals
from crysldnet.errors import CheckpointError, DeviceError
from crysldnet.inference.command import Refusals
from crysldnet.inference.predictor import (
    Embedder,
    LayersRead,
    Per,
    Predictor,
    check_for,
    embed_stream,
    one_of,
    predict_stream,
)
from crysldnet.inference.results import Embeddings, Predictions
from crysldnet.platforms import no_gpu
from crysldnet.training.calibrate import read_uncertainty_info

__all__ = [
    "Device",
    "Embedder",
    "Embeddings",
    "LayersRead",
    "Per",
    "Predictions",
    "Predictor",
    "Refusals",
    "check_for",
    "choose_device",
    "embed_stream",
    "load",
    "load_encoder",
    "predict_stream",
]

Device = Literal["auto", "cpu", "gpu"]


def choose_device(device: Device) -> torch.device:
    """Return the device to compute on.

    Raises:
        DataError: the device is unknown.
        DeviceError: no GPU is available.
    """
    one_of(Device, "device", device)
    if device == "gpu" and not torch.cuda.is_available():
        raise DeviceError(f"device=gpu: {no_gpu()}; or leave it out, to compute on the CPU")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def load(path: str | os.PathLike[str], *, device: Device = "auto") -> Predictor:
    """Load a finetuned model or an ensemble.

    Args:
        path: folder of a finetuning run, or a ``model.safetensors``.
        device: ``auto`` uses a GPU if available.

    Raises:
        CheckpointError: the model is missing or damaged.
        DeviceError: no GPU is available.
    """
    chosen = choose_device(device)
    path = Path(path)
    loaded, knowledge = model_file.load_property_models(path), read_uncertainty_info(path)
    model = loaded[0][0]
    if knowledge is not None:
        fits = len(knowledge.calibration.targets) == len(model.targets)
        if not fits or len(knowledge.training_set.scale) != model.encoder.width:
            raise CheckpointError(f"{path}: its calibration and its training set are of another model")
    labelled = labelled_crystals(model_file.model_files(path))
    return Predictor(loaded, knowledge, str(path), chosen, labelled)


def load_encoder(path: str | os.PathLike[str], *, device: Device = "auto") -> Embedder:
    """Load a pretrained encoder or that of a finetuned model.

    Args:
        path: run folder, ``encoder.safetensors``, ``model.safetensors``, or the name of an included or downloaded
            encoder.
        device: as in :func:`load`.

    Raises:
        CheckpointError: the encoder is missing or damaged.
        DeviceError: no GPU is available.
    """
    chosen = choose_device(device)
    path = weights.find(os.fspath(path))
    if path.is_dir() and (path / "encoder.safetensors").exists():
        path = path / "encoder.safetensors"
    if path.is_dir() or model_file.kind_of(path) == "property_model":
        return load(path, device=device)
    encoder, info = model_file.load_encoder(path)
    return Embedder(encoder, info, str(path), chosen)
