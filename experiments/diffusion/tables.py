"""What the study of latent diffusion measured: tables, intervals, tests and the plot."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from crysldnet.io import write_atomically
from experiments import evidence

Errors = dict[tuple[str, str, int], dict[tuple[str, int], float]]
"""The error of each task and draw, by what was measured, arm and seed of pretraining."""


def collect(runs: Path, arms: Sequence[str]) -> Errors:
    """Return the errors of every run that is complete.

    What was measured is named as in ``frozen, 300 labels``, ``frozen, 300 labels, last layer`` and
    ``finetuned, 300 labels``.
    """
    found: Errors = defaultdict(dict)
    of_folder = {arm.replace(" ", "_"): arm for arm in arms}
    for file in sorted(runs.glob("pretrain/*-seed*/probe.json")):
        arm, seed = file.parent.name.rsplit("-seed", 1)
        for measured in json.loads(file.read_text()) if arm in of_folder else []:
            last = ", last layer" if measured["layers"] == "last" else ""
            what = f"frozen, {measured['labels']:,} labels{last}"
            key = measured["task"], measured["draw"]
            found[what, of_folder[arm], int(seed)][key] = measured["kernel ridge"]
    for file in sorted(runs.glob("finetune/*-seed*/summary.json")):
        summary = json.loads(file.read_text())
        arm, rest = file.parent.name.split("-seed", 1)
        seed, task, labels, draw = rest.rsplit("-", 3)
        if arm in of_folder and summary["status"] == "complete":
            what = f"finetuned, {int(labels):,} labels"
            found[what, of_folder[arm], int(seed)][task.replace("_", " "), int(draw)] = summary["test/mae"]
    return found


def read_measurements(file: Path, arms: Sequence[str]) -> Errors:
    """Return the errors of an earlier study, as ``write_measurements`` wrote them; none if there is no file."""
    found: Errors = {}
    for what, of_arms in json.loads(file.read_text()).items() if file.exists() else []:
        for arm, of_seeds in of_arms.items():
            for seed, of_tasks in of_seeds.items() if arm in arms else []:
                draws = {(task, draw): e for task, of_draws in of_tasks.items() for draw, e in enumerate(of_draws)}
                found[what, arm, int(seed)] = draws
    return found


def change(mine: Mapping[tuple[str, int], float], control: Mapping[tuple[str, int], float]) -> float | None:
    """Return the mean change of the logarithm of the error, first over draws, in percent; None without a pair."""
    of_task = defaultdict(list)
    for (task, draw), error in mine.items():
        if (task, draw) in control:
            of_task[task].append(np.log(error / control[task, draw]))
    return 100 * float(np.mean([np.mean(values) for values in of_task.values()])) if of_task else None


def changes(errors: Errors, what: str, arm: str, control: str) -> dict[int, float]:
    """Return the change of an arm against the control, in percent, of each seed that both have."""
    found = {}
    for (measured, name, seed), mine in errors.items():
        if (measured, name) == (what, arm) and (theirs := errors.get((what, control, seed))):
            value = change(mine, theirs)
            if value is not None:
                found[seed] = value
    return found


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the 95 % t-interval of a mean over seeds."""
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))


def holm(p: Sequence[float]) -> NDArray[np.float64]:
    """Return p-values adjusted for the number of comparisons by Holm's method."""
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1)).clip(max=1.0)
    found = np.empty(len(p))
    found[order] = adjusted
    return found


def records_of(errors: Errors, arms: Sequence[str], control: str, known: Mapping[str, str]) -> list[evidence.Record]:
    """Return mean change and spread, half-width of the interval, and adjusted p of each arm and measure."""
    records = []
    measures = sorted(
        {what for what, _, _ in errors}, key=lambda what: ("last" in what, "frozen" not in what, len(what), what)
    )
    for what in measures:
        of_arms = {arm: changes(errors, what, arm, control) for arm in arms if arm != control}
        of_arms = {arm: found for arm, found in of_arms.items() if found}
        several = {arm: found for arm, found in of_arms.items() if len(found) > 1}
        p = holm([float(stats.ttest_1samp(list(found.values()), 0.0).pvalue) for found in several.values()])
        adjusted = dict(zip(several, p, strict=True))
        for arm, found in of_arms.items():
            values, seeds = list(found.values()), sorted(found)
            mine = {"name": arm, "seeds": seeds, **known}
            records.append(evidence.summarise(values, metric=what, unit="%", **mine))
            if arm in adjusted and "last" not in what:
                records.append(evidence.summarise([half_width(values)], metric=f"{what}: 95 % ±", unit="%", **mine))
                records.append(evidence.summarise([adjusted[arm]], metric=f"{what}: p", unit="Holm", **mine))
    columns = {metric: i for i, metric in enumerate(dict.fromkeys(r.metric for r in records))}
    return sorted(records, key=lambda record: (arms.index(record.name), columns[record.metric]))


def write_measurements(errors: Errors, file: Path) -> None:
    """Write every error of every run: what, arm, seed, task, and the errors of its draws."""
    nested: dict[str, dict[str, dict[str, dict[str, list[float]]]]] = {}
    for (what, arm, seed), of_draws in sorted(errors.items()):
        tasks = nested.setdefault(what, {}).setdefault(arm, {}).setdefault(str(seed), {})
        for (task, _), error in sorted(of_draws.items()):
            tasks.setdefault(task, []).append(round(error, 5))
    pattern = re.compile(r"\[[^\[\]]*\]")
    text = pattern.sub(lambda match: json.dumps(json.loads(match[0])), json.dumps(nested, indent=1))
    write_atomically(file, text + "\n")


def draw(errors: Errors, arms: Sequence[str], control: str, file: Path) -> None:
    """Draw the change against the control with its interval: frozen in one panel, finetuned in the other."""
    from matplotlib.figure import Figure

    shown = ("frozen, 300 labels", "finetuned, 300 labels")
    figure = Figure(figsize=(9, 0.32 * len(arms) + 1.2), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2, sharey=True), shown, strict=True):
        for row, arm in enumerate(arms):
            values = list(changes(errors, what, arm, control).values())
            if not values:
                continue
            width = half_width(values) if len(values) > 1 and arm != control else 0.0
            axes.errorbar(np.mean(values), row, xerr=width, fmt="o", color="C0", capsize=3)
            axes.plot(values, [row] * len(values), "|", color="C1")
        axes.axvline(0.0, color="gray", linewidth=1)
        axes.axvline(-3.0, color="gray", linewidth=1, linestyle=":")
        axes.set(xlim=(-12, 12), xlabel=f"change of the error against {control} (%)", title=what)
    figure.axes[0].set_yticks(range(len(arms)), arms)
    figure.axes[0].invert_yaxis()
    figure.savefig(file, dpi=130)
