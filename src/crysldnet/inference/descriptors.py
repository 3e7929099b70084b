"""Descriptors that a model needs for each crystal, given with the structures or read from columns.

Shapes: ``B`` crystals, ``K`` descriptors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crysldnet.errors import DataError
from crysldnet.models.descriptors import Descriptors
from crysldnet.readers.stream import Chunk

Given = Mapping[str, NDArray[np.float64]]
"""[B] values by name, or one for all crystals []."""


def columns_needed(models: Iterable[Descriptors | None], given: Given) -> dict[str, str]:
    """Return the columns required in the input, with their units.

    Raises:
        DataError: two models require different units for one column.
    """
    found: dict[str, str] = {}
    for own in (own for own in models if own is not None):
        for name, unit in zip(own.names, own.units, strict=True):
            if found.setdefault(name, unit) != unit:
                raise DataError(f"one model needs {name} in {found[name]}, another in {unit}; use one at a time")
    return {name: unit for name, unit in found.items() if name not in given}


def given_descriptors(given: Any, names: Sequence[str]) -> Given:
    """Return the given descriptors by name.

    Args:
        given: data frame, mapping from name to values or to one value for all, array [B, K], or None.
        names: of the models' K descriptors.

    Raises:
        DataError: a name or shape doesn't match, or a value isn't finite.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        if unknown := [name for name in given if name not in names]:
            raise DataError(f"descriptors: no model needs {unknown[0]!r}; needed are {', '.join(names) or 'none'}")
        columns = dict(given)
    elif hasattr(given, "columns"):
        columns = {name: given[name] for name in names if name in given.columns}
    else:
        array = np.asarray(given, np.float64)
        array = array[:, None] if array.ndim == 1 and len(names) == 1 else array
        if array.ndim != 2 or array.shape[1] != len(names):
            raise DataError(f"descriptors: an array of shape [crystals, {len(names)}] is needed, not {array.shape}")
        columns = dict(zip(names, array.T, strict=True))
    found = {name: np.asarray(values, np.float64) for name, values in columns.items()}
    for name, values in found.items():
        if values.ndim > 1 or not np.isfinite(values).all():
            raise DataError(f"descriptors: {name} must be one finite number for each crystal, or one for all")
    return found


def with_descriptors(stream: Iterable[Chunk], given: Given) -> Iterator[Chunk]:
    """Yield the portions with the given descriptors, in the order of the crystals, as additional columns.

    Raises:
        DataError: the number of values differs from the number of crystals, or a crystal before the last is invalid, so
            values can't be matched.
    """
    lengths = {len(values) for values in given.values() if values.ndim}
    if len(lengths) > 1:
        raise DataError(f"descriptors: columns of {' and '.join(map(str, sorted(lengths)))} values")
    length, done = next(iter(lengths), None), 0
    for portion in stream:
        count = len(portion.ids)
        if length is not None and portion.refused:
            first = portion.refused[0]
            raise DataError(f"{first.source}: {first.reason}; leave it out, and its descriptors")
        if length is not None and done + count > length:
            raise DataError(f"descriptors: {length} values, but there are more crystals")
        own = {
            name: values[done : done + count] if values.ndim else np.full(count, values)
            for name, values in given.items()
        }
        yield portion._replace(columns={**portion.columns, **own})
        done += count
    if length is not None and done != length:
        raise DataError(f"descriptors: {length} values for {done} crystals")


def beside(portion: Chunk, names: Sequence[str]) -> NDArray[np.float64]:
    """Return the descriptors [B, K] of a portion."""
    return np.stack([portion.columns[name] for name in names], axis=1)
