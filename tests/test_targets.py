"""Kinds of targets on real crystals: each is trained on what it says and refuses what it can't be."""

import csv
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from crysldnet import finetune, load
from crysldnet.artifacts import model_file
from crysldnet.artifacts.model_file import load_property_model
from crysldnet.build import build_dataclass
from crysldnet.data.datasets import open_store
from crysldnet.encoders.pddformer import PDDFormer
from crysldnet.errors import ConfigError, DataError
from crysldnet.finetune import FinetuneConfig
from crysldnet.graphs.batch import make_batch
from crysldnet.graphs.crystals import from_lists
from crysldnet.models.head import PropertyHead, PropertyModel
from crysldnet.models.predictor import Prediction
from crysldnet.models.references import fit_references
from crysldnet.models.targets import Bounded, Classes, Hurdle, Log, Number, make_target, make_type
from crysldnet.training.metrics import ClassificationScores, TargetMetrics
from tiny import finetune_config, subset

ENERGY, GAP = "formation_energy_per_atom", "band_gap"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Real crystals with columns of every kind, made from their own values."""
    path = subset(tmp_path_factory.mktemp("small") / "data.parquet", train=64, val=24, test=24)
    table = pq.read_table(path)
    gap = table[GAP].to_numpy()
    sizes = np.array([len(set(z)) for z in table["atomic_numbers"].to_pylist()])
    lattices = np.array(table["lattice"].to_pylist()).reshape(-1, 3, 3)
    atoms = np.array([len(z) for z in table["atomic_numbers"].to_pylist()])
    text = [None if i == 3 else "binary" if n < 3 else "ternary" if n == 3 else "more" for i, n in enumerate(sizes)]
    table = table.append_column("is_metal", pa.array(gap == 0))
    table = table.append_column("family", pa.array(text, pa.string()))
    table = table.append_column("n_elements", pa.array(sizes.clip(2, 4), pa.int32()))
    table = table.append_column("volume", pa.array(np.abs(np.linalg.det(lattices)) / atoms))
    pq.write_table(table, path)
    return path


def run(path, name, *arguments):
    config, values = finetune_config(f"runs={path}", f"name={name}", "data.batch_size=16", *arguments)
    assert finetune.run(config, values) == 0
    folder = path / "finetune" / name
    with (folder / "predictions_test.csv").open() as file:
        return folder, json.loads((folder / "summary.json").read_text()), list(csv.DictReader(file))


def test_all_kinds_of_targets_in_one_model(tmp_path, small):
    targets = f"data.targets=[{ENERGY},{GAP},volume,is_metal,family,n_elements]"
    types = f"target_types={{{GAP}: hurdle, volume: log, n_elements: classes}}"
    folder, summary, rows = run(tmp_path, "all", f"data.path={small}", targets, types, "epochs=2", "head=attention")
    model, info = load_property_model(folder)
    assert model.kinds == ["regression"] * 3 + ["binary", "multiclass", "multiclass"]
    assert model.classes[3:] == [["false", "true"], ["binary", "more", "ternary"], ["2", "3", "4"]]
    assert [t["type"] for t in info["target_types"]] == ["regression", "hurdle", "log", *["classification"] * 3]
    for metric in (f"mae/{ENERGY}", f"mae/{GAP}", "roc_auc/is_metal", "f1/family", "log_loss/n_elements"):
        assert math.isfinite(summary[f"test/{metric}"])
    assert "val/normalised_error" in summary
    of = {name: [row for row in rows if row["target"] == name] for name in info["targets"]}
    assert {row["prediction"] for row in of["is_metal"]} <= {"false", "true"}
    assert {row["true"] for row in of["family"]} <= {"binary", "ternary", "more"}
    assert all(0.33 < float(row["probability"]) <= 1 for row in of["family"])
    assert all(float(row["prediction"]) > 0 for row in of["volume"])
    right = np.mean([row["true"] == row["prediction"] for row in of["is_metal"]])
    assert summary["test/accuracy/is_metal"] == pytest.approx(right)
    mae = np.mean([abs(float(row["true"]) - float(row["prediction"])) for row in of["volume"]])
    assert summary["test/mae/volume"] == pytest.approx(mae, rel=1e-4)


def test_the_loaded_model_predicts_what_the_run_wrote(tmp_path, small):
    targets = [f"data.targets=[is_metal,{GAP}]", f"target_types={{{GAP}: hurdle}}", "loss=laplace"]
    folder, _, rows = run(tmp_path, "one", f"data.path={small}", *targets, "epochs=1")
    model, _ = load_property_model(folder)
    store = open_store(str(small))
    ids = store.ids.to_pylist()
    for row in rows[:6]:
        place = model.targets.index(row["target"])
        crystals = store.crystals.take(np.array([ids.index(row["material_id"])]))
        with torch.inference_mode():
            found = model.predict(make_batch(crystals, model.encoder.graph))
        assert isinstance(found, Prediction)
        if row["target"] == GAP:
            assert float(found.value[0, place]) == pytest.approx(float(row["prediction"]), rel=1e-3, abs=1e-5)
            assert float(found.std[0, place]) == pytest.approx(float(row["std"]), rel=1e-3)
        else:
            assert model.classes[place][int(found.value[0, place])] == row["prediction"]
            assert float(found.probability[0, place].max()) == pytest.approx(float(row["probability"]), rel=1e-3)
            assert row["std"] == ""


def test_a_bounded_target_and_its_intervals_stay_within_its_bounds(tmp_path, small):
    table = pq.read_table(small)
    cut = pa.array(table[ENERGY].to_numpy().clip(-1.7, -0.3))
    pq.write_table(table.append_column("cut", cut), tmp_path / "cut.parquet")
    given = [f"data.path={tmp_path}/cut.parquet", "data.targets=[cut]", "target_types={cut: [-1.7, -0.3]}"]
    folder, _, rows = run(tmp_path, "cut", *given, "epochs=40", "optimizer.lr=3e-3")
    predicted = {float(row["prediction"]) for row in rows}
    assert max(predicted) == np.float32(-0.3), "values at a bound are met exactly"
    assert len(predicted) > 5
    found = load(folder).predict(str(tmp_path / "cut.parquet"), interval=0.95)
    assert found.low.min() == -1.7
    assert found.high.max() == -0.3
    assert (found.low <= found.values).all()
    assert (found.values <= found.high).all()


def test_classes_and_gaps_are_learned_by_heart(tmp_path, small):
    table = pq.read_table(small)
    pq.write_table(
        table.slice(0, 32).drop_columns(["split"]).append_column("split", [["train"] * 32]), tmp_path / "a.parquet"
    )
    targets = ["data.targets=[is_metal,n_elements,band_gap]", "target_types={n_elements: classes, band_gap: hurdle}"]
    arguments = [f"data.path={tmp_path}/a.parquet", *targets, "epochs=150", "optimizer.lr=3e-3", "encoder.dropout=0"]
    config, values = finetune_config(*arguments, "data.batch_size=16")
    result = finetune.train(config, values, tmp_path / "run")
    batch = make_batch(result.data.store.crystals, result.model.encoder.graph)
    with torch.inference_mode():
        found = result.model(batch).numpy()
    true = result.data.target_values
    assert (found[:, :2] == true[:, :2]).all()
    assert ((found[:, 2] == 0) == (true[:, 2] == 0)).all()
    assert np.abs(found[:, 2] - true[:, 2]).mean() < 0.1 * true[:, 2].std()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ([f"target_types={{{ENERGY}: log}}"], DataError, r"must be over 0, but \S+ \(row \d+\) has -"),
        (["data.targets=[band_gap]", "target_types={band_gap: log}"], DataError, r"but \S+ \(row \d+\) has 0 \("),
        ([f"target_types={{{ENERGY}: hurdle}}"], DataError, "must be 0 or more"),
        ([f"target_types={{{ENERGY}: [0, null]}}"], DataError, "must be 0 or more"),
        (["data.targets=[band_gap]", "target_types={band_gap: [0, 1]}"], DataError, r"must be from 0 to 1, but \S+"),
        (["data.targets=[band_gap]", "target_types={band_gap: [1, 0]}"], ConfigError, "band_gap: bounds must be two"),
        (["data.targets=[band_gap]", "target_types={band_gap: [null, null]}"], ConfigError, "the lower first"),
        (["data.targets=[band_gap]", "target_types={band_gap: [0, 1, 2]}"], ConfigError, "bounds are two"),
        (["data.targets=[band_gap]", "target_types={band_gap: bounded}"], ConfigError, "target_types"),
        ([f"target_types={{{ENERGY}: classes}}"], DataError, "a class is a whole number"),
        (["data.targets=[formula]"], DataError, "not numbers, and too many for classes"),
        (["data.targets=[family]", "target_types={family: log}"], DataError, "holds string, not numbers"),
        ([f"target_types={{{ENERGY}_: log}}"], ConfigError, f"did you mean '{ENERGY}'"),
        (["atomic_references=[band_gap]"], ConfigError, "not among data.targets"),
        (["data.targets=[is_metal]", "head=sum"], ConfigError, "adds up over atoms, which 'is_metal'"),
        (
            ["data.targets=[band_gap]", "atomic_references=[band_gap]", "target_types={band_gap: hurdle}"],
            ConfigError,
            "atomic_references: 'band_gap' is treated as 'hurdle'",
        ),
        (["mode=frozen"], ConfigError, "needs a pretrained encoder"),
        (["layer_decay=0"], ConfigError, "layer_decay"),
        (["patience=0"], ConfigError, "patience"),
        (["layer_decay=0.5", "strategy=fsdp"], ConfigError, "sharding joins layers"),
        (["data.targets=[is_metal]", "ensemble=500", "ensemble_by=folds"], ConfigError, "can't make 500 parts"),
    ],
)
def test_a_wrong_target_is_refused_before_a_folder_is_made(tmp_path, small, arguments, error, says):
    with pytest.raises(error, match=says):
        run(tmp_path, "wrong", f"data.path={small}", "epochs=1", *arguments)
    assert not (tmp_path / "finetune" / "wrong").exists()


def test_one_class_alone_is_refused(tmp_path, small):
    table = pq.read_table(small)
    splits = np.array(table["split"].to_pylist())
    metal = table["is_metal"].to_numpy(zero_copy_only=False) | (splits == "train")
    place = table.column_names.index("is_metal")
    pq.write_table(table.set_column(place, "is_metal", pa.array(metal)), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="every training crystal has is_metal=true"):
        run(tmp_path, "wrong", f"data.path={tmp_path}/a.parquet", "data.targets=[is_metal]", "epochs=1")


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_a_number_is_undone_by_its_normalisation():
    center, scale = column(2.0, 2.0), column(3.0)[0]
    output = column(-1.0, 0.5)[:, None]
    for kind, expected in ((Number(), [-1.0, 3.5]), (Bounded(low=0.0), [0.0, 3.5]), (Log(), np.exp([-1.0, 3.5]))):
        np.testing.assert_allclose(kind.estimate(output, center, scale).value, expected)
    true = column(-1.0, 3.5)
    assert Number().loss(output, true, center, scale, "l1").abs().max() < 1e-12
    assert Log().loss(output, true.exp(), center, scale, "l1").abs().max() < 1e-12


def test_below_a_true_zero_a_bounded_number_costs_nothing_and_a_plain_one_does():
    center, scale, true = column(1.0, 1.0, 1.0), column(2.0)[0], column(0.0, 0.0, 1.0)
    output = column(-3.0, 0.5, -3.0)[:, None].requires_grad_()
    loss = make_type("non_negative", None, None).loss(output, true, center, scale, "l1")
    assert loss.tolist() == [0.0, 1.0, 3.0]
    loss.sum().backward()
    assert output.grad[:, 0].tolist() == [0.0, 1.0, -1.0]
    assert Number().loss(output, true, center, scale, "l1")[0] > 0


def test_both_bounds_cut_predictions_and_cost_nothing_beyond():
    kind = make_type([0, 1], None, None)
    center, scale = column(0.5, 0.5, 0.5, 0.5), column(0.25)[0]
    output = column(-4.0, 4.0, 4.0, -4.0)[:, None]  # -0.5, 1.5, 1.5, -0.5
    assert kind.estimate(output, center, scale).value.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert kind.loss(output, column(0.0, 1.0, 0.0, 0.5), center, scale, "l1").tolist() == [0.0, 0.0, 6.0, 4.0]
    wrong, wanted = kind.wrong(np.array([-0.1, 0.0, 1.0, 1.1]))
    assert (wrong.tolist(), wanted) == ([True, False, False, True], "from 0 to 1")
    wrong, wanted = make_type([None, 0.5], None, None).wrong(np.array([-9.0, 0.6]))
    assert (wrong.tolist(), wanted) == ([False, True], "0.5 or less")


def test_the_two_parts_learn_apart_and_the_gate_gives_exact_zeros():
    kind = Hurdle()
    assert np.isnan(kind.on_line(np.array([0.0, 2.0]))).tolist() == [True, False]
    output = column(2.0, -2.0, -2.0)[:, None].repeat(1, 2).requires_grad_()
    true, center, scale = column(3.0, 0.0, 3.0), column(1.0, 1.0, 1.0), column(2.0)[0]
    loss = kind.loss(output, true, center, scale, "l1")
    softplus = math.log1p(math.exp(-2.0))
    assert loss.tolist() == pytest.approx([softplus + 1.0, softplus, 2.0 + softplus + 3.0])
    loss.sum().backward()
    assert output.grad[1, 1] == 0  # a metal says nothing of the size of a gap
    assert kind.estimate(output, center, scale).value.tolist() == [5.0, 0.0, 0.0]


def test_the_gate_has_a_smaller_absolute_error_than_the_expected_value():
    """Of ten crystals with p = 0.3 three have a gap of 2 eV: 0 is wrong by 0.6 eV on average, p · 2 by 0.84."""
    true = np.array([2.0] * 3 + [0.0] * 7)
    output = torch.tensor([[math.log(0.3 / 0.7), 0.0]] * 10, dtype=torch.float64)
    gated = Hurdle().estimate(output, torch.full((10,), 2.0), torch.tensor(1.0)).value.numpy()
    assert np.abs(gated - true).mean() == pytest.approx(0.6)
    assert np.abs(0.3 * 2.0 - true).mean() == pytest.approx(0.84)


@pytest.mark.parametrize(("spread", "name"), [("laplace", "laplace"), ("gaussian", "norm")])
def test_the_loss_with_a_spread_is_the_likelihood_that_scipy_has(spread, name):
    distribution = getattr(pytest.importorskip("scipy.stats"), name)
    rng = np.random.default_rng(0)
    mean, log_scale, true = rng.normal(size=5), rng.normal(size=5), rng.normal(size=5)
    kind, zero, one = Number(spread), column(*[0.0] * 5), column(1.0)[0]
    output = torch.tensor(np.stack([mean, log_scale], axis=1))
    expected = -distribution.logpdf(true, mean, np.exp(log_scale))
    np.testing.assert_allclose(kind.loss(output, torch.tensor(true), zero, one, spread), expected)
    three = column(3.0)[0]
    np.testing.assert_allclose(kind.estimate(output, zero, three).std, 3.0 * distribution.std(mean, np.exp(log_scale)))


def test_a_spread_of_a_two_part_target_is_that_of_the_mixture():
    p, value, std = 0.7, 2.0, 0.4
    output = torch.tensor([[math.log(p / (1 - p)), value, math.log(std)]], dtype=torch.float64)
    found = Hurdle("gaussian").estimate(output, column(0.0), column(1.0)[0])
    rng = np.random.default_rng(0)
    draws = np.where(rng.random(200_000) < p, rng.normal(value, std, 200_000), 0.0)
    assert float(found.std) == pytest.approx(draws.std(), rel=0.01)


def test_the_spread_follows_the_noise():
    """Two kinds of crystals, one measured ten times as badly: the model says so, and a constant one can't."""
    rng = np.random.default_rng(0)
    noisy = torch.arange(2000) % 2 == 1
    true = torch.tensor(rng.normal(size=2000)) * torch.where(noisy, 1.0, 0.1)
    weights = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)  # one-hot kind to mean and log scale
    optimizer = torch.optim.Adam([weights], lr=0.05)
    kind = Number("laplace")
    for _ in range(300):
        optimizer.zero_grad()
        output = weights[noisy.long()]
        kind.loss(output, true, torch.zeros(2000), torch.tensor(1.0), "laplace").mean().backward()
        optimizer.step()
    std = kind.estimate(weights.detach(), torch.zeros(2), torch.tensor(1.0)).std
    assert 6 < float(std[1] / std[0]) < 14


