"""``crysldnet data download``: download a published data set and convert it to a store."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from crysldnet.data.catalog import PublishedSet, definition_of, published
from crysldnet.data.datasets import data_folder, open_store, published_path
from crysldnet.data.download import fetch_all
from crysldnet.errors import DataError
from crysldnet.tools.importer.published import Made, make_store


def run(arguments: argparse.Namespace) -> int:
    """Download and convert, or list; return the exit status."""
    if arguments.name is None:
        sys.stdout.write("\n".join(_listed(definition) for definition in published().values()) + "\n")
        return 0
    definition = definition_of(arguments.name)
    if arguments.info:
        sys.stdout.write("\n".join(describe(definition)) + "\n")
        return 0
    raw, out = data_folder() / "raw" / definition.name, published_path(definition.name)
    if out.exists() and not arguments.overwrite:
        raise DataError(f"{out} already exists; use it, or recreate it with --overwrite")
    structures = None if arguments.structures is None else open_store(arguments.structures)
    with alone(out):
        if out.exists() and not arguments.overwrite:
            sys.stdout.write(f"{out} was created by another process meanwhile\n")
            return 0
        digests = fetch_all(definition, raw)
        made = make_store(definition, raw, out, structures=structures, overwrite=arguments.overwrite, digests=digests)
    sys.stdout.write("\n".join(_report(definition, digests, made)) + "\n")
    return 0 if made.report.kept else 1


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Let one process at a time prepare a store; the others wait.

    Raises:
        DataError: the folder isn't writable.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out.with_name(f".{out.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise DataError(f"can't write to {out.parent}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def _listed(definition: PublishedSet) -> str:
    where = "here" if published_path(definition.name).exists() else ""
    return f"{definition.name:<22}{definition.entries:>10,}  {where:<5} {definition.title}, {definition.version}"


def describe(definition: PublishedSet) -> list[str]:
    """Return the description of a data set in lines."""
    lines = [f"{definition.title}, {definition.version}", f"  entries   {definition.entries:,}"]
    for file in definition.files:
        lines.append(f"  file      {file.name} from {file.url}{' (by hand)' if file.manual else ''}")
        lines.append(f"            sha256 {file.sha256 or 'not verified'}")
    for property_ in definition.properties:
        sizes = property_.sizes
        shown = "" if sizes is None else f"; train/val/test {sizes.train:,}/{sizes.val:,}/{sizes.test:,}"
        lines.append(f"  property  {property_.name} ({property_.unit}){shown}")
    for key, text in (
        ("splits", definition.splits),
        ("license", definition.license),
        ("citation", definition.citation),
        ("caveat", definition.caveat),
    ):
        lines += [f"  {key:<9} {text}"] if text else []
    return lines


def _report(definition: PublishedSet, digests: dict[str, str], made: Made) -> list[str]:
    known = {file.name: file.sha256 for file in definition.files}
    lines = [str(made.report)]
    for name, digest in digests.items():
        if known.get(name) is None:
            lines.append(
                f"{name}: not verified, for no sha256 is published; this one is {digest}: compare it with a colleague's"
            )
        else:
            lines.append(f"{name}: sha256 as published")
    for name, sizes in made.sizes.items():
        lines.append(f"{name}: {sizes['train']:,} train, {sizes['val']:,} val, {sizes['test']:,} test")
    lines += [f"NOT AS PUBLISHED: {difference}" for difference in made.differences]
    lines += [f"license: {definition.license}", f"cite: {definition.citation}"]
    return lines
