"""Targets that can't be learned, and models that can't predict: a message, not a run that looks fine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from crysldnet.artifacts.rebuild import load_strictly
from crysldnet.encoders.cgcnn import CGCNN
from crysldnet.encoders.protocol import single_atom_statistics
from crysldnet.errors import CheckpointError, DataError
from crysldnet.finetune.settings import make_data, make_types
from crysldnet.finetune.training import make_model
from crysldnet.graphs.batch import make_batch
from crysldnet.graphs.crystals import from_lists
from crysldnet.graphs.spec import GraphSpec
from crysldnet.models.head import PropertyModel
from tiny import finetune_config, subset


@pytest.fixture(scope="module")
def crystals(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """8 crystals to train on and 4 to validate on."""
    return pq.read_table(subset(tmp_path_factory.mktemp("crystals") / "x.parquet", train=8, val=4))


def model_of(folder: Path, crystals: pa.Table, values: list[Any], *arguments: str) -> PropertyModel:
    """Prepare a finetuning on a target with these values."""
    pq.write_table(crystals.append_column("y", pa.array(values)), folder / "x.parquet")
    config, _ = finetune_config(
        "data=custom", f"data.path={folder / 'x.parquet'}", "data.split.by=column", "data.targets=[y]", *arguments
    )
    encoder = CGCNN(width=8, layers=1, k=4)
    data = make_data(config, encoder)
    return make_model(config, encoder, data, make_types(config, data))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([3.0] * 8, r"every training crystal has y=3; there is nothing to learn"),
        ([3.0] + [None] * 7, r"the only training crystal with a value has y=3"),
        ([1e39] + [1.0] * 7, r"'y' of .* \(row 0\) is 1e\+39, beyond single precision"),
        ([1e-35 * i for i in range(8)], r"differ by 2.29e-35 .* single precision.*another unit"),
        ([1e6 + 1e-3 * i for i in range(8)], r"differ by 0.00229 at a size of 1e\+06.*subtract a constant"),
        (
            ["0,5", "1,25"] * 4,
            r"column 'y' holds texts that look like numbers, such as '0,5'.*target_types=\{y: classification\}",
        ),
        (["1", "2"] * 4, r"holds texts that look like numbers, such as '1'"),
        (["5-6", "6-7", None, "high"] * 2, r"holds texts that look like numbers, such as '5-6'"),
        (["$5", "$6", "~ 7", "--8"] * 2, r"holds texts that look like numbers, such as '\$5'"),
        (["inf", "-Infinity", "7", "x"] * 2, r"holds texts that look like numbers, such as 'inf'"),
        (["+-1e5", "1.2.3", "a", "b"] * 2, r"holds texts that look like numbers, such as '\+-1e5'"),
    ],
    ids=["constant", "one", "beyond", "tiny", "narrow", "commas", "digits", "ranges", "prices", "endless", "signs"],
)
def test_a_target_that_cannot_be_learned_is_refused(
    tmp_path: Path, crystals: pa.Table, values: list, says: str
) -> None:
    with pytest.raises(DataError, match=says):
        model_of(tmp_path, crystals, [*values, *values[:4]])


def test_what_can_be_learned_is_not_refused(tmp_path: Path, crystals: pa.Table) -> None:
    small = [1e-20 * i for i in range(12)]
    assert model_of(tmp_path, crystals, small).std.item() == pytest.approx(np.std(small[:8]))
    model_of(tmp_path, crystals, [1e30 * i for i in range(12)])
    model_of(tmp_path, crystals, ["FM", "AFM", "NM", None] * 3)
    model_of(tmp_path, crystals, ["1", "2"] * 6, "target_types={y: classification}")
    model_of(tmp_path, crystals, ["5-6", "6-7"] * 6, "target_types={y: classification}")
    model_of(tmp_path, crystals, ["225 Fm-3m", "2H", "1/3 a"] * 4)
    model_of(tmp_path, crystals, [True, False] * 6)


def test_weights_that_are_not_finite_are_refused() -> None:
    layer = nn.Linear(2, 2)
    state = layer.state_dict() | {"bias": torch.tensor([0.0, float("nan")])}
    with pytest.raises(CheckpointError, match=r"model.safetensors: bias isn't finite"):
        load_strictly(layer, state, "model.safetensors")
    assert np.isfinite(layer.bias.detach().numpy()).all()


def test_a_batch_of_one_atom_trains_by_running_statistics() -> None:
    batch = make_batch(from_lists([np.eye(3) * 2.5], [np.array([29])], [np.zeros((1, 3))]), GraphSpec(k=4))
    encoder = CGCNN(width=8, layers=1, k=4).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        encoder(batch)
    encoder.load_state_dict(before)
    with single_atom_statistics(encoder, batch):
        encoder(batch).square().sum().backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in encoder.parameters())
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in encoder.parameters())
    assert all(value.equal(before[name]) for name, value in encoder.state_dict().items())
    assert encoder.training
