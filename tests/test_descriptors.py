"""Descriptors have right values, and don't depend on how a crystal is written down."""

import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

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
from crysldnet.data.elements import SYMBOLS
from crysldnet.data.store import CrystalStore
from crysldnet.descriptors import composition_descriptors, geometry_descriptors, side_by_side
from crysldnet.descriptors.composition import Features, composition_features
from crysldnet.descriptors.geometry import slabs_of
from crysldnet.graphs.crystals import MAX_ATOMIC_NUMBER

GRAPHENE = cell([[2.46, 0, 0], [-1.23, 2.1304, 0], [0, 0, 20]], [6, 6], [[1 / 3, 2 / 3, 0.5], [2 / 3, 1 / 3, 0.5]])
GRAPHITE = cell(
    [[2.46, 0, 0], [-1.23, 2.1304, 0], [0, 0, 6.7]],
    [6] * 4,
    [[0, 0, 0], [0, 0, 0.5], [1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 0.5]],
)
SELENIUM = cell(
    [[4.37, 0, 0], [-2.185, 3.7845, 0], [0, 0, 4.95]],
    [34] * 3,
    [[0.225, 0, 1 / 3], [0, 0.225, 2 / 3], [0.775, 0.775, 0]],
)
DIAMOND = cell(3.567 / 2 * np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]), [6, 6], [[0, 0, 0], [0.25, 0.25, 0.25]])
HYDROGEN = cell(np.eye(3) * 6, [1, 1], [[0, 0, 0], [0.12, 0, 0]])
UNREDUCED = np.array([[1, 0, 0], [2, 1, 0], [-1, 3, 1]])


def describe(cells: list[Cell]) -> Features:
    crystals = put_together(cells)
    return side_by_side([composition_descriptors(crystals), geometry_descriptors(crystals)])


def value(c: Cell, name: str) -> float:
    found = describe([c])
    return float(found.values[0, found.names.index(name)])


@pytest.fixture(scope="module")
def cells(starter: CrystalStore) -> list[Cell]:
    rng = np.random.default_rng(3)
    small = rng.permutation(np.flatnonzero(starter.crystals.sizes <= 10))[:15]
    triclinic = [random_triclinic(rng, n) for n in (1, 2, 4, 6)]
    known = [ROCKSALT, PEROVSKITE, TRICLINIC, GRAPHENE, GRAPHITE, SELENIUM, DIAMOND, HYDROGEN]
    return [*cells_of(starter, small), *known, *triclinic]


def assert_same(found: Features, expected: Features, within: float = 1e-5) -> None:
    scale = np.maximum(np.abs(expected.values), 1)
    worst = (np.abs(found.values - expected.values) / scale).max(axis=0)
    assert {name: float(w) for name, w in zip(found.names, worst, strict=True) if not w < within} == {}


def test_descriptors_are_finite_and_named_once(cells: list[Cell]):
    found = describe(cells)
    assert found.values.shape == (len(cells), len(found.names))
    assert np.isfinite(found.values).all()
    assert len(set(found.names)) == len(found.names)


def rotated(c: Cell) -> Cell:
    turn = Rotation.from_rotvec([0.3, -1.1, 0.7]).as_matrix()
    return c._replace(lattice=c.lattice @ turn)


def shifted(c: Cell) -> Cell:
    return c._replace(frac_coords=c.frac_coords + np.array([0.13, 0.41, -2.77]))


def reordered(c: Cell) -> Cell:
    order = np.random.default_rng(0).permutation(len(c.numbers))
    return c._replace(numbers=c.numbers[order], frac_coords=c.frac_coords[order])


def in_another_cell(c: Cell) -> Cell:
    return c._replace(lattice=UNREDUCED @ c.lattice, frac_coords=c.frac_coords @ np.linalg.inv(UNREDUCED))


def doubled(c: Cell) -> Cell:
    return supercell(c, (2, 1, 2))


@pytest.mark.parametrize("change", [rotated, shifted, reordered, in_another_cell, doubled])
def test_descriptors_do_not_depend_on_the_description(cells: list[Cell], change):
    assert_same(describe([change(c) for c in cells]), describe(cells))


def test_descriptors_see_a_moved_atom_and_another_element():
    moved = TRICLINIC._replace(frac_coords=TRICLINIC.frac_coords + np.array([[0, 0, 0], [0.02, 0, 0]]))
    other = TRICLINIC._replace(numbers=np.array([32, 8]))
    before = describe([TRICLINIC]).values
    for changed in (moved, other):
        with pytest.raises(AssertionError):
            assert_same(describe([changed]), Features(describe([changed]).names, before))


def test_descriptors_do_not_depend_on_the_other_crystals(cells: list[Cell]):
    alone = [describe([c]).values[0] for c in cells]
    np.testing.assert_allclose(np.stack(alone), describe(cells).values, rtol=1e-9, atol=1e-9)


def test_primitive_and_conventional_cells_have_the_same_descriptors():
    assert_same(describe([ROCKSALT_CUBE, COPPER_CUBE]), describe([ROCKSALT, COPPER]))


