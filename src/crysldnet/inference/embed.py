"""Write encoder features of crystals or atoms.

The inputs are those of ``crysldnet predict``. The encoder is a pretrained one or that of a finetuned model.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from crysldnet.data.output import FileOutput, Output, open_table
from crysldnet.inference import Device, LayersRead, Per, embed_stream, load_encoder
from crysldnet.inference.command import Account, named_files
from crysldnet.readers.stream import CrystalStream, StreamSettings


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(StreamSettings):
    """Every key of ``conf/embed.yaml``."""

    plugins: list[str] = field(default_factory=list)
    model: str
    files: str | list[str]
    out: str
    per: Per
    layers_read: LayersRead
    device: Device


def run(config: EmbedConfig, _values: dict[str, Any]) -> int:
    """Embed crystals; return the exit status: 0 unless no crystal was valid."""
    model = load_encoder(config.model, device=config.device)
    output: Output = ArraysOutput(config.out) if Path(config.out).suffix.lower() == ".npz" else open_table(config.out)
    account = Account(config.out, "embedded")
    stream = CrystalStream(named_files(config.files, account), [model.encoder.graph], config)
    with output, account.progress(stream.total) as advance:
        for portion, found in embed_stream(model, stream, config.per, config.layers_read):
            if found is not None:
                output.append(found.table())
            advance(portion)
        account.refuse_nothing_used()
    account.finish()
    return 0


class ArraysOutput(FileOutput):
    """An ``.npz`` with ``embedding`` [rows, D] float32 and one array per other column of the table.

    Embeddings are buffered in a temporary file, so memory only holds the other columns.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, overwrite=True)
        self._columns: dict[str, list[Any]] = {}
        self._width = 0

    def __enter__(self) -> FileOutput:
        entered = super().__enter__()
        self._features = tempfile.TemporaryFile(dir=self._path.parent)
        return entered

    def append(self, table: pa.Table) -> None:
        """Add rows; all tables have the same columns."""
        features = table["embedding"].combine_chunks()
        self._width = features.type.list_size
        self._features.write(np.ascontiguousarray(features.flatten().to_numpy(), np.float32).tobytes())
        for name in table.column_names:
            if name != "embedding":
                self._columns.setdefault(name, []).append(_array(table[name]))

    def _finish(self) -> None:
        self._features.flush()
        size = self._features.tell() // 4
        features = np.memmap(self._features, np.float32, "r", shape=(size // max(self._width, 1), self._width))
        columns: dict[str, Any] = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        np.savez(self._file, embedding=features, **columns)
        self._features.close()


def _array(column: pa.ChunkedArray) -> np.ndarray:
    values = column.to_numpy(zero_copy_only=False)
    return values.astype(np.str_) if pa.types.is_string(column.type) else values
