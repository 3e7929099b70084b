"""The networks of a hybrid: each predicts the fold that it wasn't trained on.

Networks use the weights of the last epoch, because selecting the epoch on the held-out fold would bias its error.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crysldnet.artifacts.model_file import load_property_model
from crysldnet.console import note
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.elements import formula_groups
from crysldnet.finetune.settings import TrainingConfig, member_seed
from crysldnet.finetune.training import train_network, train_part
from crysldnet.models.head import PropertyModel
from crysldnet.models.predictor import Prediction, predict
from crysldnet.tabular.members import group_folds


@dataclass(frozen=True)
class Networks:
    """Trained networks.

    Attributes:
        models: one per fold.
        out_of_fold: predictions of the n crystals, each by the network not trained on its formula; None without
            networks.
    """

    models: list[PropertyModel]
    out_of_fold: Prediction | None


def train_networks(
    config: TrainingConfig, values: dict[str, Any], folder: Path, data: CrystalDataModule, device: torch.device
) -> Networks:
    """Train the missing networks in sequence.

    Args:
        config: the settings; the networks share ``min_steps``.
        values: the same as plain values.
        folder: run folder; network i is saved in ``network_i``.
        data: its training rows are the n crystals.
        device: device for predicting.
    """
    rows = data.rows["train"]
    groups = formula_groups(data.store.crystals, rows)
    count = min(config.networks, len(np.unique(groups)))
    folds = group_folds(groups, count, seed=config.seed)
    none = np.empty(0, np.int64)
    models: list[PropertyModel] = []
    parts: list[Prediction] = []
    for i in range(count):
        began = time.monotonic()
        path, seed = folder / f"network_{i}", member_seed(config.seed, i)
        own = replace(config, recipe="network", seed=seed, min_steps=-(-config.min_steps // count))
        if not (path / "model.safetensors").exists():
            changed = {"recipe": "network", "seed": seed, "min_steps": own.min_steps}
            parts_of = {"train": rows[folds != i], "val": none, "test": none}
            train_part(train_network, own, {**values, **changed}, path, data, parts_of, f"{folder.name}-network_{i}")
        model = load_property_model(path)[0].to(device)
        assert isinstance(model, PropertyModel)
        models.append(model)
        parts.append(predict([model], data.batches(rows[folds == i], model.encoder.graph)))
        took = time.monotonic() - began
        left = f"; about {(count - i - 1) * took / 60:.1f} minutes for the others" if i + 1 < count else ""
        note(f"network {i + 1} of {count}: {took:.0f} s{left}")
    order = np.argsort(np.concatenate([np.flatnonzero(folds == i) for i in range(count)]))
    whole = Prediction.joined(parts)
    return Networks(models, Prediction(*(None if part is None else part[order] for part in whole)))  # type: ignore[arg-type]
