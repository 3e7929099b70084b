"""Join the files that a configuration names for train, val and test into one store, and check that ids are unique."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from crysldnet.data.schema import STRUCTURE_COLUMNS
from crysldnet.data.store import CrystalStore
from crysldnet.data.units import same_unit
from crysldnet.errors import DataError


def refuse_repeated_ids(store: CrystalStore) -> None:
    """Reject a store with missing or duplicate ids.

    Raises:
        DataError: naming the first such id and its rows.
    """
    ids = store.ids
    if ids.null_count:
        raise DataError(f"{store.name}: row {pc.index(ids.is_null(), True).as_py()} has no material_id; give it one")
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    values, numbers = counts.field("values"), counts.field("counts").to_numpy()
    first = values[int(np.flatnonzero(numbers > 1)[0])]
    rows = np.flatnonzero(pc.equal(ids, first).to_numpy())
    raise DataError(
        f"{store.name}: material_id {first.as_py()!r} is in rows {', '.join(map(str, rows[:3].tolist()))} "
        f"({int((numbers > 1).sum())} such ids); an id is of one crystal, so rename one, or keep the first of each: "
        f"crysldnet data import {store.name} --out clean.store"
    )


def join_splits(stores: Mapping[str, CrystalStore], targets: Sequence[str]) -> CrystalStore:
    """Concatenate the stores of splits; the column ``split`` has the split of each crystal.

    Args:
        stores: stores by split.
        targets: target columns. Others are left out if their unit or type differs.

    Raises:
        DataError: an id is duplicated, or a target's unit or type differs between stores.
    """
    for store in stores.values():
        refuse_repeated_ids(store)
    ids = {name: set(store.ids.to_pylist()) for name, store in stores.items()}
    for one, other in combinations(ids, 2):
        if shared := sorted(ids[one] & ids[other]):
            raise DataError(f"data.path: {len(shared)} crystals are both in {one} and in {other} ({shared[0]}, …)")
    tables = [store.to_table() for store in stores.values()]
    columns = [name for name in tables[0].column_names if name != "split" and _alike(name, stores, name in targets)]
    parts = [
        table.select(columns).append_column("split", pa.array([name] * len(table)))
        for name, table in zip(stores, tables, strict=True)
    ]
    joined = pa.concat_tables(parts, promote_options="permissive")
    return CrystalStore.from_table(joined, " + ".join(store.name for store in stores.values()))


def _alike(name: str, stores: Mapping[str, CrystalStore], strict: bool) -> bool:
    """Return whether a column has the same unit and type in all stores; raise for a target that doesn't."""
    if name in STRUCTURE_COLUMNS:
        return True
    first, *others = stores
    for other in others:
        here, there = stores[first], stores[other]
        if name not in there.column_names:
            fault = f"{there.name} has no such column"
        elif (kinds := (_kind(here.type_of(name)), _kind(there.type_of(name))))[0] != kinds[1]:
            fault = f"it holds {kinds[0]} in {here.name} and {kinds[1]} in {there.name}"
        elif not same_unit(*(units := (here.units.get(name), there.units.get(name)))):
            said = [f"{unit!r}" if unit else "not stated" for unit in units]
            fault = (
                f"its unit is {said[0]} in {here.name} and {said[1]} in {there.name}; state it when you import, --units"
            )
        else:
            continue
        if strict:
            raise DataError(f"data.path: column {name!r}: {fault}")
        return False
    return True


def _kind(type_: pa.DataType) -> str:
    if pa.types.is_integer(type_) or pa.types.is_floating(type_):
        return "numbers"
    return "texts" if pa.types.is_string(type_) or pa.types.is_large_string(type_) else str(type_)
