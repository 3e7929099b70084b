"""Build encoders and property models from the metadata of their files, and load tensors that match exactly."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from crysldnet import plugins
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
    plugins: list[str] = []


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


def checked(info: Mapping[str, Any], kind: type[EncoderInfo], path: str | os.PathLike[str]) -> Any:
    """Validate the metadata of a file.

    Raises:
        CheckpointError: naming the first invalid key, or a plugin that isn't loaded.
    """
    try:
        found = kind.model_validate(renamed(info, quiet=True))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: what it says of {key!r} can't be used: {first['msg'].lower()}") from error
    plugins.require(found.plugins, path)
    return found


def build_encoder(info: EncoderInfo, path: str | os.PathLike[str]) -> Encoder:
    """Build an encoder with untrained weights.

    Raises:
        CheckpointError: its graph differs from the one in the file.
    """
    encoder: Encoder = build(info.encoder, "encoder", kind=nn.Module)
    check_graph(encoder, info.graph, path)
    return encoder


def check_graph(encoder: Encoder, graph: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Check that an encoder's graph matches the one its weights were trained on."""
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
        **_optional_parts(info),
    )


def _optional_parts(info: ModelInfo) -> dict[str, Any]:
    descriptors = Descriptors(info.descriptors, info.descriptor_units) if info.descriptors else None
    return {"referenced": info.atomic_references, "descriptors": descriptors, "per": info.target_per}


def _target(place: int, description: Mapping[str, Any]) -> TargetType:
    try:
        return make_target(description)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"target_types.{place}: {error}") from error


def _build_network(info: ModelInfo, types: list[TargetType], path: Path) -> PropertyModel:
    encoder = build_encoder(info, path)
    return build_network(encoder, info.head, info.targets, info.units, types, **_optional_parts(info))


def build_and_load(
    make: Callable[[], Any], what: str, state: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> Any:
    """Build a module and load weights; shapes are compared before large tensors are allocated.

    Raises:
        CheckpointError: it can't be built, or its tensors don't match.
    """
    planned = None
    try:
        with (
            _no_more_parameters_than(len(state)),
            torch.device("meta"),
            _NoNormalValues(),
            warnings.catch_warnings(action="ignore"),
        ):
            planned = make()
    except Exception as error:  # constructors may raise anything for invalid metadata
        if isinstance(error, CheckpointError):
            raise
        if "meta" not in str(error):  # an encoder may need values during construction, which the meta device lacks
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path}: its {what} can't be built: {reason}") from error
    if planned is not None:
        _check_fit(planned, state, path)
    module = make()
    load_strictly(module, state, path)
    return module


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Load weights into a module with exactly the same keys and shapes.

    Raises:
        CheckpointError: naming the first keys that are missing, extra, misshapen or not finite.
    """
    _check_fit(module, state, path)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: {name} isn't finite, so it can predict nothing; train or copy it again")
    module.load_state_dict(dict(state), strict=True)


def _check_fit(module: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    own = module.state_dict()
    problems = []
    for title, keys in (("missing", own.keys() - state.keys()), ("surplus", state.keys() - own.keys())):
        if keys:
            shown = ", ".join(sorted(keys)[:3])
            problems.append(f"{len(keys)} {title} ({shown}{', …' if len(keys) > 3 else ''})")
    for name in sorted(own.keys() & state.keys()):
        if own[name].shape != state[name].shape:
            problems.append(f"{name} has shape {list(state[name].shape)}, the model needs {list(own[name].shape)}")
        wanted, found = own[name].dtype, state[name].dtype
        if found != wanted and not {found, wanted} <= {torch.float32, torch.float64}:
            problems.append(f"{name} is {found}, the model needs {wanted}")
    if problems:
        raise CheckpointError(f"{path}: its tensors don't fit the model: {'; '.join(problems[:4])}")


class _NoNormalValues(TorchFunctionMode):
    """Skip normal initialization on the meta device, for which torch would import its compiler."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (nn.init.normal_, Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def _no_more_parameters_than(count: int) -> Iterator[None]:
    """Stop construction of a module with more parameters than a file has tensors."""
    made = 0

    def count_one(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > 2 * count + 100:  # some are created more than once
            raise ValueError(f"it would have more parameters than the file's {count} tensors")

    handle = register_module_parameter_registration_hook(count_one)
    try:
        yield
    finally:
        handle.remove()
