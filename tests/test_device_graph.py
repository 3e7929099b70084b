"""Graphs built on the device are those that the host builds: the same edges in the same order, to the last bit."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import COPPER, PEROVSKITE, ROCKSALT, Cell, random_triclinic, supercell
from crysldnet import finetune, pretrain
from crysldnet.artifacts import model_file
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.split import Split
from crysldnet.data.store import CrystalStore
from crysldnet.errors import ConfigError
from crysldnet.graphs import device_search
from crysldnet.graphs.batch import CrystalBatch, make_batch
from crysldnet.graphs.corruption import Corruption
from crysldnet.graphs.crystals import Crystals, from_lists
from crysldnet.graphs.device_graph import needs_host
from crysldnet.graphs.device_search import root
from crysldnet.graphs.spec import GraphSpec
from crysldnet.inference import load
from crysldnet.readers.stream import StreamSettings
from encoders import CLASSES, small
from test_neighbor_order import cells
from tiny import finetune_config, pretrain_config, subset

GRAPHS = {
    "nearest": GraphSpec(k=12),
    "fading": GraphSpec(k=12, tolerance=0.4, slots=14),
    "radius": GraphSpec(radius=5.0),
    "lattice edges": GraphSpec(k=12, symmetric=True, lattice_edges="cell", slots=9),
    "lattice edges as published": GraphSpec(
        k=12, tolerance=0.0, symmetric=True, repeat_self_images=True, lattice_edges="cell", lattice_edges_within=8.0
    ),
    "distances": GraphSpec(k=25, symmetric=True, n_distances=92),
}
SMALL = ("encoder.width=16", "encoder.layers=1", "encoder.heads=2", "encoder.channels=2")


def assert_equal(ours: CrystalBatch, theirs: CrystalBatch) -> None:
    for field in fields(CrystalBatch):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(b, CrystalBatch):
            assert_equal(a, b)
        elif isinstance(b, Tensor):
            assert a.dtype == b.dtype, field.name
            assert torch.equal(a, b), field.name
        elif field.name != "undo":
            assert a == b, field.name


def assert_same_graph(crystals: Crystals, graph: GraphSpec, dtype: torch.dtype = torch.float64) -> None:
    unbuilt = make_batch(crystals, graph, dtype=dtype, graph_on="device")
    assert not unbuilt.edge_index.numel()
    assert_equal(unbuilt.to("cpu"), make_batch(crystals, graph, dtype=dtype))


def of_cells(several: list[Cell]) -> Crystals:
    return from_lists(*([getattr(c, name) for c in several] for name in ("lattice", "numbers", "frac_coords")))


@pytest.mark.parametrize(("name", "count"), [(name, 2000 if name == "radius" else 300) for name in GRAPHS])
def test_graphs_of_real_cells_are_those_of_the_host(name: str, count: int, starter: CrystalStore) -> None:
    for start in range(0, count, 100):
        assert_same_graph(starter.crystals.take(np.arange(start, start + 100)), GRAPHS[name])


def test_nearest_neighbors_of_two_thousand_real_cells_are_those_of_the_host(starter: CrystalStore) -> None:
    for start in range(0, 2000, 100):
        assert_same_graph(starter.crystals.take(np.arange(start, start + 100)), GRAPHS["lattice edges as published"])


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_of_three_hundred_random_cells_are_those_of_the_host(name: str) -> None:
    rng = np.random.default_rng(0)
    assert_same_graph(of_cells([random_triclinic(rng, int(n)) for n in rng.integers(1, 16, 300)]), GRAPHS[name])


@settings(max_examples=60, deadline=None)
@given(
    several=st.lists(cells(), min_size=1, max_size=3),
    k=st.integers(1, 16),
    radius=st.floats(1.0, 4.5),
    tolerance=st.sampled_from([0.0, 1e-4, 0.3]),
)
def test_graphs_of_skewed_long_and_empty_cells_are_those_of_the_host(
    several: list[Cell], k: int, radius: float, tolerance: float
) -> None:
    assert_same_graph(of_cells(several), GraphSpec(k=k, tolerance=tolerance, symmetric=True, slots=5))
    assert_same_graph(of_cells(several), GraphSpec(radius=radius, slots=3))


@pytest.mark.parametrize("radius", [2.0 * np.sqrt(2.0), np.nextafter(2.0 * np.sqrt(2.0), 0), 4.0, np.nextafter(4.0, 0)])
def test_a_distance_of_exactly_the_radius_is_decided_exactly(radius: float) -> None:
    grid = Cell(np.eye(3) * 8.0, np.ones(64, np.uint8), np.argwhere(np.ones((4, 4, 4))) / 4)
    assert_same_graph(of_cells([grid]), GraphSpec(radius=radius))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    crystals = of_cells([COPPER, supercell(PEROVSKITE, (3, 2, 2)), ROCKSALT, supercell(COPPER, (2, 2, 2))])
    compared = []
    original = device_search._Search._compare
    monkeypatch.setattr(device_search._Search, "_compare", lambda *args: compared.append(1) or original(*args))
    assert_same_graph(crystals, GRAPHS["nearest"])
    before = len(compared)
    monkeypatch.setattr(device_search, "BLOCK", 5000)
    assert_same_graph(crystals, GRAPHS["nearest"])
    assert len(compared) > 2 * before + 10


def test_roots_are_rounded_correctly() -> None:
    x = torch.rand(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 50.0
    x = torch.cat([x, torch.zeros(1, dtype=torch.float64)])
    assert root(x).numpy().tobytes() == np.sqrt(x.numpy()).tobytes()


def test_edges_are_built_where_a_batch_arrives(starter: CrystalStore) -> None:
    """Only crystals cross, in one storage, and the clean crystals get their edges too."""
    how: dict[str, Any] = {
        "path": "embedded:mp_starter",
        "graph": GRAPHS["fading"],
        "split": Split(by="random", seed=0),
        "corruption": Corruption(displacement=0.1, strain=0.05),
        "with_clean": True,
        "batch_size": 8,
    }
    batches = {}
    for place in ("host", "device"):
        data = CrystalDataModule(**how, graph_on=place)
        data.setup()
        batches[place] = next(iter(data.train_dataloader()))
    assert batches["device"].unbuilt is not None
    built = data.transfer_batch_to_device(batches["device"], torch.device("cpu"), 0)
    assert_equal(built, batches["host"])
    assert built.clean is not None
    assert built.clean.edge_index.numel()
    sizes = {}
    for place, batch in batches.items():
        tensors: list[Tensor] = []
        batch._apply(lambda tensor, found=tensors: found.append(tensor) or tensor)
        sizes[place] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert 4 * sizes["device"] < sizes["host"]


def test_training_and_predictions_are_the_same_to_the_last_bit(tmp_path: Path) -> None:
    data = subset(tmp_path / "data.parquet", train=24, val=8, test=8)
    encoder = ["encoder=neighbor_attention"]
    weights, values = {}, {}
    for place in ("host", "device"):
        common = [f"runs={tmp_path / place}", "name=r", f"data.path={data}", f"data.graph_on={place}", *encoder]
        config, plain = pretrain_config(
            *common, "stage=vae", "stages.vae.epochs=1", "data.batch_size=8", tiny_encoder=SMALL
        )
        assert pretrain.run(config, plain) == 0
        file = tmp_path / place / "pretrain/r/encoder.safetensors"
        weights[place] = [model_file.read(file, "encoder")[1]]
        config, plain = finetune_config(
            *common, "epochs=2", "data.batch_size=8", "recipe=network", "pretrained=none", tiny_encoder=SMALL
        )
        assert finetune.run(config, plain) == 0
        file = tmp_path / place / "finetune/r/model.safetensors"
        weights[place].append(model_file.read(file, "property_model")[1])
        found = load(file, device="cpu").predict(str(data), settings=StreamSettings(graph_on=place))
        values[place] = found.values
    for ours, theirs in zip(weights["device"], weights["host"], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert np.array_equal(values["device"], values["host"])


@pytest.mark.parametrize("name", CLASSES)
def test_encoders_run_on_graphs_of_the_device_or_are_refused(name: str, starter: CrystalStore) -> None:
    encoder = small(name).eval()
    assert (needs_host(encoder.graph) is not None) == (name in ("potnet", "icomformer", "ecomformer"))
    if needs_host(encoder.graph) is None:
        crystals = starter.crystals.take(np.arange(20))
        batch, expected = (make_batch(crystals, encoder.graph, graph_on=place) for place in ("device", "host"))
        assert torch.equal(encoder(batch.to("cpu")), encoder(expected))
        return
    with pytest.raises(ConfigError, match=r"data\.graph_on=device: .* only the host builds; set data\.graph_on=host"):
        CrystalDataModule(path="embedded:mp_starter", graph=encoder.graph, graph_on="device")


@pytest.mark.parametrize(
    "graph",
    [
        GraphSpec(k=12, tolerance=0.0, cut_beyond=8.0),
        GraphSpec(k=12, lattice_edges="frame"),
        GraphSpec(k=12, frame=True),
        GraphSpec(k=12, potential="corrected"),
        GraphSpec(k=12, asymmetric_unit=True),
    ],
)
def test_what_a_device_cannot_build_is_refused(graph: GraphSpec) -> None:
    with pytest.raises(ConfigError, match="which only the host builds"):
        CrystalDataModule(path="embedded:mp_starter", graph=graph, graph_on="device")


def test_apple_gpus_are_refused(starter: CrystalStore) -> None:
    batch = make_batch(starter.crystals.take(np.arange(2)), GRAPHS["nearest"], graph_on="device")
    with pytest.raises(ConfigError, match="double precision, which Apple GPUs lack; set graph_on=host"):
        batch.to("mps")


def test_limits_of_edges_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.max_edges counts edges on the host; .* use data\.max_atoms"):
        CrystalDataModule(path="embedded:mp_starter", graph=GRAPHS["nearest"], graph_on="device", max_edges=1000)
