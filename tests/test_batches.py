"""Batches: who is in them, what is done to them, and what they may not see."""

import json
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from conftest import COPPER, PEROVSKITE, ROCKSALT, TRICLINIC, cell, cells_of, put_together
from crysldnet.data import crystal_dataset as edges_module
from crysldnet.data import store as store_module
from crysldnet.data.datamodule import CrystalDataModule, CrystalDataset
from crysldnet.data.elements import reduced_formula
from crysldnet.data.output import write_store
from crysldnet.data.sampler import BatchLimits, BatchRequest, BatchSampler, pack
from crysldnet.data.schema import table_from_crystals
from crysldnet.data.split import Split
from crysldnet.data.store import CrystalStore
from crysldnet.encoders.pddformer import PDDFormer
from crysldnet.errors import DataError
from crysldnet.graphs.batch import make_batch
from crysldnet.graphs.corruption import Corruption
from crysldnet.graphs.crystals import Crystals
from crysldnet.graphs.geometry import undo_strain
from crysldnet.graphs.spec import GraphSpec
from crysldnet.models.head import PropertyHead, PropertyModel

GRAPH = GraphSpec(k=6, symmetric=True)
BUDGETS = {
    "crystals": BatchLimits(crystals=32),
    "atoms": BatchLimits(crystals=64, atoms=300),
    "edges": BatchLimits(crystals=64, atoms=600, edges=6_000),
}
STRONG = Corruption(mask_fraction=0.3, displacement=0.2, strain=0.05)


