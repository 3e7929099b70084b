"""Build a module and load a file's tensors if they match exactly."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from crysldnet.errors import CheckpointError


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
