"""``crysldnet jarvis property RUN PROPERTY`` finetunes on one property of an existing run.

A run starts it for each property. You can also start it yourself or with a scheduler; the run with ``resume=last`` then
uses the result.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from crysldnet.config import compose, validate
from crysldnet.errors import ConfigError
from crysldnet.finetune import run as finetune
from crysldnet.tools.jarvis import JarvisConfig
from crysldnet.training.run_folder import is_complete


def main(argv: Sequence[str]) -> int:
    """Finetune on one property of an existing run; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="crysldnet jarvis property", description="Finetune on one property of an existing run."
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("property", help="one of its properties")
    arguments = parser.parse_args(list(argv))
    path = arguments.run.absolute()
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path}: no run exists there; start one with crysldnet jarvis", "run")
    composition = compose("jarvis", [], path / "config.yaml")
    config: JarvisConfig = validate(composition, JarvisConfig)
    if arguments.property not in config.properties:
        known = ", ".join(config.properties)
        raise ConfigError(f"{path}: {arguments.property} isn't one of its properties, {known}", "property")
    if is_complete(path / "finetune" / arguments.property):
        return 0
    return finetune(*config.of_property(arguments.property, path, composition.values))
