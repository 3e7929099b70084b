"""Read a target column: a number, or one of several classes."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from crysldnet.data.cells import CellError, read_numbers
from crysldnet.data.store import CrystalStore
from crysldnet.data.units import name_and_unit, same_unit
from crysldnet.errors import DataError

_EXPONENT = re.compile(r"(?<=\d)[eE](?=[-+]?\d)")
_NO_NAME = re.compile(r"[^A-Za-z]*\d[^A-Za-z]*|[-+]?(?:inf(?:inity)?|nan)", re.IGNORECASE)
"""Matches texts without a letter, such as ``5-6`` and ``$5``, which name no class unless that is asked for."""
MOST_CLASSES = 256
"""Above this number of values a column isn't a classification; there are 230 space groups."""


def column_called(store: CrystalStore, title: str) -> str:
    """Return the column for a title: its name, its header with unit, or either in another spelling.

    Raises:
        DataError: the unit in the title differs from the column's.
    """
    if title in store.column_names:
        return title
    name, unit = name_and_unit(title)
    wanted = {_spelling(title), _spelling(name)} - {""}
    found = [column for column in store.column_names if _spelling(column) in wanted]
    if len(found) != 1:
        return title  # reading it reports the available columns
    known = store.units.get(found[0])
    if unit is not None and known is not None and not same_unit(unit, known):
        raise DataError(f"{store.name}: {title!r} doesn't exist; {found[0]!r} is in {known}")
    return found[0]


def _spelling(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def read_target(
    store: CrystalStore, name: str, kind: str | None = None
) -> tuple[NDArray[np.float64], list[str] | None]:
    """Return a column's values [n], NaN if unknown, and the names of any classes.

    Classes are given by index. Booleans and text are classes; numbers are numbers unless ``kind`` is
    ``classification``.

    Args:
        store: the crystals.
        name: column name.
        kind: target type in the configuration, if any.

    Raises:
        DataError: the column doesn't exist, is neither numeric nor classes, has numbers as text, or a number beyond
            single precision, in which models are trained.
    """
    type_ = store.type_of(name)
    text = pa.types.is_string(type_) or pa.types.is_large_string(type_)
    if kind not in (None, "classification") or not (text or kind == "classification" or pa.types.is_boolean(type_)):
        values = store.numbers_of(name).copy()
        values[~np.isfinite(values)] = np.nan
        beyond = np.flatnonzero(np.abs(values) > np.finfo(np.float32).max)
        if len(beyond):
            raise DataError(
                f"{store.name}: {name!r} of {store.ids_at(beyond[:1])[0]} (row {beyond[0]}) is {values[beyond[0]]:g}, "
                f"beyond single precision, in which models are trained ({len(beyond)} such rows); use another unit, or "
                "leave the value out"
            )
        return values, None
    if text and kind != "classification":
        _refuse_numbers(store, name)
    if text:
        return _text_classes(store, name)
    if pa.types.is_boolean(type_):
        return store.numbers_of(name), ["false", "true"]
    return _number_classes(store, name)


def _refuse_numbers(store: CrystalStore, name: str) -> None:
    """Reject text that looks like numbers, so that a regression doesn't become a classification."""
    counts = Counter(text for text in store.texts_of(name) if text is not None)
    try:
        numbers = read_numbers(counts)
        like = None if numbers is None else next((t for t in counts if t in numbers.read), None)
    except CellError as error:
        like = error.text
    alike = {text: count for text, count in counts.items() if _NO_NAME.fullmatch(_EXPONENT.sub("", text.strip()))}
    if like is None and 2 * sum(alike.values()) >= counts.total() > 0:
        like = next(iter(alike))
    if like is not None:
        raise DataError(
            f"{store.name}: column {name!r} holds texts that look like numbers, such as {like!r}; import it anew, so "
            f"that they are read, or ask for classes with target_types={{{name}: classification}}"
        )


def _text_classes(store: CrystalStore, name: str) -> tuple[NDArray[np.float64], list[str]]:
    texts = store.texts_of(name)
    known = [text for text in texts if text is not None]
    labels = sorted(set(known))
    if len(labels) > min(MOST_CLASSES, len(known) // 2):
        raise DataError(
            f"{store.name}: column {name!r} holds {len(labels)} different texts in {len(known)} rows: not numbers, and "
            f"too many for classes (of at most {MOST_CLASSES}, each in two rows or more on average)"
        )
    return _coded(store, name, [np.nan if t is None else labels.index(t) for t in texts], labels)


def _number_classes(store: CrystalStore, name: str) -> tuple[NDArray[np.float64], list[str]]:
    values = store.numbers_of(name)
    known = np.isfinite(values)
    broken = np.flatnonzero(known & (values != np.round(values)))
    if len(broken):
        raise DataError(
            f"{store.name}: column {name!r} can't be classes: {store.ids_at(broken[:1])[0]} (row {broken[0]}) has "
            f"{values[broken[0]]:g}; a class is a whole number, true or false, or a text"
        )
    distinct = np.unique(values[known])
    if len(distinct) > MOST_CLASSES:
        raise DataError(f"{store.name}: column {name!r} has {len(distinct)} values, over {MOST_CLASSES} classes")
    codes = np.where(known, np.searchsorted(distinct, values), np.nan)
    return _coded(store, name, codes.tolist(), [f"{value:.0f}" for value in distinct])


def _coded(
    store: CrystalStore, name: str, codes: list[float], labels: list[str]
) -> tuple[NDArray[np.float64], list[str]]:
    if len(labels) < 2:
        raise DataError(f"{store.name}: column {name!r} has {len(labels)} class(es) {labels}; it takes two or more")
    return np.array(codes, np.float64), labels
