"""Files of crystals that can be read, by their suffix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS: dict[str, str | Callable[[Path], Any]] = {
    ".zip": "archives.ZipReader",
    ".tar": "archives.TarReader",
    ".json": "record_files.json_reader",
    ".jsonl": "record_files.LinesReader",
    ".ndjson": "record_files.LinesReader",
    ".csv": "record_files.CsvReader",
    ".extxyz": "record_files.XyzReader",
    ".xyz": "record_files.XyzReader",
    ".db": "record_files.DatabaseReader",
    ".parquet": "tables.ParquetReader",
}
"""The reader of each suffix: its name below ``crysldnet.readers``, or a plugin's class."""
STORE = "tables.StoreReader"


def register(suffix: str, reader: Callable[[Path], Any]) -> None:
    """Register a plugin's reader class for files with a suffix such as ``.xsf``; see ``Reader`` in ``sources.py``."""
    KINDS[suffix.lower()] = reader


def known_files() -> str:
    """Return the patterns of readable files."""
    return "*.cif, *.vasp, *.poscar, POSCAR*, CONTCAR*, " + ", ".join(f"*{suffix}" for suffix in KINDS)
