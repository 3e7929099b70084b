"""Target types: numbers and classes, including those defined by plugins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crysldnet import plugins
from crysldnet.console import did_you_mean
from crysldnet.models.targets.base import (
    TYPES,
    Estimate,
    Kind,
    Loss,
    Spread,
    TargetType,
    stack_probabilities,
)
from crysldnet.models.targets.classes import Classes
from crysldnet.models.targets.numbers import LARGEST_EXPONENT, Bounded, Hurdle, Log, Number

__all__ = [
    "LARGEST_EXPONENT",
    "TYPES",
    "Bounded",
    "Classes",
    "Estimate",
    "Hurdle",
    "Kind",
    "Log",
    "Loss",
    "Named",
    "Number",
    "Spread",
    "TargetType",
    "make_target",
    "make_type",
    "reads_classes",
    "stack_probabilities",
]

Named = str | list[float | None]
"""A type in configuration: a name, or two bounds for a bounded number."""


def find_type(name: str) -> type[TargetType]:
    """Return the target type of a name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in TYPES:
        plugins.load()
    if name not in TYPES:
        known = sorted({*TYPES, "non_negative"} - {Bounded.name})
        hint = did_you_mean(name, known, f"known are {', '.join(known)}.", 0.5)
        raise ValueError(f"no kind of target {name!r}; {hint} One of your own needs plugins=[its module]")
    return TYPES[name]


def reads_classes(named: Named | None) -> bool:
    """Return whether a type in configuration takes classes."""
    return isinstance(named, str) and issubclass(TYPES.get(named, Number), Classes)


def make_type(named: Named, spread: Spread | None, labels: Sequence[str] | None) -> TargetType:
    """Create a target type from configuration.

    Args:
        named: the type in configuration.
        spread: distribution with a predicted scale, for numbers; None for none.
        labels: class names of the column; None for numbers.

    Raises:
        ValueError: the type is unknown, takes classes where there are none, or the bounds aren't two numbers.
    """
    if labels is not None:
        kind = find_type(named) if isinstance(named, str) and reads_classes(named) else Classes
        return kind(tuple(labels))  # type: ignore[call-arg]
    if named == "non_negative":
        named = [0.0, None]
    if isinstance(named, list):
        if len(named) != 2:
            raise ValueError(f"bounds are two, as in [0, 1] or [0, null], not {named}")
        return Bounded(spread, *named)
    kind = find_type(named)
    if issubclass(kind, Classes):
        raise ValueError(f"{named!r} is no kind of number")
    return kind(spread)  # type: ignore[call-arg]


def make_target(description: Mapping[str, Any]) -> TargetType:
    """Create a target type from its description.

    Raises:
        ValueError: the type is unknown, or its class names aren't unique.
    """
    values = dict(description)
    kind = values.pop("type")
    if reads_classes(kind):
        labels = values["labels"]
        if not isinstance(labels, (list, tuple)) or len(set(map(str, labels))) < len(labels):
            raise ValueError("its labels are no list of different names")
        return make_type(kind, None, labels)
    return make_type(kind, labels=None, **values) if kind == "non_negative" else find_type(kind)(**values)
