"""Fingerprints: those of many crystals are those of one at a time, and 8 bytes of each find whatever they shared."""

from pathlib import Path

import numpy as np
import pytest
import torch

from crysldnet.artifacts import model_file
from crysldnet.data.fingerprint import (
    POSSIBLE,
    RANKS,
    SIMILAR,
    Fingerprints,
    Tolerance,
    candidates,
    geometry_of,
    overlap,
)
from crysldnet.data.store import CrystalStore
from test_formulas import one_formula, one_hash, species

ANY = Tolerance(np.inf, np.inf)


def pairs_one_by_one(a: Fingerprints, b: Fingerprints, tolerance: Tolerance) -> list[tuple[int, int]]:
    """Return what candidates returned before it was vectorized."""
    limit = np.array([tolerance.log_volume, *[tolerance.distance] * len(RANKS)], np.float32)
    ours, theirs = a.geometry.astype(np.float32), b.geometry.astype(np.float32)
    return [
        (i, int(j))
        for i in range(len(a))
        for j in np.flatnonzero(b.formulas == a.formulas[i])
        if (np.abs(theirs[j] - ours[i]) <= limit).all()
    ]


def random_fingerprints(seed: int, count: int, formulas: int) -> Fingerprints:
    """Fingerprints of few formulas and ids; half of the geometries lie on the bounds of steps, half about them."""
    rng = np.random.default_rng(seed)
    names = np.random.default_rng(0).integers(-(2**63), 2**63, (2, formulas), np.int64)
    steps = np.array([SIMILAR.log_volume, *[SIMILAR.distance] * len(RANKS)])
    centers = np.array([3.0, *np.linspace(0.9, 2.0, len(RANKS))])
    geometry = centers + steps * rng.integers(-8, 9, (count, 1))
    geometry[::2] += steps * rng.uniform(-0.6, 0.6, (len(geometry[::2]), len(steps)))
    return Fingerprints(
        names[0][rng.integers(0, formulas, count)], names[1][rng.integers(0, formulas, count)],
        geometry.astype(np.float16),
    )  # fmt: skip


def test_fingerprints_are_those_of_one_crystal_at_a_time_in_the_order_of_the_rows(
    starter: CrystalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crysldnet.data.fingerprint._CHUNK", 7)  # many pieces, on all threads
    rows = np.random.default_rng(0).permutation(len(starter))[:100]
    found = Fingerprints.of(starter, rows)
    numbers, ids = species(starter.crystals), starter.ids.to_pylist()
    assert found.ids.tolist() == [one_hash(ids[row]) for row in rows]
    assert found.formulas.tolist() == [one_hash(one_formula(numbers[row])) for row in rows]
    expected = np.concatenate([geometry_of(starter.crystals.take(np.array([row]))) for row in rows])
    assert np.array_equal(found.geometry, expected)
    assert len(Fingerprints.of(starter, rows[:0]).packed()) == 0


@pytest.mark.parametrize("tolerance", [SIMILAR, POSSIBLE, ANY])
def test_candidates_are_those_of_one_crystal_at_a_time(tolerance: Tolerance, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random_fingerprints(1, 300, 20), random_fingerprints(2, 400, 30)
    expected = pairs_one_by_one(a, b, tolerance)
    assert len(expected) > 10
    for size in (1, 50, 1 << 20):
        monkeypatch.setattr("crysldnet.data.fingerprint._PAIRS", size)
        assert [tuple(pair) for pair in candidates(a, b, tolerance).tolist()] == expected
    nothing = random_fingerprints(3, 0, 20)
    assert candidates(a, nothing, ANY).shape == candidates(nothing, b, ANY).shape == (0, 2)


@pytest.mark.parametrize("seed", range(5))
def test_packed_fingerprints_miss_no_similar_pair(seed: int) -> None:
    a, b = random_fingerprints(seed, 400, 20), random_fingerprints(seed + 100, 400, 20)
    exact = {i for i, _ in pairs_one_by_one(a, b, SIMILAR)}
    one, other = a.packed(), b.packed()
    found = {i for i in range(len(a)) if overlap(one[i : i + 1], other)["similar"]}
    assert exact <= found
    assert 0 < len(exact) < len(found) < len(a)  # some are a step apart, and most aren't


def test_packed_fingerprints_count_formulas_ids_and_similar_crystals_of_real_sets(starter: CrystalStore) -> None:
    """One formula is enough to share it; an id counts where the formula is shared too."""
    rows = np.arange(len(starter))
    a, b = Fingerprints.of(starter, rows[:2500]), Fingerprints.of(starter, rows[1500:])
    pairs = pairs_one_by_one(a, b, SIMILAR)
    counts = overlap(a.packed(), b.packed())
    assert counts["formulas"] == int(np.isin(a.formulas, b.formulas).sum())
    assert counts["ids"] == 1000
    similar = len({i for i, _ in pairs})
    assert similar <= counts["similar"] <= 1.1 * similar + 5
    assert overlap(a.packed()[:1500], b.packed())["ids"] == 0


def test_packed_fingerprints_are_pinned() -> None:
    """Files of today must mean the same to later versions: 36 bits of the formula, 16 of the id, 3 numbers of 4."""
    geometry = np.zeros((1, 1 + len(RANKS)), np.float16)
    geometry[0, [0, 1 + RANKS.index(14), 1 + RANKS.index(19)]] = [-0.06, 0.021, 0.339]
    hashes = [np.array([one_hash(text)]) for text in ("mp-22862", "ClNa")]
    (code,) = Fingerprints(hashes[0], hashes[1], geometry).packed()
    id_bits, formula_bits = (f"{int(h[0]) % 2**64:064b}" for h in hashes)
    assert f"{int(code):064b}" == formula_bits[:36] + id_bits[:16] + "1110" + "0001" + "0000"


def test_a_file_keeps_eight_bytes_a_crystal_and_one_of_the_old_form_is_read_as_the_same(
    starter: CrystalStore, tmp_path: Path
) -> None:
    seen = Fingerprints.of(starter, np.arange(50))
    new, old = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    model_file.write(new, "encoder", {}, {}, seen.packed())
    (kept,) = model_file.read_extra(new, "encoder", model_file.PREFIX).values()
    assert kept.numel() * kept.element_size() == 8 * 50
    assert model_file.read(new, "encoder")[0]["format_version"] == 3
    three = {model_file.PREFIX + name: torch.from_numpy(array) for name, array in vars(seen).items()}
    model_file.write(old, "encoder", three, {})
    assert model_file.read(old, "encoder")[0]["format_version"] == 1
    for path in (new, old):
        read = model_file.read_pretraining_set(path)
        assert read is not None
        assert read.tolist() == seen.packed().tolist()
