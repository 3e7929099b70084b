"""The published data sets. ``conf/published/NAME.yaml`` has the files, checksums, license, citation and splits of each.

A sha256 stands there only where a public, versioned source states it: the metadata of matminer and of matbench, which
come from PyPI. Without one, ``crysldnet data download`` prints the sha256 of the file that it fetched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crysldnet.build import from_yaml
from crysldnet.errors import DataError
from crysldnet.io import conf_folder


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class File(_Strict):
    """A file of a data set.

    Attributes:
        name: under which it is kept in ``data/raw``.
        url: where it is fetched from, or where a person finds it.
        sha256: of its bytes; None where it could not be verified.
        manual: it can't be fetched by name, a person has to.
        split: the split that the whole file is, where each split has its own.
    """

    name: str
    url: str
    sha256: str | None = None
    manual: bool = False
    split: str | None = None


class Sizes(_Strict):
    """How many crystals each split has, as published."""

    train: int
    val: int
    test: int


class Property(_Strict):
    """A column of a data set.

    Attributes:
        name: of the column in the store.
        key: of the value in the published file; the name by default.
        unit: of the column.
        log10: the column is the logarithm of the value.
        fractions: share of validation and of test in a seeded split; None where there is no such split.
        sizes: of the published split. Without fractions they define it, with them they are compared.
    """

    name: str
    key: str = Field(default_factory=lambda known: known["name"])
    unit: str
    log10: bool = False
    fractions: tuple[float, float] | None = None
    sizes: Sizes | None = None

    @property
    def split_column(self) -> str:
        """Name of the column that holds the published split."""
        return f"{self.name}_split"


class PublishedSet(_Strict):
    """A published data set.

    Attributes:
        name: of its YAML file.
        title: what it is called elsewhere.
        version: of the data.
        entries: rows of the published files.
        reader: how the files are read, a key of ``crysldnet.tools.importer.published.formats.READERS``.
        files: to fetch.
        properties: columns besides the structures.
        licence, citation: as published.
        splits: what ``data.split.by=official`` means.
        caveat: what could not be verified, or must be known.
        needs_structures: it has no structures of its own, but Materials Project ids.
    """

    name: str
    title: str
    version: str
    entries: int
    reader: str
    files: tuple[File, ...]
    properties: tuple[Property, ...] = ()
    licence: str
    citation: str
    splits: str = ""
    caveat: str = ""
    needs_structures: bool = False

    @property
    def unverified(self) -> list[str]:
        """Names of the files whose sha256 isn't known."""
        return [file.name for file in self.files if file.sha256 is None]


def read_definition(path: Path) -> PublishedSet:
    """Read the definition of a data set, which has the file's name.

    Raises:
        DataError: the file can't be read, or has an unknown key or a value of another type.
    """
    try:
        values = from_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(values, Mapping) or "name" in values:
            raise DataError(f"{path}: it must hold the keys of a published data set; its name is the file's")
        return PublishedSet.model_validate_json(json.dumps({"name": path.stem, **values}))
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from error
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not readable as YAML ({error})") from error


@cache
def published() -> dict[str, PublishedSet]:
    """Return the definition of each data set by its name."""
    return {path.stem: read_definition(path) for path in sorted((conf_folder() / "published").glob("*.yaml"))}


def definition_of(name: str) -> PublishedSet:
    """Return a definition, by its name or from a YAML file of that kind.

    Raises:
        DataError: no data set has this name, or the file can't be used.
    """
    if name.endswith((".yaml", ".yml")):
        return read_definition(Path(name))
    known = published()
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise DataError(f"{name}: no such published data set; {hint}there are: {', '.join(known)}")
    return known[name]
