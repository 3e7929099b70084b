"""Read and validate a W&B sweep configuration, and build the command line of a run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from crysldnet.build import build_dataclass, from_yaml
from crysldnet.config import argument, choices, compose, conf_folder, validate
from crysldnet.errors import ConfigError
from crysldnet.finetune import FinetuneConfig
from crysldnet.pretrain import PretrainConfig

try:
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
except ImportError as missing:
    raise ConfigError(f"sweep needs Optuna ({missing}): pip install 'crysldnet[sweep]'", "sweep") from None

SCHEMAS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
"""Commands that can be swept. Matbench is excluded because its scores are test scores."""
ARGUMENTS = "${args_no_hyphens}"
"""Placeholder for a run's parameters as key=value."""
PYTHON = ("python", "python3", "${interpreter}")
"""Names of the Python interpreter in a command."""
OWN_KEYS = ("name", "runs", "resume")
"""Keys of a run that the sweep sets itself."""
PLUGINS = "plugins run code, so a sweep's file can't name them; crysldnet sweep plugins=[…] does"
WANDB_KEYS = ("name", "description", "program", "project", "entity", "run_cap", "controller", "kind", "apiVersion")
"""Keys of a sweep file that only W&B reads."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """Values of a key: ``value``, one of ``values``, or a number from ``min`` to ``max``, rounded to ``q``."""

    value: Any = None
    values: list[Any] | None = None
    min: int | float | None = None
    max: int | float | None = None
    q: int | float = 1
    distribution: str = ""

    @property
    def logarithmic(self) -> bool:
        """Whether it is sampled and displayed on a logarithmic scale."""
        return "log" in self.distribution

    def domain(self) -> BaseDistribution:
        """Return the distribution for Optuna. Values are encoded as JSON, because Optuna can't choose among lists, or 1
        and true.

        Raises:
            ValueError: Optuna can't sample it.
        """
        low, high = self.min, self.max
        if low is None or high is None:
            if self.distribution not in ("", "constant", "categorical") or not low is high is None:
                raise ValueError("min and max are needed")
            texts = [json.dumps(value) for value in ([self.value] if self.values is None else self.values)]
            if any("${" in text for text in texts):
                raise ValueError("${…} would be replaced by the run; write what it stands for")
            return CategoricalDistribution(texts)
        whole = isinstance(low, int) and isinstance(high, int)
        match self.distribution or ("int_uniform" if whole else "uniform"):
            case "int_uniform" if whole:
                return IntDistribution(int(low), int(high))
            case "uniform" | "q_uniform" | "log_uniform_values" | "q_log_uniform_values":
                return FloatDistribution(low, high, log=self.logarithmic)
            case "log_uniform" | "q_log_uniform":
                return FloatDistribution(math.exp(low), math.exp(high), log=True)
        raise ValueError(
            f"{self.distribution} isn't among int_uniform (of whole numbers), uniform, q_uniform, log_uniform_values, "
            "q_log_uniform_values, log_uniform, q_log_uniform"
        )

    def used(self, drawn: Any) -> Any:
        """Return the value of the key for Optuna's sample."""
        if isinstance(drawn, str):
            return json.loads(drawn)
        return round(drawn / self.q) * self.q if self.distribution.startswith("q_") else drawn

    def all_drawn(self, *, ends: bool = False) -> list[Any]:
        """Return all values that Optuna may sample; for ranges the ends, or an error for unbounded ranges."""
        domain = self.domain()
        if isinstance(domain, CategoricalDistribution):
            return list(domain.choices)
        assert isinstance(domain, IntDistribution | FloatDistribution)
        if ends:
            return [domain.low, domain.high]
        if isinstance(domain, FloatDistribution):
            raise ValueError("a grid needs values, or whole numbers as min and max")
        return list(range(domain.low, domain.high + 1))


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Metric of a sweep; ``impute`` is used only by W&B."""

    name: str
    goal: Literal["minimize", "maximize"] = "minimize"
    target: float | None = None
    impute: Any = None

    @property
    def maximize(self) -> bool:
        """Whether higher is better."""
        return self.goal == "maximize"

    def reached(self, value: float | None) -> bool:
        """Return whether a value reaches the target, if any."""
        if self.target is None or value is None:
            return False
        return value >= self.target if self.maximize else value <= self.target


@dataclass(frozen=True, kw_only=True)
class EarlyTermination:
    """Runs are compared after ``min_iter``, times ``eta``, … validations; or ``s`` times until ``max_iter``."""

    type: Literal["hyperband"]
    min_iter: int = 0
    max_iter: int = 0
    s: int = 0
    eta: int = 3

    def __post_init__(self) -> None:
        if self.first < 1 or self.eta < 2:
            raise ValueError("it needs min_iter from 1 on, or max_iter and s with max_iter ≥ eta^s; and eta from 2 on")

    @property
    def first(self) -> int:
        """Number of validations before the first comparison."""
        return self.min_iter or self.max_iter // self.eta**self.s


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep configuration: the keys used here, and the parsed command.

    ``config`` is the file as read by W&B, ``launcher`` what precedes this program in its command, and ``arguments`` are
    those of every run, with ``${args_no_hyphens}`` in place of the parameters.
    """

    method: Literal["grid", "random", "bayes"]
    parameters: dict[str, Parameter]
    metric: Metric
    command: Any
    early_terminate: EarlyTermination | None = None
    path: Annotated[Path, "not in the file"] = Path()
    config: Annotated[dict[str, Any], "not in the file"] = field(default_factory=dict)
    launcher: Annotated[list[str], "not in the file"] = field(default_factory=list)
    arguments: Annotated[list[str], "not in the file"] = field(default_factory=list)

    def line(self, values: Mapping[str, Any], common: Sequence[str]) -> list[str]:
        """Return the arguments of a run with its parameters and the common ones; nothing is sent online."""
        words = [argument(name, value) for name, value in values.items()]
        filled = [w for argument in self.arguments for w in (words if argument == ARGUMENTS else [argument])]
        return [*filled, "logger=csv", *common]


