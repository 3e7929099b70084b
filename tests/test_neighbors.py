"""The compiled neighbor lists agree with pymatgen's and with the definition of the published graphs."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from pymatgen.core import Structure

from conftest import (
    COPPER,
    COPPER_CUBE,
    PEROVSKITE,
    ROCKSALT,
    ROCKSALT_CUBE,
    TRICLINIC,
    Cell,
    cell,
    cells_of,
    put_together,
    random_triclinic,
    supercell,
)
from crysldnet.data.store import CrystalStore
from crysldnet.graphs import neighbors
from crysldnet.graphs import spec as graph_specs
from crysldnet.graphs.crystals import from_lists
from crysldnet.graphs.neighbors import Neighbors, neighbor_list
from crysldnet.graphs.spec import GraphSpec

Edge = tuple[int, ...]
"""(source, target, n₁, n₂, n₃)."""

RADIUS = 4.7123
K = 12
TOLERANCE = 1e-4
CLEAN = GraphSpec(k=K, symmetric=True, n_distances=30)


def edges(found: Neighbors) -> list[Edge]:
    return [tuple(map(int, row)) for row in np.column_stack([found.source, found.target, found.image])]


def edges_by_crystal(found: Neighbors, ptr: NDArray) -> list[list[Edge]]:
    """Split the edges of a batch, atoms counted from each crystal's first."""
    lists: list[list[Edge]] = [[] for _ in ptr[1:]]
    for source, target, *image in edges(found):
        b = int(np.searchsorted(ptr, target, side="right")) - 1
        lists[b].append((source - int(ptr[b]), target - int(ptr[b]), *image))
    return lists


def pymatgen_edges(c: Cell, radius: float) -> dict[Edge, float]:
    """All edges up to a radius and their lengths."""
    structure = Structure(c.lattice, c.numbers, c.frac_coords)
    center, point, image, distance = structure.get_neighbor_list(radius)
    image = np.rint(image).astype(int)
    return {(int(j), int(i), *map(int, n)): float(d) for i, j, n, d in zip(center, point, image, distance, strict=True)}


def pymatgen_with_enough(c: Cell, k: int, tolerance: float) -> tuple[dict[Edge, float], NDArray]:
    """All edges up to a radius that holds k neighbors of each atom with their ties, and each atom's k-th distance."""
    n = len(c.numbers)
    radius = np.cbrt(0.75 / np.pi * (k + 10) * abs(np.linalg.det(c.lattice)) / n)
    while True:
        found = pymatgen_edges(c, radius)
        lengths: list[list[float]] = [[] for _ in range(n)]
        for edge, length in found.items():
            lengths[edge[1]].append(length)
        if min(map(len, lengths)) >= k:
            limits = np.array([sorted(of_atom)[k - 1] for of_atom in lengths])
            if limits.max() + 2 * tolerance < radius:
                return found, limits
        radius *= 1.3


def pymatgen_nearest(c: Cell, k: int, tolerance: float = TOLERANCE) -> set[Edge]:
    found, limits = pymatgen_with_enough(c, k, tolerance)
    return {edge for edge, length in found.items() if length <= limits[edge[1]] + tolerance}


def reverse(edge: Edge) -> Edge:
    source, target, *image = edge
    return (target, source, *(-n for n in image))


def unimodular(rng: np.random.Generator, size: int) -> NDArray[np.int64]:
    """A random integer matrix of determinant ±1 that isn't reduced at all."""
    lower, upper = np.tril(rng.integers(-size, size + 1, (3, 3)), -1), np.triu(rng.integers(-size, size + 1, (3, 3)), 1)
    return rng.permutation(np.eye(3, dtype=int)) @ (lower + np.eye(3, dtype=int)) @ (upper + np.eye(3, dtype=int))


