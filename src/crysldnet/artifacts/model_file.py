"""Files that outlive a run: encoder and property model.

Both are safetensors with weights and a metadata text in JSON: plain configuration, format version and provenance, and
the sha256 of every tensor and of that text. Nothing is unpickled. Reading is strict: a missing, extra or misshapen
tensor, different graph settings, a newer format or a changed byte is an error that names it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from crysldnet import plugins
from crysldnet.artifacts import weights
from crysldnet.artifacts.rebuild import EncoderInfo, ModelInfo, build_and_load, build_encoder, build_model, checked
from crysldnet.data.fingerprint import RANKS, Fingerprints
from crysldnet.encoders.protocol import Encoder
from crysldnet.errors import CheckpointError, DataError
from crysldnet.io import whole_file
from crysldnet.models.hybrid import NETWORK, HybridModel, TabularPart
from crysldnet.models.predictor import TargetModel

FORMAT_VERSION = 4
"""Newest readable version. Since 2, property models store more than weights. Since 3, the pretraining set is packed.
Since 4, a property model may have tabular members. A file has the lowest version that describes it.
"""
Kind = Literal["encoder", "pretraining", "property_model", "calibration"]
PREFIX = "pretraining_set."
"""Prefix of tensors that aren't weights but identify the crystals a model has seen, with or without labels."""
TABULAR = "tabular."
EXTRAS = (PREFIX, TABULAR, "training_set.", "calibration.")
"""Prefixes of all tensors that aren't weights."""


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    if tensor.numel():  # an empty tensor has no bytes to check
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def refuse_diverged(state: Mapping[str, Tensor], what: str) -> None:
    """Reject nonfinite weights."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{what} diverged: {name} isn't finite, and nothing was exported; lower optimizer.lr or "
                f"gradient_clip_val"
            )


def write(
    path: Path,
    kind: Kind,
    state: Mapping[str, Tensor],
    info: Mapping[str, Any],
    pretraining_set: NDArray[np.uint64] | None = None,
) -> None:
    """Write weights and metadata to a file atomically.

    Args:
        path: output file, usually ``*.safetensors``.
        kind: kind of the file.
        state: weights, and other tensors with a prefix in ``EXTRAS``.
        info: metadata as plain values.
        pretraining_set: packed fingerprints of the crystals that it has seen: in pretraining, and for a property model
            also in training and validation.
    """
    version = 1 if kind in ("encoder", "pretraining") else 2
    if pretraining_set is not None:
        version = 3
        state = {**state, f"{PREFIX}packed": torch.from_numpy(pretraining_set.view(np.int64))}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if any(name.startswith(TABULAR) for name in tensors):
        version = 4
    text = json.dumps({"format_version": version, "kind": kind, **info})
    digests = {name: _digest(tensor) for name, tensor in tensors.items()}
    digests["metadata"] = hashlib.sha256(text.encode()).hexdigest()
    content = save(tensors, metadata={"crysldnet": text, "sha256": json.dumps(digests)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(content)
    except OSError as error:
        raise CheckpointError(f"can't write {path}: {error.strerror}") from error


def read(path: str | os.PathLike[str], kind: Kind) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and verify a file; return metadata and weights, with 16-bit weights as float32.

    Raises:
        CheckpointError: it is missing, damaged, of another kind or of a newer format.
    """
    info, tensors = _read_all(path, kind)
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(EXTRAS)}
    return info, _widened(weights)


def _widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in tensors.items()}