def load_sweep(name: str, *, allow_command: bool = False) -> Sweep:
    """Read and validate a W&B sweep configuration.

    Args:
        name: name of a file in ``conf/sweep/``, or a path.
        allow_command: let its command start another program first.

    Raises:
        ConfigError: it is missing, or can't be run here.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else conf_folder() / "sweep" / f"{name}.yaml"
    try:
        config = from_yaml(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"sweep={name}: no such sweep; available: {', '.join(choices('sweep'))}", "sweep") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}", "sweep") from error
    try:
        parameters = _parameters(config)
        whole = {**config, "parameters": parameters}
        sweep: Sweep = build_dataclass(Sweep, {key: whole[key] for key in whole if key not in WANDB_KEYS}, "")
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{path}: not a W&B sweep configuration: {error}", "sweep") from error
    try:
        launcher, command, arguments = _command(sweep.command, allowed=allow_command)
        if command == "pretrain" and not sweep.metric.name.startswith(("vae/", "diffusion/")):
            raise ValueError(f"metric {sweep.metric.name}: begin it with the stage that it is of, vae/ or diffusion/")
    except ValueError as error:
        raise ConfigError(f"{path}: {error}", "sweep") from None
    return replace(sweep, path=path, config=config, launcher=launcher, command=command, arguments=arguments)


def _parameters(config: Any) -> dict[str, Parameter]:
    given = config.get("parameters") if isinstance(config, dict) else None
    if not isinstance(given, dict) or not given:
        raise ValueError("parameters must hold what is tried, by its key")
    parameters = {}
    for key, node in given.items():
        if not isinstance(key, str) or not re.fullmatch(r"\w[^=$]*", key) or not isinstance(node, dict) or not node:
            raise ValueError(f"parameter {key!r} must be a key of crysldnet with its value, values or range")
        if key.strip() in OWN_KEYS:
            raise ValueError(f"{key} is set by the sweep itself")
        if key.strip() == "plugins":
            raise ValueError(PLUGINS)
        if "parameters" in node:
            raise ValueError(f"nested parameter {key!r}; write its keys as {key}.KEY")
        parameters[key] = build_dataclass(Parameter, node, f"parameters.{key}")
        try:
            parameters[key].all_drawn(ends=config.get("method") != "grid")
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"parameters.{key}: {error}") from None
    return parameters


def _command(words: Any, *, allowed: bool) -> tuple[list[str], str, list[str]]:
    """Return what precedes this program, the swept command, and its arguments."""
    texts = [str(word) for word in words if word != "${env}"] if isinstance(words, list) else []
    place = texts.index("crysldnet") if "crysldnet" in texts[:-1] else len(texts)
    launcher, command, arguments = texts[:place], "".join(texts[place + 1 : place + 2]), texts[place + 2 :]
    keys = [argument.partition("=")[0].strip().lstrip("-") for argument in arguments]
    if "plugins" in keys:
        raise ValueError(PLUGINS)
    own = {*keys} & {*OWN_KEYS}
    if len(launcher) > 1 and launcher[-2] in PYTHON and launcher[-1] == "-m":
        launcher = launcher[:-2]
    if command not in SCHEMAS or own or [word for word in [*launcher, *arguments] if "${" in word] != [ARGUMENTS]:
        raise ValueError(
            f"its command must be ${{env}}, python, -m, crysldnet, {' or '.join(SCHEMAS)}, any key=value but "
            f"{', '.join(OWN_KEYS)}, and {ARGUMENTS}, not {', '.join(texts) or 'empty'}"
        )
    if launcher and not allowed:
        raise ValueError(
            f"its command starts another program: {' '.join(launcher)}; if you trust it, add allow_command=true"
        )
    return launcher, command, arguments


def check_parameters(sweep: Sweep, common: Sequence[str]) -> None:
    """Check every listed value and both ends of every range, and that common arguments set no parameter.

    Raises:
        ConfigError: a key is unknown or set twice, or a value has the wrong type.
    """
    for key in (word.lstrip("-").partition("=")[0] for word in common):
        if key in OWN_KEYS or key in sweep.parameters:
            raise ConfigError(f"args: {key} is set by the sweep {'itself' if key in OWN_KEYS else sweep.path}", "args")
    tried = {name: [p.used(drawn) for drawn in p.all_drawn(ends=True)] for name, p in sweep.parameters.items()}
    first = {name: values[0] for name, values in tried.items()}
    for line in (sweep.line({**first, name: value}, common) for name, values in tried.items() for value in values):
        try:
            split = validate(compose(sweep.command, line), SCHEMAS[sweep.command]).data.get("split", {}).get("file")
        except ConfigError as error:
            raise ConfigError(f"{sweep.path}: {error}", error.key) from None
        if split is not None and not Path(split).is_file():
            raise ConfigError(f"data.split.file={split}: no such file; docs/sweep.md shows how to make it", "sweep")