def table(n: int, **properties: object) -> pa.Table:
    """n cells of rocksalt and perovskite with properties."""
    crystals = put_together([ROCKSALT, PEROVSKITE] * (n // 2) + [ROCKSALT] * (n % 2))
    crystals = replace(crystals, frac_coords=crystals.frac_coords.astype(np.float32))
    return table_from_crystals(crystals, [f"c{i}" for i in range(n)], properties, {}, {"dataset": "toy"})


@pytest.fixture(scope="module")
def edges(starter: CrystalStore) -> NDArray[np.int64]:
    crystals = starter.crystals
    return np.bincount(crystals.crystal[GRAPH.build(crystals).neighbors.target], minlength=len(crystals))


def samplers(
    starter: CrystalStore,
    edges: NDArray[np.int64],
    budget: BatchLimits,
    world_size: int,
    rows: NDArray,
    **settings: object,
) -> list[BatchSampler]:
    settings = {"shuffle": True, "seed": 7, **settings}
    return [
        BatchSampler(
            rows, starter.crystals.sizes[rows], edges[rows], budget, rank=rank, world_size=world_size, **settings
        )
        for rank in range(world_size)
    ]


def rows_of(sampler: BatchSampler) -> list[list[int]]:
    return [request.rows.tolist() for request in sampler]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("shuffle", [True, False], ids=["train", "evaluation"])
def test_every_row_is_seen_once_an_epoch_in_equally_many_batches_within_the_budget(
    starter: CrystalStore, edges: NDArray[np.int64], budget: BatchLimits, world_size: int, shuffle: bool
) -> None:
    rows = np.random.default_rng(0).permutation(len(starter))[:1501]
    ranks = samplers(starter, edges, budget, world_size, rows, shuffle=shuffle)
    batches = [rows_of(sampler) for sampler in ranks]
    assert {len(sampler) for sampler in ranks} == {len(batches[0])} == {len(own) for own in batches}
    assert sorted(row for own in batches for batch in own for row in batch) == sorted(rows.tolist())
    for batch in (np.array(batch) for own in batches for batch in own):
        assert 0 < len(batch) <= budget.crystals
        assert budget.atoms is None or starter.crystals.sizes[batch].sum() <= budget.atoms
        assert budget.edges is None or edges[batch].sum() <= budget.edges
    numbers = [request.number for sampler in ranks for request in sampler]
    assert sorted(numbers) == list(range(len(numbers)))


def test_batches_are_few_and_even(starter: CrystalStore, edges: NDArray[np.int64]) -> None:
    """No more batches than the tightest bound asks for plus a tenth, and atoms spread over them evenly."""
    rows, sizes = np.arange(len(starter)), starter.crystals.sizes
    for budget in BUDGETS.values():
        (sampler,) = samplers(starter, edges, budget, 1, rows)
        fewest = max(
            len(rows) / budget.crystals,
            sizes.sum() / (budget.atoms or np.inf),
            edges.sum() / (budget.edges or np.inf),
        )
        assert len(sampler) <= 1.1 * fewest + 1
        atoms = np.array([sizes[batch].sum() for batch in rows_of(sampler)])
        assert atoms.std() < 0.05 * atoms.mean()


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_get_the_same_number_of_atoms_within_five_percent(
    starter: CrystalStore, edges: NDArray[np.int64], world_size: int
) -> None:
    sizes = starter.crystals.sizes
    ranks = samplers(starter, edges, BatchLimits(crystals=64), world_size, np.arange(len(starter)))
    for step in zip(*map(rows_of, ranks), strict=True):
        atoms = np.array([sizes[batch].sum() for batch in step])
        assert np.ptp(atoms) <= 0.05 * atoms.mean()


def test_the_batches_of_a_step_have_like_sizes_and_the_steps_come_in_any_order(starter: CrystalStore) -> None:
    """With 64 ranks of 8 crystals the largest of a step would be an eighth over its mean, were they drawn at random."""
    sizes = starter.crystals.sizes
    order = np.random.default_rng(0).permutation(len(sizes))
    packed = pack(sizes, None, BatchLimits(crystals=8), 64, order)
    atoms = np.array([sizes[rows].sum() for rows in packed]).reshape(-1, 64)
    over = atoms.max(axis=1) / atoms.mean(axis=1) - 1
    assert over.mean() < 0.02
    mixed = np.random.default_rng(1).permutation(atoms.ravel()).reshape(-1, 64)
    assert (mixed.max(axis=1) / mixed.mean(axis=1) - 1).mean() > 0.1
    alone = np.array([sizes[rows].sum() for rows in pack(sizes, None, BatchLimits(crystals=8), 1, order)])
    assert abs(np.corrcoef(np.arange(len(alone)), alone)[0, 1]) < 0.15


def test_batches_follow_from_seed_and_epoch(starter: CrystalStore, edges: NDArray[np.int64]) -> None:
    def batches(seed: int, epoch: int, shuffle: bool = True) -> list[list[int]]:
        rows = np.arange(300)
        (sampler,) = samplers(starter, edges, BUDGETS["atoms"], 1, rows, seed=seed, shuffle=shuffle)
        sampler.set_epoch(3)
        list(sampler)
        sampler.set_epoch(epoch)
        return rows_of(sampler)

    assert batches(0, 0) == batches(0, 0)
    assert batches(5, 2) == batches(5, 2)
    assert batches(0, 0) != batches(0, 1)
    assert batches(0, 0) != batches(1, 0)
    assert batches(0, 0, shuffle=False) == batches(1, 4, shuffle=False)


def test_the_number_of_batches_is_a_multiple_of_ranks_times_accumulation(
    starter: CrystalStore, edges: NDArray[np.int64]
) -> None:
    ranks = samplers(starter, edges, BatchLimits(crystals=10), 2, np.arange(303), multiple=6)
    assert [len(sampler) for sampler in ranks] == [18, 18]
    assert sorted(row for own in map(rows_of, ranks) for batch in own for row in batch) == list(range(303))


def test_a_crystal_over_the_budget_is_named_by_its_cost() -> None:
    atoms = np.array([4, 90, 7])
    with pytest.raises(
        DataError, match=r"one crystal alone \(90 atoms\) exceeds the limit of a batch.*, 50; .*max_atoms"
    ):
        pack(atoms, None, BatchLimits(crystals=8, atoms=50), 1, np.arange(3))
    with pytest.raises(DataError, match=r"\(700 edges\) exceeds the limit of a batch.*, 600; .*max_edges"):
        pack(atoms, np.array([700, 30, 60]), BatchLimits(crystals=8, edges=600), 1, np.arange(3))
    assert len(pack(atoms, None, BatchLimits(crystals=8, atoms=90), 1, np.arange(3))) == 2


def test_fewer_crystals_than_processes_are_refused() -> None:
    with pytest.raises(DataError, match="3 crystals can't be shared by 4 processes"):
        pack(np.ones(3, np.int64), None, BatchLimits(crystals=8), 4, np.arange(3))
    assert [len(part) for part in pack(np.ones(3, np.int64), None, BatchLimits(crystals=8), 3, np.arange(3))] == [
        1,
        1,
        1,
    ]


@pytest.fixture(scope="module")
def some(starter: CrystalStore) -> Crystals:
    return put_together([*cells_of(starter, range(0, 4000, 40)), COPPER, PEROVSKITE, TRICLINIC])


def test_corruption_leaves_its_input_as_it_is(some: Crystals) -> None:
    before = [array.copy() for array in (some.lattice, some.ptr, some.numbers, some.frac_coords)]
    corrupted, undo = STRONG.apply(some, np.random.default_rng(0))
    for array, copy in zip((some.lattice, some.ptr, some.numbers, some.frac_coords), before, strict=True):
        assert np.array_equal(array, copy)
    for changed, own in ((corrupted.lattice, some.lattice), (corrupted.frac_coords, some.frac_coords)):
        assert np.abs(changed - own).max() > 1e-3
        assert not np.shares_memory(changed, own)
    assert np.array_equal(undo.numbers, some.numbers)


@pytest.mark.parametrize("vary", [True, False])
def test_undoing_the_corruption_restores_species_lattice_and_positions(some: Crystals, vary: bool) -> None:
    corrupted, undo = replace(STRONG, vary=vary).apply(some, np.random.default_rng(1))
    lattice = undo_strain(torch.from_numpy(corrupted.lattice), torch.from_numpy(undo.strain)).numpy()
    back = np.linalg.inv(np.eye(3) + undo.strain)[some.crystal]
    positions = np.einsum("ni,nij->nj", corrupted.positions - undo.displacement, back)
    np.testing.assert_allclose(lattice, some.lattice, rtol=0, atol=1e-12)
    np.testing.assert_allclose(positions, some.positions, rtol=0, atol=1e-11)
    assert np.array_equal(np.where(undo.masked, undo.numbers, corrupted.numbers), some.numbers)
    assert np.array_equal(undo.strain, undo.strain.transpose(0, 2, 1))
    assert np.abs(corrupted.positions - some.positions).max() > 0.1


def test_displacements_have_no_mean_and_the_chosen_spread(some: Crystals) -> None:
    fixed = replace(STRONG, vary=False, strain=0.0)
    draws = [fixed.apply(some, np.random.default_rng(seed))[1].displacement for seed in range(20)]
    for axis in range(3):
        mean = np.bincount(some.crystal, draws[0][:, axis]) / some.sizes
        assert np.abs(mean).max() < 1e-12
    freedom = 1 - 1 / some.sizes[some.crystal]
    found = np.sqrt(np.mean(np.square(draws)) / freedom.mean())
    assert found == pytest.approx(0.2, rel=0.03)
    assert np.abs(np.array(draws)[:, some.sizes[some.crystal] == 1]).max() < 1e-12


def test_strain_has_the_chosen_spread(some: Crystals) -> None:
    fixed = replace(STRONG, vary=False, displacement=0.0)
    strain = np.concatenate([fixed.apply(some, np.random.default_rng(seed))[1].strain for seed in range(20)])
    spread = strain.std(axis=0)
    np.testing.assert_allclose(np.diag(spread), 0.05, rtol=0.08)
    np.testing.assert_allclose(spread[np.triu_indices(3, 1)], 0.05 / np.sqrt(2), rtol=0.08)
    corrupted, undo = fixed.apply(some, np.random.default_rng(0))
    np.testing.assert_allclose(corrupted.frac_coords, some.frac_coords, rtol=0, atol=1e-14)
    np.testing.assert_allclose(corrupted.lattice, some.lattice @ (np.eye(3) + undo.strain), atol=1e-12)


def test_strength_varies_between_crystals(some: Crystals) -> None:
    strain = replace(STRONG, vary=True).apply(some, np.random.default_rng(0))[1].strain
    fixed = replace(STRONG, vary=False).apply(some, np.random.default_rng(0))[1].strain
    assert np.abs(strain).max(axis=(1, 2)).min() < 0.2 * np.abs(fixed).max(axis=(1, 2)).min()


@pytest.mark.parametrize(("fraction", "share"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_masks_hide_the_chosen_share_of_every_crystal(some: Crystals, fraction: float, share: float) -> None:
    masked = Corruption(mask_fraction=fraction).apply(some, np.random.default_rng(0))[1].masked
    hidden = np.bincount(some.crystal, masked)
    expected = np.where(some.sizes > 1, np.ceil(share * some.sizes), 0)
    assert np.array_equal(hidden, expected)


@pytest.mark.parametrize(
    "settings", [{"mask_fraction": 1.1}, {"mask_fraction": -0.1}, {"displacement": -1.0}, {"strain": 0.3}], ids=str
)
def test_corruptions_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Corruption(**settings)


def data_module(**settings: object) -> CrystalDataModule:
    settings = {"path": "embedded:mp_starter", "graph": GRAPH, "batch_size": 40, **settings}
    module = CrystalDataModule(**settings)
    module.setup()
    return module


def shown(module: CrystalDataModule, split: str, epoch: int) -> dict[int, list[list]]:
    """What each row shows in an epoch: species, positions and lattice."""
    found = {}
    loader = getattr(module, f"{split}_dataloader")()
    loader.sampler.set_epoch(epoch)
    for batch in loader:
        sizes = batch.sizes.tolist()
        parts = zip(batch.rows, batch.numbers.split(sizes), batch.positions.split(sizes), batch.lattice, strict=True)
        found |= {int(row): [part.tolist() for part in rest] for row, *rest in parts}
    return found


def test_training_sees_another_corruption_every_epoch() -> None:
    module = data_module(corruption=STRONG, split=Split(train_fraction=0.03))
    first, again, second = (shown(module, "train", epoch) for epoch in (0, 0, 1))
    assert first == again
    assert first.keys() == second.keys()
    assert all(first[row] != second[row] for row in first)


def test_without_resampling_every_crystal_keeps_its_corruption_in_all_epochs() -> None:
    module = data_module(corruption=replace(STRONG, resample=False), split=Split(train_fraction=0.03))
    first, second = (shown(module, "train", epoch) for epoch in (0, 1))
    assert first.keys() == second.keys()
    assert sum(first[row] != second[row] for row in first) == 0


def test_validation_sees_the_same_corruption_every_epoch() -> None:
    module = data_module(corruption=STRONG)
    first, second = (shown(module, "val", epoch) for epoch in (0, 1))
    assert len(first) == 390
    assert sum(first[row] != second[row] for row in first) == 0


def test_splits_are_corrupted_independently() -> None:
    store = CrystalStore.from_table(table(2, split=["train", "val"]))
    rows = {"train": np.array([0]), "val": np.array([0]), "test": np.array([0])}
    module = data_module(path="", store=store, rows=rows, corruption=replace(STRONG, vary=False))
    seen = [shown(module, name, 0)[0] for name in ("train", "val", "test")]
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_corruption_depends_on_the_seed() -> None:
    settings = {"corruption": STRONG, "split": Split(train_fraction=0.01)}
    one, other = (shown(data_module(seed=seed, **settings), "val", 0) for seed in (0, 1))
    assert all(one[row] != other[row] for row in one)


@pytest.mark.parametrize("by", ["column", "formula", "random"])
def test_smaller_training_sets_lie_within_larger_ones(starter: CrystalStore, by: str) -> None:
    fractions = (0.01, 0.1, 0.5, 1.0)
    splits = [Split(by=by, train_fraction=fraction, seed=3).rows(starter) for fraction in fractions]
    for smaller, larger in pairwise(splits):
        assert set(smaller["train"]) < set(larger["train"])
        assert np.array_equal(smaller["val"], larger["val"])
        assert np.array_equal(smaller["test"], larger["test"])
    full = len(splits[-1]["train"])
    assert [len(rows["train"]) for rows in splits] == [round(fraction * full) for fraction in fractions]


@pytest.mark.parametrize("by", ["column", "formula", "random"])
def test_a_split_holds_every_row_once_in_its_shares(starter: CrystalStore, by: str) -> None:
    rows = Split(by=by, fractions=[0.8, 0.1, 0.1]).rows(starter)
    assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(len(starter)))
    shares = np.array([len(rows[name]) for name in ("train", "val", "test")]) / len(starter)
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.02)


def formulas(store: CrystalStore, rows: NDArray[np.int64]) -> set[str]:
    ptr, numbers = store.crystals.ptr, store.crystals.numbers
    return {reduced_formula(numbers[ptr[row] : ptr[row + 1]]) for row in rows}


def test_a_split_by_formula_never_shares_one(starter: CrystalStore) -> None:
    for seed in (0, 1):
        rows = Split(by="formula", seed=seed).rows(starter)
        train, val, test = (formulas(starter, rows[name]) for name in ("train", "val", "test"))
        assert not train & val
        assert not train & test
        assert not val & test
    shuffled = Split(by="random").rows(starter)
    assert formulas(starter, shuffled["train"]) & formulas(starter, shuffled["val"])


def test_splits_depend_on_the_seed_alone(starter: CrystalStore) -> None:
    for by in ("formula", "random"):
        one, same, other = (Split(by=by, seed=seed).rows(starter)["test"] for seed in (1, 1, 2))
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    "settings", [{"fractions": [0.5, 0.5]}, {"fractions": [0.9, 0.2, -0.1]}, {"train_fraction": 0}]
)
def test_shares_that_make_no_sense_are_refused(settings: dict) -> None:
    with pytest.raises(DataError, match="must be"):
        Split(**settings)


def test_a_split_column_may_hold_only_the_names_of_splits() -> None:
    store = CrystalStore.from_table(table(3, split=["train", "valid", "test"]))
    with pytest.raises(DataError, match="'valid'"):
        Split().rows(store)
    with pytest.raises(DataError, match="no column 'fold'"):
        Split(column="fold").rows(store)


TARGETS = {
    "a": [1.0, np.nan, 3.0, np.nan, 5.0, 1e9],
    "b": [np.nan, 2.0, 4.0, np.nan, np.inf, -1e9],
    "split": ["train"] * 5 + ["test"],
}


def toy(**settings: object) -> CrystalDataModule:
    store = CrystalStore.from_table(table(6, **TARGETS))
    rows = {"train": np.arange(5), "val": np.array([], np.int64), "test": np.array([5])}
    return data_module(path="", store=store, rows=rows, **settings)


def test_rows_without_any_target_are_left_out_and_counted() -> None:
    module = toy(targets=["a", "b"])
    assert module.rows["train"].tolist() == [0, 1, 2, 4]
    assert module.left_out == {"no value of a or b": 1}
    (batch,) = [batch for batch in module.train_dataloader() if 4 in batch.rows]
    values = dict(zip(batch.rows.tolist(), batch.targets.tolist(), strict=True))
    expected = {0: [1, np.nan], 1: [np.nan, 2], 2: [3, 4], 4: [5, np.nan]}
    assert values.keys() == expected.keys()
    for row, value in expected.items():
        np.testing.assert_array_equal(values[row], value)
    assert toy(targets=["b"]).rows["train"].tolist() == [1, 2]
    assert toy().rows["train"].tolist() == [0, 1, 2, 3, 4]
    assert module.val_dataloader() == []


def model_of(module: CrystalDataModule, readout: str = "mean") -> PropertyModel:
    torch.manual_seed(0)
    encoder = PDDFormer(width=4, layers=2, n_distances=3, n_basis=8, k=4)
    head = PropertyHead(width=4, outputs=len(module.targets), readout=readout)
    model = PropertyModel(encoder=encoder, head=head, targets=module.targets, units=module.units)
    model.fit_normalisation(module.train_targets(), module.store.crystals.sizes[module.rows["train"]])
    return model


def test_normalisation_comes_from_the_training_rows_alone() -> None:
    model = model_of(toy(targets=["a", "b"]))
    assert model.mean.tolist() == pytest.approx([3.0, 3.0])
    assert model.std.tolist() == pytest.approx([np.std([1, 3, 5]), 1.0])
    changed = toy(targets=["a", "b"])
    changed.target_values[5] = 123.0
    assert torch.equal(model_of(changed).mean, model.mean)
    changed.target_values[2, 0] = 6.0
    assert model_of(changed).mean[0].item() == pytest.approx(4.0)


def test_normalisation_of_a_sum_is_per_atom() -> None:
    """Known in rows 1 and 2, of 5 and 2 atoms: 2 and 4 are 0.4 and 2 an atom, −4 and 1.6 away from 1.2 an atom."""
    model = model_of(toy(targets=["b"]), "sum")
    assert model.mean.tolist() == pytest.approx([1.2])
    assert model.std.tolist() == pytest.approx([2.8])


def test_unknown_targets_enter_neither_the_loss_nor_its_gradient() -> None:
    module = toy(targets=["a", "b"])
    module.graph = GraphSpec(k=4, symmetric=True, n_distances=3)
    model = model_of(module).eval()
    (batch,) = module.train_dataloader()
    for kind in ("l1", "mse", "huber"):
        model.zero_grad()
        loss, predicted = model.loss(batch, kind)
        known = ~batch.targets.isnan()
        error = ((predicted - batch.targets) / model.std)[known]
        expected = {"l1": error.abs(), "mse": error.square()}.get(kind)
        if expected is not None:
            torch.testing.assert_close(loss, expected.mean())
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.head.parameters())
        assert model.head.mlp[-1].bias.grad.abs().max() > 0


