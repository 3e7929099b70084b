"""Verbal summary of a finetuning run, and the suggested next command."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from crysldnet.console import SHOWN

NAMES = {"mae": "the MAE", "error_rate": "the error rate"}
CONSTANTS = {"mae": "the training mean", "error_rate": "the most frequent class"}


def verdict(baselines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each target that compares the test error with the constant and the trees.

    A difference counts if its 95 % interval excludes 0.

    Args:
        baselines: as returned by :func:`crysldnet.finetune.baselines.compare`.
    """
    return [_sentence(target, found) for target, found in islice(baselines.items(), SHOWN)]


def _sentence(target: str, found: Mapping[str, Any]) -> str:
    unit = f" {found['unit']}" if found["unit"] and found["measure"] == "mae" else ""
    others = {"constant": CONSTANTS[found["measure"]], "trees": "trees on descriptors"}
    compared = [_compared(found, name, title, unit) for name, title in others.items() if name in found]
    said = f"{target}: {NAMES[found['measure']]} on {found['crystals']:,} test crystals is "
    return "; ".join([f"{said}{found['model']['error']:.4g}{unit}", *compared])


def _compared(found: Mapping[str, Any], name: str, title: str, unit: str) -> str:
    other, interval = found[name]["error"], found[name]["difference_interval"]
    if interval is None or interval[0] <= 0 <= interval[1]:
        return f"not distinguishable from {title} ({other:.4g}{unit})"
    better = interval[0] > 0
    share = f"{abs(1 - found['model']['error'] / other):.0%} " if other > 0 else ""
    return f"{share}{'below' if better else 'above'} {title} ({other:.4g}{unit})"
