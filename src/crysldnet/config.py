"""Compose, override and check the configuration of a command.

``conf/COMMAND.yaml`` names a default for each group under ``defaults`` and holds the command's own keys. A group's
choice is a file ``conf/GROUP/CHOICE.yaml``, or several as ``[a,b]``, the later ones over the earlier ones. On the
command line ``group=choice`` chooses, ``key.path=value`` overrides and ``preset=NAME`` applies
``conf/preset/COMMAND/NAME.yaml`` before that, for Matbench those of finetuning. Every key is checked against the
signature of what it configures, so an unknown one stops the run.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crysldnet.build import TARGET, build_dataclass, check
from crysldnet.console import note
from crysldnet.errors import ConfigError

COMMAND_LINE = "on the command line"
PRESETS = {"pretrain": "preset/pretrain", "finetune": "preset/finetune", "matbench": "preset/finetune"}
"""Command to the folder of its presets."""
PLAIN_WORDS = {"report": "runs"}
"""Command to the key that lists the words of its line which aren't key=value."""


def conf_folder() -> Path:
    """Return the folder of the configuration: inside the installed package, or of the working tree."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parents[1] / "conf"


def choices(group: str) -> list[str]:
    """Return the names that a group offers."""
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


def load_yaml(path: Path) -> DictConfig:
    """Read a YAML file of keys.

    Raises:
        ConfigError: it isn't one.
    """
    try:
        loaded = OmegaConf.load(path)
    except (OSError, yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: it must hold keys and values")
    return loaded


@dataclass(frozen=True)
class Composition:
    """A composed configuration.

    Attributes:
        values: plain values, interpolations resolved.
        origin: the file that each key came from, or the command line.
        groups: the chosen name of each group.
        given: the keys and groups that the command line names.
    """

    values: dict[str, Any]
    origin: dict[str, str]
    groups: dict[str, str]
    given: tuple[str, ...] = ()

    def where(self, key: str) -> str:
        """Return where a key was set, for messages."""
        while key:
            if key in self.origin:
                source = self.origin[key]
                return source if source == COMMAND_LINE else f"in {source}"
            key = key.rpartition(".")[0]
        return ""


def _note(origin: dict[str, str], node: Any, path: str, source: str) -> None:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            _note(origin, value, f"{path}.{key}" if path else str(key), source)
    else:
        origin[path] = source


def _group_file(group: str, choice: str) -> Path:
    if choice.endswith((".yaml", ".yml")):
        return Path(choice)
    path = conf_folder() / group / f"{choice}.yaml"
    if not path.is_file():
        key = group.partition("/")[0]
        close = get_close_matches(choice, choices(group), n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{key}={choice}: no such choice; {hint} there are: {', '.join(choices(group))}", key)
    return path


def _choices_in(choice: str) -> list[str]:
    """Return the choices of a group: one, or those of a list in brackets."""
    if not (choice.startswith("[") and choice.endswith("]")):
        return [choice]
    return [name.strip() for name in choice[1:-1].split(",")]


def _split(arguments: Sequence[str], plain: str | None) -> list[tuple[str, str]]:
    """Return keys and values; plain words, which may have an = after a slash, are gathered under the key ``plain``."""
    pairs, words = [], []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if plain is not None and not argument.startswith("--") and (not equals or "/" in key):
            words.append(argument)
            continue
        key = key.strip().lstrip("-") if argument.startswith("--") else key.strip()
        if not equals or not key:
            raise ConfigError(f"{argument!r}: expected group=name or key=value")
        pairs.append((key, value))
    if words and plain in dict(pairs):
        raise ConfigError(f"{words[0]}: give {plain} either as plain words or as {plain}=[…]", plain)
    return [*pairs, (plain, json.dumps(words, ensure_ascii=False))] if plain is not None and words else pairs


def split_words(text: str, key: str) -> list[str]:
    """Split the ``key=value`` that a key holds, as a shell does.

    Raises:
        ConfigError: a quote or an escape has no end.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{key}: {text!r} can't be split into words ({error})", key) from None


def _parse(value: str) -> Any:
    """Read a value as YAML, or ``None``, which W&B's agent writes for null.

    What isn't YAML, such as the pattern ``*.cif``, is text, and so is ``-``.
    """
    if value.strip() in ("-", "None"):
        return value if value.strip() == "-" else None
    try:
        return OmegaConf.from_dotlist([f"value={value}"]).value
    except yaml.YAMLError:
        return value


