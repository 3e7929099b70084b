"""Fitted models as named arrays and plain values, for storage in a safetensors file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crysldnet.errors import DataError
from crysldnet.tabular.kernel import KernelRidge
from crysldnet.tabular.projection import Projection
from crysldnet.tabular.trees import Trees

Model = KernelRidge | Trees
KINDS: dict[str, type[Model | Projection]] = {"kernel_ridge": KernelRidge, "trees": Trees, "projection": Projection}


def to_arrays(model: Model | Projection, prefix: str) -> tuple[dict[str, NDArray], dict[str, Any]]:
    """Return the arrays of a model, with names that start with ``prefix``, and its other values with its kind."""
    values = {field.name: getattr(model, field.name) for field in fields(model)}
    arrays = {f"{prefix}{name}": np.ascontiguousarray(v) for name, v in values.items() if isinstance(v, np.ndarray)}
    kind = next(name for name, of_kind in KINDS.items() if isinstance(model, of_kind))
    return arrays, {"kind": kind, **{name: v for name, v in values.items() if not isinstance(v, np.ndarray)}}


def _check(name: str, value: Any, kind: str) -> None:
    """Reject invalid fields.

    Raises:
        DataError: naming the field.
    """
    if not kind.startswith("NDArray"):
        sound = isinstance(value, (int, float)) and math.isfinite(value)
    else:
        sound = isinstance(value, np.ndarray) and value.dtype.kind == ("i" if "int" in kind else "f")
        # a tree may send everything to one side
        sound = sound and (name.endswith(".threshold") or bool(np.isfinite(value).all()))
    if not sound:
        raise DataError(f"its part {name!r} isn't finite, or of another type; train or copy it again")


def from_arrays(arrays: Mapping[str, NDArray], plain: Mapping[str, Any], prefix: str) -> Model | Projection:
    """Return the inverse of :func:`to_arrays`.

    Raises:
        DataError: an array or value is missing or inconsistent.
    """
    try:
        kind = KINDS[plain["kind"]]
        values: dict[str, Any] = {
            field.name: plain[field.name] if field.name in plain else np.asarray(arrays[prefix + field.name])
            for field in fields(kind)
        }
        for field in fields(kind):
            _check(f"{prefix}{field.name}", values[field.name], str(field.type))
        return kind(**values)
    except (KeyError, ValueError, IndexError) as error:
        raise DataError(f"the model's part {prefix!r} is damaged ({error}); export it again") from error
