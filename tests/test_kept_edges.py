"""Edges that are kept from one epoch to the next are those that a search finds, to the last bit."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from crysldnet.data import crystal_dataset as edges_module
from crysldnet.data.crystal_dataset import KeptEdges
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.split import Split
from crysldnet.data.store import CrystalStore
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.corruption import Corruption
from crysldnet.graphs.crystals import Crystals
from crysldnet.graphs.neighbors import Neighbors
from crysldnet.graphs.spec import GraphSpec

GRAPHS = {
    "nearest": GraphSpec(k=12, slots=8),
    "union": GraphSpec(k=12, symmetric=True, repeat_self_images=True, n_distances=20, lattice_edges="cell"),
    "radius": GraphSpec(radius=3.5),
    "exactly k": GraphSpec(k=6, cut_beyond=4.0),
}


def module(graph: GraphSpec, keep_edges_mb: int, corruption: Corruption | None = None) -> CrystalDataModule:
    split = Split(by="random", fractions=[0.02, 0.01, 0.97])
    data = CrystalDataModule(
        path="embedded:mp_starter",
        graph=graph,
        split=split,
        batch_size=16,
        keep_edges_mb=keep_edges_mb,
        corruption=corruption,
        with_clean=corruption is not None,
    )
    data.setup()
    return data


def assert_equal(one: CrystalBatch, other: CrystalBatch) -> None:
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert a.numpy().tobytes() == b.numpy().tobytes(), field.name
        elif isinstance(a, CrystalBatch):
            assert_equal(a, b)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many crystals each search was for."""
    found: list[int] = []
    search = GraphSpec.neighbors

    def counted(self: GraphSpec, crystals: Crystals) -> Neighbors:
        found.append(len(crystals))
        return search(self, crystals)

    monkeypatch.setattr(GraphSpec, "neighbors", counted)
    return found


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_three_epochs_are_the_same_with_edges_kept_and_search_each_crystal_once(
    graph: GraphSpec, searches: list[int]
) -> None:
    kept, plain = module(graph, 100), module(graph, 0)
    crystals = len(kept.rows["train"]) + len(kept.rows["val"])
    for epoch in range(3):
        for name in ("train_dataloader", "val_dataloader"):
            loaders = [getattr(data, name)() for data in (kept, plain)]
            for loader in loaders:
                if name == "train_dataloader":
                    loader.sampler.set_epoch(epoch)
            batches = list(zip(*loaders, strict=True))
            assert len(batches) > 1
            for one, other in batches:
                assert_equal(one, other)
    assert sum(searches) == crystals + 3 * crystals


@pytest.mark.parametrize("resample", [True, False])
def test_corrupted_crystals_are_searched_in_every_epoch_and_clean_ones_once(
    resample: bool, searches: list[int]
) -> None:
    corruption = Corruption(resample=resample, displacement=0.1, strain=0.02)
    kept, plain = module(GRAPHS["nearest"], 100, corruption), module(GRAPHS["nearest"], 0, corruption)
    crystals = len(kept.rows["val"])
    for _ in range(2):
        for one, other in zip(kept.val_dataloader(), plain.val_dataloader(), strict=True):
            assert_equal(one, other)
            assert one.clean is not None
            assert one.edge_vec.numpy().tobytes() != one.clean.edge_vec.numpy().tobytes()
    assert sum(searches) == 2 * crystals + crystals + 4 * crystals


def test_nothing_is_kept_beyond_the_bound(starter: CrystalStore, searches: list[int]) -> None:
    graph, rows = GRAPHS["nearest"], np.arange(40)
    crystals = starter.crystals.take(rows)
    expected = graph.neighbors(crystals)
    sizes = [sum(part.nbytes for part in own) for own in edges_module._divided(expected, crystals.ptr)]
    edges = KeptEdges(graph, 1)
    edges._left = sum(sizes[:10])
    for _ in range(2):
        searches.clear()
        for one, other in zip(edges.neighbors(crystals, rows), expected, strict=True):
            assert one.dtype == other.dtype
            assert one.tobytes() == other.tobytes()
        assert len(edges) == 10
    assert searches == [30]


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="keep_edges_mb"):
        module(GRAPHS["radius"], -1)


def test_another_graph_is_searched_anew() -> None:
    data = module(GRAPHS["nearest"], 100)
    first = next(iter(data.val_dataloader()))
    data.graph = GRAPHS["radius"]
    second = next(iter(data.val_dataloader()))
    assert_equal(second, next(iter(module(GRAPHS["radius"], 0).val_dataloader())))
    assert first.edge_index.shape != second.edge_index.shape
