"""Explain the predictions of a finetuned model for a few test crystals of a report."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import numpy as np

from crysldnet.errors import CrysldnetError, DataError
from crysldnet.html.explanation import AVERAGE, draw_explanation
from crysldnet.inference import Predictor, load
from crysldnet.inference.explain import explain_crystal
from crysldnet.tools.report.predictions import Predictions
from crysldnet.tools.report.run_files import Run
from crysldnet.tools.report.structures import TestedCrystals, worst_places

SHOWN = 5
"""Descriptors shown one by one."""
TOLERANCE, TOLERANCE_16 = 0.01, 0.05
"""Difference allowed between the prediction that is explained, in float32, and the one in the table, of a run in 32 or
64 and in 16 bits; relative to the prediction and the standard deviation of the true values, or to a probability."""


def chosen(p: Predictions, count: int) -> list[int]:
    """Return the crystals to explain: the worst ones, and a typical one, with the median error.

    For classes, the typical one is classified correctly, with the median probability.

    Args:
        p: predictions of one target.
        count: number of crystals.
    """
    score = p.errors if p.classes is None or p.probability is None else np.where(p.errors == 0, p.probability, np.nan)
    order = np.argsort(score, kind="stable")[: int((~np.isnan(score)).sum())]  # NaN last
    typical = [int(order[len(order) // 2])] if len(order) and count > 1 else []
    return list(dict.fromkeys([*worst_places(p, count - len(typical)), *typical]))


class Explainer:
    """Explains the predictions of one run; its model is loaded when first needed."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._model: Predictor | None = None

    def section(self, name: str, p: Predictions, found: TestedCrystals, count: int) -> Iterator[str]:
        """Yield cards of explained crystals, or a sentence that says why there are none.

        Args:
            name: the target.
            p: its predictions.
            found: the test crystals.
            count: number of crystals to explain.
        """
        yield "<h3>Where predictions come from</h3>"
        if p.folds is not None:
            yield "<p>Not shown: the predictions are those of the folds, and model.safetensors is the final model.</p>"
            return
        try:
            cards = [self._card(name, p, found, i) for i in chosen(p, count)]
        except CrysldnetError as error:
            yield f"<p>Not shown: {escape(str(error))}.</p>"
            return
        yield (
            "<p>What distinguishes each prediction from that for an average training crystal: orange raises it, blue "
            f"lowers it. The contributions add up to the prediction. {AVERAGE}</p>"
        )
        yield from cards

    def _card(self, name: str, p: Predictions, found: TestedCrystals, i: int) -> str:
        if self._model is None:
            self._model = load(self._run.path, device="cpu")
        model = self._model
        columns = {d: found.store.numbers_of(d)[found.rows[i : i + 1]] for d in model.descriptors}
        crystal = found.crystals.take(np.array([i], np.int64))
        label = None if p.classes is None else int(p.predicted[i])
        one = explain_crystal(model, crystal, p.ids[i], model.place_of(name), columns, label)
        _compare(p, i, one.found.prediction, str(self._run.config.get("trainer", {}).get("precision")))
        return draw_explanation(crystal, one.formula, one.id, one.found, p.unit, SHOWN, [_line(p, i)])


def _line(p: Predictions, i: int) -> str:
    """Return the true value and the rank of the error."""
    if p.classes is not None:
        return f"true class {p.classes[int(p.true[i])]}"
    rank, count = 1 + int((p.errors > p.errors[i]).sum()), int((~np.isnan(p.errors)).sum())
    unit = f" {p.unit}" if p.unit else ""
    place = f"the largest of {count:,}" if rank == 1 else f"rank {rank:,} of {count:,}"
    return f"true {p.true[i]:.4g}{unit}, error {p.errors[i]:.4g}{unit} ({place})"


def _compare(p: Predictions, i: int, value: float, precision: str) -> None:
    """Refuse to explain a prediction other than the one in the table.

    Args:
        p: predictions of one target.
        i: the crystal.
        value: the explained prediction; for classes, the probability of the one in the table.
        precision: that of the run.
    """
    if p.classes is None:
        want, scale = float(p.predicted[i]), abs(float(p.predicted[i])) + float(np.nanstd(p.true))
    else:
        want, scale = 0.5 if p.probability is None else float(p.probability[i]), 1.0
    if abs(value - want) > (TOLERANCE_16 if "16" in precision else TOLERANCE) * scale:
        raise DataError(
            f"the model of the run predicts {value:.4g} for {p.ids[i]}, and predictions_test.csv has {want:.4g}: one "
            "of them was changed after the run"
        )
