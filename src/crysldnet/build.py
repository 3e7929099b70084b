"""Build objects from plain configuration: allow-listed classes only, with validated keys and types.

A node is a mapping with ``_target_``, the name of a class or function on the list below. Its other keys are keyword
arguments of its signature, which is the schema. Arguments that aren't plain values (modules, data sets), or that are
annotated as ``Part``, are set by code; configuration can't set them.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from crysldnet import plugins
from crysldnet.console import did_you_mean
from crysldnet.errors import ConfigError

TARGET = "_target_"

T = TypeVar("T")
Part = Annotated[T, "passed by code, not by configuration"]
"""Marks a plain argument that follows from other settings, such as the width of an encoder."""

ALLOWED = {
    "crysldnet.data.datamodule.CrystalDataModule",
    "crysldnet.encoders.cartnet.CartNet",
    "crysldnet.encoders.cgcnn.CGCNN",
    "crysldnet.encoders.cogn.CoGN",
    "crysldnet.encoders.ecomformer.EComFormer",
    "crysldnet.encoders.elements.ElementProperties",
    "crysldnet.encoders.icomformer.IComFormer",
    "crysldnet.encoders.matformer.Matformer",
    "crysldnet.encoders.neighbor_attention.NeighborAttention",
    "crysldnet.encoders.pddformer.PDDFormer",
    "crysldnet.encoders.potnet.PotNet",
    "crysldnet.models.objectives.Denoising",
    "crysldnet.models.objectives.Published",
    "crysldnet.models.dit.DiT",
    "crysldnet.models.flow.LatentFlow",
    "crysldnet.models.latent.Posterior",
    "crysldnet.models.head.PropertyHead",
    "crysldnet.training.optimizer.AdamW",
    "crysldnet.training.strategies.auto",
    "crysldnet.training.strategies.ddp",
    "crysldnet.training.strategies.fsdp",
    "crysldnet.training.strategies.fsdp2",
    "crysldnet.training.strategies.deepspeed",
    "crysldnet.training.trainer.TrainerSettings",
    "crysldnet.training.loggers.csv",
    "crysldnet.training.loggers.tensorboard",
    "crysldnet.training.loggers.wandb",
}
"""All classes and functions of this package that configuration may instantiate."""


def _is_of_plugin(name: str) -> bool:
    """Return whether a name is a class or function defined in a plugin."""
    module, _, attribute = name.rpartition(".")
    if not plugins.of([module]):
        plugins.load()  # a process may have been started without a command line
    if not plugins.of([module]):
        return False
    try:
        return getattr(importlib.import_module(module), attribute).__module__ == module
    except (ImportError, AttributeError):
        return False


@cache
def _signature(name: str) -> tuple[Callable[..., Any], dict[str, inspect.Parameter], dict[str, Any]]:
    module, _, attribute = name.rpartition(".")
    return _describe(getattr(importlib.import_module(module), attribute))


@cache
def _describe(function: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, inspect.Parameter], dict[str, Any]]:
    parameters = dict(inspect.signature(function).parameters)
    annotated = function.__init__ if inspect.isclass(function) and not dataclasses.is_dataclass(function) else function
    hints = get_type_hints(annotated, include_extras=True)
    return function, parameters, hints


def is_plain(annotation: Any) -> bool:
    """Return whether configuration can contain a value of this type."""
    if annotation in (bool, int, float, str, type(None), Any):
        return True
    origin = get_origin(annotation)
    if origin is Annotated:
        return False
    if origin is Literal:
        return True
    if origin in (typing.Union, types.UnionType, list, dict):
        return all(is_plain(a) for a in get_args(annotation))
    return inspect.isclass(annotation) and dataclasses.is_dataclass(annotation)


def _dataclass_of(annotation: Any) -> type | None:
    options = get_args(annotation) if get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    return next((o for o in options if inspect.isclass(o) and dataclasses.is_dataclass(o)), None)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def suggest(key: str, known: list[str], *, listed: bool = True) -> str:
    """Return the known key that is most like an unknown one, or all."""
    otherwise = f"known are: {', '.join(known) or 'none'}" if listed else "see crysldnet COMMAND --help"
    return did_you_mean(key, known, otherwise, 0.5)


def target_of(node: Mapping[str, Any], where: str) -> str:
    """Return a node's target.

    Raises:
        ConfigError: it is missing or isn't allowed.
    """
    name = node.get(TARGET)
    if not isinstance(name, str):
        raise ConfigError(f"{where}: it needs {TARGET}, the name of what to build", where)
    if name not in ALLOWED and not _is_of_plugin(name):
        raise ConfigError(
            f"{_join(where, TARGET)}: {name!r} is not on the list of what configuration may build; "
            f"{suggest(name, sorted(ALLOWED), listed=False)}; a class of your own needs "
            f"plugins=[{name.rpartition('.')[0] or 'its module'}]",
            where,
        )
    return name


def check(node: Mapping[str, Any], where: str = "") -> None:
    """Check a node's keys and types against its target's signature, without building anything.

    Raises:
        ConfigError: an unknown key, a missing one or a wrong type; its second argument is the key's path.
    """
    _check_signature(_signature(target_of(node, where)), node, where)


def _check_signature(described: tuple, node: Mapping[str, Any], where: str) -> None:
    function, parameters, hints = described
    plain = [name for name in parameters if is_plain(hints.get(name))]
    for key, value in node.items():
        if key == TARGET:
            continue
        path = _join(where, key)
        if key not in plain:
            raise ConfigError(f"{path}: unknown key; {suggest(key, plain)}", path)
        _check_value(value, hints[key], path)
    for name in plain:
        if name not in node and parameters[name].default is inspect.Parameter.empty:
            raise ConfigError(f"{_join(where, name)}: no value; {function.__name__} needs one", _join(where, name))


def _check_value(value: Any, annotation: Any, path: str) -> None:
    nested = _dataclass_of(annotation)
    if nested is not None and isinstance(value, Mapping):
        _check_signature(_describe(nested), value, path)
        return
    if nested is not None and value is None and type(None) in get_args(annotation):
        return
    try:
        TypeAdapter(annotation, config=None if nested else ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        wanted = f"give a list, as {path}=[…]" if first["type"] == "list_type" else first["msg"].lower()
        raise ConfigError(f"{path}={value!r}: {wanted}", path) from None


def build(node: Mapping[str, Any], where: str = "", *, kind: type | None = None, **parts: Any) -> Any:
    """Check a node and call its target.

    Args:
        node: a mapping with ``_target_`` and plain values.
        where: path of the node in the configuration, for messages.
        kind: required class of the target; None for any.
        parts: arguments that configuration can't contain.
    """
    if kind is not None:
        target = _signature(target_of(node, where))[0]
        if not (inspect.isclass(target) and issubclass(target, kind)):
            raise ConfigError(f"{_join(where, TARGET)}: {node[TARGET]!r} is no {kind.__name__}", where)
    check(node, where)
    function, _, hints = _signature(node[TARGET])
    return _call(function, hints, {k: v for k, v in node.items() if k != TARGET}, where, parts)


def _call(function: Callable[..., Any], hints: dict[str, Any], values: dict, where: str, parts: dict) -> Any:
    for key, value in values.items():
        nested = _dataclass_of(hints[key])
        if nested is not None and isinstance(value, Mapping):
            values[key] = _call(nested, _describe(nested)[2], dict(value), _join(where, key), {})
    try:
        return function(**values, **parts)
    except (ValueError, RuntimeError) as error:  # torch raises the latter for invalid sizes
        raise ConfigError(f"{where}: {error}" if where else str(error), where) from error


def build_dataclass(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """Validate plain values against a dataclass and create an instance."""
    described = _describe(kind)
    _check_signature(described, values, where)
    return _call(kind, described[2], dict(values), where, {})


class _Dumper(yaml.SafeDumper):
    """Quotes and escapes text that YAML would change, such as unusual line breaks."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, None if text.isprintable() else '"'),
)


def to_yaml(values: Mapping[str, Any]) -> str:
    """Return plain values as YAML that reproduces them exactly."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


NO_YAML = (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError)
"""Errors that PyYAML raises for invalid content, such as dates with a thirteenth month."""
MOST_NODES = 100_000
"""values of a YAML file, each counted as often as an alias repeats it"""


def from_yaml(text: str) -> Any:
    """Read plain values from YAML, with a limit on the memory that aliases can expand to.

    Raises:
        yaml.YAMLError: it is invalid or too large.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _nodes(node, {}) > MOST_NODES:
            raise yaml.YAMLError(f"over {MOST_NODES:,} values")
        return loader.construct_document(node)
    except NO_YAML as error:
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _nodes(node: yaml.Node, counted: dict[int, float]) -> float:
    """Count the nodes of a document, with aliases expanded; infinite for recursive ones."""
    if id(node) not in counted:
        counted[id(node)] = float("inf")
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else [item])]
        counted[id(node)] = 1 + sum(_nodes(part, counted) for part in parts)
    return counted[id(node)]