@pytest.mark.parametrize(
    "kind",
    [Number("laplace"), Log(), Bounded("gaussian", low=0.0), Bounded(high=0.5), Hurdle(), Classes(("a", "b", "c"))],
)
def test_a_kind_is_made_again_from_what_it_says_of_itself(kind):
    assert make_target(json.loads(json.dumps(kind.describe()))) == kind


def test_a_file_from_before_there_were_two_bounds_is_read():
    before = {"type": "non_negative", "spread": "laplace"}
    assert make_target(before) == Bounded("laplace", low=0.0)
    assert Bounded("laplace", low=0.0).describe() == before, "an unfinished run knows its checkpoints by it"


def model_with(readout, **more):
    torch.manual_seed(0)
    encoder = PDDFormer(width=16, layers=2, k=6, n_distances=8, n_basis=8)
    head = PropertyHead(width=16, outputs=1, readout=readout)
    return PropertyModel(encoder=encoder, head=head, targets=["e"], units=[""], **more).eval()


def cell_and_double():
    cell = (np.eye(3) * 4.0, np.array([11, 17], np.uint8), np.array([[0, 0, 0], [0.5, 0.5, 0.5]]))
    twice = np.array([[0, 0, 0], [0.25, 0.5, 0.5], [0.5, 0, 0], [0.75, 0.5, 0.5]])
    double = (cell[0] * [[2], [1], [1]], np.array([11, 17, 11, 17], np.uint8), twice)
    return from_lists(*zip(cell, double, strict=True))


