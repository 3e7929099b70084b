"""Table that compares a model with the mean and with trees, for the terminal and reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {"model": "model", "trees": "trees on descriptors", "constant": "constant"}


def baseline_header(found: Mapping[str, Any]) -> list[str]:
    """Return the table header for a target."""
    measure = "MAE" if found["measure"] == "mae" else "error rate"
    unit = f" ({found['unit']})" if found["unit"] and measure == "MAE" else ""
    return ["", measure + unit, "95 % interval", "above the model", "95 % interval"]


def baseline_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the table rows for a target."""

    def ends(interval: Sequence[float] | None, form: str) -> str:
        return "" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"

    titles = {**TITLES, "constant": "mean" if found["measure"] == "mae" else "most frequent class"}
    return [
        [
            titles[name],
            f"{own['error']:.4g}",
            ends(own["interval"], ".4g"),
            f"{own['difference']:+.3g}" if "difference" in own else "",
            ends(own.get("difference_interval"), "+.3g"),
        ]
        for name, own in ((name, found[name]) for name in TITLES if name in found)
    ]
