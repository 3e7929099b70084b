"""Compose, override and validate the configuration of a command.

``conf/COMMAND.yaml`` names a default for each group under ``defaults`` and holds the command's own keys. A group's
choice is a file ``conf/GROUP/CHOICE.yaml``, or several as ``[a,b]``, with later ones overriding earlier ones. On the
command line, ``group=choice`` selects, ``key.path=value`` overrides, and ``preset=NAME`` applies
``conf/preset/COMMAND/NAME.yaml`` before that (for Matbench, a preset of finetuning). Every key is checked against the
signature of the configured object, so an unknown one stops the run.

A run's ``config.yaml`` has the resolved values and, under ``defaults``, their choices. A resumed run is composed from
that file. Naming the same group or preset again has no effect, so the original arguments may be repeated.

Only the command line and ``conf/`` can use resolvers such as ``${oc.env:HOME}``; other files that do are rejected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from crysldnet import plugins
from crysldnet.build import TARGET, build_dataclass, check, suggest
from crysldnet.config.files import (
    CHOICES,
    choices,
    choices_in,
    conf_folder,
    group_file,
    lay_over,
    read_saved,
    read_yaml,
)
from crysldnet.config.values import (
    MISSING,
    PLAIN_WORDS,
    changed,
    changed_plainly,
    flat,
    literally,
    refuse_other_bytes,
    resolve,
    split,
    with_paths,
)
from crysldnet.console import note
from crysldnet.errors import ConfigError
from crysldnet.renames import renamed_argument

COMMAND_LINE = "on the command line"
PRESETS = {
    "pretrain": "preset/pretrain",
    "finetune": "preset/finetune",
    "matbench": "preset/finetune",
    "jarvis": "preset/finetune",
}
"""Folder of presets by command."""
FILES = ("pretrained", "init")
"""Keys of the initial file of a run."""

OF_NETWORKS = (
    *("encoder", "preset", "head", "optimizer", "strategy", "mode", "epochs", "min_steps", "patience", "loss"),
    *("layer_decay", "gradient_clip_val", "networks"),
)
"""Finetuning keys specific to networks; setting one on the command line selects a network by default."""


@dataclass(frozen=True)
class Composition:
    """A composed configuration.

    Attributes:
        values: plain values with resolved interpolations.
        origin: source of each key: a file or the command line.
        groups: choice of each group.
        given: keys and groups set on the command line.
        presets: applied presets.
        links: initial files as given, if the value was a link.
    """

    values: dict[str, Any]
    origin: dict[str, str]
    groups: dict[str, str]
    given: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()
    links: dict[str, str] = field(default_factory=dict)

    @property
    def choices(self) -> dict[str, Any]:
        """Content of ``defaults`` in a run's ``config.yaml``."""
        return {**self.groups, **({"preset": list(self.presets)} if self.presets else {}), **self.links}

    def where(self, key: str) -> str:
        """Return where a key was set, for messages."""
        while key:
            if key in self.origin:
                source = self.origin[key]
                return source if source == COMMAND_LINE else f"in {source}"
            key = key.rpartition(".")[0]
        return ""


def _note(origin: dict[str, str], values: Mapping[Any, Any], source: str) -> None:
    origin.update((key, source) for key, _ in flat(values))


