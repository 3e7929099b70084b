"""What is exported predicts as the library does, folds keep groups together, weights find the better member."""

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from crysldnet.errors import DataError
from crysldnet.tabular.kernel import (
    clipped,
    fit_kernel_ridge,
    fit_projection,
    group_residuals,
    matern,
    relevance_of,
    squared_distances,
)
from crysldnet.tabular.members import MEMBERS, blend_weights, fit_members, fit_models, group_folds, out_of_fold
from crysldnet.tabular.stack import from_arrays, to_arrays
from crysldnet.tabular.trees import Trees

ensemble = pytest.importorskip("sklearn.ensemble")


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 6)).astype(np.float32)
    y = np.stack([np.sin(2 * x[:, 0]) + x[:, 4], x[:, 1] * x[:, 2]], axis=1)
    return x, y, np.repeat(np.arange(45), 2)


def test_exported_forests_predict_as_scikit_learn(data):
    x, y, _ = data
    for kind in (ensemble.ExtraTreesRegressor, ensemble.RandomForestRegressor):
        forest = kind(15, random_state=0).fit(x, y)
        new = np.concatenate([x, 3 * x[:20] + 1])
        np.testing.assert_allclose(Trees.of_forest(forest).predict(new), forest.predict(new), rtol=1e-12, atol=1e-12)


def test_exported_trees_boosted_without_histograms_predict_as_scikit_learn(data):
    x, y = data[0].astype(np.float32), data[1]
    make = ensemble.GradientBoostingRegressor
    models = [make(n_estimators=20, subsample=0.7, max_features=0.3, random_state=0).fit(x, y[:, t]) for t in (0, 1)]
    expected = np.stack([model.predict(3 * x) for model in models], axis=1)
    np.testing.assert_allclose(Trees.of_gradient_boosting(models).predict(3 * x), expected, rtol=1e-12, atol=1e-12)


def test_exported_boosted_trees_predict_as_scikit_learn(data):
    x, y, _ = data
    models = [ensemble.HistGradientBoostingRegressor(max_iter=20, min_samples_leaf=3).fit(x, y[:, t]) for t in (0, 1)]
    expected = np.stack([model.predict(3 * x) for model in models], axis=1)
    np.testing.assert_allclose(Trees.of_boosting(models).predict(3 * x), expected, rtol=1e-12, atol=1e-12)


def test_kernel_ridge_equals_scikit_learns(data):
    kernel_ridge = pytest.importorskip("sklearn.kernel_ridge").KernelRidge
    x, y, groups = data
    model = fit_kernel_ridge(x, y, groups)
    z = clipped(x, model.shift, model.scale) * model.factor
    gram = matern(squared_distances(z, z))
    reference = kernel_ridge(alpha=model.ridge, kernel="precomputed").fit(gram, y - y.mean(axis=0))
    np.testing.assert_allclose(model.predict(x), reference.predict(gram) + y.mean(axis=0), rtol=1e-6, atol=1e-7)


def test_residuals_of_groups_left_out_equal_those_of_refits(data):
    x, y, groups = data
    cov = np.exp(-squared_distances(x, x) / 8) + 0.1 * np.eye(len(x))
    inverse = np.linalg.inv(cov)
    found = group_residuals(np.linalg.cholesky(inverse), inverse @ y, groups)
    for group in (0, 7):
        kept, held = np.flatnonzero(groups != group), np.flatnonzero(groups == group)
        predicted = cov[np.ix_(held, kept)] @ np.linalg.solve(cov[np.ix_(kept, kept)], y[kept])
        np.testing.assert_allclose(found[held], y[held] - predicted, rtol=1e-8)


def test_kernel_ridge_learns_better_where_relevance_is_known():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 12))
    y = np.sin(2 * x[:, :1]) + x[:, 1:2]
    errors = []
    for relevance in (None, relevance_of(np.arange(12) < 2)):
        model = fit_kernel_ridge(x[:150], y[:150], np.arange(150), relevance=relevance)
        errors.append(np.abs(model.predict(x[150:]) - y[150:]).mean())
    assert errors[1] < 0.5 * errors[0] < 0.5 * np.abs(y - y.mean()).mean()


def test_a_constant_column_changes_nothing(data):
    x, y, groups = data
    with_constant = np.concatenate([x, np.full((len(x), 1), 7.0)], axis=1)
    plain = fit_kernel_ridge(x, y, groups)
    other = fit_kernel_ridge(with_constant, y, groups)
    new = with_constant[:5] + np.array([0, 0, 0, 0, 0, 0, 1e3])
    np.testing.assert_allclose(other.predict(new), plain.predict(x[:5]), rtol=1e-6)


def test_models_survive_a_safetensors_file(data):
    x, y, groups = data
    for model in (fit_kernel_ridge(x, y, groups), Trees.of_forest(ensemble.ExtraTreesRegressor(5).fit(x, y))):
        arrays, plain = to_arrays(model, "member.0.")
        again = from_arrays(load(save(arrays)), json.loads(json.dumps(plain)), "member.0.")
        np.testing.assert_array_equal(again.predict(x), model.predict(x))
        arrays.popitem()
        with pytest.raises(DataError, match=r"'member.0.' is damaged"):
            from_arrays(arrays, plain, "member.0.")


