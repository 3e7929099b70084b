"""The ``--help`` text of a command."""

from __future__ import annotations

from collections.abc import Sequence

from crysldnet.config.compose import PRESETS
from crysldnet.config.files import CHOICES, choices, conf_folder, group_file, load_yaml
from crysldnet.config.words import PLAIN_WORDS, TRAINS


def help_text(command: str, description: str) -> str:
    """Return usage, groups with their choices, and every key with its comment."""
    root_file = conf_folder() / f"{command}.yaml"
    defaults = load_yaml(root_file).get(CHOICES) or {}
    plain = f"{PLAIN_WORDS[command].upper()} …" if command in PLAIN_WORDS else "[group=name …]"
    first = f"[CRYSTALS [TABLE]] {plain}" if command in TRAINS else plain
    lines = [f"usage: crysldnet {command} {first} [key=value …] [--print-config]", "", description, ""]
    if defaults:
        lines.append("groups (group=name; the default in brackets)")
        lines += [f"  {group:<10} {', '.join(choices(str(group)))}  [{default}]" for group, default in defaults.items()]
        if command in PRESETS:
            lines.append(f"  {'preset':<10} {', '.join(choices(PRESETS[command]))}")
        lines.append("")
    lines += ["keys (key=value), with their defaults", ""]
    body = root_file.read_text().split("\n")
    lines += [f"  {line}".rstrip() for line in _without_defaults(body)]
    for group, default in defaults.items():
        text = group_file(str(group), default).read_text().strip().split("\n")
        lines += ["", f"  {group}:  # {group}={default}", *(f"    {line}".rstrip() for line in text)]
    return "\n".join(lines)


def _without_defaults(lines: Sequence[str]) -> list[str]:
    kept, inside = [], False
    for line in lines:
        if line.startswith("defaults:"):
            inside = True
        elif inside and line and not line.startswith((" ", "#")):
            inside = False
        if not inside:
            kept.append(line)
    return kept