def compose(command: str | Path, arguments: Sequence[str] = (), saved: Path | None = None) -> Composition:
    """Merge a command's file, its groups, a preset and the command line.

    Args:
        command: the name of a file in ``conf/``, or the path of one elsewhere.
        arguments: ``group=name`` and ``key=value``; a leading ``--`` is allowed. Of the commands in ``PLAIN_WORDS``
            also plain words.
        saved: the resolved configuration of a run that is resumed, in place of the defaults and presets.

    Raises:
        ConfigError: a file, group or choice is unknown, a value is missing or can't be parsed.
    """
    pairs = _split(arguments, PLAIN_WORDS.get(str(command)))
    root_file = command if isinstance(command, Path) else conf_folder() / f"{command}.yaml"
    layers = [(str(root_file), load_yaml(root_file))]
    for key, value in pairs:
        if key == "preset" and value not in ("null", ""):
            if command not in PRESETS:
                raise ConfigError(f"{key}={value}: {command} has no presets", key)
            file = _group_file(PRESETS[str(command)], value)
            layers.append((str(file), load_yaml(file)))
    groups: dict[str, str] = {}
    for source, layer in layers:
        for group, choice in (layer.pop("defaults", None) or {}).items():
            if source != str(root_file) and group not in groups:
                raise ConfigError(f"{source}: {command} has no group {group!r}", group)
            groups[str(group)] = choice
    for key, value in pairs:
        if key in groups:
            if value in ("null", ""):
                raise ConfigError(f"{key}={value}: choose one of {', '.join(choices(key))}", key)
            groups[key] = value

    origin: dict[str, str] = {}
    merged: Any = OmegaConf.create()
    if saved is not None:
        layers = [(str(saved), load_yaml(saved))]
        groups = {key: value for key, value in groups.items() if key in [given for given, _ in pairs]}
        layers[0][1].update({group: {} for group in groups})
    for group, choice in groups.items():
        merged[group] = {}
        for name in _choices_in(choice):
            file = _group_file(group, name)
            node = load_yaml(file)
            _note(origin, OmegaConf.to_container(node), group, str(file))
            merged[group] = OmegaConf.merge(merged[group], node)
    for source, layer in layers:
        _note(origin, OmegaConf.to_container(layer), "", source)
        merged = OmegaConf.merge(merged, layer)
    for key, value in pairs:
        if key == "preset" or key in groups:
            continue
        try:
            OmegaConf.update(merged, key, _parse(value), merge=False)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key}={value}: {str(error).splitlines()[0]}", key) from error
        origin[key] = COMMAND_LINE
    return Composition(_resolve(merged, origin), origin, groups, tuple(key for key, _ in pairs))


def _resolve(merged: Any, origin: dict[str, str]) -> dict[str, Any]:
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        key = missing[0]
        raise ConfigError(f"{key}: it has no default; give it as {key}=VALUE (it stands in {origin.get(key, '')})", key)
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "")
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}", key) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def validate(composition: Composition, schema: type) -> Any:
    """Check every key and type; return the command's settings as an instance of its dataclass.

    Raises:
        ConfigError: with the key, the file that set it, and a suggestion.
    """
    try:
        settings = build_dataclass(schema, composition.values, "")
        for field in fields(schema):
            node = composition.values.get(field.name)
            if isinstance(node, Mapping) and (TARGET in node or field.name in composition.groups):
                check(node, field.name)
    except ConfigError as error:
        where = composition.where(error.key)
        raise ConfigError(f"{error}{f' (set {where})' if where else ''}", error.key) from None
    return settings


_WHERE_IT_RUNS = {"name", "runs", "resume", "strategy", "logger"}
MAY_CHANGE = {
    "pretrain": {*_WHERE_IT_RUNS, "trainer", "stages"},
    "finetune": {*_WHERE_IT_RUNS, "trainer", "epochs"},
    "matbench": {*_WHERE_IT_RUNS, "parallel", "folds", "out", "algorithm", "authors"},
}
"""Of each command, what a resumed run may do otherwise than it was begun: how it is executed, how long, and what its
submission says. All folds of a benchmark are trained alike."""


