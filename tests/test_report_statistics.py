"""The numbers of a report against plain loops, scipy's other bootstrap, normal theory, and known distributions."""

import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from conftest import PEROVSKITE, ROCKSALT_CUBE, cell, put_together
from crysldnet.artifacts.calibration import reliability
from crysldnet.data.elements import SYMBOLS
from crysldnet.html.structure_drawing import draw_structure
from crysldnet.tools.report.figures import parity, svg
from crysldnet.tools.report.predictions import Predictions, read_predictions
from crysldnet.tools.report.statistics import (
    CalibrationOfRun,
    bootstrap,
    compare,
    errors_by_element,
    errors_by_size,
    metrics,
)


def errors_of_two_runs(seed: int, n: int = 400, shift: float = 0.0) -> np.ndarray:
    """Errors of two runs that find the same crystals hard."""
    rng = np.random.default_rng(seed)
    hard = rng.gamma(1.0, 0.1, n)
    return np.abs(np.stack([hard + rng.normal(0, 0.02, n), hard + rng.normal(shift, 0.02, n)]))


def predictions(errors: np.ndarray, ids: list[str] | None = None) -> Predictions:
    ids = ids or [f"id{i}" for i in range(len(errors))]
    return Predictions("gap", "eV", ids, np.zeros(len(errors)), errors)


def test_intervals_are_those_of_a_plain_loop_of_resamples() -> None:
    errors = errors_of_two_runs(0)
    low, high, other_sign = bootstrap(errors, 4000, seed=1)
    rng = np.random.default_rng(99)
    means, differences = [], []
    for _ in range(4000):
        rows = rng.integers(0, errors.shape[1], errors.shape[1])
        means.append(errors[:, rows].mean(axis=1))
        differences.append(errors[1, rows].mean() - errors[0, rows].mean())
    noise = 0.25 * np.std(differences)
    assert low[:2] == pytest.approx(np.quantile(means, 0.025, axis=0), abs=0.25 * np.std(means))
    assert high[:2] == pytest.approx(np.quantile(means, 0.975, axis=0), abs=0.25 * np.std(means))
    assert low[3] == pytest.approx(np.quantile(differences, 0.025), abs=noise)
    assert high[3] == pytest.approx(np.quantile(differences, 0.975), abs=noise)
    observed = np.sign(errors[1].mean() - errors[0].mean())
    assert other_sign[1] == pytest.approx(np.mean(np.sign(differences) != observed), abs=0.03)


def test_intervals_agree_with_scipys_corrected_bootstrap_and_with_normal_theory() -> None:
    errors = errors_of_two_runs(3, n=800, shift=0.004)
    low, high, _ = bootstrap(errors, 4000, seed=0)

    def difference(one: np.ndarray, other: np.ndarray, axis: int) -> np.ndarray:
        return other.mean(axis=axis) - one.mean(axis=axis)

    corrected = stats.bootstrap(
        tuple(errors), difference, paired=True, vectorized=True, n_resamples=4000, method="BCa", rng=5
    ).confidence_interval
    spread = (errors[1] - errors[0]).std(ddof=1) / math.sqrt(800)
    assert (low[3], high[3]) == pytest.approx((corrected.low, corrected.high), abs=0.2 * spread)
    middle = (errors[1] - errors[0]).mean()
    assert (low[3], high[3]) == pytest.approx((middle - 1.96 * spread, middle + 1.96 * spread), abs=0.2 * spread)
    apart = stats.bootstrap(
        tuple(errors), difference, vectorized=True, n_resamples=1000, method="percentile", rng=5
    ).confidence_interval
    assert apart.high - apart.low > 3 * (high[3] - low[3])  # not paired, it would see no difference between such runs


def test_intervals_hold_the_true_difference_as_often_as_they_say() -> None:
    rng = np.random.default_rng(10_000)
    hard, noise = rng.gamma(1.0, 0.1, 1_000_000), rng.normal(0, 0.02, (2, 1_000_000))
    true = np.abs(hard + noise[1] + 0.01).mean() - np.abs(hard + noise[0]).mean()
    held = 0
    for seed in range(200):
        low, high, _ = bootstrap(errors_of_two_runs(seed, n=100, shift=0.01), 300, seed)
        held += bool(low[3] <= true <= high[3])
    assert 0.90 <= held / 200 <= 0.99


def test_the_same_run_twice_differs_in_nothing_and_a_better_one_does() -> None:
    errors = errors_of_two_runs(0)[0]
    again = compare("gap", [(0, predictions(errors)), (1, predictions(errors.copy()))], 300, 0).runs[1]
    assert (again.difference, again.difference_interval) == (0.0, (0.0, 0.0))
    better = compare("gap", [(0, predictions(errors)), (1, predictions(errors * 0.5))], 300, 0).runs[1]
    assert better.difference == pytest.approx(-errors.mean() / 2)
    assert better.difference_interval[1] < 0
    assert better.other_sign == 0.0


def test_pairs_are_found_by_id_whatever_the_order() -> None:
    errors = errors_of_two_runs(0)[0]
    ids = [f"id{i}" for i in range(len(errors))]
    order = np.random.default_rng(0).permutation(len(errors))
    shuffled = predictions(errors[order], [ids[i] for i in order])
    found = compare("gap", [(0, predictions(errors, ids)), (1, shuffled)], 300, 0).runs[1]
    assert found.difference_interval == pytest.approx((0.0, 0.0), abs=1e-12)
    mixed = compare("gap", [(0, predictions(errors, ids)), (1, predictions(errors[order], ids))], 300, 0).runs[1]
    assert mixed.difference_interval[1] > 1e-3


