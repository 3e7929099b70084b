"""What is said of a published data set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a data set.

    Attributes:
        name: what it is called here.
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


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many crystals each split has, as published."""

    train: int
    val: int
    test: int


@dataclass(frozen=True, kw_only=True)
class Property:
    """A column of a data set.

    Attributes:
        name: of the column in the store.
        key: of the value in the published file.
        unit: of the column.
        log10: the column is the logarithm of the value.
        fractions: share of validation and of test in a seeded split; None where there is no such split.
        sizes: of the published split. Without fractions they define it, with them they are compared.
    """

    name: str
    key: str
    unit: str
    log10: bool = False
    fractions: tuple[float, float] | None = None
    sizes: Sizes | None = None

    @property
    def split_column(self) -> str:
        """Name of the column that holds the published split."""
        return f"{self.name}_split"


@dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """A published data set.

    Attributes:
        name: what it is called here.
        title: what it is called elsewhere.
        version: of the data.
        entries: rows of the published files.
        reader: the function of ``published.formats`` that reads them.
        files: to fetch.
        properties: columns besides the structures.
        licence, citation: as published.
        splits: what ``data.split.by=published`` means.
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