def compose(command: str | Path, arguments: Sequence[str] = (), saved: Path | None = None) -> Composition:
    """Merge a command's file, its groups, a preset and the command line.

    Args:
        command: name of a file in ``conf/``, or the path of another.
        arguments: ``group=name`` and ``key=value``; a leading ``--`` is allowed. Commands in ``PLAIN_WORDS`` also
            accept plain words.
        saved: ``config.yaml`` of a resumed run, in place of the defaults and presets.

    Raises:
        ConfigError: a file, group or choice is unknown, or a value is missing or can't be parsed.
    """
    split_pairs = split(arguments, keys_of(command), PLAIN_WORDS.get(str(command)), literally)
    pairs = with_paths([renamed_argument(*pair) for pair in split_pairs])
    if command not in PLAIN_WORDS:
        refuse_other_bytes(pairs)
    links: dict[str, str] = {}
    presets = tuple(value for key, value in pairs if key == "preset" and value not in ("null", ""))
    if saved is None:
        origin: dict[str, str] = {}
        values, groups = merge_files(command, pairs, presets, origin)
    else:
        values, recorded = read_saved(saved)
        begun_with = tuple(recorded.pop("preset", () if recorded else presets))
        if presets not in ((), begun_with):
            then = f"preset={','.join(begun_with)}" if begun_with else "no preset"
            raise ConfigError(
                f"preset={','.join(presets)}: the run in {saved.parent} was started with {then}; resume it unchanged, "
                "or start another",
                "preset",
            )
        presets = begun_with
        links = {key: str(recorded.pop(key)) for key in FILES if key in recorded}
        values, groups, origin = _merge_saved(command, pairs, presets, saved, values, recorded)
    changes = [
        (key, value) for key, value in pairs if key != "preset" and key not in groups and links.get(key) != value
    ]
    merged = changed_plainly(values, changes) or changed(values, changes)
    origin.update((key, COMMAND_LINE) for key, _ in changes)
    given = tuple(key for key, _ in pairs)
    described = any(key.split(".")[0] in ("preset", "encoder") for key in given)
    if saved is None and described and origin.get("pretrained") == str(root_of(command)):
        merged["pretrained"] = "none"  # an encoder that the command line describes is trained from scratch
    if saved is None and merged.get("recipe") == "auto" and "recipe" not in given:
        merged["recipe"] = "network" if any(key.split(".")[0] in OF_NETWORKS for key in given) else "auto"
    resolved = merged if isinstance(merged, dict) else resolve(merged)
    return Composition(resolved, origin, groups, given, presets, links)


def root_of(command: str | Path) -> Path:
    """Return the file of a command's configuration."""
    return command if isinstance(command, Path) else conf_folder() / f"{command}.yaml"


def keys_of(command: str | Path) -> list[str]:
    """Return the keys and groups of a command."""
    root = read_yaml(root_of(command))
    return [key for key in (*root, *(root.get(CHOICES) or ()), "preset") if key != CHOICES]


