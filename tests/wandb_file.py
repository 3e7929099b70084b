"""Read what an offline W&B run wrote: records of protocol buffers in a log of blocks."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
HEADER = 7
"""Bytes of the file's own header, and of each record's: checksum, length, kind."""
WHOLE, FIRST, LAST = 1, 2, 4


def records(path: Path) -> Iterator[Any]:
    """Return the records of a ``.wandb`` file, as W&B's own message type."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, part = path.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:  # too short for a header: padding
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        place += HEADER
        part = (b"" if kind in (WHOLE, FIRST) else part) + data[place : place + length]
        place += length
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(part)
            yield record


def rows(path: Path) -> list[dict[str, Any]]:
    """Return what was logged, a mapping each time."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in records(path)
        if r.HasField("history")
    ]


def config(path: Path) -> dict[str, Any]:
    """Return the configuration as it was at the end."""
    updates = (item for r in records(path) if r.HasField("config") for item in r.config.update)
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}


def artifacts(path: Path) -> dict[str, dict[str, Any]]:
    """Return the metadata of the artifacts that were logged as such, by their type."""
    logged = [r.artifact for r in records(path) if r.HasField("artifact") and r.artifact.type != "run_table"]
    return {a.type: {**json.loads(a.metadata), "aliases": sorted(a.aliases)} for a in logged}
