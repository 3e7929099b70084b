"""What the data files inside the package promise."""

import hashlib
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Composition, Element, Lattice

EMBEDDED = Path(__file__).parents[1] / "src" / "crysldnet" / "data" / "embedded"
NAMES = ["mp_starter", "matbench_jdft2d", "matbench_phonons"]
TARGET_UNITS = {
    "mp_starter": {"formation_energy_per_atom": "eV/atom", "band_gap": "eV"},
    "matbench_jdft2d": {"exfoliation_energy": "meV/atom"},
    "matbench_phonons": {"last_phdos_peak": "1/cm"},
}
MATBENCH = [
    ("matbench_jdft2d", [f"mb-jdft2d-{i:03d}" for i in range(1, 637)], [128, 127, 127, 127, 127]),
    ("matbench_phonons", [f"mb-phonons-{i:04d}" for i in range(1, 1266)], [253] * 5),
]

Columns = dict[str, list]


@pytest.fixture(scope="module")
def tables() -> dict[str, Columns]:
    return {name: pq.read_table(EMBEDDED / f"{name}.parquet").to_pydict() for name in NAMES}


@pytest.fixture(scope="module")
def starter(tables: dict[str, Columns]) -> Columns:
    return tables["mp_starter"]


def reduced_amounts(atomic_numbers: list[int]) -> dict[str, int]:
    """Amounts of a reduced formula, divided by their greatest common divisor only: Na2O2 becomes NaO."""
    counts = Counter(atomic_numbers)
    divisor = math.gcd(*counts.values())
    return {Element.from_Z(z).symbol: count // divisor for z, count in counts.items()}


def elements_of(rows: list[list[int]]) -> set[int]:
    return {z for numbers in rows for z in numbers}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_smaller_than_one_megabyte(name: str) -> None:
    assert (EMBEDDED / f"{name}.parquet").stat().st_size < 1_000_000


@pytest.mark.parametrize("name", NAMES)
def test_metadata_states_source_licence_citation_and_units(name: str) -> None:
    schema = pq.read_schema(EMBEDDED / f"{name}.parquet")
    metadata = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    for key in ("description", "source", "source_commit", "licence", "code_licence", "citation", "schema_note"):
        assert metadata[key]
    assert metadata["dataset"] == name
    assert "CC BY 4.0" in metadata["licence"]
    for column, units in TARGET_UNITS[name].items():
        assert schema.field(column).metadata[b"units"].decode() == units


@pytest.mark.parametrize("name", NAMES[1:])
def test_matbench_metadata_says_that_it_is_not_the_official_file(name: str) -> None:
    assert b"not the official Matbench file" in pq.read_schema(EMBEDDED / f"{name}.parquet").metadata[b"schema_note"]


@pytest.mark.parametrize("name", NAMES)
def test_every_row_has_a_complete_structure_and_no_nan(tables: dict[str, Columns], name: str) -> None:
    columns = tables[name]
    assert len(set(columns["material_id"])) == len(columns["material_id"])
    for numbers, lattice, coords in zip(
        columns["atomic_numbers"], columns["lattice"], columns["frac_coords"], strict=True
    ):
        assert len(lattice) == 9
        assert len(coords) == 3 * len(numbers) > 0
        assert np.isfinite(lattice).all()
        assert np.isfinite(coords).all()
    for target in TARGET_UNITS[name]:
        assert np.isfinite(np.array(columns[target], dtype=float)).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_species_is_a_known_element(tables: dict[str, Columns], name: str) -> None:
    assert elements_of(tables[name]["atomic_numbers"]) <= set(range(1, 95))


@pytest.mark.parametrize("name", NAMES)
def test_every_lattice_has_a_positive_volume(tables: dict[str, Columns], name: str) -> None:
    assert (np.linalg.det(np.array(tables[name]["lattice"]).reshape(-1, 3, 3)) > 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_two_atoms_are_closer_than_0_4_angstrom(tables: dict[str, Columns], name: str) -> None:
    columns = tables[name]
    for material_id, cell, coords in zip(
        columns["material_id"], columns["lattice"], columns["frac_coords"], strict=True
    ):
        lattice = Lattice(cell)
        sites = np.reshape(coords, (-1, 3))
        distances = lattice.get_all_distances(sites, sites)
        np.fill_diagonal(distances, min(lattice.abc))
        assert distances.min() > 0.4, material_id


def test_the_starter_has_4000_crystals_of_at_most_40_atoms(starter: Columns) -> None:
    assert len(starter["material_id"]) == 4000
    assert max(map(len, starter["atomic_numbers"])) == 40


def test_the_starter_leaves_out_unphysical_formation_energies(starter: Columns) -> None:
    assert max(map(abs, starter["formation_energy_per_atom"])) <= 5


def test_band_gaps_are_not_negative(starter: Columns) -> None:
    assert min(starter["band_gap"]) >= 0


def test_the_formula_column_is_the_reduced_formula_of_the_atoms(starter: Columns) -> None:
    for formula, numbers in zip(starter["formula"], starter["atomic_numbers"], strict=True):
        assert Composition(formula).get_el_amt_dict() == reduced_amounts(numbers)


def test_no_reduced_formula_crosses_a_split(starter: Columns) -> None:
    splits: dict[frozenset, set[str]] = {}
    for numbers, split in zip(starter["atomic_numbers"], starter["split"], strict=True):
        splits.setdefault(frozenset(reduced_amounts(numbers).items()), set()).add(split)
    assert all(len(found) == 1 for found in splits.values())


def test_the_split_follows_from_the_hash_of_the_formula(starter: Columns) -> None:
    for formula, split in zip(starter["formula"], starter["split"], strict=True):
        u = int(hashlib.sha256(f"crysldnet-starter-v1:{formula}".encode()).hexdigest()[:8], 16) / 2**32
        assert split == ("train" if u < 0.8 else "val" if u < 0.9 else "test")


def test_the_splits_are_about_80_10_10(starter: Columns) -> None:
    assert Counter(starter["split"]) == {"train": 3209, "val": 390, "test": 401}


def test_all_87_elements_are_in_the_train_split(starter: Columns) -> None:
    train = [z for z, split in zip(starter["atomic_numbers"], starter["split"], strict=True) if split == "train"]
    assert len(elements_of(train)) == 87
    assert elements_of(starter["atomic_numbers"]) == elements_of(train)


@pytest.mark.parametrize(("name", "ids", "folds"), MATBENCH)
def test_matbench_rows_are_complete_and_in_official_order(
    tables: dict[str, Columns], name: str, ids: list[str], folds: list[int]
) -> None:
    assert tables[name]["material_id"] == ids
    assert np.bincount(tables[name]["matbench_test_fold"]).tolist() == folds
