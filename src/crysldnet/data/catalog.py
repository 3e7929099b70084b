"""Published data sets. ``conf/published/NAME.yaml`` defines files, checksums, license, citation and splits of each.

A sha256 is given only if a public, versioned source states it: the metadata of matminer and matbench on PyPI.
Otherwise, ``crysldnet data download`` prints the sha256 of the downloaded file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator

from crysldnet.build import from_yaml
from crysldnet.console import did_you_mean
from crysldnet.errors import DataError
from crysldnet.io import conf_folder


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class File(_Strict):
    """A file of a data set.

    Attributes:
        name: file name in ``data/raw``.
        url: download address, or page with the file.
        sha256: hash of its bytes; None if unverified.
        manual: it must be downloaded manually.
        split: the split of the whole file, if splits are separate files.
    """

    name: str
    url: str
    sha256: str | None = None
    manual: bool = False
    split: str | None = None

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not name.isprintable() or {*name} & {*"/\\"} or name.startswith("."):
            raise ValueError(f"{name!r} is no file's name: no path, no dot at its start, no control characters")
        return name


class Sizes(_Strict):
    """Published number of crystals in each split."""

    train: int
    val: int
    test: int


class Property(_Strict):
    """A column of a data set.

    Attributes:
        name: column name in the store.
        key: key in the published file; by default the name.
        unit: unit of the column.
        log10: the column is the logarithm of the value.
        fractions: fractions of validation and test in a seeded split; None without such a split.
        sizes: sizes of the official split. Without fractions they define it, otherwise they are checked.
    """

    name: str
    key: str = Field(default_factory=lambda known: known["name"])
    unit: str
    log10: bool = False
    fractions: tuple[float, float] | None = None
    sizes: Sizes | None = None

    @property
    def split_column(self) -> str:
        """Name of the column with the official split."""
        return f"{self.name}_split"


class PublishedSet(_Strict):
    """A published data set.

    Attributes:
        name: name of its YAML file.
        title: common name.
        version: version of the data.
        entries: number of rows of the published files.
        reader: file layout, a key of ``RECORDS`` or ``FILES`` in ``crysldnet.tools.importer.published``.
        files: files to download.
        properties: columns in addition to the structures.
        license, citation: as published.
        splits: meaning of ``data.split.by=official``.
        caveat: what is unverified or important to know.
        needs_structures: it has Materials Project ids but no structures.
    """

    name: str
    title: str
    version: str
    entries: int
    reader: str
    files: tuple[File, ...]
    properties: tuple[Property, ...] = ()
    license: str = Field(validation_alias=AliasChoices("license", "licence"))
    citation: str
    splits: str = ""
    caveat: str = ""
    needs_structures: bool = False

    @property
    def unverified(self) -> list[str]:
        """Names of the files without a known sha256."""
        return [file.name for file in self.files if file.sha256 is None]


def read_definition(path: Path) -> PublishedSet:
    """Read the definition of a data set, named after its file.

    Raises:
        DataError: the file can't be read, or has an unknown key or a value of the wrong type.
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
    """Return the definition of each data set by name."""
    return {path.stem: read_definition(path) for path in sorted((conf_folder() / "published").glob("*.yaml"))}


def definition_of(name: str) -> PublishedSet:
    """Return a definition by name or from a YAML file.

    Raises:
        DataError: no data set has this name, or the file is invalid.
    """
    if name.endswith((".yaml", ".yml")):
        return read_definition(Path(name))
    known = published()
    if name not in known:
        hint = did_you_mean(name, known, f"available: {', '.join(known)}")
        raise DataError(f"{name}: no such published data set; {hint}")
    return known[name]
