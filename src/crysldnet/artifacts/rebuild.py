"""Build encoders and property models from the metadata of their files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from crysldnet.build import build
from crysldnet.encoders.protocol import Encoder
from crysldnet.errors import CheckpointError
from crysldnet.models.descriptors import Descriptors
from crysldnet.models.head import PropertyModel, build_network
from crysldnet.models.hybrid import HybridModel
from crysldnet.models.per import Per
from crysldnet.models.predictor import TargetModel
from crysldnet.models.targets import TargetType, make_target
from crysldnet.renames import renamed


class EncoderInfo(BaseModel):
    """Metadata of an encoder file."""

    model_config = ConfigDict(strict=True)
    encoder: dict[str, Any]
    graph: dict[str, Any]


class ModelInfo(EncoderInfo):
    """Metadata of a property model file."""

    head: dict[str, Any]
    recipe: Literal["network", "frozen", "hybrid"] = "network"
    networks: int = Field(0, ge=0, le=1000)
    tabular: dict[str, Any] | None = None
    targets: list[str] = Field(min_length=1)
    units: list[str]
    target_types: list[dict[str, Any]] | None = None
    atomic_references: list[str] = []
    descriptors: list[str] = []
    descriptor_units: list[str] = []
    target_per: dict[str, Per] = {}


def checked(info: Mapping[str, Any], kind: type[BaseModel], path: str | os.PathLike[str]) -> Any:
    """Validate the metadata of a file.

    Raises:
        CheckpointError: naming the first invalid key.
    """
    try:
        return kind.model_validate(renamed(info, quiet=True))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: what it says of {key!r} can't be used: {first['msg'].lower()}") from error


def build_encoder(info: EncoderInfo, path: str | os.PathLike[str]) -> Encoder:
    """Build an encoder with untrained weights.

    Raises:
        CheckpointError: its graph differs from the one in the file.
    """
    encoder: Encoder = build(info.encoder, "encoder", kind=nn.Module)
    check_graph(encoder, info.graph, path)
    return encoder


def check_graph(encoder: Encoder, graph: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Check that an encoder's graph matches the one its weights were trained on.

    Raises:
        CheckpointError: naming the setting that differs.
    """
    for key, (stored, own) in encoder.graph.differences(renamed(graph, "graph", quiet=True)).items():
        raise CheckpointError(
            f"{path}: it was trained on graphs with {key}={stored}, here they are built with {key}={own}"
        )


def build_model(info: ModelInfo, path: Path) -> TargetModel:
    """Build a property model with untrained weights.

    Raises:
        ValueError: its parts are incompatible.
    """
    described = [{"type": "regression"}] * len(info.targets) if info.target_types is None else info.target_types
    if not len(described) == len(info.units) == len(info.targets):
        raise ValueError(
            f"it has {len(info.targets)} targets, {len(info.units)} units and {len(described)} target_types"
        )
    if len(set(info.targets)) < len(info.targets):
        raise ValueError("a name stands twice among its targets")
    types = [_target(place, description) for place, description in enumerate(described)]
    if info.recipe == "network":
        return _build_network(info, types, path)
    return HybridModel(
        encoder=build_encoder(info, path),
        networks=[_build_network(info, types, path) for _ in range(info.networks)],
        targets=info.targets,
        units=info.units,
        types=types,
        referenced=info.atomic_references,
        descriptors=_build_descriptors(info),
        per=info.target_per,
    )


def _build_descriptors(info: ModelInfo) -> Descriptors | None:
    return Descriptors(info.descriptors, info.descriptor_units) if info.descriptors else None


def _target(place: int, description: Mapping[str, Any]) -> TargetType:
    try:
        return make_target(description)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"target_types.{place}: {error}") from error


def _build_network(info: ModelInfo, types: list[TargetType], path: Path) -> PropertyModel:
    return build_network(
        build_encoder(info, path),
        info.head,
        info.targets,
        info.units,
        types,
        referenced=info.atomic_references,
        descriptors=_build_descriptors(info),
        per=info.target_per,
    )
