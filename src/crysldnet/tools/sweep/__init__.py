"""Run a hyperparameter sweep, locally without an account, or on W&B.

A sweep is a W&B sweep configuration whose parameters are keys of crysldnet. With backend=local, Optuna proposes values
and stops poor runs early; every run is a separate process in the sweep's folder with its output in run_N.log.
results.csv lists all runs, and sweep.html shows them. A failed run is recorded, and the sweep continues. With
backend=wandb, the sweep is created on W&B, and its agents run on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from crysldnet.build import from_yaml
from crysldnet.config import FILES, argument, compose, split_words
from crysldnet.console import note
from crysldnet.data.datasets import open_store
from crysldnet.data.store import file_hash
from crysldnet.errors import ConfigError
from crysldnet.tools.sweep.proposals import Sweep, check_parameters, load_sweep
from crysldnet.tools.sweep.results import finish, write_results
from crysldnet.tools.sweep.study import Study, Trial
from crysldnet.tools.sweep.trials import LocalRuns, run_agents, sweep_id
from crysldnet.training.inputs import hashes_of
from crysldnet.training.processes import places, visible_gpus
from crysldnet.training.run_folder import RunFolder

__all__ = ["SweepCommandConfig", "check_parameters", "load_sweep", "run"]


@dataclass(frozen=True, kw_only=True)
class SweepCommandConfig:
    """Every key of ``conf/sweep.yaml``."""

    plugins: list[str] = field(default_factory=list)
    sweep: str
    backend: Literal["local", "wandb"]
    count: int
    parallel: int | None
    args: str
    allow_command: bool
    entity: str | None
    seed: int
    name: str | None
    runs: str
    resume: Literal["last"] | None

    def __post_init__(self) -> None:
        if self.count < 1 or (self.parallel is not None and self.parallel < 1):
            raise ValueError(f"count={self.count} and parallel={self.parallel} must be at least 1")


def _inputs(sweep: Sweep, common: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the sha256 of all initial files by key, because other crystals or weights aren't comparable."""
    first = {name: parameter.used(parameter.all_drawn(ends=True)[0]) for name, parameter in sweep.parameters.items()}
    values = compose(sweep.command, sweep.line(first, common)).values
    found = hashes_of(**{key: values.get(key) for key in FILES})
    data = values["data"]
    if (split := data.get("split", {}).get("file")) is not None:
        found["data.split.file"] = file_hash(Path(split))
    path = data.get("path")  # a plugin's data module may have none
    paths = path if isinstance(path, Mapping) else {None: path}
    for part, path in paths.items():
        if path is not None and not str(path).startswith("embedded:"):
            found[f"data.path.{part}" if part else "data.path"] = open_store(str(path)).hash
    return {"files": {key: digest for key, digest in found.items() if key not in sweep.parameters}}


def _keep_sweep(folder: RunFolder, sweep: Sweep, values: dict[str, Any], common: Sequence[str]) -> None:
    """Save the sweep with the command's configuration; a resumed sweep must be the same."""
    if (folder.path / "trials.json").exists():
        raise ConfigError(
            f"{folder.path} was started by an earlier version and can't be continued (it has trials.json, no Optuna "
            "study); its runs and results.csv stay as they are: choose another name",
            "name",
        )
    whole = {**values, "sweep_config": sweep.config}
    path = folder.path / "config.yaml"
    before = from_yaml(path.read_text()) if path.exists() else whole
    for key in ("backend", "args", "seed", "sweep_config"):
        if before.get(key) != whole[key]:
            raise ConfigError(f"{folder.path} was started with another {key}; choose another name", key)
    folder.save_inputs(_inputs(sweep, common), values["plugins"])
    folder.save_config(whole)


def _environments(parallel: int | None) -> list[dict[str, str]]:
    """Return the environment of each concurrent run: one GPU each."""
    gpus = visible_gpus()
    count = parallel if parallel is not None else max(1, len(gpus))
    return [{}] if count == 1 else places(count, "cuda" if gpus else "cpu")


def run(config: SweepCommandConfig, values: dict[str, Any]) -> int:
    """Run the sweep; return the exit status, 1 if no run finished or an agent failed.

    Args:
        config: the settings.
        values: the same as plain values, for saving.
    """
    sweep = load_sweep(config.sweep, allow_command=config.allow_command)
    common = split_words(config.args, "args")
    check_parameters(sweep, common)
    environments = _environments(config.parallel)
    if config.backend == "wandb":
        return _run_online(sweep, config, common, values, environments)
    folder = RunFolder(config.runs, "sweep", config.name, resume=config.resume is not None, extend=True)
    _keep_sweep(folder, sweep, values, common)

    study = Study(sweep, folder.path, config.seed)

    def changed(trial: Trial) -> None:
        write_results(folder.path, sweep, list(study.trials().values()))
        _tell(sweep, folder.path, trial)

    LocalRuns(sweep, folder.path, common, study, environments, changed).run(config.count)
    trials = list(study.trials().values())
    write_results(folder.path, sweep, trials)
    return finish(sweep, folder, trials, config.seed)


def _run_online(
    sweep: Sweep, config: SweepCommandConfig, common: list[str], values: dict[str, Any], places: list[dict[str, str]]
) -> int:
    """Create the sweep on W&B unless it exists, and run agents; every task of a SLURM job runs its own."""
    folder = RunFolder(config.runs, "sweep", config.name, resume=config.resume is not None)
    _keep_sweep(folder, sweep, values, common)
    name = sweep_id(sweep, folder.path, common, config.count, config.entity)
    return run_agents(name, folder.path, places)


def _tell(sweep: Sweep, folder: Path, trial: Trial) -> None:
    """Print the result of a run."""
    shown = " ".join(argument(name, value) for name, value in trial.values.items())
    metric = "" if trial.metric is None else f" {sweep.metric.name}={trial.metric:.6g}"
    why = f", see {folder / f'{trial.name}.log'}" if trial.state == "failed" else ""
    note(f"{trial.name}: {trial.state}{metric}{why} ({trial.seconds:.0f} s) {shown}")
