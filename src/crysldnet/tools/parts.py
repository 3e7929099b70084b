"""Arguments of the two-word commands, such as ``crysldnet matbench validate``, without the modules that run them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Part(NamedTuple):
    """A two-word command: its help, the module whose ``main`` runs it, and its arguments."""

    description: str
    module: str
    add_arguments: Callable[[argparse.ArgumentParser], None]


def _matbench_validate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=Path,
        help="matbench_v0.1_ALGORITHM, with results.json.gz, info.json and a script",
    )


def _matbench_fold(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("task", help="one of its tasks")
    parser.add_argument("fold", type=int, choices=range(5), help="number of the fold")


def _jarvis_validate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="contributions/NAME")
    parser.add_argument("--splits", type=Path, help="folder with the benchmark's dft_3d_PROPERTY.json.zip")


def _jarvis_property(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("property", help="one of its properties")


PARTS = {
    ("matbench", "validate"): Part(
        "Check a submission folder as Matbench does, and recompute its scores.",
        "crysldnet.tools.matbench.validation",
        _matbench_validate,
    ),
    ("matbench", "fold"): Part(
        "Train one fold of an existing run.", "crysldnet.tools.matbench.benchmark_run", _matbench_fold
    ),
    ("jarvis", "validate"): Part(
        "Check an entry of the JARVIS leaderboard and compute its errors.",
        "crysldnet.tools.jarvis.entry",
        _jarvis_validate,
    ),
    ("jarvis", "property"): Part(
        "Finetune on one property of an existing run.", "crysldnet.tools.jarvis", _jarvis_property
    ),
}


def parser(command: str, part: str) -> argparse.ArgumentParser:
    """Return what reads the arguments of a two-word command."""
    about = PARTS[command, part]
    made = argparse.ArgumentParser(prog=f"crysldnet {command} {part}", description=about.description)
    about.add_arguments(made)
    return made
