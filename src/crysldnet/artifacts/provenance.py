"""Overlap between test crystals and the crystals that a model has seen before.

An encoder file records its pretraining crystals; a finetuned model also records the training and validation crystals of
every finetuning since.
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
from crysldnet.errors import CheckpointError, ConfigError


def encoder_file(pretrained: str | None) -> Path | None:
    """Return the file of a pretrained encoder or finetuned model; None when training from scratch.

    It may be given as its run folder or as the name of an included encoder.

    Raises:
        CheckpointError: it is missing, or is the folder of an ensemble.
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
    """Read which crystals an encoder or finetuned model has seen; None if not recorded."""
    finetuned = model_file.kind_of(path) == "property_model"
    return model_file.read_pretraining_set(path, "property_model" if finetuned else "encoder")


def seen_crystals(pretrained: str | None, store: CrystalStore, rows: NDArray[np.int64]) -> NDArray[np.uint64] | None:
    """Return the crystals seen by a model that starts from ``pretrained`` and is trained on some rows of a store, these
    first.

    None if the initial file doesn't record its crystals.
    """
    path = encoder_file(pretrained)
    before = None if path is None else _seen_by(path)
    if path is not None and before is None:
        return None
    own = Fingerprints.of(store, rows).packed()
    return own if before is None else np.concatenate([own, np.setdiff1d(before, own)])


def labelled_crystals(files: Sequence[Path]) -> NDArray[np.uint64] | None:
    """Return sorted fingerprints of the training and validation crystals of finetuned models; None if one isn't
    recorded.
    """
    found: list[NDArray[np.uint64]] = []
    for file in files:
        info, seen = model_file.read(file, "property_model")[0], _seen_by(file)
        if seen is None or ("labelled_crystals" not in info and info.get("provenance")):
            return None
        found.append(seen[: info.get("labelled_crystals")])
    return np.unique(np.concatenate(found))


def labels_learned(pretrained: str | None) -> list[str]:
    """Return the targets that a model was trained on; empty for an encoder without labels."""
    path = encoder_file(pretrained)
    if path is None or model_file.kind_of(path) != "property_model":
        return []
    info, _ = model_file.read(path, "property_model")
    before = [target for learned in info["provenance"].get("labels", []) for target in learned["targets"]]
    return list(dict.fromkeys([*before, *info["targets"]]))


def pretraining_overlap(pretrained: str | None, tested: Fingerprints) -> dict[str, Any] | None:
    """Count the test crystals that were seen before.

    Args:
        pretrained: as configured.
        tested: the crystals of the test split.

    Returns:
        ``test_crystals``, ``pretraining_crystals`` and how many test crystals share an id (``ids``), a reduced
        formula (``formulas``), and both formula and geometry (``similar``). The last three are None if the file
        doesn't record the crystals seen. ``labels`` are the previously learned targets, if any. None when training from
        scratch.
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


def refuse_seen_labels(pretrained: str | None, task: str, source: str, overlap: dict[str, Any] | None) -> None:
    """Reject a finetuned model that may have been trained on labels of crystals with formulas of a benchmark.

    Args:
        pretrained: as configured.
        task: name of the benchmark.
        source: its data, as in ``data.exclude``.
        overlap: from :func:`pretraining_overlap`.

    Raises:
        ConfigError: it may have.
    """
    if overlap is None or not overlap.get("labels") or overlap["formulas"] == 0:
        return
    learned = f"pretrained={pretrained} has learned labels ({', '.join(overlap['labels'])})"
    if overlap["formulas"] is None:
        raise ConfigError(f"{learned}, and its file doesn't say of which crystals; finetune it again", "pretrained")
    raise ConfigError(
        f"{learned}, and the crystals it has seen share the formulas of {overlap['formulas']:,} of the "
        f"{overlap['test_crystals']:,} crystals of {task}; pretrain and finetune with data.exclude=[{source}] "
        "data.exclude_by=formula",
        "pretrained",
    )


def describe_overlap(counts: dict[str, Any]) -> str:
    """Return a human-readable sentence."""
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
    """Print the counts if there was pretraining."""
    if counts is None or not counts["test_crystals"]:
        return
    title = f"Test crystals that are in the pretraining set, of {counts['test_crystals']:,}"
    if counts.get("labels"):
        title = f"Test crystals that were seen before, of {counts['test_crystals']:,}"
    names = {"ids": "same id", "formulas": "same reduced formula", "similar": "same formula, similar geometry"}
    rows = [[text, "not known" if counts[key] is None else f"{counts[key]:,}"] for key, text in names.items()]
    print_table(title, ["", ""], rows)