def random_cells(kind: str) -> list[Cell]:
    rng = np.random.default_rng(sum(kind.encode()))
    cells = []
    for _ in range(20):
        c = random_triclinic(rng, 1 if kind == "one atom" else int(rng.integers(1, 7)))
        if kind == "flat":
            c = c._replace(lattice=c.lattice * np.array([[3.0], [3.0], [0.3]]))
        elif kind == "long":
            c = c._replace(lattice=c.lattice * np.array([[0.5], [0.7], [15.0]]))
        elif kind == "skewed":
            u = unimodular(rng, 2)
            c = c._replace(lattice=u @ c.lattice, frac_coords=c.frac_coords @ np.linalg.inv(u))
        elif kind == "on faces and unwrapped":
            faces = np.where(rng.random(c.frac_coords.shape) < 0.5, rng.integers(0, 2, c.frac_coords.shape), 0.5)
            spread = np.where(np.arange(len(faces))[:, None] % 2 == 0, c.frac_coords, faces)
            shift = rng.integers(-4, 5, c.frac_coords.shape)
            c = c._replace(frac_coords=spread + shift + 1e-3 * np.arange(len(faces))[:, None])
            c.frac_coords[-1] = shift[-1]
        cells.append(c)
    return cells


@pytest.fixture(scope="module", params=["real", "one atom", "flat", "long", "skewed", "on faces and unwrapped"])
def cells(request: pytest.FixtureRequest, starter: CrystalStore) -> list[Cell]:
    """300 real crystals, or 20 of each of five kinds of random ones."""
    if request.param == "real":
        return cells_of(starter, np.random.default_rng(0).choice(len(starter), 300, replace=False))
    return random_cells(request.param)


@pytest.fixture(scope="module")
def real(starter: CrystalStore) -> list[Cell]:
    return cells_of(starter, np.random.default_rng(1).choice(len(starter), 60, replace=False))


def test_neighbors_within_a_radius_are_those_of_pymatgen(cells: list[Cell]) -> None:
    crystals = put_together(cells)
    found = edges_by_crystal(GraphSpec(radius=RADIUS).build(crystals).neighbors, crystals.ptr)
    for c, ours in zip(cells, found, strict=True):
        assert len(set(ours)) == len(ours)
        assert set(ours) == set(pymatgen_edges(c, RADIUS))


def test_nearest_neighbors_with_ties_and_their_union_are_those_of_pymatgen(cells: list[Cell]) -> None:
    crystals = put_together(cells)
    directed = edges_by_crystal(GraphSpec(k=K).build(crystals).neighbors, crystals.ptr)
    union = edges_by_crystal(GraphSpec(k=K, symmetric=True).build(crystals).neighbors, crystals.ptr)
    for c, ours, ours_union in zip(cells, directed, union, strict=True):
        expected = pymatgen_nearest(c, K)
        assert len(set(ours)) == len(ours)
        assert len(set(ours_union)) == len(ours_union)
        assert set(ours) == expected
        assert set(ours_union) == expected | set(map(reverse, expected))


@pytest.mark.parametrize(("k", "tolerance"), [(1, 1.5), (3, 0.4), (30, 0.05)])
def test_a_wide_tolerance_keeps_all_neighbors_within_it(cells: list[Cell], k: int, tolerance: float) -> None:
    chosen = cells[:20]
    crystals = put_together(chosen)
    found = edges_by_crystal(GraphSpec(k=k, tolerance=tolerance).build(crystals).neighbors, crystals.ptr)
    for c, ours in zip(chosen, found, strict=True):
        assert set(ours) == pymatgen_nearest(c, k, tolerance)


def test_distances_are_the_sorted_ones_of_pymatgen(cells: list[Cell]) -> None:
    chosen = cells[:40]
    crystals = put_together(chosen)
    ours = GraphSpec(radius=1.0, n_distances=40).build(crystals).neighbors.distances
    expected = []
    for c in chosen:
        found, _ = pymatgen_with_enough(c, 40, TOLERANCE)
        for atom in range(len(c.numbers)):
            expected.append(sorted(length for edge, length in found.items() if edge[1] == atom)[:40])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-8)


def test_neighbors_do_not_depend_on_how_skewed_the_cell_is() -> None:
    rng = np.random.default_rng(3)
    for _ in range(10):
        reduced = random_triclinic(rng, 3)
        u = unimodular(rng, 15)
        inverse = np.rint(np.linalg.inv(u)).astype(int)
        skewed = Cell(u @ reduced.lattice, reduced.numbers, reduced.frac_coords @ inverse)
        assert np.linalg.norm(skewed.lattice, axis=1).max() > 100
        expected, found = (CLEAN.build(put_together([c])).neighbors for c in (reduced, skewed))
        images = {(s, t, *(np.array(n) @ inverse).tolist()) for s, t, *n in edges(expected)}
        assert set(edges(found)) == images
        np.testing.assert_allclose(found.distances, expected.distances, atol=1e-9)