def test_a_target_without_a_training_value_is_named() -> None:
    store = CrystalStore.from_table(table(3, a=[1.0, 2.0, 3.0], b=[np.nan, np.nan, 3.0]))
    rows = {"train": np.array([0, 1]), "val": np.array([], np.int64), "test": np.array([2])}
    module = data_module(path="", store=store, rows=rows, targets=["a", "b"])
    with pytest.raises(DataError, match="'b' has no value in the training split"):
        model_of(module)


def test_crystals_over_or_under_the_limits_are_left_out() -> None:
    module = data_module(max_crystal_atoms=20, corruption=Corruption(min_atoms=3))
    kept = np.concatenate(list(module.rows.values()))
    sizes = module.store.crystals.sizes
    assert sizes[kept].min() == 3
    assert sizes[kept].max() == 20
    assert len(kept) == ((sizes >= 3) & (sizes <= 20)).sum()
    assert sum(module.left_out.values()) == len(module.store) - len(kept)


def test_batches_hold_no_more_edges_than_allowed() -> None:
    settings = {"split": Split(train_fraction=0.1), "batch_size": 64, "max_atoms": 700}
    largest = 4_500
    module = data_module(max_edges=largest, **settings)
    batches = list(module.train_dataloader())
    assert sum(batch.num_crystals for batch in batches) == len(module.rows["train"])
    counts = [batch.edge_index.shape[1] for batch in batches]
    assert 0.5 * largest < max(counts) <= largest
    assert max(batch.num_atoms for batch in batches) <= 700
    free = data_module(**settings)
    assert max(batch.edge_index.shape[1] for batch in free.train_dataloader()) > largest


