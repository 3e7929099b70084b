"""Files that outlive a run: the encoder checkpoint and the property model.

Both are safetensors: weights, and in the metadata one JSON text with the plain configuration, the format version and
the provenance, and the sha256 of every tensor and of that text. Nothing is unpickled. Reading is strict: a missing,
surplus or misshapen tensor, other graph settings, a newer format or a changed byte is an error that says which.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from crysldnet.build import build
from crysldnet.data.fingerprint import Fingerprints
from crysldnet.encoders.protocol import Encoder
from crysldnet.errors import CheckpointError, ConfigError
from crysldnet.models.head import PropertyModel
from crysldnet.models.target import make_target
from crysldnet.training.atomic import whole_file

FORMAT_VERSION = 2
"""What is read. Since 2, property models keep more than weights; encoders are still written as 1."""
Kind = Literal["encoder", "pretraining", "property_model", "calibration"]
PREFIX = "pretraining_set."
"""Of the tensors that aren't weights, but say which crystals a model has seen, with labels or without."""
EXTRAS = (PREFIX, "training_set.", "calibration.")
"""Prefixes of all tensors that aren't weights."""


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    if tensor.numel():  # an empty tensor has no bytes to look at
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def refuse_diverged(state: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that aren't finite.

    Raises:
        CheckpointError: naming the first such tensor.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{what} diverged: {name} isn't finite, and nothing was exported; lower optimizer.lr or gradient_clip"
            )


def write(
    path: Path,
    kind: Kind,
    state: Mapping[str, Tensor],
    info: Mapping[str, Any],
    pretraining_set: Fingerprints | None = None,
) -> None:
    """Write weights and what is known of them; the file appears whole or not at all.

    Args:
        path: the file, usually ``*.safetensors``.
        kind: what it is.
        state: the weights, and what else is kept with one of the prefixes in ``EXTRAS``.
        info: plain values.
        pretraining_set: the crystals that it has seen: those of an encoder's pretraining, and those that a property
            model was trained and chosen on besides.
    """
    if pretraining_set is not None:
        state = {**state, **{PREFIX + name: torch.from_numpy(a) for name, a in vars(pretraining_set).items()}}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    version = 1 if kind in ("encoder", "pretraining") else FORMAT_VERSION
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
    """Read and verify a file; return its information and its weights.

    Raises:
        CheckpointError: there is no such file, or it is damaged, of another kind or of a newer format.
    """
    info, tensors = _read_all(path, kind)
    return info, {name: tensor for name, tensor in tensors.items() if not name.startswith(EXTRAS)}


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """Return the kind that a file says it is, without reading its tensors; None where it says nothing."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("crysldnet", "{}")).get("kind")
    except (SafetensorError, OSError, ValueError, AttributeError):
        return None


def read_extra(path: str | os.PathLike[str], kind: Kind, prefix: str) -> dict[str, Tensor]:
    """Read the tensors of one prefix, without it; none where the file has none, as those of earlier versions."""
    _, tensors = _read_all(path, kind)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read_pretraining_set(path: str | os.PathLike[str], kind: Kind = "encoder") -> Fingerprints | None:
    """Read which crystals an encoder, or a property model, has seen; None where its file doesn't say."""
    arrays = {name: tensor.numpy() for name, tensor in read_extra(path, kind, PREFIX).items()}
    try:
        return Fingerprints(**arrays) if arrays else None
    except TypeError as error:
        raise CheckpointError(f"{path}: its pretraining set isn't complete ({', '.join(arrays)})") from error


