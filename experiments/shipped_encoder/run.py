"""Pretrain the encoder that ships with the package.

python -m experiments.shipped_encoder.run data=FOLDER [key=value …]

Gathers crystals, leaves out every formula of the benchmarks and each crystal that repeats another, pretrains, and
writes NAME.safetensors with 16-bit weights into the folder of runs. An interrupted run goes on where it stopped. The
keys are those of config.yaml beside this file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crysldnet.artifacts.model_file import write_half_precision
from crysldnet.data.matching import shared_rows
from crysldnet.data.store import CrystalStore
from crysldnet.io import write_atomically
from crysldnet.tools.datacheck.dedupe import find_repeats
from experiments import evidence

HERE = Path(__file__).parent
COLUMNS = ["material_id", "lattice", "atomic_numbers", "frac_coords"]


@dataclass(frozen=True)
class Settings:
    """See config.yaml."""

    data: str
    runs: str
    name: str
    sources: dict[str, float]
    benchmarks: list[str]
    max_atoms: int
    validation: int
    pretraining: list[str]


def gather(settings: Settings, folder: Path) -> dict[str, Any]:
    """Write train.parquet and val.parquet; return what was taken from each source, and what was left out."""
    told = folder / "sources.json"
    if told.exists():
        return json.loads(told.read_text())
    source = Path(settings.data)
    rng = np.random.default_rng(0)
    tables, counts = [], {}
    for name, share in settings.sources.items():
        table = pq.read_table(source / f"{name}.parquet").select(COLUMNS)
        table = table.take(pa.array(np.sort(rng.permutation(len(table))[: round(share * len(table))])))
        counts[name] = len(table)
        tables.append(table)
    schema = pa.schema([field.remove_metadata() for field in tables[0].schema])
    table = pa.concat_tables([t.cast(schema) for t in tables])
    names = np.repeat(list(counts), list(counts.values()))
    ids = [f"{name}:{given}" for name, given in zip(names, table["material_id"].to_pylist(), strict=True)]
    table = table.set_column(0, "material_id", pa.array(ids))
    store = CrystalStore.from_table(table, "sources")
    small = np.flatnonzero(store.crystals.sizes <= settings.max_atoms)
    others = [name if ":" in name else str(source / f"{name}.parquet") for name in settings.benchmarks]
    shared, records = shared_rows(store, small, others, "formula")
    rows = np.setdiff1d(small, shared)
    kept = CrystalStore.from_table(table.take(pa.array(rows)), "sources")
    repeats = find_repeats(kept, ["structure"])
    rows = np.delete(rows, [repeat.row for repeat in repeats])
    held = np.sort(rng.permutation(len(rows))[: settings.validation])
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.take(pa.array(rows[held])), folder / "val.parquet")
    pq.write_table(table.take(pa.array(np.delete(rows, held))), folder / "train.parquet")
    known = {
        "read": counts,
        "larger": len(store) - len(small),
        "of a benchmark's formula": {
            name: record["crystals"] for name, record in zip(settings.benchmarks, records, strict=True)
        },
        "repeats": len(repeats),
        "used": {name: int(count) for name, count in zip(*np.unique(names[rows], return_counts=True), strict=True)},
    }
    write_atomically(told, json.dumps(known, indent=1))
    return known


def main() -> None:
    """Gather, pretrain, write the file that ships."""
    settings = evidence.settings(Settings, HERE, __doc__ or "", {"runs", "data"})
    runs = Path(settings.runs)
    data = runs / "data"
    gather(settings, data)
    evidence.launch(
        runs,
        "pretrain",
        settings.name,
        "data=custom",
        "data.targets=null",
        f"data.path={{train: {data / 'train.parquet'}, val: {data / 'val.parquet'}}}",
        *settings.pretraining,
    )
    write_half_precision(
        runs / "pretrain" / settings.name / "encoder.safetensors", runs / f"{settings.name}.safetensors"
    )


if __name__ == "__main__":
    main()
