"""Conformal intervals cover what they promise, standard deviations are scaled, and unlike crystals are told."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import crysldnet
from crysldnet import finetune
from crysldnet.artifacts.calibration import (
    Calibration,
    TargetCalibration,
    check,
    conformal_quantile,
    miscalibration_area,
    reliability,
)
from crysldnet.artifacts.ood import TrainingSet
from crysldnet.data.datasets import open_store
from crysldnet.data.store import CrystalStore
from tiny import finetune_config

LEVELS = (0.5, 0.8, 0.9, 0.95)


@pytest.fixture(scope="module")
def real(starter: CrystalStore) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Errors and standard deviations [n] of formation energies that weren't trained on.

    The model is least squares on the fractions of the elements, the spread that of ten resamplings of its training set:
    far too small, since it knows nothing of the structures.
    """
    crystals, splits = starter.crystals, starter.texts_of("split")
    fractions = np.zeros((len(crystals), 119))
    np.add.at(fractions, (crystals.crystal, crystals.numbers), 1.0)
    fractions /= crystals.sizes[:, None]
    y = starter.numbers_of("formation_energy_per_atom")
    train, rest = np.flatnonzero(splits == "train"), np.flatnonzero(splits != "train")
    rng = np.random.default_rng(0)
    predicted = []
    for _ in range(10):
        rows = rng.choice(train, len(train))
        x = fractions[rows]
        weights = np.linalg.solve(x.T @ x + 0.1 * np.eye(119), x.T @ y[rows])
        predicted.append(fractions[rest] @ weights)
    return np.mean(predicted, axis=0) - y[rest], np.std(predicted, axis=0)


def coverages(errors: NDArray, std: NDArray | None, level: float, count: int, splits: int = 300) -> NDArray:
    """Calibrate on ``count`` crystals chosen at random and return the coverage of the others, for each split."""
    rng, found = np.random.default_rng(1), []
    for _ in range(splits):
        order = rng.permutation(len(errors))
        one, other = order[:count], order[count:]
        fitted = TargetCalibration.of(errors[one], None if std is None else std[one])
        half = fitted.half_width(level, None if std is None else std[other], len(other))
        found.append((np.abs(errors[other]) <= half).mean())
    return np.array(found)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("count", [25, 200])
@pytest.mark.parametrize("normalised", [False, True])
def test_conformal_intervals_cover_real_crystals_as_often_as_promised(real, level, count, normalised):
    errors, std = real
    found = coverages(errors, std if normalised else None, level, count)
    sampling = 4 * found.std() / math.sqrt(len(found))
    scored = count // 2 if normalised and count >= 40 else count
    assert level - sampling <= found.mean() <= level + 1 / (scored + 1) + sampling


def test_a_spread_that_is_nearly_zero_for_some_does_not_widen_all_the_others(real):
    """As of two models that happen to agree: scaled alone, the median interval would be many times too wide."""
    errors, std = real
    few = np.random.default_rng(3).random(len(std)) < 0.05
    std = np.where(few, 1e-4 * std, std)
    fitted = TargetCalibration.of(errors, std)
    assert fitted.floor > 0
    assert np.median(fitted.std(std, np.ones_like(std))) < 2 * np.sqrt(np.mean(errors**2))
    assert np.median(std) * np.sqrt(np.mean((errors / std) ** 2)) > 20 * np.sqrt(np.mean(errors**2))
    plain = TargetCalibration.of(errors, None).half_width(0.9, None, 1)[0]
    assert fitted.half_width(0.9, std, len(std)).mean() < 1.3 * plain


def test_standard_deviations_that_were_not_calibrated_fail_the_same_test(real):
    errors, std = real
    for level in LEVELS:
        half = NormalDist().inv_cdf((1 + level) / 2) * std
        assert (np.abs(errors) <= half).mean() < level - 0.25
    about = check(errors, std)
    assert about["miscalibration_area"] > 0.25
    assert about["std_scale"] > 1


def test_scaling_brings_the_standard_deviations_closer_to_the_errors(real):
    about = check(*real)
    assert about["miscalibration_area_scaled"] < 0.5 * about["miscalibration_area"]
    for level in (0.5, 0.8, 0.95):
        assert about[f"coverage_{100 * level:g}"] == pytest.approx(level, abs=0.03)


def test_an_interval_without_the_finite_sample_correction_would_cover_too_little(real):
    errors, _ = real
    rng, plain, corrected = np.random.default_rng(2), [], []
    for _ in range(500):
        order = rng.permutation(len(errors))
        one, other = np.abs(errors[order[:19]]), np.abs(errors[order[19:]])
        plain.append((other <= np.quantile(one, 0.9)).mean())
        corrected.append((other <= conformal_quantile(one, 0.9)).mean())
    assert np.mean(plain) < 0.885
    assert np.mean(corrected) > 0.895


def test_the_conformal_quantile_is_the_order_statistic_of_numpy():
    rng = np.random.default_rng(0)
    for n in (9, 10, 19, 20, 99, 100, 250):
        scores = rng.exponential(size=n)
        for level in LEVELS:
            rank = math.ceil(round((n + 1) * level, 9))
            expected = np.inf if rank > n else np.quantile(scores, rank / n, method="inverted_cdf")
            assert conformal_quantile(scores, level) == expected


