"""The ``--help`` text of a command, and command-line completion for bash, zsh and fish, from its groups and keys."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from crysldnet.config.compose import PRESETS, merge_files
from crysldnet.config.files import CHOICES, choices, conf_folder, group_file, load_yaml
from crysldnet.config.values import PLAIN_WORDS, TRAINS, flat
from crysldnet.errors import CrysldnetError


def help_text(command: str, description: str) -> str:
    """Return usage, groups with their choices, and every key with its comment."""
    root_file = conf_folder() / f"{command}.yaml"
    defaults = load_yaml(root_file).get(CHOICES) or {}
    words = ["[CRYSTALS [TABLE]]"] if command in TRAINS else []
    words += [f"{PLAIN_WORDS[command].upper()} …"] if command in PLAIN_WORDS else []
    words += ["[group=name …]"] if defaults else []
    lines = [
        f"usage: crysldnet {command} {' '.join(words)} [key=value …] [--print-config]".replace("  ", " "),
        "",
        description,
        "",
    ]
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


SHELLS = ("bash", "zsh", "fish")

BASH = """\
# Completion of crysldnet in bash. Write it where bash looks for such files:
#   crysldnet completion bash > ~/.local/share/bash-completion/completions/crysldnet
_crysldnet() {
    local line=${COMP_LINE:0:COMP_POINT} current candidates place
    local -a words
    current=${line##*[[:space:]]}
    read -ra words <<<"${line%"$current"}"
    place=${#words[@]}
    case "$place ${words[1]} ${words[2]}" in
@CASES@
    esac
    COMPREPLY=($(compgen -W "$candidates" -- "$current"))
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
    if [[ $COMP_WORDBREAKS == *=* && $current == *=* ]]; then # bash replaces what stands behind the = alone
        COMPREPLY=("${COMPREPLY[@]#"${current%"${current##*=}"}"}")
    fi
}
complete -o default -F _crysldnet crysldnet
"""

ZSH = """\
#compdef crysldnet
# Completion of crysldnet in zsh. Write it where zsh looks for such files, a folder of its fpath:
#   crysldnet completion zsh > ~/.zfunc/_crysldnet
_crysldnet() {
    local -a candidates described
    case "$((CURRENT - 1)) ${words[2]} ${words[3]}" in
@CASES@
    esac
    if (( ${#described} )); then
        _describe command described
        return
    fi
    compadd -- ${candidates:#*=}
    compadd -S '' -- ${(M)candidates:#*=}
    compset -P '*='
    _files
}
if [[ ${funcstack[1]} == _crysldnet ]]; then
    _crysldnet "$@"
else
    compdef _crysldnet crysldnet
fi
"""

FISH = """\
# Completion of crysldnet in fish. Write it where fish looks for such files:
#   crysldnet completion fish > ~/.config/fish/completions/crysldnet.fish
@CASES@
"""


@dataclass(frozen=True)
class Command:
    """Possible words after a command.

    Attributes:
        help: help line.
        words: ``key=``, ``group=choice`` and flags.
        actions: possible words after each action.
    """

    help: str
    words: Sequence[str] = ()
    actions: Mapping[str, Sequence[str]] = field(default_factory=dict)


def words_of(command: str, schema: type) -> list[str]:
    """Return the possible words after a command with groups and keys."""
    found = ["--help", "--print-config"]
    values, groups = merge_files(command, (), (), {})
    for group in groups:
        found += [f"{group}={name}" for name in choices(group)]
    if command in PRESETS:
        found += [f"preset={name}" for name in choices(PRESETS[command])]
    types = get_type_hints(schema)
    for key, value in flat(values):
        if key.rpartition(".")[2].startswith("_"):
            continue
        found += [f"{key}={word}" for word in _words_for(types.get(key), value)] or [f"{key}="]
    return list(dict.fromkeys(found))


def actions_of(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Return the actions of a command with flags, and the flags of each."""
    (actions,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    return {name: sorted(set(re.findall(r"(?<![\w-])--[\w-]+", own.format_help()))) for name, own in actions.items()}


def _words_for(type_: Any, value: Any) -> list[str]:
    """Return the values of a key with few choices."""
    if isinstance(value, bool):
        return ["true", "false"]
    literals = [type_, *get_args(type_)]
    return [str(word) for each in literals if getattr(each, "__origin__", None) is Literal for word in get_args(each)]


def script(shell: str, commands: Mapping[str, Command]) -> str:
    """Return the completion script of these commands for a shell.

    Raises:
        CrysldnetError: the shell isn't supported.
    """
    if shell not in SHELLS:
        raise CrysldnetError(f"crysldnet completion SHELL: the shells are {', '.join(SHELLS)}, not {shell!r}")
    template, cases = {"bash": (BASH, _bash), "zsh": (ZSH, _zsh), "fish": (FISH, _fish)}[shell]
    return template.replace("@CASES@", "\n".join(cases(commands)))


def _bash(commands: Mapping[str, Command]) -> list[str]:
    return [f"    1\\ *) candidates={_joined(commands)} ;;", *_cases(commands, _joined)]


def _zsh(commands: Mapping[str, Command]) -> list[str]:
    described = " ".join(shlex.quote(f"{name}:{command.help}") for name, command in commands.items())
    return [f"    1\\ *) described=({described}) ;;", *_cases(commands, lambda words: f"({' '.join(words)})")]


def _joined(words: Iterable[str]) -> str:
    return shlex.quote(" ".join(words))


def _cases(commands: Mapping[str, Command], array: Callable[[Iterable[str]], str]) -> Iterator[str]:
    """Yield the candidates after each command and action, as cases of bash and zsh."""
    for name, command in commands.items():
        if command.actions:
            yield f"    2\\ {name}\\ *) candidates={array(command.actions)} ;;"
            for action, words in command.actions.items():
                yield f"    *\\ {name}\\ {action}) candidates={array(words)} ;;"
        else:
            yield f"    *\\ {name}\\ *) candidates={array(command.words)} ;;"


def _fish(commands: Mapping[str, Command]) -> list[str]:
    lines = []
    for name, command in commands.items():
        lines.append(f"complete -c crysldnet -f -n __fish_use_subcommand -a {name} -d {shlex.quote(command.help)}")
        here = f"__fish_seen_subcommand_from {name}"
        if command.actions:
            actions = " ".join(command.actions)
            none = f"not __fish_seen_subcommand_from {actions}"
            lines.append(f"complete -c crysldnet -f -n '{here}; and {none}' -a '{actions}'")
            for action, words in command.actions.items():
                this = f"{here}; and __fish_seen_subcommand_from {action}"
                lines += [f"complete -c crysldnet -n '{this}' -l {word[2:]}" for word in words]
        elif command.words:
            lines.append(f"complete -c crysldnet -n '{here}' -a {_joined(command.words)}")
    return lines
