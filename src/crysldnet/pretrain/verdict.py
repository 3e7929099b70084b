"""Results of a pretraining run, as a table and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crysldnet.console import note, print_table, suggest_next
from crysldnet.measures import MEASURES

Metrics = Mapping[str, float]


KEPT = 0.5
"""A second stage that retains less than this fraction of the spread or effective rank has collapsed."""
GAIN = 0.02
"""An error at least this fraction below its baseline counts as learned."""


def verdict(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Describe what was learned relative to which baseline, and whether the run failed.

    Args:
        summary: run summary with the metrics of each stage under its name.

    Returns:
        ``sentences``; ``failed``, whether a metric of the last stage is no better than its baseline or the second stage
        collapsed; ``collapsed``, None if undetermined.
    """
    stages = [stage for stage in ("vae", "diffusion") if stage in summary]
    last: Metrics = summary[stages[-1]]
    sentences, failed = [], False
    for measure in MEASURES.values():
        value, baseline = last.get(f"val/{measure.name}"), last.get(f"val/{measure.name}_baseline")
        if not measure.learned or value is None or baseline is None:
            continue
        higher = measure.better == "higher"
        gain = (value - baseline) / max(1.0 - baseline, 1e-9) if higher else 1.0 - value / max(baseline, 1e-12)
        learned = gain > GAIN
        failed |= not learned
        word = "learned" if learned else "not learned"
        compared = f"{measure.form.format(value)} against {measure.form.format(baseline)} ({measure.baseline})"
        sentences.append(f"{measure.learned}: {word}, {compared}")
    shares = _shares(summary) if len(stages) == 2 else {}
    for name, (before, after) in shares.items():
        if after >= KEPT * before:
            continue
        sentences.append(f"encoder output: its {name} fell from {before:.3g} to {after:.3g} in the second stage")
    collapsed = any(not after > KEPT * before for before, after in shares.values()) if shares else None
    return {"sentences": sentences, "failed": failed or bool(collapsed), "collapsed": collapsed}


def _shares(summary: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return spread and effective rank of the encoder output after both stages."""
    names = {"spread": "val/features_spread", "effective rank": "val/features_rank"}
    if not all(key in summary[stage] for stage in ("vae", "diffusion") for key in names.values()):
        return {}
    return {name: (summary["vae"][key], summary["diffusion"][key]) for name, key in names.items()}


def print_result(summary: Mapping[str, Any], stages: Sequence[str], encoder: str) -> None:
    """Print the table, the verdict and the path of the encoder."""
    shown = [stage for stage in stages if stage in summary]
    table = []
    for measure in (known for known in MEASURES.values() if known.shown):
        cells = [_cell(summary[stage], measure.name, measure.form) for stage in shown]
        if all(cell == "–" for cell in cells):
            continue
        bases = [_cell(summary[stage], f"{measure.name}_baseline", measure.form) for stage in shown]
        base = next((cell for cell in bases if cell != "–"), None) if measure.baseline else None
        table.append([measure.heading, *cells, f"{base} ({measure.baseline})" if base is not None else ""])
    print_table("On the validation split", ["", *shown, "baseline"], table)
    said = summary["verdict"]
    for sentence in said["sentences"]:
        note(sentence)
    if said["failed"]:
        note("pretraining failed in what is named above: see docs/method.md")
    print_table("", ["written", ""], [["encoder", encoder]])
    suggest_next(f"crysldnet finetune pretrained={encoder}", f"make finetune ENCODER={encoder}")


def _cell(metrics: Metrics, key: str, form: str) -> str:
    value = metrics.get(f"val/{key}")
    return "–" if value is None else form.format(value)
