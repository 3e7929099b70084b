"""Predict properties of crystals with finetuned models.

Reads files, folders, archives, tables and stores, and writes a table of predictions with standard deviations, conformal
intervals and out-of-distribution flags.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from crysldnet.data.output import open_table
from crysldnet.inference import Device, check_for, load, predict_stream
from crysldnet.inference.command import Account, named_files
from crysldnet.inference.descriptors import columns_needed, given_descriptors, with_descriptors
from crysldnet.readers.stream import CrystalStream, StreamSettings


@dataclass(frozen=True, kw_only=True)
class PredictConfig(StreamSettings):
    """Every key of ``conf/predict.yaml``."""

    plugins: list[str] = field(default_factory=list)
    model: str | list[str]
    files: str | list[str]
    out: str
    descriptors: dict[str, float]
    interval: float
    device: Device

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.interval < 1.0:
            raise ValueError(f"interval must be between 0 and 1, not {self.interval}")
        if not self.model:
            raise ValueError("model: name at least one")


def run(config: PredictConfig, _values: dict[str, Any]) -> int:
    """Predict; return the exit status: 0 unless no crystal was valid.

    Rejected crystals are reported on standard error with the reason and listed next to the output; the rest is
    predicted.
    """
    names = [config.model] if isinstance(config.model, str) else config.model
    output = open_table(config.out)
    models = [load(name, device=config.device) for name in names]
    account = Account(config.out, "predicted")
    given = given_descriptors(config.descriptors, [name for model in models for name in model.descriptors])
    columns = columns_needed([model.members[0].descriptors for model in models], given)
    graphs = [model.encoder.graph for model in models]
    stream = CrystalStream(named_files(config.files, account), graphs, config, columns, check_for(models))
    trained = 0
    with output, account.progress(stream.total) as advance:
        for portion, found in predict_stream(models, with_descriptors(stream, given), config.interval):
            for name, predictions in zip(names, found, strict=False):
                table = predictions.table()
                if len(names) > 1:
                    table = table.add_column(3, "model", pa.array([name] * len(table), pa.string()))
                output.append(table)
            trained += sum(
                any("trained" in flags for flags in each) for each in zip(*(p.flags for p in found), strict=True)
            )
            advance(portion)
        account.refuse_nothing_used()
    notes = dict.fromkeys(text for model in models for text in model.other_units(stream))
    if trained:
        notes[f"{trained:,} crystals are among those that a model was trained or validated on (flag: trained)"] = None
    account.finish(notes)
    if all(model.knowledge is None for model in models):
        print("no intervals or flags: the model was written by an earlier version", file=sys.stderr)  # noqa: T201
    return 0