def test_corrupted_crystals_have_no_more_edges_than_allowed_either() -> None:
    """Strain and displacements move atoms into the radius of others; edges are counted before."""
    corruption = Corruption(displacement=0.3, strain=0.15, vary=False)
    settings = {"graph": GraphSpec(radius=5.0), "split": Split(train_fraction=0.2), "corruption": corruption}
    module = data_module(max_edges=1_500, batch_size=64, max_crystal_atoms=12, **settings)
    dataset = module.train_dataloader().dataset
    requests = list(module._sampler("train", 0, 1, 1))
    free = CrystalDataset(module.store, None, module.graph, corruption, dataset.seed)
    over = [i for i, request in enumerate(requests) if free[request].edge_index.shape[1] > 1_500]
    assert 0 < len(over) < 0.5 * len(requests)
    for i, request in enumerate(requests):
        batch = dataset[request]
        assert batch.edge_index.shape[1] <= 1_500
        assert torch.equal(batch.undo.masked, free[request].undo.masked)
        assert (batch.undo.displacement.abs().max() == 0) == (i in over)


def test_edges_are_counted_once_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module = data_module(max_edges=4_500, split=Split(train_fraction=0.05))
    counted, count = [], edges_module._count
    monkeypatch.setattr(edges_module, "_count", lambda *given: counted.append(1) or count(*given))
    with ThreadPoolExecutor(4) as pool:  # as four ranks would
        samplers = list(pool.map(lambda rank: module._sampler("train", rank, 4, 1), range(4)))
    assert counted == [1]
    assert all(np.array_equal(sampler.edges, samplers[0].edges) for sampler in samplers)
    (file,) = tmp_path.rglob("edges-*.npy")
    file.write_bytes(file.read_bytes()[:100])
    assert np.array_equal(module._sampler("train", 0, 4, 1).edges, samplers[0].edges), "a damaged file is made again"
    assert counted == [1, 1]