@pytest.mark.parametrize(("readout", "factor"), [("attention", 1.0), ("atoms", 1.0), ("sum", 2.0)])
def test_attention_is_intensive_and_the_sum_extensive_with_element_energies_too(readout, factor):
    model = model_with(readout, referenced=["e"])
    model.references.copy_(torch.linspace(-3, 2, 119)[None])
    if model.head.attention is not None:
        torch.nn.init.normal_(model.head.attention.score.weight)
    one, two = model(make_batch(cell_and_double(), model.encoder.graph))[:, 0]
    assert torch.allclose(two, factor * one, rtol=1e-4)


def test_attention_begins_as_the_mean_and_then_is_not():
    model, mean = model_with("attention"), model_with("mean")
    mean.load_state_dict({k: v for k, v in model.state_dict().items() if "attention" not in k})
    batch = make_batch(open_store("embedded:mp_starter").crystals.take(np.arange(6)), model.encoder.graph)
    torch.testing.assert_close(model(batch), mean(batch))
    torch.nn.init.normal_(model.head.attention.score.weight)
    assert not torch.allclose(model(batch), mean(batch))


@pytest.mark.parametrize("total", [True, False])
def test_element_energies_are_found_again(total):
    crystals = open_store("embedded:mp_starter").crystals.take(np.arange(2000))
    of_element = np.random.default_rng(0).normal(size=119)
    each = of_element[crystals.numbers]
    sums = np.bincount(crystals.crystal, each, len(crystals))
    found = fit_references(crystals, sums if total else sums / crystals.sizes, total=total)
    seen = np.unique(crystals.numbers)
    np.testing.assert_allclose(found.of_element[seen], of_element[seen], atol=5e-3)
    unseen = np.setdiff1d(np.arange(119), seen)
    assert len(unseen)
    np.testing.assert_allclose(
        found.of_element[unseen], sums.sum() / crystals.sizes.sum() if total else (sums / crystals.sizes).mean()
    )