@pytest.mark.parametrize(
    ("n", "level", "finite"), [(8, 0.9, False), (9, 0.9, True), (18, 0.95, False), (0, 0.5, False)]
)
def test_an_interval_needs_enough_crystals(n, level, finite):
    assert math.isfinite(conformal_quantile(np.arange(n, dtype=float), level)) == finite


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_reliability_of_normal_errors_is_the_closed_form(factor):
    normal = NormalDist()
    errors = np.array([normal.inv_cdf(p) for p in (np.arange(20000) + 0.5) / 20000])
    expected = np.linspace(0.05, 0.95, 19)
    exact = [2 * normal.cdf(normal.inv_cdf((1 + p) / 2) * factor) - 1 for p in expected]
    assert np.allclose(reliability(errors, np.full(20000, factor), expected), exact, atol=2e-4)
    area = miscalibration_area(errors, np.full(20000, factor))
    assert area < 1e-3 if factor == 1.0 else area > 0.1


def test_unknown_values_and_a_standard_deviation_of_zero_do_no_harm():
    errors, std = np.array([1.0, np.nan, -2.0, 3.0]), np.array([1.0, 1.0, 0.0, np.nan])
    assert np.isfinite(TargetCalibration.of(errors, np.zeros(4)).std(np.zeros(2), np.ones(2))).all()
    fitted = TargetCalibration.of(errors, std)
    assert len(fitted.scores) == 2
    assert np.isfinite(fitted.half_width(0.5, std[:1], 1)).all()
    assert len(TargetCalibration.of(errors, None).scores) == 3
    assert check(errors, None) == {"crystals": 3.0}


def test_a_calibration_survives_its_file(real):
    errors, std = real
    kept = Calibration([TargetCalibration.of(errors, std), TargetCalibration.of(errors[:5], None, relative=True)])
    again = Calibration.from_tensors(kept.tensors())
    for one, other in zip(kept.targets, again.targets, strict=True):
        assert (one.scores == other.scores).all()
        assert one.scale == other.scale or math.isnan(one.scale)
        assert (one.floor, one.normalised, one.relative) == (other.floor, other.normalised, other.relative)
    assert math.isnan(again.targets[1].scale)
    assert [target.relative for target in again.targets] == [False, True]
    tensors = kept.tensors()
    earlier = Calibration.from_tensors({**tensors, "spread": tensors["spread"][:, :3]})
    assert not any(target.relative for target in earlier.targets), "intervals of earlier files were absolute"


@pytest.mark.parametrize("loss", ["l1", "laplace"])
def test_intervals_of_a_logarithm_reach_as_many_times_below_as_above(tmp_path, loss):
    config, values = finetune_config(
        f"runs={tmp_path}", "name=log", "data.path=embedded:matbench_phonons", "data.targets=[last_phdos_peak]",
        "target_types={last_phdos_peak: log}", "data.split.by=formula", "data.split.train_fraction=0.1", "epochs=1",
        f"loss={loss}", "data.max_crystal_atoms=20", "min_steps=150",
    )  # fmt: skip
    finetune.run(config, values)
    found = crysldnet.load(tmp_path / "finetune" / "log", device="cpu").predict("embedded:matbench_phonons")
    low, value, high = found.low[:, 0], found.values[:, 0], found.high[:, 0]
    assert np.allclose(high / value, value / low)
    assert (low > 0).all()
    assert high.std() > 100
    true = open_store("embedded:matbench_phonons").numbers_of("last_phdos_peak")
    assert 0.8 < ((low <= true) & (true <= high)).mean() < 0.97
    if loss == "laplace":
        assert np.isfinite(found.std).all()


def test_the_latent_distance_is_that_of_the_five_nearest_neighbors(starter):
    neighbors = pytest.importorskip("sklearn.neighbors")
    torch.manual_seed(0)
    features = torch.randn(200, 8) * torch.tensor([1.0, 10, 1, 1, 0.1, 1, 1, 0])
    known = TrainingSet.of(starter.crystals.take(np.arange(200)), features)
    scale = features.numpy().std(axis=0)
    scale[-1] = 1.0  # a dimension that never changes counts as it is
    there = neighbors.NearestNeighbors(n_neighbors=6).fit(features.numpy() / scale)
    unit = np.sort(there.kneighbors(features.numpy() / scale)[0][:, 1:].mean(axis=1))[100]
    asked = torch.randn(20, 8)
    expected = there.kneighbors(asked.numpy() / scale, n_neighbors=5)[0].mean(axis=1) / unit
    assert np.allclose(known.distance(asked), expected, rtol=1e-4)
    assert (known.distance(features) <= known.far).mean() > 0.98


def test_elements_that_the_training_set_lacks_are_named(starter):
    crystals = starter.crystals.take(np.arange(400))
    counts = np.bincount(crystals.numbers, minlength=119)
    gone = int(np.flatnonzero(counts)[np.argmin(counts[counts > 0])])
    has = np.array([gone in crystals.numbers[crystals.crystal == b] for b in range(400)])
    known = TrainingSet.of(crystals.take(np.flatnonzero(~has)), torch.randn(30, 4))
    for row in np.flatnonzero(has):
        assert len(known.unseen(crystals.numbers[crystals.crystal == row])) == 1
    assert known.unseen(crystals.numbers[crystals.crystal == np.flatnonzero(~has)[0]]) == []
    assert int(known.elements.max()) <= 400
    assert int(known.largest) == crystals.sizes[~has].max()


@pytest.mark.parametrize("count", [1, 2, 6])
def test_a_tiny_training_set_still_gives_distances(starter, count):
    known = TrainingSet.of(starter.crystals.take(np.arange(count)), torch.randn(count, 4))
    assert np.isfinite(known.distance(torch.randn(3, 4))).all()
