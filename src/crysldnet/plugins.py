"""User modules that add encoders, objectives, heads, data modules, target types, strategies and file formats.

``plugins=[my_encoder]`` on the command line imports ``my_encoder`` from the working folder or the environment. Child
processes get it through an environment variable. An installed package can instead register its modules in the
entry-point group ``crysldnet.plugins``. A model file names the plugins that it needs, but never loads one: it is
rejected unless the user has loaded them.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path

from crysldnet.errors import CheckpointError, ConfigError

GROUP = "crysldnet.plugins"
"""Entry-point group."""
VARIABLE = "CRYSLDNET_PLUGINS"
"""Environment variable with the plugins of the parent process, separated by commas."""
LOADED: set[str] = set()
"""Names of the loaded plugins, whose own classes and functions configuration may instantiate."""


def load(names: Iterable[str] = ()) -> None:
    """Import plugins, including those of the environment and of installed packages.

    Raises:
        ConfigError: a module can't be imported.
    """
    inherited = [name for name in os.environ.get(VARIABLE, "").split(",") if name]
    for name in dict.fromkeys([*inherited, *(point.value for point in entry_points(group=GROUP)), *names]):
        if name not in LOADED:
            _import(name)
            LOADED.add(name)
    if LOADED:
        os.environ[VARIABLE] = ",".join(sorted(LOADED))


def _import(name: str) -> None:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise ConfigError(f"plugins: {name} needs {error.name}, which isn't installed", "plugins") from error
        raise ConfigError(
            f"plugins: no module {name!r}; put {name.replace('.', '/')}.py into {here}, or install its package",
            "plugins",
        ) from error
    children = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if here not in children and Path(here) in Path(module.__file__ or "").absolute().parents:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, *children]))  # they may run in another folder


def of(modules: Iterable[str]) -> list[str]:
    """Return the loaded plugins to which modules belong."""
    wholes = {f"{module}." for module in modules}
    return sorted(name for name in LOADED if any(whole.startswith(f"{name}.") for whole in wholes))


def require(names: Iterable[str], path: str | os.PathLike[str]) -> None:
    """Check that the plugins of a file are loaded.

    Raises:
        CheckpointError: one isn't; the message names file and remedy.
    """
    if missing := [name for name in names if name not in LOADED]:
        load()
        missing = [name for name in missing if name not in LOADED]
    if missing:
        raise CheckpointError(
            f"{path}: parts of it are defined in {', '.join(missing)}, which isn't loaded; add "
            f"plugins=[{','.join(missing)}] (in Python, crysldnet.plugins.load({missing!r}))"
        )


def files_of(names: Iterable[str]) -> dict[str, list[Path]]:
    """Return the source files of each loaded plugin: one for a module, all for a package."""
    found = {}
    for name in names:
        module = sys.modules[name]
        folders = [Path(folder) for folder in getattr(module, "__path__", ())]
        found[name] = sorted(file for folder in folders for file in folder.rglob("*.py"))
        found[name] = found[name] or [Path(module.__file__ or "")]
    return found