def test_vectors_are_differences_of_positions(cells: list[Cell]) -> None:
    crystals = put_together(cells)
    found = GraphSpec(k=K, symmetric=True).build(crystals).neighbors
    lattice = crystals.lattice[crystals.crystal[found.source]]
    away = crystals.positions[found.source] + np.einsum("ei,eij->ej", found.image, lattice)
    np.testing.assert_allclose(found.vector, crystals.positions[found.target] - away, rtol=0, atol=1e-9)
    assert np.linalg.norm(found.vector, axis=1).min() > 0


def test_few_crystals_are_searched_in_python_with_the_same_result(
    real: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    crystals, found = put_together([ROCKSALT, TRICLINIC, *real[:4]]), []
    for numbers in (0, 10**9):
        for kernel in (neighbors.directed, neighbors._with_reverses, graph_specs._slots):
            monkeypatch.setattr(kernel, "_left", numbers)
        built = [GraphSpec(k=K, symmetric=True, n_distances=20, slots=8), GraphSpec(radius=4.0)]
        graphs = [one.build(crystals) for one in built]
        found.append([*graphs[0].neighbors, graphs[0].slots, graphs[0].slot_atom, *graphs[1].neighbors])
    assert [one.tobytes() for one in found[0]] == [one.tobytes() for one in found[1]]


@pytest.mark.parametrize("spec", [GraphSpec(k=K), CLEAN, GraphSpec(radius=4.0)], ids=["k", "union", "radius"])
def test_edges_are_sorted_by_target_and_stay_inside_their_crystal(spec: GraphSpec, real: list[Cell]) -> None:
    crystals = put_together(real)
    found = spec.build(crystals).neighbors
    assert (np.diff(found.target) >= 0).all()
    assert (crystals.crystal[found.source] == crystals.crystal[found.target]).all()
    assert spec.radius is not None or len(set(found.target.tolist())) == len(crystals.numbers)


@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
def test_the_union_holds_the_reverse_of_every_edge_exactly_once(real: list[Cell], tolerance: float) -> None:
    crystals = put_together(real)
    count = Counter(edges(GraphSpec(k=K, tolerance=tolerance, symmetric=True).build(crystals).neighbors))
    assert set(count.values()) == {1}
    assert all(count[reverse(edge)] == 1 for edge in count)
    directed = set(edges(GraphSpec(k=K, tolerance=tolerance).build(crystals).neighbors))
    assert any(reverse(edge) not in directed for edge in directed)


def shell(n: int) -> Cell:
    """One atom in the middle of a large box and n around it, all 3 Å away."""
    turn = np.pi * (3 - np.sqrt(5)) * np.arange(n)
    z = 1 - (2 * np.arange(n) + 1) / n
    around = np.stack([np.cos(turn) * np.sqrt(1 - z**2), np.sin(turn) * np.sqrt(1 - z**2), z], axis=1)
    return cell(np.eye(3) * 30, [6] * (n + 1), np.concatenate([[[0.5] * 3], 0.5 + around / 10]))


@pytest.mark.parametrize(
    ("c", "k", "degrees"),
    [
        (ROCKSALT, 4, [6, 6]),
        (ROCKSALT, 7, [18, 18]),
        (ROCKSALT_CUBE, 20, [26] * 8),
        (PEROVSKITE, 5, [12, 6, 14, 14, 14]),
        (PEROVSKITE, 13, [20, 14, 14, 14, 14]),
        (COPPER, 13, [18]),
    ],
)
def test_shells_of_equal_distances_are_never_cut(c: Cell, k: int, degrees: list[int]) -> None:
    """Degrees follow from counting the shells of the ideal structures by hand."""
    rng = np.random.default_rng(k)
    for _ in range(5):
        order = rng.permutation(len(c.numbers))
        moved = Cell(c.lattice, c.numbers[order], (c.frac_coords + rng.random(3))[order])
        found = GraphSpec(k=k).build(put_together([moved])).neighbors
        assert np.bincount(found.target).tolist() == [degrees[i] for i in order]


@pytest.mark.parametrize("k", [1, 10, 39, 40])
def test_a_shell_of_40_neighbors_is_kept_whole(k: int) -> None:
    found = GraphSpec(k=k).build(put_together([shell(40)])).neighbors
    assert sorted(found.source[found.target == 0]) == list(range(1, 41))


def test_atoms_farther_than_the_tolerance_are_not_ties() -> None:
    c = cell(np.eye(3) * 30, [1, 1, 1, 1], [[0, 0, 0], [0.1, 0, 0], [0, 0.1 + 0.00002, 0], [0, 0, 0.1 + 0.000002]])
    found = GraphSpec(k=1, tolerance=1e-4).build(put_together([c])).neighbors
    assert sorted(found.source[found.target == 0]) == [1, 3]


@pytest.mark.parametrize("tolerance", [0.0, 1e-8, 1e-4])
def test_every_atom_has_at_least_k_neighbors(starter: CrystalStore, tolerance: float) -> None:
    crystals = starter.crystals.take(np.arange(500))
    target = GraphSpec(k=25, tolerance=tolerance).build(crystals).neighbors.target
    fewest = np.bincount(target, minlength=len(crystals.numbers)).min()
    assert fewest == 25


@pytest.mark.parametrize("symmetric", [False, True])
def test_repeating_doubles_self_images_and_nothing_else(real: list[Cell], symmetric: bool) -> None:
    crystals = put_together([ROCKSALT, COPPER, TRICLINIC, *real])
    plain = Counter(edges(GraphSpec(k=K, symmetric=symmetric).build(crystals).neighbors))
    repeated = Counter(edges(GraphSpec(k=K, symmetric=symmetric, repeat_self_images=True).build(crystals).neighbors))
    assert repeated == {edge: 2 if edge[0] == edge[1] else 1 for edge in plain}
    assert 2 in repeated.values()
    assert 1 in repeated.values()


@pytest.mark.parametrize(
    ("c", "count"),
    [(ROCKSALT, 76), (ROCKSALT_CUBE, 208), (COPPER, 84), (COPPER_CUBE, 192)],
    ids=["NaCl primitive", "NaCl cube", "Cu primitive", "Cu cube"],
)
def test_published_graphs_have_the_expected_number_of_edges(c: Cell, count: int) -> None:
    """Counts from an independent implementation of the published graph, k = 25, shells completed."""
    spec = GraphSpec(k=25, tolerance=1e-8, symmetric=True, repeat_self_images=True)
    assert len(spec.build(put_together([c])).neighbors.source) == count
    assert len(spec.build(put_together([ROCKSALT_CUBE, c, PEROVSKITE])).neighbors.source) == count + 208 + len(
        spec.build(put_together([PEROVSKITE])).neighbors.source
    )


@pytest.mark.parametrize("c", [ROCKSALT, ROCKSALT_CUBE], ids=["primitive", "cube"])
def test_distances_of_rocksalt_are_its_closed_shells(c: Cell) -> None:
    """Shells and multiplicities computed in float64 from the definition, a = 5.64 Å, 92 distances."""
    shells = [2.82, 3.988082, 4.884383, 5.64, 6.305712, 6.907561, 7.976165]
    expected = np.repeat(shells, [6, 12, 8, 6, 24, 24, 12])
    found = GraphSpec(k=25, n_distances=92).build(put_together([c])).neighbors.distances
    np.testing.assert_allclose(found, np.tile(expected, (len(c.numbers), 1)), atol=1e-6)
    np.testing.assert_allclose(found.mean(axis=1), 5.983963, atol=1e-6)


def test_distances_of_a_triclinic_crystal_have_their_golden_values() -> None:
    """Computed in float64 from the definition, 92 distances."""
    found = GraphSpec(k=25, n_distances=92).build(put_together([TRICLINIC])).neighbors.distances
    np.testing.assert_allclose(found[:, :6], [[2.117059, 2.847690, 3, 3, 3.079990, 3.131188]] * 2, atol=1e-6)
    np.testing.assert_allclose(found[:, 91], 7.763810, atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 538.13935, atol=1e-5)


@pytest.mark.parametrize(
    "spec", [CLEAN, GraphSpec(k=K, tolerance=0.0, symmetric=True, repeat_self_images=True, n_distances=30)]
)
def test_a_graph_does_not_depend_on_the_other_crystals_of_the_batch(spec: GraphSpec, real: list[Cell]) -> None:
    crystals = put_together(real)
    together = spec.build(crystals).neighbors
    for b in range(0, len(real), 3):
        alone = spec.build(put_together([real[b]])).neighbors
        first, last = crystals.ptr[b], crystals.ptr[b + 1]
        own = (together.target >= first) & (together.target < last)
        assert np.array_equal(together.source[own] - first, alone.source)
        assert np.array_equal(together.target[own] - first, alone.target)
        assert np.array_equal(together.image[own], alone.image)
        assert np.array_equal(together.vector[own], alone.vector)
        assert np.array_equal(together.distances[first:last], alone.distances)


def sorted_lengths(found: Neighbors, atom: int) -> NDArray:
    return np.sort(np.linalg.norm(found.vector[found.target == atom], axis=1))


def test_the_clean_graph_of_a_supercell_repeats_that_of_the_cell(real: list[Cell]) -> None:
    for c in [ROCKSALT, COPPER, PEROVSKITE, TRICLINIC, *real[:20]]:
        small = CLEAN.build(put_together([c])).neighbors
        large = CLEAN.build(put_together([supercell(c, (2, 1, 3))])).neighbors
        np.testing.assert_allclose(large.distances, np.tile(small.distances, (6, 1)), atol=1e-9)
        n = len(c.numbers)
        assert np.array_equal(np.bincount(large.target), np.tile(np.bincount(small.target), 6))
        for atom in range(6 * n):
            np.testing.assert_allclose(sorted_lengths(large, atom), sorted_lengths(small, atom % n), atol=1e-9)


def test_the_published_graph_of_a_supercell_has_other_degrees() -> None:
    spec = GraphSpec(k=25, tolerance=1e-8, symmetric=True, repeat_self_images=True)
    small, large = (spec.build(put_together([c])).neighbors for c in (ROCKSALT, supercell(ROCKSALT, (2, 2, 2))))
    assert set(np.bincount(small.target)) == {38}
    assert set(np.bincount(large.target)) == {26}


def test_an_empty_batch_has_no_edges() -> None:
    found = CLEAN.build(from_lists([], [], [])).neighbors
    assert [len(part) for part in found] == [0] * 6


@pytest.mark.parametrize(
    "arguments",
    [{}, {"k": 4, "radius": 3.0}, {"k": 0}, {"k": -1}, {"radius": 0.0}, {"radius": -2.0}, {"radius": float("nan")}],
    ids=str,
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, float]) -> None:
    crystals = put_together([COPPER])
    with pytest.raises(ValueError, match="radius"):
        neighbor_list(crystals.lattice, crystals.frac_coords, crystals.ptr, **arguments)


