"""Train directly on files: ``crysldnet finetune cifs/ values.csv``.

A folder or file of crystals and an optional table of properties are imported into a store below the runs folder, once
per content, and the store replaces them in the arguments.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crysldnet.config.compose import keys_of
from crysldnet.config.values import DATA_WORDS, OWN, is_opened, literally, parse, split
from crysldnet.console import listed, note
from crysldnet.data.datasets import open_store
from crysldnet.data.store import CrystalStore
from crysldnet.errors import ConfigError, DataError
from crysldnet.readers.structure_files import find_structure_files
from crysldnet.readers.table_cells import EXCEL, NO_TABLE
from crysldnet.tools.importer.importer import import_crystals

TABLE = "data.table"
TABLES = (".csv", ".tsv", ".txt", *EXCEL, *NO_TABLE)
FOLDER = "imported"


def with_own_data(command: str, arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Return the arguments with a store in place of files, and whether there were any.

    Raises:
        ConfigError: the crystals or the target are ambiguous.
        DataError: the files can't be imported.
    """
    pairs = split(arguments, keys_of(command), DATA_WORDS, literally)
    given = dict(pairs)
    source, table = _named(given)
    if source is None:
        if table is not None:
            raise ConfigError(f"{TABLE}={table}: name its crystals too, as data=FOLDER", TABLE)
        return list(arguments), False
    rest = [f"{key}={value}" for key, value in pairs if key not in (DATA_WORDS, "data", "data.path", TABLE)]
    if is_opened(source):
        if table is not None:
            raise ConfigError(f"{TABLE}={table}: {source} is already imported, with its table if it had one", TABLE)
        store = Path(source)
    else:
        store = _imported(Path(str(given.get("runs", "runs"))), source, table)
    opened = open_store(os.fspath(store))
    if command == "finetune" and "data.targets" not in given:
        rest.append(f"data.targets=['{_only_target(opened, table)}']")
    return [f"data={OWN}", f"data.path={store}", *rest], not is_opened(source)


def _named(given: dict[str, str]) -> tuple[str | None, str | None]:
    """Return the crystals and the table in the arguments."""
    words = parse(given[DATA_WORDS]) if DATA_WORDS in given else []
    tables = [word for word in words if Path(word).suffix.lower() in TABLES and len(words) > 1]
    sources = [word for word in words if word not in tables]
    table = given.get(TABLE)
    if len(tables) > 1 or len(sources) > 1 or (tables and table is not None):
        raise ConfigError(f"{' '.join(words)}: name one folder or file of crystals, and one table of their properties")
    source = sources[0] if sources else _path_of(given)
    return source, tables[0] if tables else table


def _path_of(given: dict[str, str]) -> str | None:
    """Return the files in ``data`` or ``data.path`` that need an import."""
    for key in ("data", "data.path"):
        value = given.get(key, "")
        if value and not value.startswith(("[", "{")) and os.path.exists(os.path.expanduser(value)):
            if key == "data" and value.endswith((".yaml", ".yml")):
                continue
            if not is_opened(value):
                return value
    return None


def _imported(runs: Path, source: str, table: str | None) -> Path:
    """Import files unless already imported; print what was understood."""
    if not os.path.exists(os.path.expanduser(source)):
        raise DataError(f"{source}: no such file or folder")
    if table is not None and not os.path.exists(table):
        raise DataError(f"{table}: no such file")
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(source).resolve().stem) or "crystals"
    store = runs / FOLDER / f"{name}-{_stamp(source, table)}.store"
    if store.exists():
        note(f"{source} was imported before, into {store}")
        return store
    report = import_crystals(source, store, targets=table)
    if not report.kept:
        raise DataError(f"{source}: every crystal was rejected; the reasons are in {report.report_path}")
    for line in str(report).splitlines():
        note(line)
    _say_what_was_understood(CrystalStore.open(store), table)
    return store


def _say_what_was_understood(store: CrystalStore, table: str | None) -> None:
    """Print the count and unit of each property."""
    if table is not None:
        note(f"{table} has these properties of the {len(store):,} crystals:")
    for name in filter(store.is_numeric, store.column_names):
        values = store.numbers_of(name)
        known = np.isfinite(values)
        unit = store.units.get(name)
        span = f", {values[known].min():.4g} to {values[known].max():.4g}" if known.any() else ""
        note(f"  {name}: {int(known.sum()):,} values {f'in {unit}' if unit else 'without a unit'}{span}")


def _stamp(source: str, table: str | None) -> str:
    """Return a short hash of the files, their sizes and times, and the table's content."""
    path = Path(source).expanduser()
    files = find_structure_files(path) if path.is_dir() else [path]
    text = "\n".join(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
    content = Path(table).read_bytes() if table is not None else b""
    return hashlib.sha256(text.encode(errors="surrogateescape") + b"\0" + content).hexdigest()[:8]


def _only_target(store: CrystalStore, table: str | None) -> str:
    """Return the only property, to predict it.

    Raises:
        ConfigError: there are several properties or none.
    """
    names = list(filter(store.is_numeric, store.column_names))
    if len(names) == 1:
        return names[0]
    of = table or store.name
    if not names:
        hint = "" if table else "; name the table of their properties too, as data.table=values.csv"
        raise ConfigError(f"data.targets: {of} has no column of numbers to predict{hint}", "data.targets")
    raise ConfigError(
        f"data.targets: {of} has several columns of numbers; name what to predict, as "
        f'"data.targets={names[0]}". They are: {listed(names)}',
        "data.targets",
    )