def merge_files(
    command: str | Path, pairs: Sequence[tuple[str, str]], presets: Sequence[str], origin: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of a command's files and the choice of each group; store each key's file in ``origin``."""
    root_file = root_of(command)
    layers = [(str(root_file), read_yaml(root_file))]
    for preset in presets:
        if command not in PRESETS:
            raise ConfigError(f"preset={preset}: {command} has no presets", "preset")
        file = group_file(PRESETS[str(command)], preset)
        layers.append((str(file), read_yaml(file)))
    groups: dict[str, str] = {}
    for source, layer in layers:
        for group, choice in (layer.pop(CHOICES, None) or {}).items():
            if source != str(root_file) and group not in groups:
                raise ConfigError(f"{source}: {command} has no group {group!r}", group)
            groups[str(group)] = choice
    for key, value in pairs:
        if key in groups:
            if value in ("null", ""):
                raise ConfigError(f"{key}={value}: choose one of {', '.join(choices(key))}", key)
            groups[key] = value
    merged: dict[str, Any] = {group: {} for group in groups}
    for group, choice in groups.items():
        for name in choices_in(choice):
            file = group_file(group, name)
            node = read_yaml(file, group)
            _note(origin, {group: node}, str(file))
            lay_over(merged[group], node)
    for source, layer in layers:
        _note(origin, layer, source)
        lay_over(merged, layer)
    return merged, groups


def _merge_saved(
    command: str | Path,
    pairs: Sequence[tuple[str, str]],
    presets: Sequence[str],
    saved: Path,
    values: Mapping[str, Any],
    recorded: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Return the original values of a run, the choice of each group, and the file of each key.

    A group is reset only if another choice is named, or if the run's version stored none.
    """
    known = read_yaml(root_of(command)).get(CHOICES) or {}
    named = {key: value for key, value in pairs if key in known}
    other = {key: value for key, value in named.items() if choices_in(str(recorded.get(key))) != choices_in(value)}
    origin: dict[str, str] = {}
    merged = literally(values)
    _note(origin, values, str(saved))
    if other:
        fresh, _ = merge_files(command, list(other.items()), presets, origin)
        for group in other:
            merged[group] = fresh[group]
    return merged, {**recorded, **named}, origin


def refuse_unknown(command: str, composition: Composition) -> None:
    """Reject keys that the command doesn't have before importing its modules."""
    known = [key for key in read_yaml(root_of(command)) if key != CHOICES]
    known += [*composition.groups, "preset"]
    for key in composition.given:
        if key.split(".")[0] not in known:
            raise ConfigError(
                f"{_unknown(key, composition) or f'{key}: unknown key; {suggest(key, known)}'} (set {COMMAND_LINE})",
                key,
            )


def refuse_missing(composition: Composition) -> None:
    """Reject a configuration without a required value before importing the command's modules."""
    for key, value in flat(composition.values):
        if value == MISSING:
            raise _needed(key, composition)


def validate(composition: Composition, schema: type) -> Any:
    """Load the plugins, and validate every key and type; return the command's settings as an instance of its dataclass.

    Raises:
        ConfigError: with the key, the file that set it, and a suggestion; unknown keys are reported before missing
            ones, because they may be the same.
    """
    missing = [key for key, value in flat(composition.values) if value == MISSING]
    named = composition.values.get("plugins")
    plugins.load(named if isinstance(named, list) else ())
    try:
        settings = build_dataclass(schema, composition.values, "")
        for key in (known.name for known in fields(schema)):
            node = composition.values.get(key)
            if isinstance(node, Mapping) and (TARGET in node or key in composition.groups):
                check(node, key)
    except ConfigError as error:
        where = composition.where(error.key)
        text = str(error)
        if "unknown key" in text:
            text = _unknown(error.key, composition) or text
        elif missing and _may_follow(error.key, text, missing, composition):
            raise _needed(missing[0], composition) from None
        raise ConfigError(f"{text}{f' (set {where})' if where else ''}", error.key) from None
    refuse_missing(composition)
    return settings


def _may_follow(key: str, text: str, missing: Sequence[str], composition: Composition) -> bool:
    """Return whether an error may follow from a missing value, because it names that value or no key."""
    named = key or text.partition(":")[0].partition("=")[0]
    return named in missing or named.partition(".")[0] not in composition.values


def settings_of(command: str, folder: Path, schema: type) -> tuple[Any, dict[str, Any]]:
    """Return the settings of an existing run, and the same as plain values.

    Raises:
        ConfigError: there is no run in the folder.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: no run exists there; start one with crysldnet {command}", "run")
    composition = compose(command, [], folder / "config.yaml")
    return validate(composition, schema), composition.values


def _needed(key: str, composition: Composition) -> ConfigError:
    place = composition.origin.get(key, "")
    return ConfigError(f"{key}: it has no default; give it as {key}=VALUE (see {place})", key)


OTHER_WORDS = {
    "device": "accelerator",
    "gpus": "devices",
    "workers": "num_workers",
    "learning_rate": "lr",
    "file": "path",
    "max_epochs": "epochs",
}
"""Words from other programs, with the last part of the key that is meant."""


def _unknown(key: str, composition: Composition) -> str:
    """Return a message with similar keys elsewhere for an unknown one, or an empty string."""
    leaf = key.rpartition(".")[2]
    leaves = {leaf, OTHER_WORDS.get(leaf, leaf)}
    others = (k for k, source in composition.origin.items() if source != COMMAND_LINE and k != key)
    found = sorted((k for k in others if k.split(".")[-1] in leaves), key=lambda k: (k.count("."), k))[:3]
    return f"{key}: unknown key; did you mean {' or '.join(found)}?" if found else ""


def refuse_unused(composition: Composition) -> None:
    """Reject keys on the command line that would have no effect.

    Raises:
        ConfigError: an encoder is configured although the pretrained one has its own configuration.
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
