"""The Parquet schema of crystals, readable by any tool.

One row per crystal: ``material_id`` string, ``lattice`` 9 floats (row-major 3×3, Å, rows are lattice vectors),
``atomic_numbers`` n integers, ``frac_coords`` 3n floats; then any property columns, numbers with their unit in the
field's metadata (``units``) or strings. Null means no value. Source, license and citation are in the schema
metadata.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from crysldnet.errors import DataError
from crysldnet.graphs.crystals import Crystals

if TYPE_CHECKING:
    import pyarrow.parquet as pq

STRUCTURE_COLUMNS = {
    "material_id": pa.string(),
    "lattice": pa.list_(pa.float64()),
    "atomic_numbers": pa.list_(pa.uint8()),
    "frac_coords": pa.list_(pa.float32()),
}

MOST_VALUES = 1 << 27
"""of a column, which may be encoded in a thousandth as many bytes"""
_TEXTS = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())


def refuse_claims(file: pq.ParquetFile, size: int) -> None:
    """Reject a Parquet file whose encoded values would exceed memory."""
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    for j in range(file.metadata.num_columns):
        parts = [group.column(j) for group in groups]
        values, held = sum(p.num_values for p in parts), min(size, sum(p.total_compressed_size for p in parts))
        if values > MOST_VALUES and values > 1000 * held:
            raise DataError(f"column {parts[0].path_in_schema!r} claims {values:,} values in {held:,} bytes")


def units_of(schema: pa.Schema) -> dict[str, str]:
    """Return the unit of each property column that has one."""
    return {
        field.name: field.metadata[b"units"].decode(errors="replace")
        for field in schema
        if field.name not in STRUCTURE_COLUMNS and field.metadata and b"units" in field.metadata
    }


def metadata_of(schema: pa.Schema) -> dict[str, str]:
    """Return the metadata of the file: data set, source, license, citation."""
    return with_current_keys(
        {
            key.decode(errors="replace"): text.decode(errors="replace")
            for key, text in (schema.metadata or {}).items()
            if not key.startswith((b"pandas", b"ARROW"))
        }
    )


def with_current_keys(metadata: Mapping[str, str]) -> dict[str, str]:
    """Rename the keys of metadata that earlier versions spelled ``licence``."""
    return {key.replace("licence", "license"): text for key, text in metadata.items()}


def ids_of(table: pa.Table) -> pa.ChunkedArray:
    """Return the ids of a table as text.

    Raises:
        DataError: they are neither text nor integers.
    """
    ids = table["material_id"]
    kind = ids.type.value_type if pa.types.is_dictionary(ids.type) else ids.type
    try:
        if pa.types.is_floating(kind):  # pandas converts integers to float if one is missing
            ids = ids.cast(pa.int64())
        elif not (pa.types.is_integer(kind) or pa.types.is_null(kind) or kind in _TEXTS):
            raise DataError(f"column 'material_id' must hold texts, not {ids.type}")
        return ids.cast(pa.string())
    except pa.ArrowException as error:
        raise DataError(f"column 'material_id' must hold texts, not {ids.type} ({error})") from error


def refuse_repeated_columns(names: Sequence[str]) -> None:
    """Reject a table with duplicate column names."""
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise DataError(f"the column name {twice!r} occurs twice; rename one")


def _lists(table: pa.Table, name: str, dtype: type) -> tuple[NDArray, NDArray[np.int64]]:
    """Return a list column's values and the length of each row."""
    column = table[name].combine_chunks()
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise DataError(f"column {name!r} must hold lists, not {kind}")
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"column {name!r} is empty in row {row}")
    values = column.flatten()
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise DataError(f"column {name!r} must hold lists of numbers, not of {values.type}")
    if values.null_count:
        raise DataError(f"column {name!r} has a null inside a list")
    lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    return values.to_numpy(zero_copy_only=False).astype(dtype, copy=False), lengths


def crystals_from_table(table: pa.Table) -> Crystals:
    """Read the structure columns of a table in the schema.

    Raises:
        DataError: a column is missing or of the wrong type, or the lists of a row have inconsistent lengths.
    """
    refuse_repeated_columns(table.column_names)
    missing = [name for name in STRUCTURE_COLUMNS if name not in table.column_names]
    if missing:
        raise DataError(f"no column {', '.join(missing)}; a table of crystals needs {', '.join(STRUCTURE_COLUMNS)}")
    lattice, nine = _lists(table, "lattice", np.float64)
    numbers, sizes = _lists(table, "atomic_numbers", np.int64)
    frac, triples = _lists(table, "frac_coords", np.float32)
    for bad, message in (
        (nine != 9, "lattice must have 9 numbers"),
        (triples != 3 * sizes, "frac_coords must have 3 numbers for each of atomic_numbers"),
    ):
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise DataError(f"row {row} ({table['material_id'][row]}): {message}")
    numbers = np.where((numbers < 0) | (numbers > 255), 0, numbers).astype(np.uint8)
    ptr = np.concatenate([[0], np.cumsum(sizes)])
    return Crystals(lattice.reshape(-1, 3, 3), ptr, numbers, frac.reshape(-1, 3))


def table_from_crystals(
    crystals: Crystals,
    ids: list[str],
    properties: Mapping[str, NDArray | list | pa.Array],
    units: Mapping[str, str],
    metadata: Mapping[str, str],
) -> pa.Table:
    """Return crystals and their properties as a table in the schema."""
    columns: dict[str, pa.Array] = {
        "material_id": pa.array(ids, pa.string()),
        "lattice": pa.ListArray.from_arrays(9 * np.arange(len(ids) + 1, dtype=np.int32), crystals.lattice.reshape(-1)),
        "atomic_numbers": pa.ListArray.from_arrays(crystals.ptr.astype(np.int32), crystals.numbers),
        "frac_coords": pa.ListArray.from_arrays((3 * crystals.ptr).astype(np.int32), crystals.frac_coords.reshape(-1)),
    }
    for name, values in properties.items():
        columns[name] = values if isinstance(values, pa.Array) else pa.array(values, from_pandas=True)
    return described_table(columns, units, metadata)


def described_table(
    columns: Mapping[str, pa.Array | pa.ChunkedArray], units: Mapping[str, str], metadata: Mapping[str, str]
) -> pa.Table:
    """Return columns as a table with the units of those that have one, and metadata."""
    fields = [
        pa.field(name, column.type, metadata={"units": units[name]} if name in units else None)
        for name, column in columns.items()
    ]
    return pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields, metadata=dict(metadata)))