def test_errors_by_element_and_size_are_those_of_a_plain_loop(starter) -> None:  # type: ignore[no-untyped-def]
    crystals = starter.crystals.take(np.arange(300))
    errors = np.random.default_rng(0).gamma(1, 1, 300)
    errors[::7] = np.nan
    own: dict[str, list[float]] = {}
    for i in range(300):
        numbers = crystals.numbers[crystals.ptr[i] : crystals.ptr[i + 1]].tolist()
        for symbol in {SYMBOLS[z] for z in numbers} if not math.isnan(errors[i]) else ():
            own.setdefault(symbol, []).append(errors[i])
    found = errors_by_element(errors, crystals)
    assert {s: n for s, (_, n) in found.items()} == {s: len(e) for s, e in own.items()}
    assert {s: m for s, (m, _) in found.items()} == pytest.approx({s: sum(e) / len(e) for s, e in own.items()})
    groups = errors_by_size(errors, crystals.sizes)
    assert sum(g.count for g in groups) == int((~np.isnan(errors)).sum())
    assert len(groups) > 3
    for before, after in pairwise(groups):
        assert before.high < after.low
    for g in groups:
        inside = [e for e, n in zip(errors, crystals.sizes, strict=True) if g.low <= n <= g.high and not math.isnan(e)]
        assert (g.count, g.mean) == (len(inside), pytest.approx(np.mean(inside)))
        assert g.standard_error == pytest.approx(stats.sem(inside))


def test_true_standard_deviations_are_calibrated_and_halved_ones_are_not() -> None:
    rng = np.random.default_rng(0)
    std = rng.uniform(0.1, 2.0, 20_000)
    errors = rng.normal(0, std)
    good = CalibrationOfRun.of(Predictions("gap", "eV", [""] * len(std), np.zeros(len(std)), errors, std))
    bad = CalibrationOfRun.of(Predictions("gap", "eV", [""] * len(std), np.zeros(len(std)), errors, std / 2))
    assert good is not None
    assert bad is not None
    assert good.area < 0.01
    assert good.coverage == pytest.approx({0.5: 0.5, 0.8: 0.8, 0.95: 0.95}, abs=0.01)
    normal = NormalDist()
    for level, covered in bad.coverage.items():
        assert covered == pytest.approx(2 * normal.cdf(normal.inv_cdf((1 + level) / 2) / 2) - 1, abs=0.01)
    assert bad.area > 0.1


def test_a_standard_deviation_of_zero_holds_only_what_is_right() -> None:
    found = reliability(np.array([0.0, 1.0, 1.0]), np.array([0.0, 0.0, 10.0]), np.array([0.95]))
    assert found.tolist() == [pytest.approx(2 / 3)]


def test_constant_targets_have_no_r2_and_unknown_ones_no_metrics() -> None:
    constant = Predictions("gap", "eV", ["a", "b"], np.zeros(2), np.ones(2))
    assert metrics(constant) == {"MAE": 1.0, "RMSE": 1.0}
    assert metrics(Predictions("gap", "eV", ["a"], np.array([np.nan]), np.ones(1))) == {}


def test_many_points_are_drawn_as_a_density() -> None:
    rng = np.random.default_rng(0)

    def size(n: int) -> int:
        true = rng.normal(size=n)
        p = Predictions("gap", "eV", [""] * n, true, true + rng.normal(size=n) / 5)
        return len(svg(parity(p, "#2f6db3"), f"parity{n}", "parity"))

    assert size(20_000) < 300_000
    assert size(1_000) > 2 * size(100)


def test_atoms_on_faces_edges_and_corners_are_drawn_wherever_they_repeat() -> None:
    def circles(c) -> int:  # type: ignore[no-untyped-def]
        one = put_together([c])
        return draw_structure(one.lattice[0], one.numbers, one.frac_coords).count("<circle")

    assert circles(PEROVSKITE) == 8 + 1 + 6
    assert circles(ROCKSALT_CUBE) == 14 + 13
    assert circles(cell(np.eye(3) * 3.9, [38], [[0.3, 0.3, 0.3]])) == 1
    assert circles(cell(np.eye(3) * 3.9, [38], [[0.999, 0.3, 0.3]])) == 2
    one = put_together([PEROVSKITE])
    drawn = draw_structure(one.lattice[0], one.numbers, one.frac_coords)
    assert drawn.count("<line") == 12


@pytest.mark.parametrize("names", [("222", "m-3m"), ("1", "2")])
def test_classes_whose_names_look_like_numbers_are_classes(tmp_path, names):
    one, two = names
    file = tmp_path / "predictions_test.csv"
    rows = [f"a,group,{one},{one},,,0.9", f"b,group,{two},{one},,,0.6", f"c,group,,{two},,,0.6"]
    file.write_text("\n".join(["material_id,target,true,prediction,unit,std,probability", *rows]) + "\n")
    found = read_predictions(file, {})["group"]
    assert found.classes == [one, two]
    np.testing.assert_array_equal(found.errors, [0.0, 1.0, np.nan])