def test_element_energies_of_few_crystals_do_not_fit_noise():
    store = open_store("embedded:mp_starter")
    energy, crystals = store.numbers_of("formation_energy_per_atom"), store.crystals
    energy = energy[: len(crystals)]
    order = np.random.default_rng(0).permutation(np.flatnonzero(~np.isnan(energy)))
    few, others = order[:40], order[40:1000]
    found = fit_references(crystals.take(few), energy[few], total=False)
    test = crystals.take(others)
    predicted = np.bincount(test.crystal, found.of_element[test.numbers], len(test)) / test.sizes
    error, plain = (np.abs(energy[others] - guess).mean() for guess in (predicted, energy[few].mean()))
    assert error < 0.9 * plain


def test_with_element_energies_a_composition_is_learned_before_the_first_step(tmp_path, small):
    """Energies that are sums over atoms alone are right without training; without the option they are not."""
    table = pq.read_table(small)
    of_element = np.random.default_rng(0).normal(size=119)
    per_atom = np.array([of_element[z].mean() for z in table["atomic_numbers"].to_pylist()])
    pq.write_table(table.append_column("energy", pa.array(per_atom)), tmp_path / "a.parquet")
    arguments = [f"data.path={tmp_path}/a.parquet", "data.targets=[energy]", "epochs=1", "optimizer.lr=1e-30"]
    arguments += ["data.split.by=random", "data.split.fractions=[0.9,0.1,0.0]"]
    errors = {}
    for name, more in (("with", ["atomic_references=[energy]"]), ("without", [])):
        config, values = finetune_config(*arguments, *more)
        errors[name] = finetune.train(config, values, tmp_path / name).metrics["val/rmse"]
    assert errors["with"] < 0.5 * errors["without"]


