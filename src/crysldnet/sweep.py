"""Run a sweep on this machine, without an account: propose, run, read the metric, propose again.

A sweep is a W&B sweep configuration whose parameters are keys of crysldnet; ``wandb sweep`` takes the same file. The
proposals come from W&B's own ``sweeps`` package. Every run is a process of its own, kept in the sweep's folder with its
output in run_N.log; results.csv lists them all. A run that fails is recorded as failed, and the sweep goes on.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import random
import shlex
import subprocess
import sys
import time
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
from crysldnet.report import print_table
from crysldnet.training.run_folder import NAME_VARIABLE, RunFolder, write_atomically

SCHEMAS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
"""Commands that can be swept. Matbench isn't among them: its scores are of test sets."""
ARGUMENTS = "${args_no_hyphens}"
"""Where W&B puts a run's parameters, as key=value."""
OWN_KEYS = ("name", "runs", "resume")
"""Keys of a run that the sweep sets itself."""


@dataclass(frozen=True, kw_only=True)
class SweepCommandConfig:
    """Every key of ``conf/sweep.yaml``."""

    sweep: str
    count: int
    args: str
    seed: int
    name: str | None
    runs: str
    resume: Literal["last"] | None


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
    nested = [key for key, parameter in config["parameters"].items() if "parameters" in parameter]
    own = [key for key in config["parameters"] if key in OWN_KEYS]
    if nested or own or "metric" not in config:
        reason = f"nested parameter {nested[0]!r}; write its keys as {nested[0]}.KEY" if nested else "no metric"
        raise ConfigError(f"{path}: {f'{own[0]} is set by the sweep itself' if own else reason}", "sweep")
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


def check_line(sweep: Sweep, line: Sequence[str]) -> None:
    """Compose and check what a run would be started with.

    Raises:
        ConfigError: a key isn't known, or a value isn't of its type.
    """
    try:
        validate(compose(sweep.command, line), SCHEMAS[sweep.command])
    except ConfigError as error:
        raise ConfigError(f"{sweep.path}: {error}", error.key) from None


def check_parameters(sweep: Sweep, first: Mapping[str, Any], common: Sequence[str]) -> None:
    """Check the first proposal and every value that is listed, and that what is in common sets no parameter."""
    for key in (word.lstrip("-").partition("=")[0] for word in common):
        if key in OWN_KEYS or key in sweep.parameters:
            raise ConfigError(f"args: {key} is set by the sweep {'itself' if key in OWN_KEYS else sweep.path}", "args")
    check_line(sweep, sweep.line(first, common))
    for name, parameter in sweep.config["parameters"].items():
        for value in parameter.get("values", []):
            check_line(sweep, sweep.line({**first, name: value}, common))


def propose(sweep: Sweep, trials: Sequence[Trial], seed: int) -> dict[str, Any] | None:
    """Return the values of the next run; the same for the same seed and earlier runs. None where a grid is done."""
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
    number = (seed * 1_000_003 + len(trials)) % 2**32
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002  (the package draws from the global generators)
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


def find_metric(summary: Mapping[str, Any], name: str) -> float | None:
    """Return a metric of a run's summary, of the last stage where it has several; None where it isn't a number."""
    places = [stage for stage in summary.values() if isinstance(stage, Mapping)]
    found = [place[name] for place in [*places, summary] if name in place]
    return float(found[-1]) if found and math.isfinite(found[-1]) else None


def run_trial(sweep: Sweep, folder: Path, number: int, values: dict[str, Any], common: Sequence[str]) -> Trial:
    """Run one proposal to its end, or read the result where that was done before."""
    name = f"run_{number:03d}"
    line = [*sweep.line(values, common), f"name={name}", f"runs={folder}"]
    own = folder / sweep.command / name
    if (own / "config.yaml").exists():
        line.append("resume=last")
    started = time.monotonic()
    if not (own / "summary.json").exists():
        environment = {key: value for key, value in os.environ.items() if key != NAME_VARIABLE}
        with (folder / f"{name}.log").open("ab") as log:
            subprocess.run(
                [sys.executable, "-m", "crysldnet", sweep.command, *line],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                check=False,
            )
    metric, seconds = None, time.monotonic() - started
    if (own / "summary.json").exists():  # a run that ended well has one, and no other
        summary = json.loads((own / "summary.json").read_text())
        metric, seconds = find_metric(summary, sweep.metric), summary["wall_time_s"]
    return Trial(name, values, metric, seconds)