def write_half_precision(source: Path, out: Path) -> None:
    """Rewrite an encoder file with 16-bit weights, at half the size.

    Raises:
        CheckpointError: the source isn't an encoder's file, or a weight overflows 16 bits.
    """
    info, tensors = _read_all(source, "encoder")
    state = {name: tensor for name, tensor in tensors.items() if not name.startswith(EXTRAS)}
    halved = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in state.items()}
    refuse_diverged(halved, f"{source} in 16 bits")
    known = {name: value for name, value in info.items() if name not in ("format_version", "kind")}
    write(out, "encoder", halved, known, read_pretraining_set(source))


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """Return the kind stated in a file without reading its tensors; None if missing."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("crysldnet", "{}")).get("kind")
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError):
        return None


def read_extra(path: str | os.PathLike[str], kind: Kind, prefix: str) -> dict[str, Tensor]:
    """Read the tensors with a prefix, which is removed; empty for files of earlier versions without them."""
    _, tensors = _read_all(path, kind)
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return found if prefix == PREFIX else _widened(found)


def read_pretraining_set(path: str | os.PathLike[str], kind: Kind = "encoder") -> NDArray[np.uint64] | None:
    """Read packed fingerprints of the crystals that an encoder or property model has seen; None if not recorded."""
    tensors = read_extra(path, kind, PREFIX)
    if not tensors:
        return None
    found = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    count = list(next(iter(tensors.values())).shape[:1])
    if found == {"packed": (torch.int64, count)}:
        return tensors["packed"].numpy().view(np.uint64)
    hashes, geometry = (torch.int64, count), (torch.float16, [*count, 1 + len(RANKS)])
    if found != {"ids": hashes, "formulas": hashes, "geometry": geometry}:  # formats 1 and 2
        raise CheckpointError(f"{path}: its pretraining set can't be used ({', '.join(sorted(found))})")
    return Fingerprints(**{name: tensor.numpy() for name, tensor in tensors.items()}).packed()


def _read_all(path: str | os.PathLike[str], kind: Kind) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file" if path.exists() else f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        info = json.loads(metadata.get("crysldnet", "null"))
        digests = json.loads(metadata.get("sha256", "null"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file, or cut off ({error})") from error
    if not isinstance(info, dict) or not isinstance(digests, dict):
        raise CheckpointError(f"{path}: not written by crysldnet (it has no crysldnet metadata)")
    if info.get("format_version") not in range(1, FORMAT_VERSION + 1) or info["format_version"] is True:
        raise CheckpointError(
            f"{path}: its format version is {info.get('format_version')}, this crysldnet reads 1 to {FORMAT_VERSION}; "
            "upgrade crysldnet"
        )
    if hashlib.sha256(metadata["crysldnet"].encode()).hexdigest() != digests.get("metadata"):
        raise CheckpointError(f"{path}: its metadata was changed after it was written (sha256 differs)")
    for name, tensor in state.items():
        if digests.get(name) != _digest(tensor):
            raise CheckpointError(f"{path}: tensor {name!r} is damaged (sha256 differs); copy or train it again")
    if info.get("kind") != kind:
        raise CheckpointError(f"{path}: its kind is {info.get('kind')!r}, where {kind!r} is needed")
    return info, state


def encoder_info(
    encoder: Encoder, config: Mapping[str, Any], provenance: Mapping[str, Any], parts: Iterable[object] = ()
) -> dict[str, Any]:
    """Return the metadata of an encoder file.

    Args:
        encoder: the encoder.
        config: its configuration.
        provenance: origin of its weights.
        parts: further objects of the file, which may be defined by plugins.
    """
    needed = plugins.of(type(part).__module__ for part in (*encoder.modules(), *parts))
    info = {"encoder": dict(config), "graph": asdict(encoder.graph), "provenance": dict(provenance)}
    return {**info, "plugins": needed} if needed else info


def load_encoder(path: str | os.PathLike[str]) -> tuple[Encoder, dict[str, Any]]:
    """Load a pretrained encoder, or that of a finetuned model, and its metadata."""
    finetuned = kind_of(path) == "property_model"
    info, state = read(path, "property_model" if finetuned else "encoder")
    if finetuned:
        state = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    said = checked(info, EncoderInfo, path)
    return build_and_load(lambda: build_encoder(said, path), "encoder", state, path), info


def load_property_model(path: str | os.PathLike[str]) -> tuple[TargetModel, dict[str, Any]]:
    """Load a finetuned model and its metadata; a run folder stands for its ``model.safetensors``.

    Raises:
        CheckpointError: it can't be read, or the folder holds an ensemble.
    """
    path = Path(path)
    if path.is_dir() and (members := _members(path)):
        raise CheckpointError(f"{path}: an ensemble of {len(members)} models; name one of them, as {members[0]}")
    path = path / "model.safetensors" if path.is_dir() else path
    info, state = read(path, "property_model")
    said = checked(info, ModelInfo, path)
    model = build_and_load(lambda: build_model(said, path), "model", state, path)
    if isinstance(model, HybridModel):
        _load_tabular(model, said, path)
    if not bool((model.std > 0).all()):
        raise CheckpointError(f"{path}: std, which scales its predictions, isn't positive")
    if model.descriptors is not None and not bool((model.descriptors.stats[1] > 0).all()):
        raise CheckpointError(f"{path}: descriptors.stats has a standard deviation that isn't positive")
    return model.eval(), info


def _load_tabular(model: HybridModel, info: ModelInfo, path: Path) -> None:
    try:
        model.tabular = TabularPart.from_file(read_extra(path, "property_model", TABULAR), info.tabular or {})
    except DataError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if len(model.tabular.stacks) != len(model.targets):
        raise CheckpointError(f"{path}: it has tabular members of {len(model.tabular.stacks)} targets")
    if len(model.networks) and any(NETWORK not in stack.weights for stack in model.tabular.stacks):
        raise CheckpointError(f"{path}: its networks have no weight beside the tabular members")


def load_property_models(path: str | os.PathLike[str]) -> list[tuple[TargetModel, dict[str, Any]]]:
    """Load all members of an ensemble, or the model of another run folder or file.

    An ensemble is a run folder whose ``summary.json`` lists its ``members``: folders in it, each with a
    ``model.safetensors``.

    Raises:
        CheckpointError: one can't be read, or their targets differ.
    """
    if str(path) in weights.named_encoders() and not Path(path).exists():
        raise CheckpointError(
            f"{path} is an encoder, not a finetuned model; make one: crysldnet finetune pretrained={path}"
        )
    loaded = [load_property_model(file) for file in model_files(Path(path))]
    first = loaded[0][1]
    for _, info in loaded[1:]:
        if (info["targets"], info["units"]) != (first["targets"], first["units"]):
            raise CheckpointError(f"{path}: its members predict {first['targets']} and {info['targets']}")
    return loaded


def model_files(path: Path) -> list[Path]:
    """Return the files of an ensemble's members, or of the model of another run folder or file."""
    folders = _members(path) or ([path] if path.is_dir() else [])
    return [folder / "model.safetensors" for folder in folders] or [path]


def _members(folder: Path) -> list[Path]:
    """Return the folders of an ensemble's members; empty if this is no ensemble."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        return [folder / Path(name).name for name in summary.get("members", [])]
    except (OSError, ValueError, RecursionError):
        return []
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder / 'summary.json'}: it doesn't list its members as names of folders") from error
