"""User modules whose classes a configuration may use: encoders, objectives, heads, strategies, data modules.

``plugins=[my_encoder]`` on the command line imports ``my_encoder`` from the working folder or the environment. Child
processes get it through an environment variable. An installed package can instead register its modules in the
entry-point group ``crysldnet.plugins``. A model file never loads a plugin: it is rejected unless the user has loaded
the required one.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points

from crysldnet import build
from crysldnet.errors import ConfigError

GROUP = "crysldnet.plugins"
"""Entry-point group."""
VARIABLE = "CRYSLDNET_PLUGINS"
"""Environment variable with the plugins of the parent process, separated by commas."""


def load(names: Iterable[str] = ()) -> None:
    """Import plugins, including those of the environment and of installed packages.

    Raises:
        ConfigError: a module can't be imported.
    """
    inherited = [name for name in os.environ.get(VARIABLE, "").split(",") if name]
    for name in dict.fromkeys([*inherited, *(point.value for point in entry_points(group=GROUP)), *names]):
        if name not in build.PLUGINS:
            _import(name)
            build.PLUGINS.add(name)
    if build.PLUGINS:
        os.environ[VARIABLE] = ",".join(sorted(build.PLUGINS))


def _import(name: str) -> None:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:  # as in python -m crysldnet
        sys.path.insert(0, here)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise ConfigError(f"plugins: {name} needs {error.name}, which isn't installed", "plugins") from error
        raise ConfigError(
            f"plugins: no module {name!r}; put {name.replace('.', '/')}.py into {here}, or install its package",
            "plugins",
        ) from error
