"""Study of a local sweep: Optuna proposals and pruning, stored as a journal in the sweep's folder."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.pruners import NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GPSampler, PartialFixedSampler, RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from crysldnet.tools.sweep.proposals import Sweep

JOURNAL = "study.jsonl"
STARTUP = 5
"""Number of finished random runs before the Gaussian process of a Bayesian sweep proposes values."""

State = Literal["running", "finished", "stopped", "failed"]
STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: run name.
        values: parameter values.
        state: ``stopped`` if terminated early.
        metric: final value, or the best so far of a stopped run, or None.
        seconds: run time.
        history: logged metric values in order.
    """

    name: str
    values: dict[str, Any]
    state: State
    metric: float | None
    seconds: float
    history: tuple[float, ...] = ()


class Study:
    """Propose values, record results, and prune runs.

    Proposals depend on the seed and on the finished runs. A restarted run keeps its name.

    Args:
        sweep: the sweep.
        folder: sweep folder; no other process may write to its journal.
        seed: seed of the proposals.
    """

    def __init__(self, sweep: Sweep, folder: Path, seed: int) -> None:
        self.sweep, self.seed, early = sweep, seed, sweep.early_terminate
        self._domains = {name: parameter.domain() for name, parameter in sweep.parameters.items()}
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(_repaired(folder / JOURNAL)))),
            study_name="sweep",
            direction="maximize" if sweep.metric.maximize else "minimize",
            pruner=NopPruner() if early is None else SuccessiveHalvingPruner(early.first, early.eta),
            load_if_exists=True,
        )
        self._open = {
            name: optuna.Trial(self._study, trial._trial_id)
            for name, trial in self._latest().items()
            if trial.state == TrialState.RUNNING
        }

    def _latest(self) -> dict[str, FrozenTrial]:
        """Return the last attempt of each run in starting order."""
        trials = self._study.get_trials(deepcopy=False)
        return {trial.user_attrs["run"]: trial for trial in trials if "run" in trial.user_attrs}

    def trials(self) -> dict[str, Trial]:
        """Return all runs by name in starting order."""
        return {name: self._trial(name, trial) for name, trial in self._latest().items()}

    def _trial(self, name: str, trial: FrozenTrial) -> Trial:
        values = {key: self.sweep.parameters[key].used(drawn) for key, drawn in trial.params.items()}
        history = tuple(value for _, value in sorted(trial.intermediate_values.items()))
        metric = trial.value
        if trial.state == TrialState.PRUNED:
            metric = (max if self.sweep.metric.maximize else min)(history, default=None)
        return Trial(name, values, STATES[trial.state], metric, trial.user_attrs.get("seconds", 0.0), history)

    def propose(self) -> Trial | None:
        """Start the next run; return None if a grid is complete."""
        number = len(self._latest())
        fixed = {}
        if self.sweep.method == "grid":
            grid = itertools.product(*(parameter.all_drawn() for parameter in self.sweep.parameters.values()))
            drawn = next(itertools.islice(grid, number, None), None)
            if drawn is None:
                return None
            fixed = dict(zip(self.sweep.parameters, drawn, strict=True))
        return self._ask(f"run_{number + 1:03d}", number, fixed)

    def begin_again(self, name: str) -> Trial:
        """Resume an unfinished run, or restart a failed one; return it."""
        if name in self._open:
            return self.trials()[name]
        latest = self._latest()
        return self._ask(name, len(latest), latest[name].params)

    def _ask(self, name: str, number: int, fixed: dict[str, Any]) -> Trial:
        seed = int(np.random.SeedSequence([self.seed % 2**32, number]).generate_state(1)[0])
        bayes = self.sweep.method == "bayes" and not fixed
        sampler: BaseSampler = GPSampler(seed=seed, n_startup_trials=STARTUP) if bayes else RandomSampler(seed)
        self._study.sampler = PartialFixedSampler(fixed, sampler) if fixed else sampler
        self._open[name] = self._study.ask(self._domains)
        self._open[name].set_user_attr("run", name)  # last: a trial killed before this is ignored
        return self.trials()[name]

    def report(self, name: str, history: Sequence[float]) -> bool:
        """Record the values logged so far; return whether the run is pruned for a new one."""
        trial, given_up = self._open[name], False
        reported = self._latest()[name].last_step or 0
        for step, value in enumerate(history[reported:], reported + 1):
            if math.isfinite(value):
                trial.report(value, step)
                given_up = trial.should_prune() or given_up
        return given_up

    def end(self, name: str, state: State, metric: float | None, seconds: float) -> Trial:
        """Record the result of a run; return it."""
        trial = self._open.pop(name)
        trial.set_user_attr("seconds", seconds)
        ended = next(key for key, value in STATES.items() if value == state)
        self._study.tell(trial, metric, ended)
        return self.trials()[name]


def _repaired(journal: Path) -> Path:
    """Remove what a kill may have left: a partial line at the end of the journal, and the writer's lock."""
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if journal.exists():
        with journal.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    return journal