def test_trees_that_lead_nowhere_are_refused(data):
    x, y, _ = data
    good = Trees.of_forest(ensemble.ExtraTreesRegressor(2, random_state=0).fit(x, y))
    arrays, plain = to_arrays(good, "")
    for name, value in (("left", 0), ("right", len(good.feature)), ("roots", -1)):
        changed = {**arrays, name: np.full_like(arrays[name], value)}
        with pytest.raises(DataError, match="aren't trees"):
            from_arrays(changed, plain, "")
    with pytest.raises(ValueError, match="features, but the trees ask for"):
        good.predict(x[:, :2])


def test_folds_keep_groups_together_and_are_even():
    groups = np.random.default_rng(0).integers(0, 40, 200)
    folds = group_folds(groups, 5)
    assert all(len(set(folds[groups == g])) == 1 for g in set(groups))
    assert np.ptp(np.bincount(folds)) <= 8
    with pytest.raises(ValueError, match="can't make 5 folds"):
        group_folds(np.zeros(10, np.int64), 5)


def test_out_of_fold_predictions_never_saw_their_fold():
    y = np.arange(20.0)
    folds = group_folds(np.repeat(np.arange(10), 2), 5)
    found = out_of_fold(
        lambda fitted, held: np.full((len(held), 1), len(set(fitted) & set(held))) + y[held, None], folds
    )
    np.testing.assert_array_equal(found[:, 0], y)


def test_weights_take_the_better_member_and_beat_both_where_errors_differ():
    rng = np.random.default_rng(0)
    y = rng.normal(size=400)
    good, other, bad = (y + scale * rng.normal(size=400) for scale in (0.3, 0.3, 3.0))
    y[::7] = np.nan
    weights = blend_weights(np.stack([good, other, bad], axis=1), y)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1)
    assert weights[2] < 0.02
    assert abs(weights[0] - weights[1]) < 0.15
    assert np.nanmean(np.abs(y - weights[0] * good - weights[1] * other)) < 0.85 * np.nanmean(np.abs(y - good))


def test_weights_do_not_depend_on_unit_or_offset():
    rng = np.random.default_rng(1)
    y = rng.normal(size=60)
    p = y[:, None] + np.array([0.2, 0.5]) * rng.normal(size=(60, 2))
    np.testing.assert_allclose(blend_weights(1000 * p + 5e4, 1000 * y + 5e4), blend_weights(p, y), atol=1e-3)


def test_few_crystals_leave_equal_members_almost_equal():
    y = np.array([0.0, 1.0, 2.0])
    p = np.stack([y + np.array([0.1, -0.1, 0.1]), y + np.array([-0.1, 0.1, 0.11])], axis=1)
    assert np.abs(blend_weights(p, y, caution=10) - 0.5).max() < 0.2


def test_members_predict_each_crystal_without_its_group(data):
    x, y, groups = data
    folds = group_folds(groups, 2)
    before = fit_members(x, y, groups, folds=folds)
    assert set(before.models) == set(before.out_of_fold) == set(MEMBERS)
    held = folds == 1
    changed = np.where(held[:, None], y + 100, y)
    after = fit_members(x, changed, groups, folds=folds)
    for name in MEMBERS:
        np.testing.assert_allclose(after.out_of_fold[name][held], before.out_of_fold[name][held], rtol=1e-9)
        assert np.abs(after.models[name].predict(x[held]) - before.models[name].predict(x[held])).min() > 10


def test_members_of_one_seed_are_the_same(data):
    x, y, groups = data
    first, again, other = (fit_models(x, y[:, :1], groups, seed=seed) for seed in (0, 0, 1))
    for name in MEMBERS:
        np.testing.assert_array_equal(first[name].predict(x), again[name].predict(x))
    assert (first["extra_trees"].predict(x + 0.1) != other["extra_trees"].predict(x + 0.1)).any()


def test_relevant_features_count_more_in_the_kernel():
    found = relevance_of(np.array([0.8, 0.2, 0.0]))
    assert found[0] > found[1] > found[2] > 0
    np.testing.assert_allclose(relevance_of(np.zeros(3)), 1.1)


def test_a_projection_equals_scikit_learns_and_survives_a_file():
    pca = pytest.importorskip("sklearn.decomposition").PCA
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 50)) + 0.01 * rng.normal(size=(40, 50))
    found = fit_projection(x, 3)
    z = clipped(x, found.shift, found.scale)
    np.testing.assert_allclose(np.abs(found(x)), np.abs(pca(3).fit_transform(z)), rtol=1e-6, atol=1e-8)
    arrays, plain = to_arrays(found, "p.")
    np.testing.assert_array_equal(from_arrays(load(save(arrays)), plain, "p.")(x), found(x))
    assert fit_projection(x[:10], 64)(x).shape == (40, 9)
