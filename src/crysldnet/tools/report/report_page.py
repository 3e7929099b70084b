"""Report page: differences between runs, learning curves, and prediction errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from crysldnet.console import SHOWN
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError
from crysldnet.graphs.crystals import Crystals
from crysldnet.html import page as html
from crysldnet.html.explanation import STYLE as DRAWING
from crysldnet.measures import unit_of
from crysldnet.tools.report import figures, statistics
from crysldnet.tools.report.predictions import Predictions
from crysldnet.tools.report.run_files import Run, matbench_tasks
from crysldnet.tools.report.structures import TestedCrystals, find_structures, worst_cards, worst_places
from crysldnet.tools.report.tables import baseline_table, comparison_table, run_table, seed_table, settings_table
from crysldnet.training.plots import file_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from crysldnet.tools.report.explanations import Explainer

IN_DRAWING = 3
"""Up to this number of lines, the legend is inside the plot, else above it."""
STYLE = (
    DRAWING
    + """
svg.plot { max-width: 34rem; margin: 0 auto; }
svg.plot text { fill: var(--text); }
.cards .structure { max-width: 11rem; margin: 0 auto; }
.cards .card { font-size: 0.85rem; line-height: 1.35; }
.cards .card b { font-size: 1rem; }
.cards .soft { font-size: 0.8rem; overflow-wrap: anywhere; }
summary { cursor: pointer; font-size: 1.1rem; font-weight: bold; margin: 1.75rem 0 0.5rem; overflow-wrap: anywhere; }
.legend span { margin-right: 1.25em; white-space: nowrap; }
"""
)


@dataclass
class Report:
    """Content of a report.

    Attributes:
        runs: runs with unique names.
        names: unique names of the runs.
        worst: number of worst predictions to show.
        explained: number of explained predictions per target.
        resamples: bootstrap resamples.
        seed: seed of the bootstrap.
        images: PNG of every figure by name, filled by :meth:`html` if ``keep``.
        keep: fill ``images``.
    """

    runs: Sequence[Run]
    names: Sequence[str]
    worst: int
    explained: int
    resamples: int
    seed: int
    keep: bool = False
    printed: str | None = None
    images: dict[str, bytes] = field(default_factory=dict)
    stores: dict[str, CrystalStore] = field(default_factory=dict)

    def __post_init__(self) -> None:
        targets = list(dict.fromkeys(target for run in self.runs for target in run.predictions))
        self.hidden = frozenset(targets[SHOWN:])
        self.runs = [
            replace(run, predictions={t: p for t, p in run.predictions.items() if t not in self.hidden})
            for run in self.runs
        ]

    def html(self) -> str:
        """Return the page."""
        title = f"Report of {self.names[0]}" if len(self.runs) == 1 else f"Report of {len(self.runs)} runs"
        return html.page(title, self._body(), STYLE)

    def figure(self, figure: Figure, name: str, title: str, note: str = "") -> str:
        """Return a figure in a card, and keep its image."""
        name = file_name(name)
        drawn = figures.svg(figure, name, title)
        if self.printed is not None:
            self.images[f"{name}.{self.printed}"] = figures.for_print(figure, self.printed)
        if self.keep:
            self.images[f"{name}.png"] = figures.png(figure, title)
        caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
        return f'<figure class="card"><h3>{escape(title)}</h3>{drawn}{caption}</figure>'

    def _body(self) -> Iterator[str]:
        if self.hidden:
            more = f"{len(self.hidden):,} more are in metrics.csv, summary.json and the tables of predictions"
            yield f"<p>The first {SHOWN} targets are shown; {more}.</p>"
        yield run_table(self.runs, self.names)
        if len(self.runs) > 1:
            yield from self._comparison()
        yield from self._curves()
        for place, run in enumerate(self.runs):
            if not run.predictions:
                continue
            opened = " open" if len(self.runs) == 1 else ""
            yield f"<details{opened}><summary>{escape(self.names[place])}: errors on the test crystals</summary>"
            yield from self._errors(place, run)
            yield "</details>"

    def _comparison(self) -> Iterator[str]:
        targets = dict.fromkeys(target for run in self.runs for target in run.predictions)
        together = {
            t: [(i, run.predictions[t]) for i, run in enumerate(self.runs) if t in run.predictions] for t in targets
        }
        together = {target: runs for target, runs in together.items() if len(runs) > 1}
        if together:
            yield "<h2>Comparison on the test crystals</h2>"
        for target, runs in together.items():
            try:
                found = statistics.compare(target, runs, self.resamples, self.seed)
            except DataError as error:
                yield f"<p>{escape(str(error))}.</p>"
                continue
            yield comparison_table(found, self.names, self.resamples)
            title = f"{target}: {found.measure} with its 95 % interval"
            drawn = figures.comparison(found, self.names)
            yield f'<div class="charts">{self.figure(drawn, f"comparison_{target}", title)}</div>'
        yield seed_table(self.runs, self.names)
        yield settings_table(self.runs, self.names)

    def _curves(self) -> Iterator[str]:
        commands = {run.command for run in self.runs}
        for command, part in dict.fromkeys((run.command, part) for run in self.runs for part in run.curves):
            lines = {
                " ".join(filter(None, [name if len(self.runs) > 1 else "", line])): curves
                for run, name in zip(self.runs, self.names, strict=True)
                if run.command == command
                for line, curves in run.curves.get(part, {}).items()
            }
            of = [f" of {escape(part)}"] if part else []
            of += [f" ({command})"] if len(commands) > 1 else []
            yield f"<h2>Learning curves{''.join(of)}</h2>"
            yield self._curve_charts(lines, f"{command}_{part}" if part else command)

    def _curve_charts(self, lines: dict[str, figures.Curves], name: str) -> str:
        metrics = [
            metric
            for metric in dict.fromkeys(m for curves in lines.values() for m in curves)
            if not metric.endswith("_baseline") and metric.split("/", 2)[-1] not in self.hidden
        ]
        units = {target: p.unit for run in self.runs for target, p in run.predictions.items()}
        shown = "".join(
            self.figure(
                figures.curves(metric, lines, legend=len(lines) <= IN_DRAWING, unit=unit_of(metric, units)),
                f"curve_{name}_{metric}",
                metric,
            )
            for metric in sorted(metrics, key=lambda metric: (not metric.startswith("train/"), metric))
        )
        legend = "".join(
            f'<span><i class="swatch" style="background: var(--series{i % len(html.SERIES)})"></i>{escape(line)}</span>'
            for i, line in enumerate(lines)
        )
        return (
            f'<p class="legend">{legend}</p>' if len(lines) > IN_DRAWING else ""
        ) + f'<div class="charts">{shown}</div>'

    def _errors(self, place: int, run: Run) -> Iterator[str]:
        crystals: dict[str, TestedCrystals] = {}
        reasons: dict[str, None] = {}
        for name in run.predictions:
            try:
                crystals[name] = find_structures(run, name, self.stores)
            except DataError as error:
                reasons[str(error)] = None
        explainer = self._explainer(run)
        hint = " A relative path counts from the current folder; run the command where the run was started."
        for reason in reasons:
            yield (
                f'<p class="soft">No structures, errors by element and by number of atoms: {escape(reason)}.'
                f"{'' if run.command == 'matbench' else hint}</p>"
            )
        for name, p in run.predictions.items():
            title = f"{name}: {p.target}" if run.command == "matbench" else name
            yield f"<h2>{escape(title)}{escape(p.suffix)}</h2>"
            if run.command == "matbench":
                yield '<p class="soft">Over all folds; the Matbench score is the mean over the folds.</p>'
            elif p.folds is not None:
                yield '<p class="soft">Each crystal is predicted by a model trained on other formulas.</p>'
            found, warning = crystals.get(name), _disagreement(run, name)
            yield from self._errors_of(f"{self.names[place]}_{name}", p, found and found.crystals, warning)
            if explainer is not None and found is not None:
                yield from explainer.section(name, p, found, self.explained)
            yield baseline_table(run, name)
            yield _intervals(run, name)

    def _explainer(self, run: Run) -> Explainer | None:
        """Return what explains the predictions of a run, which needs torch; None if not wanted."""
        if run.command != "finetune" or not self.explained:
            return None
        from crysldnet.tools.report.explanations import Explainer

        return Explainer(run)

    def _errors_of(self, name: str, p: Predictions, crystals: Crystals | None, warning: str) -> Iterator[str]:
        found = statistics.metrics(p)
        known = int((~np.isnan(p.true)).sum())
        if not found:
            yield "<p>The test split has no true values of it.</p>"
            return
        missing = [("without a true value", f"{len(p.ids) - known:,}")] if known < len(p.ids) else []
        yield html.facts([*((k, f"{v:.4g}") for k, v in found.items()), ("test crystals", f"{known:,}"), *missing])
        if warning:
            yield f"<p>{escape(warning)}</p>"
        color = html.SERIES[0]
        charts = []
        if p.classes is None:
            charts.append(self.figure(figures.parity(p, color), f"parity_{name}", "Predicted against true"))
            note = "The end bars include the 1 % beyond." if known >= 100 else ""
            charts.append(self.figure(figures.error_histogram(p, color), f"errors_{name}", "Errors", note))
        else:
            charts.append(self.figure(figures.confusion(p, color), f"confusion_{name}", "Predicted and true classes"))
        if crystals is not None:
            groups = statistics.errors_by_size(p.errors, crystals.sizes)
            drawn = figures.errors_by_size(groups, f"{p.measure}{p.suffix}", color)
            note = "Groups of similar size; the lines are standard errors of the means."
            charts.append(self.figure(drawn, f"atoms_{name}", "Error by number of atoms", note))
        calibration = statistics.CalibrationOfRun.of(p)
        if calibration is not None:
            charts.append(self._calibration(calibration, p, f"calibration_{name}"))
        yield f'<div class="charts">{"".join(charts)}</div>'
        if crystals is not None:
            yield f"<h3>Error by element: {escape(p.measure + p.suffix)} of the crystals that contain it</h3>"
            yield _element_table(p, crystals)
            yield '<p class="soft">Point at an element to see its number of crystals; small numbers mean little.</p>'
        if worst := worst_places(p, min(self.worst, -(-known // 10))):
            yield f"<h3>{len(worst)} worst predictions</h3>"
            yield worst_cards(p, crystals, worst)

    def _calibration(self, found: statistics.CalibrationOfRun, p: Predictions, name: str) -> str:
        covered = ", ".join(f"{100 * share:.1f} % in {100 * level:g} %" for level, share in found.coverage.items())
        note = (
            "True values in central intervals of normal distributions with the predicted standard "
            f"deviations: {covered}. Miscalibration area {found.area:.3f}. Mean standard deviation "
            f"{found.mean_std:.4g}, RMSE {found.rmse:.4g}{p.suffix}."
        )
        return self.figure(figures.reliability(found, html.SERIES[0]), name, "Calibration", note)


def _intervals(run: Run, name: str) -> str:
    """Describe the coverage of the ``predict`` intervals on their calibration crystals."""
    found = (run.summary.get("calibration") or {}).get(name) or {}
    levels = [key for key in found if key.startswith("coverage_")]
    covered = [f"{100 * found[key]:.1f} % in {key.removeprefix('coverage_')} %" for key in levels]
    if not covered:
        return ""
    area, scaled = (found.get(f"miscalibration_area{end}") for end in ("", "_scaled"))
    areas = "" if area is None else f" Miscalibration area of the standard deviations {area:.3f}, scaled {scaled:.3f}."
    return (
        f"<h3>Intervals of crysldnet predict</h3><p>True values in the intervals, of the {found['crystals']:,.0f} "
        "calibration crystals, none of which was trained on; made from one half of them and measured on the other: "
        f"{escape(', '.join(covered))}.{areas}</p>"
    )


def _disagreement(run: Run, name: str) -> str:
    """Report a difference between the error in the summary and that of the predictions."""
    measure = "MAE" if run.predictions[name].classes is None else "accuracy"
    for of, said, p in _stated(run, name, measure.lower()):
        found = statistics.metrics(p).get(measure, np.nan)
        if not abs(said - found) <= 1e-3 * abs(said) + 1e-6:
            return (
                f"summary.json says that the {measure}{of} is {said:.6g}, the table of predictions gives {found:.6g}: "
                "one of them was changed after the run, or they are of different predictions."
            )
    return ""


def _stated(run: Run, name: str, metric: str) -> Iterator[tuple[str, float, Predictions]]:
    """Yield each error in the summary: name, value, and its predictions."""
    p = run.predictions[name]
    if run.command == "matbench":
        for fold, scores in matbench_tasks(run.summary)[name]["scores"].items():
            said = scores.get(metric, np.nan)
            yield f" of {fold.replace('_', ' ')}", said, p.of_fold(int(fold.removeprefix("fold_")))
        return
    keys = [f"test/{metric}/{name}", *([f"test/{metric}"] if len(run.predictions) == 1 else [])]
    for said in [run.summary[key] for key in keys if isinstance(run.summary.get(key), float)][:1]:
        yield "", said, p


def _element_table(p: Predictions, crystals: Crystals) -> str:
    found = statistics.errors_by_element(p.errors, crystals)
    top = float(np.quantile([mean for mean, _ in found.values()], 0.95)) or 1.0
    cells = {
        symbol: html.ElementCell(
            f"{mean:.2g}" if mean < 99.5 else f"{mean:.0f}",
            min(1.0, mean / top),
            f"{mean:.4g}{p.suffix} over {count:,} crystals",
        )
        for symbol, (mean, count) in found.items()
    }
    return html.periodic_table(cells, "in no test crystal")