def best_first(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """Sort by the metric, failed runs last."""
    sign = -1.0 if sweep.maximize else 1.0
    return sorted(trials, key=lambda t: (t.metric is None, 0.0 if t.metric is None else sign * t.metric))


def write_results(path: Path, sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Write all runs as CSV, in the order in which they were run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "state", sweep.metric, "seconds", *sweep.parameters])
    for t in trials:
        metric = "" if t.metric is None else repr(t.metric)
        writer.writerow(
            [t.name, t.state, metric, f"{t.seconds:.1f}", *(t.values.get(name, "") for name in sweep.parameters)]
        )
    write_atomically(path, text.getvalue())


def _keep_sweep(folder: RunFolder, sweep: Sweep, values: dict[str, Any]) -> None:
    """Save the sweep beside the command's configuration; a sweep that is resumed must be the same."""
    whole = {**values, "sweep_config": sweep.config}
    path = folder.path / "config.yaml"
    before = yaml.safe_load(path.read_text()) if path.exists() else whole
    for key in ("args", "seed", "sweep_config"):
        if before.get(key) != whole[key]:
            raise ConfigError(f"{folder.path} was begun with another {key}; choose another name", key)
    folder.save_config(whole)


def run(config: SweepCommandConfig, values: dict[str, Any]) -> int:
    """Run the sweep; return the exit status, 1 where every run failed.

    Args:
        config: the settings.
        values: the same as plain values, to be saved.
    """
    if config.count < 1:
        raise ConfigError(f"count={config.count}: at least 1", "count")
    sweep = load_sweep(config.sweep)
    common = shlex.split(config.args)
    first = propose(sweep, [], config.seed)
    assert first is not None
    check_parameters(sweep, first, common)
    folder = RunFolder(config.runs, "sweep", config.name, resume=config.resume is not None)
    _keep_sweep(folder, sweep, values)
    if "early_terminate" in sweep.config:
        _say("early_terminate is left to W&B; here every run goes to its end")
    trials: list[Trial] = []
    while len(trials) < config.count and (proposal := propose(sweep, trials, config.seed)) is not None:
        trial = run_trial(sweep, folder.path, len(trials) + 1, proposal, common)
        trials.append(trial)
        write_results(folder.path / "results.csv", sweep, trials)
        shown = " ".join(f"{name}={value}" for name, value in proposal.items())
        log = folder.path / f"{trial.name}.log"
        outcome = f"failed, see {log}" if trial.metric is None else f"{sweep.metric}={trial.metric:.6g}"
        _say(f"{trial.name}: {outcome} ({trial.seconds:.0f} s) {shown}")
        if _reached(sweep, trial):
            break
    return _finish(sweep, folder, trials, config)


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _reached(sweep: Sweep, trial: Trial) -> bool:
    target = sweep.config["metric"].get("target")
    if target is None or trial.metric is None:
        return False
    return trial.metric >= target if sweep.maximize else trial.metric <= target


def _finish(sweep: Sweep, folder: RunFolder, trials: Sequence[Trial], config: SweepCommandConfig) -> int:
    ranked = best_first(sweep, trials)
    ends = [name.rpartition(".")[2] for name in sweep.parameters]
    header = [end if ends.count(end) == 1 else name for end, name in zip(ends, sweep.parameters, strict=True)]
    rows = [
        [
            t.name,
            *(_cell(v) for v in ("failed" if t.metric is None else t.metric, *map(t.values.get, sweep.parameters))),
        ]
        for t in ranked
    ]
    print_table(f"{sweep.path.stem}, best first", ["run", sweep.metric, *header], rows)
    results = [["results", str(folder.path / "results.csv")]]
    best = ranked[0]
    if best.metric is not None:
        results.append(["best", str(folder.path / sweep.command / best.name)])
        folder.finish(
            {
                "command": "sweep",
                "sweep": str(config.sweep),
                "seed": config.seed,
                "metric": sweep.metric,
                "best": {"run": best.name, sweep.metric: best.metric, "values": best.values},
                "finished": sum(t.metric is not None for t in trials),
                "failed": sum(t.metric is None for t in trials),
            }
        )
    print_table("", ["written", ""], results)
    return 0 if best.metric is not None else 1