def test_a_batch_holds_the_crystals_of_its_rows(starter: CrystalStore) -> None:
    rows = [7, 3000, 12, 0, 3999]
    module = data_module(targets=["band_gap", "formation_energy_per_atom"])
    batch = module.train_dataloader().dataset[BatchRequest(np.array(rows), 0, 0)]
    values = np.stack([starter.numbers_of(name)[rows] for name in module.targets], axis=1)
    np.testing.assert_allclose(batch.targets.numpy(), values, rtol=1e-6)
    assert batch.rows.tolist() == rows
    assert module.units == ["eV", "eV/atom"]
    for c, numbers, lattice, positions in zip(
        cells_of(starter, rows),
        batch.numbers.split(batch.sizes.tolist()),
        batch.lattice,
        batch.positions.split(batch.sizes.tolist()),
        strict=True,
    ):
        assert numbers.tolist() == c.numbers.tolist()
        np.testing.assert_allclose(lattice.numpy(), c.lattice, rtol=1e-6)
        np.testing.assert_allclose(positions.numpy(), c.positions, atol=1e-5)


def test_edges_of_a_batch_lead_from_their_source_to_their_target() -> None:
    """In a box so large that no image is near."""
    molecule = cell(np.eye(3) * 40, [8, 1, 6], [[0.5, 0.5, 0.5], [0.52, 0.5, 0.5], [0.5, 0.57, 0.5]])
    batch = make_batch(put_together([PEROVSKITE, molecule]), GraphSpec(k=1), dtype=torch.float64)
    mine = (batch.crystal[batch.edge_index] == 1).all(0)
    assert (batch.edge_index[:, mine] - 5).T.tolist() == [[1, 0], [0, 1], [0, 2]]
    source, target = batch.edge_index[:, mine]
    torch.testing.assert_close(batch.edge_vec[mine], batch.positions[target] - batch.positions[source])
    data = batch.to_pyg()
    assert torch.equal(data.edge_index, batch.edge_index)
    assert (data.num_nodes, data.num_edges) == (8, len(mine))


