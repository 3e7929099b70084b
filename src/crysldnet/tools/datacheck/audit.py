"""``crysldnet data audit``: overlap of two data sets."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crysldnet.console import lines_of
from crysldnet.data.datasets import open_part
from crysldnet.data.elements import formulas_of
from crysldnet.data.matching import matches
from crysldnet.data.store import CrystalStore
from crysldnet.io import write_csv


@dataclass(frozen=True)
class Shared:
    """Overlap of a test set with a training set.

    Attributes:
        train, test: names of the sets.
        train_crystals, test_crystals: sizes of the sets.
        ids, formulas, structures: test rows that share one, each with the matching training rows; ``structures`` is
            None if not compared.
    """

    train: str
    test: str
    train_crystals: int
    test_crystals: int
    ids: dict[str, list[str]]
    formulas: dict[str, list[str]]
    structures: dict[str, list[str]] | None


def audit(train: str, test: str, *, structures: bool = True) -> Shared:
    """Compare two data sets.

    Args:
        train, test: names as in :func:`crysldnet.data.datasets.open_part`.
        structures: also compare structures.
    """
    (a, rows_a), (b, rows_b) = open_part(train), open_part(test)
    ids_a, ids_b = a.ids_at(rows_a), b.ids_at(rows_b)
    return Shared(
        train,
        test,
        len(rows_a),
        len(rows_b),
        _shared(ids_a, ids_a, ids_b, ids_b),
        _shared(ids_a, formulas_of(a.crystals, rows_a), ids_b, formulas_of(b.crystals, rows_b)),
        _matching(a, rows_a, b, rows_b) if structures else None,
    )


def _shared(
    ids_a: Sequence[str], keys_a: Sequence[str], ids_b: Sequence[str], keys_b: Sequence[str]
) -> dict[str, list[str]]:
    """Return the id of each row of b whose key is in a, with the ids of the matching rows of a."""
    wanted = set(keys_b)
    where: dict[str, list[str]] = {}
    for key, id_ in zip(keys_a, ids_a, strict=True):
        if key in wanted:
            where.setdefault(key, []).append(id_)
    return {id_: where[key] for key, id_ in zip(keys_b, ids_b, strict=True) if key in where}


def _matching(
    a: CrystalStore, rows_a: NDArray[np.int64], b: CrystalStore, rows_b: NDArray[np.int64]
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    pairs = list(matches(b, rows_b, a, rows_a))
    if not pairs:
        return found
    of_b, of_a = (store.ids_at(np.array(rows)) for store, rows in zip((b, a), zip(*pairs, strict=True), strict=True))
    for id_b, id_a in zip(of_b, of_a, strict=True):
        found.setdefault(id_b, []).append(id_a)
    return found


def write_table(path: str | os.PathLike[str], found: Sequence[Shared]) -> None:
    """Write every shared crystal as a CSV row: sets, ids, and what they share.

    Raises:
        DataError: it can't be written.
    """
    rows = (row for shared in found for row in _rows(shared))
    write_csv(Path(path), [["train", "test", "by", "test_id", "train_ids"], *rows])


def _rows(shared: Shared) -> Iterator[list[str]]:
    for by in ("ids", "formulas", "structures"):
        for test_id, train_ids in (getattr(shared, by) or {}).items():
            yield [shared.train, shared.test, by.removesuffix("s"), test_id, " ".join(train_ids)]


def run(arguments: argparse.Namespace) -> int:
    """Compare the sets, print a table, and return the exit status."""
    found = [
        audit(train, test, structures=not arguments.no_structures)
        for train in arguments.train
        for test in arguments.test
    ]
    sys.stdout.write(lines_of(line for shared in found for line in _lines(shared)) + "\n")
    if arguments.out:
        write_table(arguments.out, found)
        sys.stdout.write(f"every shared crystal: {arguments.out}\n")
    return int(arguments.strict and any(s.ids or s.formulas or s.structures for s in found))


def _lines(shared: Shared) -> list[str]:
    lines = [
        f"training set  {shared.train} ({shared.train_crystals:,} crystals)",
        f"test set      {shared.test} ({shared.test_crystals:,} crystals), of which the training set has",
    ]
    for by in ("ids", "formulas", "structures"):
        part, name = getattr(shared, by), by.removesuffix("s")
        count = "not compared" if part is None else f"{len(part):,} ({len(part) / shared.test_crystals:.1%})"
        lines.append(f"  by {name:<10} {count}")
    return lines
