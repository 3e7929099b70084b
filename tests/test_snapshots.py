"""Help and configuration of every command and preset are what was last agreed on.

``UPDATE_SNAPSHOTS=1 pytest tests/test_snapshots.py`` writes them anew; look at the difference before you commit it.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from crysldnet.cli import COMMANDS, run
from crysldnet.config import PRESETS, choices, compose, to_yaml

FOLDER = Path(__file__).parent / "snapshots"
NEEDED = {
    "predict": ["model=a", "files=b"],
    "embed": ["files=b"],
    "suggest": ["model=a", "files=b"],
    "explain": ["model=a", "files=b"],
    "export": ["model=a"],
    "report": ["runs=[a]"],
    "jarvis": ["email=a@b.org", "project_url=https://b.org"],
}
"""Keys without a default."""


def compare(name: str, text: str) -> None:
    path = FOLDER / name
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.write_text(text)
    assert path.is_file(), f"{path}: run with UPDATE_SNAPSHOTS=1"
    assert text == path.read_text(), f"{path} differs: run with UPDATE_SNAPSHOTS=1 if that is intended"


def values_of(command: str, *arguments: str) -> dict[str, Any]:
    return compose(command, [*NEEDED.get(command, []), *arguments]).values


def differences(base: Any, values: Any, key: str = "") -> Iterator[str]:
    """Give ``key: value`` where values differ from a base."""
    if isinstance(base, Mapping) and isinstance(values, Mapping):
        for name in sorted({*base, *values}):
            yield from differences(base.get(name), values.get(name), f"{key}.{name}" if key else name)
    elif base != values:
        yield f"{key}: {values}"


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    compare(f"{command}.help.txt", capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_configuration(command: str) -> None:
    compare(f"{command}.yaml", to_yaml(values_of(command)))


@pytest.mark.parametrize("command", PRESETS)
def test_presets(command: str) -> None:
    base = values_of(command)
    lines = []
    for preset in choices(PRESETS[command]):
        lines.append(f"preset={preset}")
        lines += [f"  {line}" for line in differences(base, values_of(command, f"preset={preset}"))]
    compare(f"{command}.presets.txt", "\n".join(lines) + "\n")
