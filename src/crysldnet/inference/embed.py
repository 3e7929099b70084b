"""Write encoder features of crystals or atoms.

The inputs are those of ``crysldnet predict``. The encoder is a pretrained one or that of a finetuned model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crysldnet.data.output import Output, open_table
from crysldnet.inference import Device, LayersRead, Per, embed_stream, load_encoder
from crysldnet.inference.arrays import ArraysOutput
from crysldnet.inference.command import Account, named_files
from crysldnet.readers.stream import CrystalStream, StreamSettings


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Every key of ``conf/embed.yaml``."""

    plugins: list[str] = field(default_factory=list)
    model: str
    files: str | list[str]
    out: str
    per: Per
    layers_read: LayersRead
    batch_size: int
    batch_atoms: int
    max_atoms: int
    workers: int | None
    device: Device


def run(config: EmbedConfig, _values: dict[str, Any]) -> int:
    """Embed crystals; return the exit status: 0 unless no crystal was valid."""
    model = load_encoder(config.model, device=config.device)
    output: Output = ArraysOutput(config.out) if Path(config.out).suffix.lower() == ".npz" else open_table(config.out)
    account = Account(config.out, "embedded")
    settings = StreamSettings(
        batch_size=config.batch_size,
        batch_atoms=config.batch_atoms,
        max_atoms=config.max_atoms,
        workers=config.workers,
    )
    stream = CrystalStream(named_files(config.files, account), [model.encoder.graph], settings)
    with output, account.progress(stream.total) as advance:
        for portion, found in embed_stream(model, stream, config.per, config.layers_read):
            if found is not None:
                output.append(found.table())
            advance(portion)
        account.refuse_nothing_used()
    account.finish()
    return 0
