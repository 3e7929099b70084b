"""``crysldnet data dedupe``: remove duplicates and crystals of other sets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crysldnet.console import lines_of
from crysldnet.data.datasets import open_selected
from crysldnet.data.matching import duplicates, shared_rows
from crysldnet.data.output import ParquetOutput, StoreWriter
from crysldnet.data.store import CrystalStore
from crysldnet.io import write_csv


@dataclass(frozen=True)
class Removed:
    """A removed row.

    Attributes:
        row: row in the store.
        reason: reason for the removal.
        of: id of the kept duplicate, or name of the other set.
    """

    row: int
    reason: str
    of: str


def find_repeats(store: CrystalStore, by: Sequence[str]) -> list[Removed]:
    """Find rows that duplicate an earlier one.

    Args:
        store: the crystals.
        by: ``id``, ``structure`` or both.
    """
    ids: list[str] = store.ids.to_pylist()
    found: dict[int, Removed] = {}
    if "id" in by:
        first: dict[str, int] = {}
        for row, id_ in enumerate(ids):
            if first.setdefault(id_, row) != row:
                found[row] = Removed(row, "same id", id_)
    if "structure" in by:
        for row, kept in duplicates(store).items():
            found.setdefault(row, Removed(row, "same structure", ids[kept]))
    return sorted(found.values(), key=lambda removed: removed.row)


def write_rows(store: CrystalStore, rows: NDArray[np.int64], out: str, *, overwrite: bool) -> None:
    """Write some rows of a store as a store, or as Parquet if the name ends in .parquet."""
    table = store.to_table().take(rows)
    kind = ParquetOutput if out.endswith(".parquet") else StoreWriter
    with kind(out, overwrite=overwrite) as output:
        output.append(table)


def run(arguments: argparse.Namespace) -> int:
    """Write the result, print the counts, and return the exit status."""
    store = open_selected(arguments.store)
    removed = find_repeats(store, arguments.by)
    gone = {item.row for item in removed}
    left = np.array([row for row in range(len(store)) if row not in gone], np.int64)
    records = []
    for name in arguments.against:
        shared, (record,) = shared_rows(store, left, [name], arguments.against_by)
        removed += [Removed(int(row), f"same {arguments.against_by}", name) for row in shared]
        left = np.setdiff1d(left, shared)
        records.append(record)
    lines = [f"{len(store):,} crystals in {arguments.store}"]
    for reason in ("same id", "same structure"):
        count = sum(item.reason == reason for item in removed if item.of not in arguments.against)
        lines.append(f"{count:,} left out: {reason} as an earlier one")
    lines += [f"{r['crystals']:,} left out: {r['by']} also in {r['name']}" for r in records]
    if not len(left):
        sys.stdout.write(lines_of([*lines, "no crystals left, nothing written"]) + "\n")
        return 1
    write_rows(store, left, arguments.out, overwrite=arguments.overwrite)
    listed = _write_removed(store, removed, Path(arguments.out))
    lines.append(f"{len(left):,} crystals written to {arguments.out}")
    lines += [f"what was left out: {listed}"] if listed is not None else []
    sys.stdout.write(lines_of(lines) + "\n")
    return 0


def _write_removed(store: CrystalStore, removed: Sequence[Removed], out: Path) -> Path | None:
    path = out.with_name(f"{out.name}.removed.csv")
    if not removed:
        path.unlink(missing_ok=True)
        return None
    ids = store.ids_at(np.array([item.row for item in removed], np.int64))
    rows = ([id_, item.row, item.reason, item.of] for id_, item in zip(ids, removed, strict=True))
    write_csv(path, [["material_id", "row", "reason", "of"], *rows])
    return path