@pytest.mark.parametrize("arguments", [{}, {"k": 4, "radius": 3.0}], ids=["neither", "both"])
def test_a_graph_is_made_by_k_or_by_radius(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="radius"):
        GraphSpec(**arguments)


def test_a_crystal_near_a_cut_is_one_whose_neighbors_change_when_atoms_move(starter: CrystalStore) -> None:
    """Moved at random in several ways; rocksalt has shells of 6, 12 and 8."""
    rng = np.random.default_rng(7)
    rows = rng.permutation(np.flatnonzero(starter.crystals.sizes <= 12))[:60]
    cells = [ROCKSALT, COPPER, *cells_of(starter, rows)]
    crystals = put_together(cells)
    for spec in (GraphSpec(k=12), GraphSpec(k=12, tolerance=0.05), GraphSpec(radius=4.0)):
        expected = edges_by_crystal(spec.build(crystals).neighbors, crystals.ptr)
        changes = np.zeros(len(cells), bool)
        for _ in range(12):
            step = rng.normal(size=crystals.frac_coords.shape)
            step *= 1e-3 / np.linalg.norm(step, axis=1, keepdims=True)
            step = np.einsum("ni,nij->nj", step, np.linalg.inv(crystals.lattice)[crystals.crystal])
            frac = crystals.frac_coords + step
            moved = replace(crystals, frac_coords=frac)
            found = edges_by_crystal(spec.build(moved).neighbors, crystals.ptr)
            changes |= [set(one) != set(other) for one, other in zip(expected, found, strict=True)]
        near = spec.near_cut(crystals)
        assert 0 < changes.sum() < len(cells)
        assert near[changes].all()
        assert (near & ~changes).mean() < 0.25  # what moves together, as images of one atom do, changes nothing
    assert GraphSpec(k=12).near_cut(put_together([ROCKSALT, COPPER])).tolist() == [True, False]
    assert not GraphSpec(k=12, tolerance=0.05).near_cut(put_together([ROCKSALT])).any()