def test_class_scores_equal_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for classes in (2, 4):
        probability = rng.dirichlet(np.ones(classes), 60)
        true = np.array([rng.choice(classes, p=p) for p in probability]).astype(float)
        holes = true.copy()
        holes[:11] = np.nan
        scores = ClassificationScores(classes)
        for part in range(0, 60, 7):
            scores.update(torch.tensor(probability[part : part + 7]), torch.tensor(holes[part : part + 7]))
        found = {name: float(value) for name, value in scores.compute().items()}
        p, y = probability[11:], true[11:].astype(int)
        assert found["accuracy"] == pytest.approx(metrics.accuracy_score(y, p.argmax(1)))
        assert found["log_loss"] == pytest.approx(metrics.log_loss(y, p, labels=range(classes)), rel=1e-5)
        average = "binary" if classes == 2 else "macro"
        assert found["f1"] == pytest.approx(metrics.f1_score(y, p.argmax(1), average=average), rel=1e-5)
        if classes == 2:
            assert found["roc_auc"] == pytest.approx(metrics.roc_auc_score(y, p[:, 1]), rel=1e-5)
            assert found["roc_auc"] != pytest.approx(metrics.roc_auc_score(y, p.argmax(1)), rel=1e-3)


def test_a_score_of_nothing_or_of_one_class_is_not_a_number():
    scores = ClassificationScores(2)
    scores.update(torch.tensor([[0.2, 0.8]]), torch.tensor([math.nan]))
    assert all(math.isnan(value) for value in scores.compute().values())
    scores.update(torch.tensor([[0.2, 0.8]]), torch.tensor([1.0]))
    assert math.isnan(scores.compute()["roc_auc"])
    assert float(scores.compute()["accuracy"]) == 1.0


