"""A W&B sweep configuration: read it, check it, and propose the values of its next run."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from crysldnet.config import choices, compose, conf_folder, validate
from crysldnet.errors import ConfigError
from crysldnet.finetune import FinetuneConfig
from crysldnet.pretrain import PretrainConfig

SCHEMAS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
"""Commands that can be swept. Matbench isn't among them: its scores are of test sets."""
ARGUMENTS = "${args_no_hyphens}"
"""Where W&B puts a run's parameters, as key=value."""
OWN_KEYS = ("name", "runs", "resume")
"""Keys of a run that the sweep sets itself."""


@dataclass(frozen=True)
class Sweep:
    """A sweep configuration.

    Attributes:
        path: its file.
        config: as W&B reads it.
        command: pretrain or finetune.
        arguments: those of every run, with ``${args_no_hyphens}`` where the parameters belong.
        parameters: names of the parameters.
        metric: name of the metric.
        maximize: whether a higher one is better.
    """

    path: Path
    config: dict[str, Any]
    command: str
    arguments: list[str]
    parameters: list[str]
    metric: str
    maximize: bool

    def line(self, values: Mapping[str, Any], common: Sequence[str]) -> list[str]:
        """Return the arguments of a run: as W&B's agent would write them, then those in common; nothing goes online."""
        words = [f"{name}={value}" for name, value in values.items()]
        filled = [w for word in self.arguments for w in (words if word == ARGUMENTS else [word])]
        return [*filled, "logger=csv", *common]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    name: str
    values: dict[str, Any]
    metric: float | None
    """None where the run failed."""
    seconds: float

    @property
    def state(self) -> str:
        """``finished`` or ``failed``."""
        return "failed" if self.metric is None else "finished"


def import_sweeps() -> Any:
    """Return W&B's ``sweeps`` package, imported when first needed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it was written for an older pydantic
            import sweeps
    except ImportError as error:
        raise ConfigError(
            f"sweep needs the sweeps package ({error}): pip install 'crysldnet[wandb]'", "sweep"
        ) from None
    return sweeps


def load_sweep(name: str) -> Sweep:
    """Read and check a W&B sweep configuration.

    Args:
        name: of a file in ``conf/sweep/``, or the path of one.

    Raises:
        ConfigError: there is none, or it isn't one that can be run here.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else conf_folder() / "sweep" / f"{name}.yaml"
    try:
        config = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"sweep={name}: no such sweep; there are: {', '.join(choices('sweep'))}", "sweep") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}", "sweep") from error
    try:
        faults = import_sweeps().schema_violations_from_proposed_config(config)
    except ValueError as error:
        faults = [str(error)]
    if faults:
        raise ConfigError(f"{path}: not a W&B sweep configuration: {'; '.join(faults)}", "sweep")
    for key, parameter in config["parameters"].items():
        if key in OWN_KEYS:
            raise ConfigError(f"{path}: {key} is set by the sweep itself", "sweep")
        if "parameters" in parameter:
            raise ConfigError(f"{path}: nested parameter {key!r}; write its keys as {key}.KEY", "sweep")
    if "metric" not in config:
        raise ConfigError(f"{path}: no metric", "sweep")
    command, arguments = _command(path, config.get("command", []))
    maximize = config["metric"].get("goal", "minimize") == "maximize"
    return Sweep(path, config, command, arguments, list(config["parameters"]), config["metric"]["name"], maximize)


def _command(path: Path, words: Sequence[Any]) -> tuple[str, list[str]]:
    """Return which command is swept, and its arguments."""
    texts = [str(word) for word in words]
    place = texts.index("crysldnet") if "crysldnet" in texts[:-1] else -1
    command, arguments = (texts[place + 1], texts[place + 2 :]) if place >= 0 else ("", [])
    unknown = [word for word in arguments if "${" in word and word != ARGUMENTS]
    if command not in SCHEMAS or arguments.count(ARGUMENTS) != 1 or unknown:
        raise ConfigError(
            f"{path}: its command must be ${{env}}, python, -m, crysldnet, {' or '.join(SCHEMAS)}, any key=value, and "
            f"{ARGUMENTS}, not {', '.join(texts) or 'empty'}",
            "sweep",
        )
    return command, arguments


def _check_line(sweep: Sweep, line: Sequence[str]) -> None:
    try:
        validate(compose(sweep.command, line), SCHEMAS[sweep.command])
    except ConfigError as error:
        raise ConfigError(f"{sweep.path}: {error}", error.key) from None


def check_parameters(sweep: Sweep, first: Mapping[str, Any], common: Sequence[str]) -> None:
    """Check the first proposal and every value that is listed, and that what is in common sets no parameter.

    Raises:
        ConfigError: a key isn't known, is set twice, or a value isn't of its type.
    """
    for key in (word.lstrip("-").partition("=")[0] for word in common):
        if key in OWN_KEYS or key in sweep.parameters:
            raise ConfigError(f"args: {key} is set by the sweep {'itself' if key in OWN_KEYS else sweep.path}", "args")
    _check_line(sweep, sweep.line(first, common))
    for name, parameter in sweep.config["parameters"].items():
        for value in parameter.get("values", []):
            _check_line(sweep, sweep.line({**first, name: value}, common))


def propose(sweep: Sweep, trials: Sequence[Trial], seed: int) -> dict[str, Any] | None:
    """Return the values of the next run, or None where a grid is done.

    The same seed and earlier runs give the same values.

    Raises:
        ConfigError: the package can't propose from this configuration.
    """
    sweeps = import_sweeps()
    done = [
        sweeps.SweepRun(
            name=trial.name,
            state=trial.state,
            config={name: {"value": value} for name, value in trial.values.items()},
            summaryMetrics={} if trial.metric is None else {sweep.metric: trial.metric},
        )
        for trial in trials
    ]
    state = (seed * 1_000_003 + len(trials)) % 2**32
    random.seed(state)
    np.random.seed(state)  # noqa: NPY002  (the package draws from the global generators)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            proposal = sweeps.next_run(sweeps.SweepConfig(sweep.config), done)
        except ValueError as error:
            raise ConfigError(f"{sweep.path}: {error}", "sweep") from error
    if proposal is None:
        return None
    values = {name: entry["value"] for name, entry in proposal.config.items()}
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