def test_a_step_bounded_in_atoms_is_shared_by_ranks_and_accumulation() -> None:
    module = data_module(batch_size=None, batch_atoms=1200, split=Split(train_fraction=0.3))
    sizes = module.store.crystals.sizes
    one = [request.rows for request in module._sampler("train", 0, 1, 4)]
    ranks = [[request.rows for request in module._sampler("train", rank, 4, 1)] for rank in range(4)]
    for step, shares in enumerate(zip(*ranks, strict=True)):
        assert all(np.array_equal(a, b) for a, b in zip(one[4 * step : 4 * step + 4], shares, strict=True))
        assert sum(sizes[rows].sum() for rows in shares) <= 1200
    assert np.mean([sizes[rows].sum() for rows in one]) > 0.8 * 300, "and not much below its bound"


def test_a_batch_size_that_ranks_cannot_share_is_refused() -> None:
    module = data_module(batch_size=30)
    with pytest.raises(DataError, match="batch_size=30"):
        module.steps_per_epoch(4, 1)
    with pytest.raises(DataError, match="batch_atoms=1001"):
        data_module(batch_atoms=1001).steps_per_epoch(2, 1)
    with pytest.raises(ValueError, match="batch_size or batch_atoms"):
        data_module(batch_size=None)
    assert module.steps_per_epoch(2, 3) == -(-3209 // 30)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "toy.store"
    first = table(5, a=np.arange(5.0), split=["train"] * 5)
    second = table(4, a=np.arange(5.0, 9.0), split=["val", "test", None, "train"])
    write_store(path, [first, second])
    return path


def test_a_store_holds_what_was_written(written: Path) -> None:
    store = CrystalStore.open(written)
    whole = CrystalStore.from_table(pa.concat_tables([table(5), table(4)]))
    assert store.ids_at(np.array([0, 5, 8])) == ["c0", "c0", "c3"]
    assert store.numbers_of("a").tolist() == list(range(9))
    assert store.metadata == {"dataset": "toy"}
    for name in ("lattice", "ptr", "numbers", "frac_coords"):
        assert np.array_equal(getattr(store.crystals, name), getattr(whole.crystals, name))
    store.verify()
    assert not list(written.parent.glob(".*partial*"))


@pytest.mark.parametrize("name", ["lattice.bin", "ptr.bin", "numbers.bin", "frac_coords.bin", "columns.arrow"])
def test_a_cut_off_or_missing_file_of_a_store_is_named(written: Path, tmp_path: Path, name: str) -> None:
    damaged = tmp_path / "damaged.store"
    shutil.copytree(written, damaged)
    content = (damaged / name).read_bytes()
    for remains in (content[:-1], content[:0], content + b"0"):
        (damaged / name).write_bytes(remains)
        with pytest.raises(DataError, match=f"{name}: {len(remains)} bytes where the store says {len(content)}"):
            CrystalStore.open(damaged)
    (damaged / name).unlink()
    with pytest.raises(DataError, match=f"{name}: missing"):
        CrystalStore.open(damaged)


def test_a_changed_byte_is_found_by_verification(written: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.store"
    shutil.copytree(written, damaged)
    content = bytearray((damaged / "frac_coords.bin").read_bytes())
    content[10] ^= 1
    (damaged / "frac_coords.bin").write_bytes(content)
    store = CrystalStore.open(damaged)
    with pytest.raises(DataError, match=r"frac_coords\.bin"):
        store.verify()


@pytest.mark.parametrize(
    ("name", "row", "value", "words"),
    [
        ("ptr", 3, 0, "ptr.bin doesn't ascend"),
        ("ptr", 0, -2, "ptr.bin doesn't ascend"),
        ("ptr", 5, 1 << 62, "ptr.bin doesn't ascend"),
        ("lattice", 2, np.nan, "lattice.bin has nan (crystal 2)"),
        ("lattice", 2, 1e300, "lattice.bin has 1e+300 (crystal 2)"),
        ("lattice", 2, 0, "lattice.bin has a cell without volume (crystal 2)"),
        ("numbers", 0, 0, "numbers.bin has 0 (crystal 0), which isn't between 1 and 118"),
        ("numbers", 0, 119, "numbers.bin has 119 (crystal 0)"),
        ("frac_coords", -1, np.nan, "frac_coords.bin has nan (crystal 8)"),
        ("frac_coords", -1, -np.inf, "frac_coords.bin has -inf (crystal 8)"),
    ],
)
def test_arrays_that_no_import_writes_are_refused_when_the_store_is_opened(
    written: Path, tmp_path: Path, name: str, row: int, value: float, words: str
) -> None:
    damaged = tmp_path / "damaged.store"
    shutil.copytree(written, damaged)
    dtype, shape = store_module.ARRAYS[name]
    array = np.fromfile(damaged / f"{name}.bin", dtype).reshape(-1, *shape)
    array[row] = value
    array.tofile(damaged / f"{name}.bin")
    with pytest.raises(DataError, match=re.escape(f"{damaged}: damaged: {words}")):
        CrystalStore.open(damaged)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format_version", "1"),
        ("crystals", None),
        ("crystals", -1),
        ("crystals", 10),
        ("atoms", 1 << 60),
        ("units", []),
        ("metadata", "x"),
        ("sha256", 3),
        ("files", []),
        ("files", {}),
        ("files", {"ptr.bin": 3, "lattice.bin": None}),
    ],
)
def test_a_description_that_no_import_writes_is_refused(written: Path, tmp_path: Path, key: str, value: object) -> None:
    damaged = tmp_path / "damaged.store"
    shutil.copytree(written, damaged)
    info = json.loads((damaged / "store.json").read_text())
    (damaged / "store.json").write_text(json.dumps(info | {key: value}))
    with pytest.raises(DataError, match=re.escape(str(damaged))):
        CrystalStore.open(damaged)


