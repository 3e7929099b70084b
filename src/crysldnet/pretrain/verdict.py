"""What a pretraining run learned, as a table and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from crysldnet.console import note, print_table

Metrics = Mapping[str, float]


class Row(NamedTuple):
    """A measure of the table.

    Attributes:
        title: with its unit.
        key: its name after ``val/``.
        baseline: what the measure of the baseline, ``KEY_baseline``, stands for; empty for none.
        form: how a value is printed.
        learned: what the verdict calls it; empty where it says nothing of it.
        higher: whether more is better.
    """

    title: str
    key: str
    baseline: str
    form: str
    learned: str = ""
    higher: bool = False


ROWS = (
    Row("masked species found", "masked_accuracy", "commonest species", "{:.3f}", "species", higher=True),
    Row("coordinate error (Å)", "coordinate_error", "as corrupted", "{:.4f}"),
    Row("squared displacement error", "displacement_squared_error", "as corrupted", "{:.3f}", "displacements"),
    Row("lattice length error (Å)", "lattice_length_error", "as corrupted", "{:.4f}"),
    Row("lattice angle error (°)", "lattice_angle_error", "as corrupted", "{:.3f}"),
    Row("squared strain error", "strain_squared_error", "as corrupted", "{:.3f}", "strain"),
    Row("species, told of the crystal", "masked_accuracy_conditioned", "", "{:.3f}"),
    Row("diffusion error", "diffusion_error", "Gaussian guess", "{:.4f}", "latent diffusion"),
    Row("encoder output: spread", "features_spread", "", "{:.3f}"),
    Row("encoder output: effective rank", "features_rank", "", "{:.1f}"),
    Row("latent: effective rank", "latent_rank", "", "{:.1f}"),
)
KEPT = 0.5
"""A second stage that leaves less than this share of the spread or the effective rank has collapsed in it."""
GAIN = 0.02
"""An error this share below its baseline counts as learned."""


def verdict(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Say in words what was learned, against which baseline, and whether the run failed.

    Args:
        summary: of the run; the metrics of each stage under its name.

    Returns:
        ``sentences``; ``failed``, whether the last stage learned something no better than its baseline, or the second
        one collapsed; ``collapsed``, None where that can't be told.
    """
    stages = [stage for stage in ("vae", "diffusion") if stage in summary]
    last: Metrics = summary[stages[-1]]
    sentences, failed = [], False
    for row in ROWS:
        value, baseline = last.get(f"val/{row.key}"), last.get(f"val/{row.key}_baseline")
        if not row.learned or value is None or baseline is None:
            continue
        gain = (value - baseline) / max(1.0 - baseline, 1e-9) if row.higher else 1.0 - value / max(baseline, 1e-12)
        learned = gain > GAIN
        failed |= not learned
        word = "learned" if learned else "not learned"
        compared = f"{row.form.format(value)} against {row.form.format(baseline)} ({row.baseline})"
        sentences.append(f"{row.learned}: {word}, {compared}")
    shares = _shares(summary) if len(stages) == 2 else {}
    for name, (before, after) in shares.items():
        if after >= KEPT * before:
            continue
        sentences.append(f"encoder output: its {name} fell from {before:.3g} to {after:.3g} in the second stage")
    collapsed = any(not after > KEPT * before for before, after in shares.values()) if shares else None
    return {"sentences": sentences, "failed": failed or bool(collapsed), "collapsed": collapsed}


def _shares(summary: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return spread and effective rank of the encoder's output after both stages."""
    names = {"spread": "val/features_spread", "effective rank": "val/features_rank"}
    if not all(key in summary[stage] for stage in ("vae", "diffusion") for key in names.values()):
        return {}
    return {name: (summary["vae"][key], summary["diffusion"][key]) for name, key in names.items()}


def print_result(summary: Mapping[str, Any], stages: Sequence[str], encoder: str) -> None:
    """Print the table, the verdict, and where the encoder is."""
    shown = [stage for stage in stages if stage in summary]
    table = []
    for row in ROWS:
        cells = [_cell(summary[stage], row.key, row.form) for stage in shown]
        if all(cell == "–" for cell in cells):
            continue
        bases = [_cell(summary[stage], f"{row.key}_baseline", row.form) for stage in shown]
        base = next((cell for cell in bases if cell != "–"), None) if row.baseline else None
        table.append([row.title, *cells, f"{base} ({row.baseline})" if base is not None else ""])
    print_table("On the validation split", ["", *shown, "baseline"], table)
    said = summary["verdict"]
    for sentence in said["sentences"]:
        note(sentence)
    if said["failed"]:
        note("pretraining failed in what is named above: see docs/method.md")
    print_table("", ["written", ""], [["encoder", encoder]])


def _cell(metrics: Metrics, key: str, form: str) -> str:
    value = metrics.get(f"val/{key}")
    return "–" if value is None else form.format(value)