def test_the_best_epoch_is_chosen_by_what_the_targets_are():
    names, two = ["a", "b"], Classes(("x", "y"))
    assert TargetMetrics(names, [Number(), Log()]).selection == "normalised_mae"
    assert TargetMetrics(names, [two, two]).selection == "normalised_log_loss"
    assert TargetMetrics(names, [Number(), two]).selection == "normalised_error"
    assert TargetMetrics(names, [Number("laplace"), two]).selection == "nll"


def test_a_run_of_before_there_were_kinds_can_be_resumed():
    values = finetune_config()[1]
    new = (
        "mode",
        "target_types",
        "atomic_references",
        "min_steps",
        "patience",
        "layer_decay",
        "ensemble",
        "ensemble_by",
    )
    old = build_dataclass(FinetuneConfig, {k: v for k, v in values.items() if k not in new}, "")
    assert old == build_dataclass(FinetuneConfig, values, "")


def test_a_model_of_before_there_were_kinds_is_a_plain_number(tmp_path, small):
    folder, _, _ = run(tmp_path, "now", f"data.path={small}", "epochs=1")
    info, state = model_file.read(folder / "model.safetensors", "property_model")
    old = {k: v for k, v in info.items() if k not in ("target_types", "atomic_references", "format_version", "kind")}
    model_file.write(tmp_path / "old.safetensors", "property_model", state, old)
    models = [load_property_model(path)[0] for path in (folder, tmp_path / "old.safetensors")]
    batch = make_batch(open_store(str(small)).crystals.take(np.arange(4)), models[0].encoder.graph)
    with torch.inference_mode():
        assert torch.equal(*(model(batch) for model in models))
    assert models[1].kinds == ["regression"]
    assert models[1].predict(batch).std is None
