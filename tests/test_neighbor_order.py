"""The compiled search finds the edges of a plain one in the same order, every vector equal to the last bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from conftest import COPPER, ROCKSALT, Cell, cells_of, random_triclinic, supercell
from crysldnet.data.store import CrystalStore
from crysldnet.graphs import images
from crysldnet.graphs.compiled import in_python
from crysldnet.graphs.neighbors import neighbor_list

SHAPES = ("compact", "skewed", "one very long edge", "slab")


def triangular(c: Cell) -> NDArray[np.float64]:
    t = np.zeros((3, 3))
    in_python(images.triangular)(c.lattice[None], 0, t, np.zeros((3, 3)))
    return t


def plain(c: Cell, *, k: int = 0, radius: float = 0.0, tolerance: float = 1e-4) -> tuple[NDArray, ...]:
    """Try every atom in every cell within reach: source, target, image and vector by j, then n₂, n₁, n₀ ascending."""
    n = len(c.numbers)
    frac, t = c.frac_coords, triangular(c)
    within = radius or 1.5 * np.cbrt((k + 8) * abs(np.linalg.det(c.lattice)) / n)
    while True:
        reach = within * np.linalg.norm(np.linalg.inv(t), axis=0)
        low, high = np.floor(-reach - np.ptp(frac, axis=0)), np.ceil(reach + np.ptp(frac, axis=0))
        j, n2, n1, n0 = np.meshgrid(
            np.arange(n), *(np.arange(low[axis], high[axis] + 1) for axis in (2, 1, 0)), indexing="ij", sparse=True
        )
        found = []
        for i in range(n):
            g2 = frac[j, 2] - frac[i, 2] + n2
            z = g2 * t[2, 2]
            g1 = frac[j, 1] - frac[i, 1] + n1
            y = g1 * t[1, 1] + g2 * t[2, 1]
            x = (frac[j, 0] - frac[i, 0] + n0) * t[0, 0] + (g1 * t[1, 0] + g2 * t[2, 0])
            d2 = x * x + y * y + z * z
            itself = (j == i) & (n0 == 0) & (n1 == 0) & (n2 == 0)
            near = (d2 <= within**2) & ~itself
            if k and near.sum() < k:
                break
            least2 = np.sort(d2[near])[k - 1] if k else 0.0
            limit = np.sqrt(least2) + tolerance if k else radius
            if limit > within:
                break
            edges = np.argwhere(near & (d2 <= max(limit * limit, least2)))
            image = edges[:, [3, 2, 1]] + low
            found.append(np.column_stack([edges[:, 0], np.full(len(edges), i), image]))
        else:
            source, target, *cells = np.concatenate(found).astype(int).T
            g0, g1, g2 = (frac[target, axis] - frac[source, axis] - cells[axis] for axis in range(3))
            lattice = c.lattice
            vector = [g0 * lattice[0, axis] + g1 * lattice[1, axis] + g2 * lattice[2, axis] for axis in range(3)]
            return source, target, np.stack(cells, axis=1).astype(np.int32), np.stack(vector, axis=1)
        within *= 1.5


def assert_same(c: Cell, **arguments: float) -> None:
    found = neighbor_list(c.lattice[None], c.frac_coords, np.array([0, len(c.numbers)]), **arguments)
    for name, expected in zip(("source", "target", "image", "vector"), plain(c, **arguments), strict=True):
        ours = getattr(found, name)
        assert ours.dtype == expected.dtype
        assert ours.tobytes() == np.ascontiguousarray(expected).tobytes(), name


def listed(c: Cell, radius: float) -> tuple[bool, bool]:
    """Return whether images are listed, and whether for several boxes."""
    room = in_python(images.room_for)(100_000)
    room.t[:] = triangular(c)
    with np.errstate(all="ignore"):  # room that isn't filled holds anything
        margin = in_python(images.lists_of)(room.t, c.frac_coords.ravel(), 0, len(c.numbers), radius, room)
    return margin > 0, margin > 0 and bool(room.parts.prod() > 1)


@st.composite
def cells(draw: st.DrawFn) -> Cell:
    """Up to 60 atoms anywhere or on a grid, where distances tie, in or outside of a cell of one of the shapes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n = draw(st.integers(1, 60))
    shape = draw(st.sampled_from(SHAPES))
    reduced = random_triclinic(rng, n)
    lattice = reduced.lattice * np.cbrt(n * draw(st.floats(8.0, 25.0)) / abs(np.linalg.det(reduced.lattice)))
    frac = reduced.frac_coords
    if draw(st.booleans()):
        frac = np.argwhere(np.ones((4, 4, 4)))[rng.permutation(64)[:n]] / 4
    if shape == "skewed":
        shear = np.eye(3, dtype=int)
        shear[0, 1], shear[2, 0] = draw(st.integers(-2, 2)), draw(st.integers(-2, 2))
        lattice, frac = shear @ lattice, frac @ np.linalg.inv(shear)
    elif shape == "one very long edge":
        lattice = lattice * np.array([[0.5], [0.4], [5.0]])
    elif shape == "slab":
        lattice, frac = lattice * np.array([[1.0], [3.0], [1.0]]), frac * np.array([1.0, 1 / 3, 1.0])
    return Cell(lattice, reduced.numbers, frac + draw(st.sampled_from([0.0, 0.5, 1 / 3])) + rng.integers(-1, 2, (n, 3)))


@settings(max_examples=60, deadline=None)
@given(c=cells(), k=st.integers(1, 16), radius=st.floats(1.0, 4.5), tolerance=st.sampled_from([0.0, 1e-4, 0.3]))
def test_edges_of_random_cells_are_those_of_the_plain_search(c: Cell, k: int, radius: float, tolerance: float) -> None:
    assert_same(c, k=k, tolerance=tolerance)
    assert_same(c, radius=radius)


def test_edges_of_real_cells_are_those_of_the_plain_search(starter: CrystalStore) -> None:
    rows = np.random.default_rng(1).choice(len(starter), 24, replace=False)
    real = [COPPER, ROCKSALT, *cells_of(starter, rows)]
    larger = [supercell(c, (2, 3, 2) if len(c.numbers) < 12 else (2, 1, 2)) for c in real[:8]]
    for c in [*real, *larger]:
        assert_same(c, k=12)
        assert_same(c, radius=5.0 if len(c.numbers) < 40 else 3.5)
    assert {listed(c, 3.5) for c in [*real, *larger]} == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize("radius", [2.0 * np.sqrt(2.0), np.nextafter(2.0 * np.sqrt(2.0), 0), 4.0, np.nextafter(4.0, 0)])
def test_a_distance_of_exactly_the_radius_is_decided_exactly(radius: float) -> None:
    """On a cubic grid of 2 Å, with as many digits as there are."""
    frac = np.argwhere(np.ones((4, 4, 4))) / 4
    c = Cell(np.eye(3) * 8.0, np.ones(64, np.uint8), frac)
    assert listed(c, radius)[0]
    assert_same(c, radius=radius)
    counts = {2.0 * np.sqrt(2.0): 18, 4.0: 32}
    found = neighbor_list(c.lattice[None], frac, np.array([0, 64]), radius=radius)
    assert len(found.source) / 64 == counts.get(radius, 6 if radius < 3 else 26)