def _read_all(path: str | os.PathLike[str], kind: Kind) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        info = json.loads(metadata.get("crysldnet", "null"))
        digests = json.loads(metadata.get("sha256", "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file, or cut off ({error})") from error
    if not isinstance(info, dict) or not isinstance(digests, dict):
        raise CheckpointError(f"{path}: not written by crysldnet (it has no crysldnet metadata)")
    if not isinstance(info.get("format_version"), int) or info["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: its format version is {info.get('format_version')}, this crysldnet reads up to {FORMAT_VERSION}; "
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


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Copy weights into a module of exactly the same keys and shapes.

    Raises:
        CheckpointError: naming the first keys that are missing, surplus or of another shape.
    """
    own = module.state_dict()
    problems = []
    for title, keys in (("missing", own.keys() - state.keys()), ("surplus", state.keys() - own.keys())):
        if keys:
            shown = ", ".join(sorted(keys)[:3])
            problems.append(f"{len(keys)} {title} ({shown}{', …' if len(keys) > 3 else ''})")
    for name in sorted(own.keys() & state.keys()):
        if own[name].shape != state[name].shape:
            problems.append(f"{name} has shape {list(state[name].shape)}, the model needs {list(own[name].shape)}")
    if problems:
        raise CheckpointError(f"{path}: its tensors don't fit the model: {'; '.join(problems[:4])}")
    module.load_state_dict(dict(state), strict=True)


def encoder_info(encoder: Encoder, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an encoder's file says of it."""
    return {"encoder": dict(config), "graph": asdict(encoder.graph), "provenance": dict(provenance)}


def build_encoder(info: Mapping[str, Any], path: str | os.PathLike[str]) -> Encoder:
    """Build the encoder that a file describes, with fresh weights.

    Raises:
        CheckpointError: this version can't build it, or builds it with another graph.
    """
    try:
        encoder: Encoder = build(info["encoder"], "encoder")
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{path}: its encoder can't be built: {error}") from error
    check_graph(encoder, info, path)
    return encoder


def check_graph(encoder: Encoder, info: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Check that an encoder asks for the graph that a file's weights were trained on.

    Raises:
        CheckpointError: naming the setting that differs.
    """
    for key, (stored, own) in encoder.graph.differences(info.get("graph", {})).items():
        raise CheckpointError(
            f"{path}: it was trained on graphs with {key}={stored}, here they are built with {key}={own}"
        )


def load_encoder(path: str | os.PathLike[str]) -> tuple[Encoder, dict[str, Any]]:
    """Load a pretrained encoder, or that of a finetuned model, and what its file says of it."""
    finetuned = kind_of(path) == "property_model"
    info, state = read(path, "property_model" if finetuned else "encoder")
    if finetuned:
        state = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    encoder = build_encoder(info, path)
    load_strictly(encoder, state, path)
    return encoder, info


def load_property_model(path: str | os.PathLike[str]) -> tuple[PropertyModel, dict[str, Any]]:
    """Load a finetuned model, and what its file says of it; a run folder stands for its ``model.safetensors``.

    Raises:
        CheckpointError: it can't be read, or the folder holds an ensemble.
    """
    path = Path(path)
    if path.is_dir() and (members := _members(path)):
        raise CheckpointError(f"{path}: an ensemble of {len(members)} models; name one of them, as {members[0]}")
    path = path / "model.safetensors" if path.is_dir() else path
    info, state = read(path, "property_model")
    encoder = build_encoder(info, path)
    try:
        types = [make_target(d) for d in info.get("target_types", [{"type": "number"}] * len(info["targets"]))]
        head = build(info["head"], "head", width=encoder.width, outputs=sum(kind.outputs for kind in types))
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{path}: its head can't be built: {error}") from error
    model = PropertyModel(
        encoder=encoder,
        head=head,
        targets=info["targets"],
        units=info["units"],
        types=types,
        referenced=info.get("element_references", []),
    )
    load_strictly(model, state, path)
    return model.eval(), info


def load_property_models(path: str | os.PathLike[str]) -> list[tuple[PropertyModel, dict[str, Any]]]:
    """Load all members of an ensemble, or the one model of another run folder or file.

    An ensemble is a run folder whose ``summary.json`` lists its ``members``: folders in it, each with a
    ``model.safetensors``.

    Raises:
        CheckpointError: one of them can't be read, or they don't predict the same.
    """
    loaded = [load_property_model(member) for member in _members(Path(path)) or [Path(path)]]
    first = loaded[0][1]
    for _, info in loaded[1:]:
        if (info["targets"], info["units"]) != (first["targets"], first["units"]):
            raise CheckpointError(f"{path}: its members predict {first['targets']} and {info['targets']}")
    return loaded


def _members(folder: Path) -> list[Path]:
    """Return the folders of an ensemble's members; none where this is no ensemble."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return []
    return [folder / Path(name).name for name in summary.get("members", [])]
