"""Every encoder has the symmetries it says it has, and not those it says it lacks.

In double precision, on real, ideal, skewed and triclinic crystals; each with something that must change. PDDFormer, the
decoder and the denoiser have more of this in ``test_symmetry.py``.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from conftest import (
    COPPER,
    PEROVSKITE,
    ROCKSALT,
    TRICLINIC,
    Cell,
    cell,
    cells_of,
    put_together,
    random_triclinic,
    supercell,
)
from crysldnet.data.store import CrystalStore
from crysldnet.encoders.neighbor_attention import NeighborAttention
from crysldnet.encoders.protocol import Encoder
from crysldnet.graphs.batch import make_batch
from crysldnet.graphs.spec import GraphSpec
from encoders import CLASSES, batch_of, every_crystal_differs, features, settled, small
from test_symmetry import flat_order, orders, permuted, repeated, rotation, transformed

NOT_ROTATION = {"cartnet"}
NOT_REFLECTION = {"cartnet", "icomformer"}
CELL_FREE: dict[str, dict[str, object]] = {
    "cartnet": {},
    "cgcnn": {},
    "cogn": {},
    "ecomformer": {"lattice_edges": False},
    "matformer": {"lattice_edges": False},
    "neighbor_attention": {},
    "pddformer": {},
}
"""Those that don't depend on the choice of cell, and with which settings."""
VARIANTS = {
    "cartnet, invariant": ("cartnet", {"invariant": True}),
    "cogn, asymmetric unit": ("cogn", {"asymmetric_unit": True}),
    "neighbor_attention, rows of 4": ("neighbor_attention", {"slots": 4}),
    "neighbor_attention, fading": ("neighbor_attention", {"k": 9, "fade": 0.2}),
}
CLOSE = {"rtol": 0.0, "atol": 1e-9}


@pytest.fixture(scope="module")
def cells(starter: CrystalStore) -> list[Cell]:
    rng = np.random.default_rng(5)
    rows = rng.permutation(np.flatnonzero(starter.crystals.sizes <= 10))[:10]
    skew = np.array([[1, 0, 0], [2, 1, 0], [-1, 3, 1]])
    skewed = TRICLINIC._replace(
        lattice=skew @ TRICLINIC.lattice, frac_coords=TRICLINIC.frac_coords @ np.linalg.inv(skew)
    )
    triclinic = [random_triclinic(rng, n) for n in (2, 3, 5)]
    masked = triclinic[2]._replace(numbers=np.where(np.arange(5) < 2, 0, triclinic[2].numbers))
    return [*cells_of(starter, rows), ROCKSALT, PEROVSKITE, COPPER, TRICLINIC, skewed, *triclinic, masked]


ALL = [*CLASSES, *VARIANTS]


@pytest.fixture(scope="module")
def encoders(cells: list[Cell]) -> dict[str, Encoder]:
    made = {name: settled(small(name), cells) for name in CLASSES}
    return made | {title: settled(small(name, **settings), cells) for title, (name, settings) in VARIANTS.items()}


def assert_same(one: Tensor, other: Tensor) -> None:
    assert one.abs().max() > 0.1
    torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("name", ALL)
def test_encoder_is_invariant_to_rotation_unless_it_says_otherwise(
    name: str, cells: list[Cell], encoders: dict[str, Encoder]
) -> None:
    expected = features(cells, encoders[name])
    for seed in range(2):
        found = features(transformed(cells, rotation(seed)), encoders[name])
        if name in NOT_ROTATION:
            assert (expected - found).abs().max() > 1e-3
        else:
            assert_same(expected, found)
    stretched = transformed(cells, rotation(0) @ np.diag([1.0, 1.0, 1.1]))
    assert every_crystal_differs(expected, features(stretched, encoders[name]), cells)


@pytest.mark.parametrize("name", ALL)
def test_encoder_is_invariant_to_reflection_unless_it_says_otherwise(
    name: str, cells: list[Cell], encoders: dict[str, Encoder]
) -> None:
    chiral = [c for c in cells if len(c.numbers) >= 3][-3:]  # triclinic, no atom where symmetry would put it
    mirror = rotation(4) @ np.diag([1.0, 1, -1])
    expected, found = (features(some, encoders[name]) for some in (chiral, transformed(chiral, mirror)))
    if name in NOT_REFLECTION:
        assert every_crystal_differs(expected, found, chiral, far=1e-5)
    else:
        assert_same(expected, found)
        assert_same(features(cells, encoders[name]), features(transformed(cells, -np.eye(3)), encoders[name]))


