"""Members of one target and their weights, also as named arrays for a safetensors file.

Shapes: ``n`` training crystals, ``B`` crystals, ``D`` features, ``C`` outputs: one for a number, one per class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crysldnet.errors import DataError
from crysldnet.tabular.kernel import KernelRidge, Projection
from crysldnet.tabular.members import FOLDS, MEMBERS, Baseline, Model, blend_weights, fit_members, group_folds
from crysldnet.tabular.trees import Trees

LARGEST_KERNEL = 10_000
"""Above this number of crystals kernel ridge is skipped, because its memory and time grow with square and cube."""


@dataclass(frozen=True)
class Stack:
    """Fitted members and their weights.

    Attributes:
        models: models by name.
        weights: nonnegative weights by name that sum to 1, including members that aren't tabular.
    """

    models: dict[str, Model]
    weights: dict[str, float]

    def predict(self, x: NDArray[np.floating]) -> dict[str, NDArray[np.float64]]:
        """Return predictions [B, C] of each member for features [B, D]."""
        return {name: model.predict(x) for name, model in self.models.items()}

    def combine(self, found: Mapping[str, NDArray[np.floating]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the weighted mean [B, C] of the members' predictions and their standard deviation."""
        return _mixed(np.array([self.weights[name] for name in found]), np.stack(list(found.values()), axis=1))

    def to_arrays(self, prefix: str) -> tuple[dict[str, NDArray], dict[str, Any]]:
        """Return the content to store: arrays with names that start with ``prefix``, and plain values."""
        arrays: dict[str, NDArray] = {}
        plain: dict[str, Any] = {}
        for name, model in self.models.items():
            own, plain[name] = to_arrays(model, f"{prefix}{name}.")
            arrays |= own
        return arrays, {"weights": self.weights, "models": plain}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray], plain: Mapping[str, Any], prefix: str) -> Stack:
        """Return the inverse of :meth:`to_arrays`.

        Raises:
            DataError: an array or value is missing or inconsistent.
        """
        models = {name: from_arrays(arrays, of, f"{prefix}{name}.") for name, of in plain["models"].items()}
        weights = {name: float(weight) for name, weight in plain["weights"].items()}
        if not models.keys() <= weights.keys() or not all(0 <= weight <= 1 + 1e-6 for weight in weights.values()):
            raise DataError(f"its part '{prefix}weights' isn't a weight from 0 to 1 of each of {', '.join(models)}")
        return cls(models, weights)  # type: ignore[arg-type]


@dataclass(frozen=True)
class FittedStack:
    """A stack and its out-of-fold results.

    Attributes:
        stack: the stack fitted to all crystals.
        members: [n, C] out-of-fold predictions by name.
        value: [n, C] combined out-of-fold predictions, with weights fitted on the other folds.
        spread: [n, C] standard deviation of the members around them.
        y: [n, C] training targets.
        folds: [n] folds.
        absolute: as in :func:`fit_stack`.
    """

    stack: Stack
    members: dict[str, NDArray[np.float64]]
    value: NDArray[np.float64]
    spread: NDArray[np.float64]
    y: NDArray[np.float64]
    folds: NDArray[np.int64]
    absolute: bool

    @property
    def error(self) -> float:
        """Mean absolute out-of-fold error over the standard deviation of the targets."""
        return float(np.abs(self.value - self.y).mean() / max(float(self.y.std()), 1e-30))

    def without(self, name: str) -> FittedStack:
        """Return the stack of the other members; only the weights are refitted."""
        members = {other: own for other, own in self.members.items() if other != name}
        return _weighed(self.stack.models, members, self.y, self.folds, self.absolute)


def fit_stack(
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    groups: NDArray[np.int64],
    *,
    others: Mapping[str, NDArray[np.float64]] | None = None,
    baseline: Baseline | None = None,
    absolute: bool = True,
    seed: int = 0,
) -> FittedStack:
    """Fit the tabular members and the weights.

    Args:
        x: [n, D] finite features.
        y: [n, C] finite targets; for classes one-hot.
        groups: [n] groups left out together, such as crystals of one formula; at least two.
        others: [n, C] out-of-fold predictions of members that aren't tabular, by name.
        baseline: the tabular members learn the remainder after this.
        absolute: minimize absolute errors, else squared ones.
        seed: seed of folds and trees.
    """
    folds = group_folds(groups, min(FOLDS, len(np.unique(groups))), seed=seed)
    names = MEMBERS if len(x) <= LARGEST_KERNEL else MEMBERS[:-1]
    fitted = fit_members(x, y, groups, members=names, folds=folds, baseline=baseline, seed=seed)
    members = {**(others or {}), **fitted.out_of_fold}
    return _weighed(fitted.models, members, np.asarray(y, np.float64), folds, absolute)


def _weighed(
    models: dict[str, Model],
    members: dict[str, NDArray[np.float64]],
    y: NDArray[np.float64],
    folds: NDArray[np.int64],
    absolute: bool,
) -> FittedStack:
    """Fit the weights of members [n, C] on all folds, and on all but each."""
    each = np.stack(list(members.values()), axis=1)

    def weigh(rows: NDArray[np.bool_]) -> NDArray[np.float64]:
        flat = np.moveaxis(each[rows], 1, 2).reshape(-1, len(members))
        return blend_weights(flat, y[rows].reshape(-1), absolute=absolute)

    value, spread = np.empty(y.shape), np.empty(y.shape)
    for fold in np.unique(folds):
        held = folds == fold
        value[held], spread[held] = _mixed(weigh(~held), each[held])
    weights = dict(zip(members, weigh(np.ones(len(y), bool)).tolist(), strict=True))
    return FittedStack(Stack(models, weights), members, value, spread, y, folds, absolute)


def _mixed(weights: NDArray[np.floating], each: NDArray[np.floating]) -> tuple[NDArray, NDArray]:
    """Return weighted mean and standard deviation [B, C] of predictions [B, M, C]."""
    mean = np.einsum("m,bmc->bc", weights, each)
    return mean, np.sqrt(np.einsum("m,bmc->bc", weights, (each - mean[:, None]) ** 2))


KINDS: dict[str, type[Model | Projection]] = {"kernel_ridge": KernelRidge, "trees": Trees, "projection": Projection}


def to_arrays(model: Model | Projection, prefix: str) -> tuple[dict[str, NDArray], dict[str, Any]]:
    """Return the arrays of a model, with names that start with ``prefix``, and its other values with its kind."""
    values = {field.name: getattr(model, field.name) for field in fields(model)}
    arrays = {f"{prefix}{name}": np.ascontiguousarray(v) for name, v in values.items() if isinstance(v, np.ndarray)}
    kind = next(name for name, of_kind in KINDS.items() if isinstance(model, of_kind))
    return arrays, {"kind": kind, **{name: v for name, v in values.items() if not isinstance(v, np.ndarray)}}


def _check(name: str, value: Any, kind: str) -> None:
    """Reject invalid fields."""
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