def arguments_for(command: str, values: Mapping[str, Any], without: Collection[str] = ()) -> list[str] | None:
    """Return arguments that compose a resolved configuration, what differs from the defaults alone.

    Args:
        command: the name of a file in ``conf/``.
        values: the configuration.
        without: keys that are left out.

    Returns:
        None where there are no such arguments, as for a configuration of a version with other keys.
    """
    wanted = {key: value for key, value in values.items() if key not in without}
    base = compose(command)
    chosen = []
    for group in base.groups:
        target = wanted.get(group, {}).get(TARGET)
        if target != base.values[group].get(TARGET):
            files = {name: load_yaml(conf_folder() / group / f"{name}.yaml") for name in choices(group)}
            chosen += [f"{group}={name}" for name, file in files.items() if file.get(TARGET) == target][:1]
    try:
        arguments = [*chosen, *_differences(compose(command, chosen).values, wanted)]
    except KeyError:
        return None
    made = compose(command, arguments).values
    return arguments if all(made.get(key) == value for key, value in wanted.items()) else None


def _differences(base: Mapping[str, Any], values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Give arguments that make values of a base, which has the same keys or is an empty mapping.

    Raises:
        KeyError: it has other keys.
    """
    for key, value in values.items():
        before = base[key] if base else None
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from _differences(before, value, f"{prefix}{key}.")
        elif before != value or not base:
            plain = isinstance(value, str) and _parse(value) == value
            yield f"{prefix}{key}={value if plain else json.dumps(value, ensure_ascii=False)}"


LENGTH = {"pretrain": "stages", "finetune": "epochs"}
"""Of each command, the key that says how long it trains: learning rates are planned with it."""


def refuse_changed(command: str, composition: Composition, saved: Path, *, complete: bool) -> set[str]:
    """Refuse to resume a run of a command as another one; return the keys that differ, which it may have otherwise.

    Args:
        command: pretrain, finetune or matbench.
        composition: what is asked for now.
        saved: the resolved configuration of the run.
        complete: whether the run has ended well.

    Raises:
        ConfigError: naming the key that differs.
    """
    changed = set()
    before = yaml.safe_load(saved.read_text())
    for key, value in composition.values.items():
        given = [name for name in composition.given if name not in composition.groups]
        differs = _first_difference(key, before.get(key), value, given)
        if differs is None or (key not in before and not _is_given(key, given)):
            continue
        changed.add(key)
        name, then, now = differs
        if complete and key == LENGTH.get(command):
            raise ConfigError(
                f"{name}: the run in {saved.parent} is complete with {name}={then}, for which its learning rates were "
                f"planned; for {name}={now} begin another, name=…",
                name,
            )
        if key not in MAY_CHANGE[command]:
            raise ConfigError(
                f"{name}: the run in {saved.parent} was begun with {name}={then}, not {now}; "
                "resume it as it was, or begin another",
                name,
            )
        if key == LENGTH.get(command):
            note(f"{key} differ from those that the run was begun with; its learning rates stay as they were planned")
    return changed


def _first_difference(key: str, before: Any, now: Any, given: Collection[str]) -> tuple[str, Any, Any] | None:
    """Return the innermost key whose values differ, and both; None where there is none.

    A key that an earlier version of the package didn't have doesn't count, unless it is given now.
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for part in {**now, **before}:
            name = f"{key}.{part}"
            if part in before or _is_given(name, given):
                differs = _first_difference(name, before.get(part), now.get(part), given)
                if differs is not None:
                    return differs
        return None
    return None if before == now else (key, before, now)


def _is_given(key: str, given: Collection[str]) -> bool:
    """Say whether the command line names a key, a part of it, or what it is a part of."""
    return any(one == key or one.startswith(f"{key}.") or key.startswith(f"{one}.") for one in given)


def refuse_unused(composition: Composition) -> None:
    """Refuse keys of the command line that would have no effect.

    Raises:
        ConfigError: an encoder is described although a pretrained one brings its own description.
    """
    if composition.values.get("pretrained") in (None, "none"):
        return
    if "preset" in composition.given:
        note(f"the preset's encoder isn't used: pretrained={composition.values['pretrained']} brings its own")
    for key in composition.given:
        if key.split(".")[0] == "encoder":
            raise ConfigError(
                f"{key}: pretrained={composition.values['pretrained']} brings its encoder's configuration, and this "
                "would be ignored; leave it out, or start from scratch with pretrained=none",
                key,
            )


def to_yaml(values: Mapping[str, Any]) -> str:
    """Return plain values as YAML."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def help_text(command: str, description: str) -> str:
    """Return what ``--help`` prints: usage, groups with their choices, every key with its comment."""
    root_file = conf_folder() / f"{command}.yaml"
    defaults = load_yaml(root_file).get("defaults") or {}
    first = f"{PLAIN_WORDS[command].upper()} …" if command in PLAIN_WORDS else "[group=name …]"
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
        text = _group_file(str(group), default).read_text().strip().split("\n")
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
