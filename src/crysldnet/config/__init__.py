"""Compose, override and validate the configuration of a command, and resume a run with its configuration."""

from crysldnet.build import to_yaml
from crysldnet.config.arguments import argument, arguments_for, split_words
from crysldnet.config.compose import (
    FILES,
    PRESETS,
    Composition,
    compose,
    refuse_missing,
    refuse_unknown,
    refuse_unused,
    settings_of,
    validate,
)
from crysldnet.config.files import choices, load_yaml, read_saved
from crysldnet.config.help import help_text
from crysldnet.config.resume import pin_files, refuse_changed
from crysldnet.io import conf_folder

__all__ = [
    "FILES",
    "PRESETS",
    "Composition",
    "argument",
    "arguments_for",
    "choices",
    "compose",
    "conf_folder",
    "help_text",
    "load_yaml",
    "pin_files",
    "read_saved",
    "refuse_changed",
    "refuse_missing",
    "refuse_unknown",
    "refuse_unused",
    "settings_of",
    "split_words",
    "to_yaml",
    "validate",
]
