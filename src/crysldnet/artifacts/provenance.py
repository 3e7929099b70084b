"""What the crystals that a model is tested on have in common with those that it has seen before.

An encoder's file says which crystals it was pretrained on, a finetuned model's says besides which ones chose its
weights: training and validation crystals of every finetuning since.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crysldnet.artifacts import model_file, weights
from crysldnet.console import print_table
from crysldnet.data.fingerprint import Fingerprints, overlap
from crysldnet.data.store import CrystalStore
from crysldnet.errors import CheckpointError


def encoder_file(pretrained: str | None) -> Path | None:
    """Return the file of a pretrained encoder or a finetuned model; None where training is from scratch.

    The folder of their run may stand for it, and so may the name of an encoder that ships with the package.

    Raises:
        CheckpointError: there is none, or it is the folder of an ensemble.
    """
    if pretrained in (None, "none"):
        return None
    path = weights.find(str(pretrained))
    if not path.is_dir():
        return path
    model = path / "model.safetensors"
    if members := sorted(path.glob("member_*/model.safetensors")):
        raise CheckpointError(f"{path}: an ensemble of {len(members)} models; name one, as {members[0].parent}")
    return model if model.exists() else path / "encoder.safetensors"


def _seen_by(path: Path) -> NDArray[np.uint64] | None:
    """Read which crystals an encoder or a finetuned model has seen; None where its file doesn't say."""
    finetuned = model_file.kind_of(path) == "property_model"
    return model_file.read_pretraining_set(path, "property_model" if finetuned else "encoder")


def seen_crystals(pretrained: str | None, store: CrystalStore, rows: NDArray[np.int64]) -> NDArray[np.uint64] | None:
    """Return what a model has seen that starts from ``pretrained`` and learns from some rows of a store, these first.

    None where the file that it starts from doesn't say what that has seen.
    """
    path = encoder_file(pretrained)
    before = None if path is None else _seen_by(path)
    if path is not None and before is None:
        return None
    own = Fingerprints.of(store, rows).packed()
    return own if before is None else np.concatenate([own, np.setdiff1d(before, own)])


def labelled_crystals(files: Sequence[Path]) -> NDArray[np.uint64] | None:
    """Return what finetuned models were trained or validated on, in ascending order; None where a file doesn't say."""
    found: list[NDArray[np.uint64]] = []
    for file in files:
        info, seen = model_file.read(file, "property_model")[0], _seen_by(file)
        if seen is None or ("labelled_crystals" not in info and info.get("provenance")):
            return None
        found.append(seen[: info.get("labelled_crystals")])
    return np.unique(np.concatenate(found))


def labels_learned(pretrained: str | None) -> list[str]:
    """Return the targets whose labels a model has learned; none for an encoder without labels."""
    path = encoder_file(pretrained)
    if path is None or model_file.kind_of(path) != "property_model":
        return []
    info, _ = model_file.read(path, "property_model")
    before = [target for learned in info["provenance"].get("labels", []) for target in learned["targets"]]
    return list(dict.fromkeys([*before, *info["targets"]]))


def pretraining_overlap(pretrained: str | None, tested: Fingerprints) -> dict[str, Any] | None:
    """Count the tested crystals that were seen before.

    Args:
        pretrained: as configured.
        tested: the crystals of the test split.

    Returns:
        ``test_crystals``, ``pretraining_crystals`` and how many of the tested ones share an id (``ids``), a reduced
        formula (``formulas``), and both formula and geometry (``similar``). The last three are None where the file
        doesn't say what was seen. ``labels`` are the targets that were learned before; not there where none was.
        None where training is from scratch.
    """
    path = encoder_file(pretrained)
    if path is None:
        return None
    seen, labels = _seen_by(path), labels_learned(pretrained)
    learned = {"labels": labels} if labels else {}
    if seen is None:
        unknown = dict.fromkeys(("pretraining_crystals", "ids", "formulas", "similar"))
        return {"test_crystals": len(tested), **unknown, **learned}
    shared = overlap(tested.packed(), seen)
    return {"test_crystals": len(tested), "pretraining_crystals": len(seen), **shared, **learned}


def describe_overlap(counts: dict[str, Any]) -> str:
    """Return a sentence for a person."""
    if counts["ids"] is None:
        return (
            f"It isn't known which of the {counts['test_crystals']:,} test crystals were in the pretraining set: the "
            "file that training started from doesn't say."
        )
    labels = counts.get("labels")
    return (
        f"Of the {counts['test_crystals']:,} test crystals, the {counts['pretraining_crystals']:,} of pretraining "
        f"have {counts['ids']:,} by id, {counts['formulas']:,} by reduced formula, and {counts['similar']:,} by "
        "formula and similar geometry; "
        + (f"labels of {', '.join(labels)} were learned there." if labels else "pretraining saw no labels.")
    )


def print_overlap(counts: dict[str, Any] | None) -> None:
    """Print the counts, where there was pretraining."""
    if counts is None or not counts["test_crystals"]:
        return
    title = f"Test crystals that are in the pretraining set, of {counts['test_crystals']:,}"
    if counts.get("labels"):
        title = f"Test crystals that were seen before, of {counts['test_crystals']:,}"
    names = {"ids": "same id", "formulas": "same reduced formula", "similar": "same formula, similar geometry"}
    rows = [[text, "not known" if counts[key] is None else f"{counts[key]:,}"] for key, text in names.items()]
    print_table(title, ["", ""], rows)