def test_columns_with_any_changed_byte_are_read_or_refused(written: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.store"
    shutil.copytree(written, damaged)
    content = (damaged / "columns.arrow").read_bytes()
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 0xFF
        (damaged / "columns.arrow").write_bytes(changed)
        with suppress(DataError):
            CrystalStore.open(damaged).to_table()


def test_a_store_without_its_description_is_not_one(written: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.store"
    shutil.copytree(written, damaged)
    (damaged / "store.json").write_text((damaged / "store.json").read_text()[:-20])
    with pytest.raises(DataError, match=r"store\.json: unreadable"):
        CrystalStore.open(damaged)
    (damaged / "store.json").unlink()
    with pytest.raises(DataError, match=r"no store\.json"):
        CrystalStore.open(damaged)


def test_a_cut_off_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "crystals.parquet"
    pa.parquet.write_table(table(4), file)
    assert len(CrystalStore.open(file)) == 4
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        CrystalStore.open(file)


def test_a_failed_import_leaves_no_store(tmp_path: Path) -> None:
    good, bad = table(3), table(3).drop_columns(["lattice"])
    with pytest.raises(DataError, match="lattice"):
        write_store(tmp_path / "new.store", [good, bad])
    assert list(tmp_path.iterdir()) == []


def test_every_epoch_has_as_many_batches_as_the_first_under_a_tight_budget(starter):
    rows = np.arange(800)
    sampler = BatchSampler(
        rows,
        starter.crystals.sizes[rows],
        None,
        BatchLimits(crystals=32, atoms=400),
        shuffle=True,
        seed=0,
        world_size=1,
    )
    counts, orders = set(), set()
    for epoch in range(12):
        sampler.set_epoch(epoch)
        requests = list(sampler)
        counts.add(len(requests))
        orders.add(tuple(requests[0].rows))
        assert sorted(np.concatenate([r.rows for r in requests])) == rows.tolist()
        assert max(starter.crystals.sizes[r.rows].sum() for r in requests) <= 400
    assert len(counts) == 1
    assert len(orders) > 6