@pytest.mark.parametrize(
    ("crystal", "name", "expected"),
    [
        (COPPER, "density", 8.97),
        (COPPER, "mean coordination number", 12.0),
        (COPPER, "mean bond length", 3.61 / 2**0.5),
        (COPPER, "mean bond orientation q4", 0.1909),  # Steinhardt's values for fcc
        (COPPER, "mean bond orientation q6", 0.5745),
        (DIAMOND, "mean coordination number", 4.0),
        (DIAMOND, "mean bond orientation q3", 0.745),
        (DIAMOND, "bonds of an atom", 4.0),
        (ROCKSALT, "mean coordination number", 6.0),
        (ROCKSALT, "mean like neighbors", 0.0),
        (ROCKSALT, "mean neighbor difference Electronegativity", 3.16 - 0.93),
        (ROCKSALT, "distance of neighbor 6", 2.82),
        (ROCKSALT, "distance of neighbor 8", 2.82 * 2**0.5),
    ],
)
def test_known_crystals_have_known_values(crystal: Cell, name: str, expected: float):
    assert value(crystal, name) == pytest.approx(expected, rel=2e-2, abs=2e-2 if expected == 0 else None)


@pytest.mark.parametrize(
    ("crystal", "kind"),
    [(HYDROGEN, "molecules"), (SELENIUM, "chains"), (GRAPHITE, "layers"), (GRAPHENE, "layers"), (DIAMOND, "networks")],
)
def test_atoms_are_in_molecules_chains_layers_or_networks(crystal: Cell, kind: str):
    shares = {k: value(crystal, f"atoms in {k}") for k in ("molecules", "chains", "layers", "networks")}
    assert shares == {k: float(k == kind) for k in shares}


def test_a_sheet_has_its_area_and_vacuum_whatever_the_cell():
    sheet = GRAPHENE
    written = [sheet, supercell(sheet, (3, 2, 1)), supercell(sheet, (1, 1, 2)), in_another_cell(sheet), shifted(sheet)]
    slabs = slabs_of(put_together([*written, ROCKSALT]))
    assert slabs.is_slab.tolist() == [True] * len(written) + [False]
    np.testing.assert_allclose(slabs.vacuum[:-1], 20.0, atol=1e-6)
    np.testing.assert_allclose(slabs.area[:-1], 2.46 * 2.1304 / 2, rtol=1e-6)
    thick = sheet._replace(frac_coords=sheet.frac_coords + np.array([[0, 0, 0], [0, 0, 0.1]]))
    found = slabs_of(put_together([thick, supercell(thick, (1, 1, 3))]))
    np.testing.assert_allclose(found.thickness, 2.0, atol=1e-6)
    np.testing.assert_allclose(found.vacuum, 18.0, atol=1e-6)


def test_a_bulk_crystal_has_no_slab_geometry():
    slabs = slabs_of(put_together([ROCKSALT, GRAPHITE]))
    assert not slabs.is_slab.any()
    assert (slabs.area == 0).all()


def test_composition_equals_matminers_magpie():
    element = pytest.importorskip("matminer.featurizers.composition")
    composition = pytest.importorskip("pymatgen.core").Composition
    formulas = ["NaCl", "BaTiO3", "Fe", "LaMnO3", "HeXe", "SiO2", "UPu3AmLr2", "GaAs", "C60H3Og"]
    amounts = np.zeros((len(formulas), MAX_ATOMIC_NUMBER + 1))
    for row, formula in enumerate(formulas):
        for symbol, count in composition(formula).get_el_amt_dict().items():
            amounts[row, SYMBOLS.index(symbol)] = count
    found = composition_features(amounts)
    preset = element.ElementProperty.from_preset("magpie", impute_nan=True)
    orbitals = element.ValenceOrbital(props=["frac"])
    norms = element.Stoichiometry()
    renamed = {"0-norm": "number of elements"}
    for featurizer in (preset, orbitals, norms):
        table = np.array([featurizer.featurize(composition(f)) for f in formulas])
        for label, expected in zip(featurizer.feature_labels(), table.T, strict=True):
            ours = found.values[:, found.names.index(renamed.get(label, label))]
            np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9, err_msg=label)


def test_a_composition_without_elements_is_refused():
    with pytest.raises(ValueError, match="composition 1 has no elements"):
        composition_features(np.eye(119)[[3, 0]] * np.array([[1.0], [0.0]]))


def test_descriptors_import_neither_pymatgen_nor_matminer():
    code = (
        "import sys, numpy as np; from crysldnet.descriptors import *;"
        "from crysldnet.graphs.crystals import from_lists;"
        "c = from_lists([np.eye(3) * 3], [np.array([29])], [np.zeros((1, 3))]);"
        "geometry_descriptors(c), composition_descriptors(c);"
        "sys.exit(','.join({'pymatgen', 'matminer', 'sklearn', 'pandas'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_atomic_number_is_described():
    every: NDArray = np.eye(MAX_ATOMIC_NUMBER + 1)[1:]
    assert np.isfinite(composition_features(every).values).all()
