"""A W&B sweep configuration: read it, check it, and propose the values of its next run."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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

    def is_logarithmic(self, parameter: str) -> bool:
        """Say whether a parameter is drawn on a logarithmic scale."""
        return "log" in str(self.config["parameters"][parameter].get("distribution", ""))

    def reaches(self, metric: float | None) -> bool:
        """Say whether a value of the metric is as good as the target, where the sweep has one."""
        target = self.config["metric"].get("target")
        if target is None or metric is None:
            return False
        return metric >= target if self.maximize else metric <= target


State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: of the run.
        values: of the parameters.
        state: ``stopped`` is a run that early termination gave up.
        metric: at the end, or the best so far of a run that was stopped; None where there is none.
        seconds: that it took.
        history: values of the metric in the order in which they were logged.
    """

    name: str
    values: dict[str, Any]
    state: State
    metric: float | None
    seconds: float
    history: tuple[float, ...] = ()


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
    parameters = config.get("parameters") if isinstance(config, Mapping) else None
    if not isinstance(parameters, Mapping) or not parameters:
        raise ConfigError(
            f"{path}: not a W&B sweep configuration: parameters must hold what is tried, by its key", "sweep"
        )
    for key, parameter in parameters.items():
        if not isinstance(key, str) or not isinstance(parameter, Mapping):
            raise ConfigError(
                f"{path}: parameter {key!r} must be a key of crysldnet with its value, values or range", "sweep"
            )
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
    metric, stages = config["metric"]["name"], ("vae/", "diffusion/")
    if command == "pretrain" and not metric.startswith(stages):
        raise ConfigError(
            f"{path}: metric {metric}: begin it with the stage that it is of, vae/ or diffusion/", "sweep"
        )
    maximize = config["metric"].get("goal", "minimize") == "maximize"
    return Sweep(path, config, command, arguments, list(config["parameters"]), metric, maximize)


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
    words = dict(word.partition("=")[::2] for word in sweep.line(first, common))
    split = words.get("data.split.file")
    if split is not None and not Path(split).is_file():
        raise ConfigError(f"data.split.file={split}: no such file; docs/sweep.md shows how to make it", "sweep")


def propose(sweep: Sweep, trials: Sequence[Trial], seed: int) -> dict[str, Any] | None:
    """Return the values of the next run, or None where a grid is done.

    The same seed and earlier runs give the same values.

    Raises:
        ConfigError: the package can't propose from this configuration.
    """
    sweeps = import_sweeps()
    done = [_as_run(sweep, trial) for trial in trials]
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


def to_stop(sweep: Sweep, trials: Sequence[Trial]) -> set[str]:
    """Return the names of the running trials that early termination gives up, by W&B's own rule."""
    if "early_terminate" not in sweep.config:
        return set()
    return {run.name for run in import_sweeps().stop_runs(sweep.config, [_as_run(sweep, trial) for trial in trials])}


def _as_run(sweep: Sweep, trial: Trial) -> Any:
    """Return a trial as W&B's package wants it; a stopped run has its history and no metric of its end."""
    return import_sweeps().SweepRun(
        name=trial.name,
        state="killed" if trial.state == "stopped" else trial.state,
        config={name: {"value": value} for name, value in trial.values.items()},
        summaryMetrics={sweep.metric: trial.metric} if trial.state == "finished" else {},
        sampledHistory=[{sweep.metric: value} for value in trial.history],
    )
