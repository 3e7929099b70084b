"""What the crystals that a model is tested on have in common with those that its encoder was pretrained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crysldnet.data.fingerprint import Fingerprints, overlap
from crysldnet.report import print_table
from crysldnet.training import checkpoint


def encoder_file(pretrained: str | None) -> Path | None:
    """Return the file of a pretrained encoder or a finetuned model; None where training is from scratch.

    The folder of their run may stand for it.
    """
    if pretrained in (None, "none"):
        return None
    path = Path(str(pretrained))
    if not path.is_dir():
        return path
    model = path / "model.safetensors"
    return model if model.exists() else path / "encoder.safetensors"


def pretraining_overlap(pretrained: str | None, tested: Fingerprints) -> dict[str, Any] | None:
    """Count the tested crystals that pretraining saw, without their labels.

    Args:
        pretrained: as configured.
        tested: the crystals of the test split.

    Returns:
        ``test_crystals``, ``pretraining_crystals`` and how many of the tested ones share an id (``ids``), a reduced
        formula (``formulas``), and both formula and geometry (``similar``). The last three are None where the encoder's
        file doesn't say what it was pretrained on. None where there was no pretraining.
    """
    path = encoder_file(pretrained)
    if path is None:
        return None
    finetuned = checkpoint.kind_of(path) == "property_model"  # its file doesn't say which crystals it was trained on
    seen = None if finetuned else checkpoint.read_pretraining_set(path)
    if seen is None:
        unknown = dict.fromkeys(("pretraining_crystals", "ids", "formulas", "similar"))
        return {"test_crystals": len(tested), **unknown}
    return {"test_crystals": len(tested), "pretraining_crystals": len(seen), **overlap(tested, seen)}


def describe_overlap(counts: dict[str, Any]) -> str:
    """Return a sentence for a person."""
    if counts["ids"] is None:
        return (
            f"It isn't known which of the {counts['test_crystals']:,} test crystals were in the pretraining set: the "
            "encoder's file doesn't say."
        )
    return (
        f"Of the {counts['test_crystals']:,} test crystals, the {counts['pretraining_crystals']:,} of pretraining "
        f"have {counts['ids']:,} by id, {counts['formulas']:,} by reduced formula, and {counts['similar']:,} by "
        "formula and similar geometry; pretraining saw no labels."
    )


def print_overlap(counts: dict[str, Any] | None) -> None:
    """Print the counts, where there was pretraining."""
    if counts is None or not counts["test_crystals"]:
        return
    title = f"Test crystals that are in the pretraining set, of {counts['test_crystals']:,}"
    names = {"ids": "same id", "formulas": "same reduced formula", "similar": "same formula, similar geometry"}
    rows = [[text, "not known" if counts[key] is None else f"{counts[key]:,}"] for key, text in names.items()]
    print_table(title, ["", ""], rows)
