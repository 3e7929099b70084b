"""Tables of a report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from crysldnet.html import page as html
from crysldnet.measures import MEASURES
from crysldnet.tools.report import statistics
from crysldnet.tools.report.run_files import Run, matbench_tasks
from crysldnet.training.bootstrap import baseline_header, baseline_rows

SUMMARY_NAMES = {"train_crystals": "training crystals", "pretrained": "pretrained", "seed": "seed"}


def run_table(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return settings and results of runs: a column for one run, a row each for several."""
    rows = [_facts(run) for run in runs]
    if len(runs) == 1:
        return html.facts(rows[0].items()) + _scores(runs[0])
    columns = list(dict.fromkeys(key for row in rows for key in row))
    body = [[name, *(row.get(key, "") for key in columns)] for name, row in zip(names, rows, strict=True)]
    return "<h2>Runs</h2>" + html.table(["run", *columns], body) + "".join(_scores(run) for run in runs)


def _facts(run: Run) -> dict[str, str]:
    s = run.summary
    encoder = str((run.config.get("encoder") or {}).get("_target_", "")).rpartition(".")[2]
    found = {
        "command": run.command,
        "encoder": encoder,
        **{title: str(s[key]) for key, title in SUMMARY_NAMES.items() if s.get(key) is not None},
        "members": str(len(s["members"])) if s.get("members") else "",
        "wall time": _duration(s.get("wall_time_s")),
        "code": str(s.get("code_version", "")),
    }
    for stage in ("vae", "diffusion"):
        values: dict[str, Any] = own if isinstance(own := s.get(stage), dict) else {}
        measure = next((m for m in MEASURES.values() if m.shown and values.get(f"val/{m.name}") is not None), None)
        if measure is not None:
            found[f"{stage}: {measure.heading}"] = measure.form.format(values[f"val/{measure.name}"])
    for task, told in matbench_tasks(s).items():
        for key in (key.removesuffix("_mean") for key in told if key.endswith("_mean")):
            found[f"{key} {task}"] = f"{told[f'{key}_mean']:.4g} ± {told[f'{key}_std']:.4g} {told.get('unit') or ''}"
    for target, p in run.predictions.items() if run.command != "matbench" else ():
        value = statistics.metrics(p).get("MAE")
        if value is not None:
            found[f"MAE {target}{p.suffix}"] = f"{value:.4g}"
        elif p.classes is not None and statistics.metrics(p):
            found[f"accuracy {target}"] = f"{statistics.metrics(p)['accuracy']:.4g}"
    return {key: text for key, text in found.items() if text}


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, (int, float)):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _scores(run: Run) -> str:
    """Return the scores of a Matbench run's folds."""
    text = ""
    for task, told in matbench_tasks(run.summary).items():
        columns = list(dict.fromkeys(key for fold in told["scores"].values() for key in fold))
        rows = []
        for fold, own in told["scores"].items():
            rows.append([fold.replace("_", " "), *(f"{own[key]:.4g}" if key in own else "" for key in columns)])
        text += f"<h2>Folds of {escape(task)}, {escape(run.name)}</h2>" + html.table(["", *columns], rows, numbers=True)
    return text


def comparison_table(c: statistics.Comparison, names: Sequence[str], resamples: int) -> str:
    """Return the results of runs on one target, and their differences from the first."""
    suffix = f" ({c.unit})" if c.unit else ""
    rows = []
    for r in c.runs:
        differs = r.run != c.runs[0].run
        low, high = r.difference_interval
        rows.append(
            [
                names[r.run],
                f"{r.mean:.4g}",
                f"{r.interval[0]:.4g} to {r.interval[1]:.4g}",
                f"{r.difference:+.3g}" if differs else "reference",
                f"{low:+.3g} to {high:+.3g}" if differs else "",
                _share(r.other_sign, resamples) if differs else "",
            ]
        )
    same = all(count == c.common for count in c.of)
    of = "" if same else f" The runs have {', '.join(f'{n:,}' for n in c.of)} test crystals; the rest is left out here."
    header = ["run", c.measure, "95 % interval", "difference", "95 % interval", "other sign"]
    return (
        f"<h3>{escape(c.target)}{escape(suffix)}</h3>"
        f"{html.table(header, rows, numbers=True)}"
        f'<p class="soft">{c.common:,} test crystals in common.{of} Difference from {escape(names[c.runs[0].run])}, '
        f"paired bootstrap of {resamples:,} resamples of the crystals; other sign: the share of resamples in which the "
        "difference is 0 or of the other sign. The intervals are of the test crystals drawn; another seed of the "
        "training changes a run too.</p>"
    )


def baseline_table(run: Run, target: str) -> str:
    """Return a finetuned model's comparison with a constant and trees; empty if not available."""
    found = (run.summary.get("baselines") or {}).get(target)
    if found is None:
        return ""
    return (
        "<h3>Without a network</h3>"
        f"{html.table(baseline_header(found), baseline_rows(found), numbers=True)}"
        f'<p class="soft">{found["crystals"]:,} test crystals, bootstrap. Trees and constant were fitted to the same '
        "training crystals; the trees read the composition and the surroundings of the atoms.</p>"
    )


def _share(share: float, resamples: int) -> str:
    return f"< {1 / resamples:.2g}" if share == 0 else f"{share:.3g}"


def seed_table(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return mean and spread of runs that differ only in their seed, if any."""
    rows = []
    for group in statistics.same_but_seed(runs):
        own = [runs[i] for i in group]
        for target in own[0].predictions if len(own) > 1 else {}:
            values = [statistics.metrics(run.predictions[target]) for run in own if target in run.predictions]
            measure = "accuracy" if own[0].predictions[target].classes else "MAE"
            known = np.array([value[measure] for value in values if measure in value])
            if len(known) > 1:
                title = f"{measure} {target}{own[0].predictions[target].suffix}"
                spread = f"{known.mean():.4g} ± {known.std(ddof=1):.2g}"
                rows.append([", ".join(names[i] for i in group), title, f"{len(known)}", spread])
    if not rows:
        return ""
    return "<h2>Runs that differ only in the seed</h2>" + html.table(
        ["runs", "", "number", "mean ± standard deviation"], rows
    )


def settings_table(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return the settings that differ between runs."""
    found = statistics.differing_settings(runs)
    if not found:
        return "<h2>Settings that differ</h2><p>None but the name.</p>"
    return "<h2>Settings that differ</h2>" + html.table(["", *names], [[key, *values] for key, values in found.items()])