@pytest.mark.parametrize("name", ALL)
def test_encoder_is_invariant_to_translation_and_to_the_choice_of_origin(
    name: str, cells: list[Cell], encoders: dict[str, Encoder]
) -> None:
    rng = np.random.default_rng(1)
    shift = np.array([0.3217, -1.2345, 7.41])
    moved = [c._replace(frac_coords=c.frac_coords + shift @ np.linalg.inv(c.lattice)) for c in cells]
    wrapped = [c._replace(frac_coords=np.mod(c.frac_coords + rng.random(3), 1.0)) for c in cells]
    expected = features(cells, encoders[name])
    assert_same(expected, features(moved, encoders[name]))
    assert_same(expected, features(wrapped, encoders[name]))
    several = [c for c in cells if len(c.numbers) > 1]
    one_moved = [c._replace(frac_coords=c.frac_coords + np.eye(len(c.numbers))[:, :1] * 0.02) for c in several]
    assert every_crystal_differs(
        features(several, encoders[name]), features(one_moved, encoders[name]), several, far=1e-7
    )


@pytest.mark.parametrize("name", ALL)
def test_encoder_follows_the_order_of_atoms(name: str, cells: list[Cell], encoders: dict[str, Encoder]) -> None:
    expected, order = features(cells, encoders[name]), orders(cells, 2)
    found = features(permuted(cells, order), encoders[name])
    # The first of equivalent atoms stands for all, and real ones are equivalent up to their seventh digit.
    close = 1e-5 if name == "cogn, asymmetric unit" else 1e-9
    assert (expected[flat_order(order)] - found).abs().max() < close
    assert (expected - found).abs().max() > 1e-3


def changed_cells(cells: list[Cell]) -> tuple[list[Cell], list[Cell], NDArray[np.int64]]:
    larger = [supercell(c, (2, 1, 1)) for c in cells]
    u = np.array([[2, 1, 0], [1, 1, 0], [-3, 2, 1]])
    return larger, [Cell(u @ c.lattice, c.numbers, c.frac_coords @ np.linalg.inv(u)) for c in cells], u


@pytest.mark.parametrize("name", [*CELL_FREE, *VARIANTS])
def test_encoder_does_not_depend_on_the_choice_of_cell(name: str, cells: list[Cell]) -> None:
    kind, settings = VARIANTS.get(name, (name, CELL_FREE.get(name, {})))
    encoder = settled(small(kind, **settings), cells)
    larger, skewed, _ = changed_cells(cells)
    expected = features(cells, encoder)
    assert_same(repeated(expected, cells, 2), features(larger, encoder))
    assert_same(expected, features(skewed, encoder))
    other = [c._replace(numbers=np.array([83, *c.numbers[1:]])) for c in larger]
    assert every_crystal_differs(features(larger, encoder), features(other, encoder), larger, far=1e-5)


@pytest.mark.parametrize("name", ["ecomformer", "icomformer", "matformer", "potnet"])
def test_encoders_of_the_given_cell_depend_on_it(name: str, cells: list[Cell], encoders: dict[str, Encoder]) -> None:
    larger, _, _ = changed_cells(cells)
    difference = repeated(features(cells, encoders[name]), cells, 2) - features(larger, encoders[name])
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["ecomformer", "matformer", "pddformer"])
def test_published_graphs_make_features_depend_on_the_cell(name: str, cells: list[Cell]) -> None:
    """With lattice edges off, what is left is that self-images count twice (and PDDFormer's weight)."""
    settings = {**CELL_FREE[name], "variant": "published"}
    encoder = settled(small(name, **settings), cells)
    copper = [COPPER]
    difference = repeated(features(copper, encoder), copper, 2) - features([supercell(COPPER, (2, 1, 1))], encoder)
    assert difference.abs().max() > 1e-3


