"""Formulas, chemical systems and hashes of many crystals are those of one crystal after another."""

import hashlib
from itertools import pairwise
from math import gcd

import numpy as np
import pytest

from crysldnet.data.elements import SYMBOLS, chemical_systems_of, formulas_of, hashes, reduced_formula
from crysldnet.data.matching import shared_rows
from crysldnet.data.output import write_store
from crysldnet.data.schema import table_from_crystals
from crysldnet.data.split import SPLITS, Split
from crysldnet.data.store import CrystalStore
from crysldnet.graphs.crystals import Crystals


def one_formula(numbers: np.ndarray) -> str:
    """Return the reduced formula of one crystal, as it was written before it was vectorized."""
    elements, counts = np.unique(numbers, return_counts=True)
    divisor = gcd(*counts.tolist())
    parts = sorted((SYMBOLS[z], count // divisor) for z, count in zip(elements, counts, strict=True))
    return "".join(f"{symbol}{count if count > 1 else ''}" for symbol, count in parts)


def one_system(numbers: np.ndarray) -> str:
    return "-".join(sorted(SYMBOLS[z] for z in np.unique(numbers)))


def one_place(key: str, seed: int) -> float:
    """Return where a key lies between 0 and 1."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


def one_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def species(crystals: Crystals) -> list[np.ndarray]:
    return [np.asarray(crystals.numbers[a:b]) for a, b in pairwise(crystals.ptr)]


def random_crystals(seed: int, count: int) -> Crystals:
    """Crystals of any species, masked atoms among them; some without atoms, some with thousands of one element."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([0, 1, 2, 3, 6, 12, 50, 400, 3000], count, p=[0.1, 0.1, 0.2, 0.2, 0.2, 0.1, 0.05, 0.04, 0.01])
    few = [rng.choice(119, rng.integers(1, 7), replace=False) for _ in sizes]
    numbers = np.concatenate([rng.choice(own, size) for own, size in zip(few, sizes, strict=True)])
    ptr = np.concatenate([[0], np.cumsum(sizes)])
    return Crystals(np.zeros((count, 3, 3)), ptr, numbers.astype(np.uint8), np.zeros((len(numbers), 3), np.float32))


@pytest.mark.parametrize("seed", range(4))
def test_formulas_and_systems_of_random_crystals_are_those_of_one_at_a_time(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crysldnet.data.elements._CHUNK", 100)
    crystals = random_crystals(seed, 450)
    expected = [one_formula(numbers) for numbers in species(crystals)]
    assert formulas_of(crystals) == expected
    assert "" in expected
    assert chemical_systems_of(crystals) == [one_system(numbers) for numbers in species(crystals)]
    rows = np.random.default_rng(seed).integers(0, 450, 333)
    assert formulas_of(crystals, rows) == [expected[row] for row in rows]
    assert formulas_of(crystals, rows[:0]) == []


def test_formulas_and_systems_of_real_crystals_are_those_of_one_at_a_time(starter: CrystalStore) -> None:
    numbers = species(starter.crystals)
    assert formulas_of(starter.crystals) == [one_formula(z) for z in numbers] == [reduced_formula(z) for z in numbers]
    assert chemical_systems_of(starter.crystals) == [one_system(z) for z in numbers]
    assert "O-Si" in chemical_systems_of(starter.crystals)


def test_an_atomic_number_without_a_symbol_is_no_formula() -> None:
    crystals = Crystals(np.zeros((1, 3, 3)), np.array([0, 1]), np.array([119], np.uint8), np.zeros((1, 3), np.float32))
    with pytest.raises(IndexError):
        formulas_of(crystals)


def test_hashes_are_those_of_each_text() -> None:
    texts = ["NaCl", "", "Å", "NaCl", *(f"mp-{i}" for i in range(50))]
    assert hashes(texts).tolist() == [one_hash(text) for text in texts]
    assert hashes([]).tolist() == []


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize(("by", "key"), [("formula", one_formula), ("chemical_system", one_system)])
def test_a_hashed_split_is_that_of_one_crystal_at_a_time(starter: CrystalStore, by: str, key, seed: int) -> None:
    rows = Split(by=by, seed=seed).rows(starter)  # type: ignore[arg-type]
    places = np.array([one_place(key(numbers), seed) for numbers in species(starter.crystals)])
    expected = np.searchsorted(np.cumsum([0.8, 0.1, 0.1])[:2], places, side="right").clip(max=2)
    for part, name in enumerate(SPLITS):
        assert np.array_equal(rows[name], np.flatnonzero(expected == part))


def test_exclusion_by_formula_is_that_of_one_crystal_at_a_time(starter: CrystalStore, tmp_path) -> None:
    rng = np.random.default_rng(0)
    rows, others = np.sort(rng.permutation(len(starter))[:1500]), rng.permutation(len(starter))[:900]
    path = str(tmp_path / "other.store")
    crystals = starter.crystals.take(others)
    write_store(path, [table_from_crystals(crystals, [str(row) for row in others], {}, {}, {})])
    names = np.array([one_formula(numbers) for numbers in species(starter.crystals)])
    taken = set(names[others])
    gone, (record,) = shared_rows(starter, rows, [path], "formula")
    assert gone.tolist() == [row for row in rows if names[row] in taken]
    assert record["crystals"] == len(gone) > 300