def test_published_cgcnn_depends_on_the_order_of_atoms_through_ties(cells: list[Cell]) -> None:
    """Rocksalt: 6 chlorine, then 6 of the 12 sodium at one distance; perovskite: oxygens are cut, and others stay."""
    encoder = settled(small("cgcnn", variant="published"), cells)
    four = cell(np.eye(3) * 4.0, [29, 79, 47, 13], [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    body = cell(np.eye(3) * 3.0, [26, 13], [[0, 0, 0], [0.5, 0.5, 0.5]])
    tied = [supercell(body, (2, 2, 1)), four]  # 8 + 6 at the 12th place
    numbers = [np.array([26, 13, 29, 47, 79, 22, 8, 9]), four.numbers]
    tied = [c._replace(numbers=n) for c, n in zip(tied, numbers, strict=True)][:1]
    order = orders(tied, 3)
    expected, found = features(tied, encoder)[flat_order(order)], features(permuted(tied, order), encoder)
    assert (expected - found).abs().max() > 1e-4
    clean = settled(small("cgcnn"), cells)
    assert_same(features(tied, clean)[flat_order(order)], features(permuted(tied, order), clean))


def test_augmentation_turns_cartnet_in_training_alone(cells: list[Cell]) -> None:
    for settings, changes in (({}, True), ({"augment": False}, False), ({"variant": "published"}, False)):
        encoder = small("cartnet", **settings).double().train()
        batch = batch_of(cells, encoder)
        torch.manual_seed(1)
        first = encoder(batch)
        second = encoder(batch)
        assert ((first - second).abs().max() > 1e-6) == changes
        encoder.eval()
        assert (encoder(batch) == encoder(batch)).all()


@pytest.mark.parametrize("name", ALL)
def test_single_precision_features_do_not_depend_on_the_rest_of_the_batch(name: str, starter: CrystalStore) -> None:
    kind, settings = VARIANTS.get(name, (name, {}))
    encoder = small(kind, **settings)
    small_ones = np.flatnonzero(starter.crystals.sizes <= 20)
    rows = np.random.default_rng(3).choice(small_ones, 64, replace=False)

    @torch.no_grad()
    def encode(some: NDArray[np.int64]) -> Tensor:
        return encoder(make_batch(starter.crystals.take(some), encoder.graph))

    for _ in range(10):
        encode(rows)
    encoder.eval()
    together = encode(rows)
    owner = np.repeat(np.arange(64), starter.crystals.sizes[rows])
    scale = float(together.abs().max().clamp_min(1.0))
    for b in range(0, 64, 7):
        alone = encode(rows[b : b + 1])
        assert (together[torch.from_numpy(owner == b)] - alone).abs().max() < 1e-5 * scale


def shell(n: int) -> Cell:
    """A large cell with one atom in the middle of n others at exactly one distance (Fibonacci sphere)."""
    i = np.arange(n) + 0.5
    z, phi = 1 - 2 * i / n, np.pi * (1 + 5**0.5) * i
    points = 3.0 * np.stack([np.sqrt(1 - z * z) * np.cos(phi), np.sqrt(1 - z * z) * np.sin(phi), z], axis=1)
    return cell(np.eye(3) * 20.0, [26] + [8] * n, np.concatenate([[[0.0] * 3], points]) / 20.0 + 0.5)


@pytest.mark.parametrize("crystal", [ROCKSALT, PEROVSKITE, shell(40)], ids=["rocksalt", "perovskite", "shell of 40"])
@pytest.mark.parametrize("name", ["neighbor_attention", "ecomformer"])
def test_padded_rows_drop_no_neighbor_whatever_their_length(name: str, crystal: Cell) -> None:
    """Rows of 1, 3 and 64 slots give the same features; a neighbor that is taken out shows."""
    encoder = small(name).double()
    batches = []
    for slots in (1, 3, 64):
        encoder.graph = replace(encoder.graph, slots=slots)
        batches.append(batch_of([crystal], encoder))
    degrees = torch.bincount(batches[0].edge_index[1])
    assert degrees.max() >= 12 if name == "neighbor_attention" else 25
    encoder.eval()
    with torch.no_grad():
        first, second, third = (encoder(batch) for batch in batches)
        torch.testing.assert_close(first, third, **CLOSE)
        torch.testing.assert_close(second, third, **CLOSE)
        assert batches[2].slots is not None
        cut = batches[2].slots.clone()
        cut[:, 0] = len(batches[2].edge_vec)
        if name == "neighbor_attention":
            assert (encoder(replace(batches[2], slots=cut)) - third).abs().max() > 1e-4


def test_a_shell_of_forty_is_whole_in_every_clean_graph() -> None:
    for name, kind in CLASSES.items():
        graph = kind().graph
        if graph.k is not None and graph.k <= 40:
            found = graph.build(put_together([shell(40)])).neighbors
            assert (found.target == 0).sum() >= 40, name


@pytest.mark.parametrize("name", ["neighbor_attention", "ecomformer"])
def test_gradient_by_the_edges_agrees_with_finite_differences(name: str) -> None:
    encoder = small(name).double().eval()
    batch = batch_of([TRICLINIC], encoder)
    vectors = batch.edge_vec.clone().requires_grad_()
    weights = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def total(edge_vec: Tensor) -> Tensor:
        return (encoder(replace(batch, edge_vec=edge_vec)) * weights).sum()

    assert torch.autograd.gradcheck(total, vectors, eps=1e-6, atol=1e-6)


def jump(encoder: Encoder, cells: list[Cell], move: float) -> float:
    """Return the largest change of any feature when atoms move by so many Å, each in a direction of its own."""
    rng = np.random.default_rng(6)
    moved = []
    for c in cells:
        step = rng.normal(size=c.frac_coords.shape)
        step *= move / np.linalg.norm(step, axis=1, keepdims=True)
        moved.append(c._replace(frac_coords=c.frac_coords + step @ np.linalg.inv(c.lattice)))
    return (features(moved, encoder) - features(cells, encoder)).abs().max().item()


@pytest.mark.parametrize("k", [1, 4, 9, 12, 20])
def test_features_of_a_fading_graph_follow_its_atoms_without_a_jump(k: int, cells: list[Cell]) -> None:
    """k cuts through shells of equal distances here: without fading one atom or another falls out at once."""
    cells = [c for c in cells if len(c.numbers) > 1]
    fading = settled(small("neighbor_attention", k=k, fade=0.2), cells)
    assert fading.smooth
    assert jump(fading, cells, 1e-6) < 1e-4
    assert jump(fading, cells, 1e-3) < 0.1
    cut = settled(small("neighbor_attention", k=k), cells)
    assert not cut.smooth
    assert jump(cut, cells, 1e-3) > 0.1


def test_edges_lose_their_weight_between_the_kth_distance_and_the_cut() -> None:
    """One neighbor at 2 Å and another beyond: half of its weight is left half way, and all within the first."""
    encoder = small("neighbor_attention", k=1, fade=0.2).double().eval()

    def first(length: float) -> Tensor:
        points = np.array([[0, 0, 0], [2.0, 0, 0], [0, length, 0]])
        return features([cell(np.eye(3) * 30, [8, 1, 9], points / 30)], encoder)[0]

    lone, half, near = first(2.3), first(2.1), first(2.0)
    assert torch.equal(lone, first(2.25))
    assert (first(2.2 - 1e-5) - lone).abs().max() < 1e-6
    assert (half - lone).abs().max() > 1e-3
    assert (near - half).abs().max() > 1e-3


def test_a_file_without_fading_has_the_graph_it_was_trained_on() -> None:
    encoder = small("neighbor_attention", k=12, slots=14, tolerance=1e-4)
    assert encoder.graph == GraphSpec(k=12, slots=14, tolerance=1e-4)
    assert not encoder.smooth


def test_angles_are_seen_by_the_own_encoder_where_distances_are_equal() -> None:
    """Two neighbors at one distance, at 90° and at 180°, too far from their images to see them."""
    encoder = small("neighbor_attention", k=2).double().eval()
    bent = cell(np.eye(3) * 30, [8, 1, 1], np.array([[0, 0, 0], [1.5, 0, 0], [0, 1.5, 0]]) / 30)
    straight = cell(np.eye(3) * 30, [8, 1, 1], np.array([[0, 0, 0], [1.5, 0, 0], [-1.5, 0, 0]]) / 30)
    blind = NeighborAttention(width=16, layers=1, heads=2, channels=1, k=2).double().eval()
    with torch.no_grad():
        blind.layers[0].output.weight[:, 16:] = 0.0  # what the angles go through
    difference = [(features([bent], e) - features([straight], e))[0].abs().max() for e in (encoder, blind)]
    assert difference[0] > 1e-4
    assert difference[1] < 1e-9
