"""Finetuning on real crystals: it starts where it says, learns, and reads the test set once, at the end."""

import csv
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from conftest import drawing
from crysldnet import finetune
from crysldnet.artifacts import model_file
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.datasets import open_store
from crysldnet.data.fingerprint import Fingerprints
from crysldnet.data.output import write_store
from crysldnet.data.split import Split
from crysldnet.encoders.pddformer import PDDFormer
from crysldnet.errors import CheckpointError, ConfigError, DataError, DivergedError
from crysldnet.graphs.batch import make_batch
from crysldnet.graphs.crystals import from_lists
from crysldnet.graphs.spec import GraphSpec
from crysldnet.models.head import PropertyHead, PropertyModel
from crysldnet.training.metrics import RegressionErrors
from tiny import finetune_config, subset

SHORT = ["epochs=2", "data.batch_size=16"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return subset(tmp_path_factory.mktemp("small") / "data.parquet", train=64, val=24, test=24)


def run(path, name, *arguments):
    config, values = finetune_config(f"runs={path}", f"name={name}", *arguments)
    assert finetune.run(config, values) == 0
    folder = path / "finetune" / name
    return folder, json.loads((folder / "summary.json").read_text())


def weights(folder):
    return model_file.read(folder / "model.safetensors", "property_model")[1]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_finetuning_starts_from_exactly_the_exported_weights(pretrained, small):
    config, _ = finetune_config(f"pretrained={pretrained}", f"data.path={small}")
    encoder, encoder_config, provenance = finetune.make_encoder(config)
    _, exported = model_file.read(pretrained, "encoder")
    assert same(encoder.state_dict(), exported)
    assert encoder_config["width"] == 32
    assert provenance["stage"] == "vae"
    fresh, _, _ = finetune.make_encoder(finetune_config("pretrained=none")[0])
    assert not same(fresh.state_dict(), exported)


def test_the_first_epoch_begins_there_too(tmp_path, pretrained, small):
    folder, _ = run(
        tmp_path, "still", f"pretrained={pretrained}", f"data.path={small}", "optimizer.lr=1e-30", "epochs=1"
    )
    _, exported = model_file.read(pretrained, "encoder")
    trained = {k.removeprefix("encoder."): v for k, v in weights(folder).items() if k.startswith("encoder.")}
    unchanged = [k for k, v in exported.items() if "running" not in k and "num_batches" not in k]
    assert all(torch.equal(trained[k], exported[k]) for k in unchanged)


def test_sixteen_crystals_are_learned_by_heart(tmp_path):
    path = subset(tmp_path / "sixteen.parquet", train=16)
    table = pq.read_table(path)
    spread = float(np.std(table["formation_energy_per_atom"].to_numpy()))
    arguments = [f"data.path={path}", "data.batch_size=16", "encoder.dropout=0", "encoder.width=64", "epochs=200"]
    config, values = finetune_config(*arguments, "optimizer.lr=3e-3", "loss=mse")
    result = finetune.train(config, values, tmp_path / "run")
    crystals = result.data.store.crystals
    model = result.model
    with torch.no_grad():
        predicted = model(make_batch(crystals, model.encoder.graph)).numpy()[:, 0]
    mae = float(np.abs(predicted - result.data.target_values[:, 0]).mean())
    assert mae < 0.01 * spread


def test_the_same_seed_gives_the_same_weights(tmp_path, small):
    one, _ = run(tmp_path, "one", f"data.path={small}", *SHORT)
    two, _ = run(tmp_path, "two", f"data.path={small}", *SHORT)
    other, _ = run(tmp_path, "other", f"data.path={small}", "seed=1", *SHORT)
    assert same(weights(one), weights(two))
    assert not same(weights(one), weights(other))


def with_changed(path, out, change):
    """Copy a data set with other values in the target column."""
    table = pq.read_table(path)
    place = table.column_names.index("formation_energy_per_atom")
    values = table["formation_energy_per_atom"].to_numpy().copy()
    splits = np.array(table["split"].to_pylist())
    change(values, splits)
    field = table.schema.field(place)
    pq.write_table(table.set_column(place, field, pa.array(values, field.type)), out)
    return out


def test_test_targets_leave_no_trace_in_the_weights(tmp_path, small):
    def shift_test(values, splits):
        values[splits == "test"] += 100.0

    changed = with_changed(small, tmp_path / "changed.parquet", shift_test)
    one, summary = run(tmp_path, "one", f"data.path={small}", *SHORT)
    two, other = run(tmp_path, "two", f"data.path={changed}", *SHORT)
    assert same(weights(one), weights(two))
    assert other["test/mae"] > summary["test/mae"] + 50


def test_normalisation_comes_from_the_training_rows_alone(tmp_path, small):
    def shift_val(values, splits):
        values[splits == "val"] += 100.0

    changed = with_changed(small, tmp_path / "changed.parquet", shift_val)
    folder, _ = run(tmp_path, "one", f"data.path={changed}", "epochs=1")
    table = pq.read_table(small)
    train = table["formation_energy_per_atom"].to_numpy()[np.array(table["split"].to_pylist()) == "train"]
    assert float(weights(folder)["mean"][0]) == pytest.approx(train.mean(), rel=1e-5)
    assert float(weights(folder)["std"][0]) == pytest.approx(train.std(), rel=1e-5)


def test_the_best_epoch_is_chosen_on_validation(tmp_path, small):
    folder, summary = run(tmp_path, "best", f"data.path={small}", "epochs=6", "data.batch_size=16")
    with (folder / "metrics.csv").open() as file:
        curve = [float(row["val/mae"]) for row in csv.DictReader(file) if row.get("val/mae")]
    assert len(curve) >= 6
    assert summary["val/mae"] == pytest.approx(min(curve[:6]), rel=1e-5)


def test_saved_predictions_have_ids_and_give_the_reported_error(tmp_path, small):
    folder, summary = run(tmp_path, "ids", f"data.path={small}", *SHORT)
    with (folder / "predictions_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = pq.read_table(small)
    truth = dict(zip(table["material_id"].to_pylist(), table["formation_energy_per_atom"].to_pylist(), strict=True))
    tests = {
        i for i, s in zip(table["material_id"].to_pylist(), table["split"].to_pylist(), strict=True) if s == "test"
    }
    assert {row["material_id"] for row in rows} == tests
    assert all(float(row["true"]) == pytest.approx(truth[row["material_id"]], rel=1e-4) for row in rows)
    mae = np.mean([abs(float(row["true"]) - float(row["prediction"])) for row in rows])
    assert mae == pytest.approx(summary["test/mae"], rel=1e-3)
    assert rows[0]["unit"] == "eV/atom"


def test_several_targets_with_missing_values(tmp_path, small, capsys):
    def some_gone(values, splits):
        values[: len(values) // 2] = np.nan

    holes = with_changed(small, tmp_path / "holes.parquet", some_gone)
    targets = "data.targets=[formation_energy_per_atom,band_gap]"
    folder, summary = run(tmp_path, "two", f"data.path={holes}", targets, *SHORT)
    assert {"val/mae/formation_energy_per_atom", "test/mae/band_gap", "test/r2/band_gap"} <= set(summary)
    assert np.isfinite(summary["test/mae/band_gap"])
    told = capsys.readouterr().out
    assert "MAE band_gap (eV)" in told
    assert "MAE formation_energy_per_atom (eV/atom)" in told
    model, info = model_file.load_property_model(folder)
    assert info["targets"] == ["formation_energy_per_atom", "band_gap"]
    assert model.mean.shape == (2,)


def test_a_sum_over_atoms_of_a_value_of_an_atom_is_pointed_out(tmp_path, small, capsys):
    run(tmp_path, "sum", f"data.path={small}", "head=sum", "epochs=1", "data.batch_size=16")
    assert "head=atoms suits it" in capsys.readouterr().err
    run(tmp_path, "atoms", f"data.path={small}", "head=atoms", "epochs=1", "data.batch_size=16")
    assert "suits it" not in capsys.readouterr().err


def test_unknown_values_add_nothing_to_the_loss():
    torch.manual_seed(0)
    encoder = PDDFormer(width=16, layers=2, k=4, n_distances=4, n_basis=8)
    head = PropertyHead(width=16, outputs=2)
    model = PropertyModel(encoder=encoder, head=head, targets=["a", "b"], units=["", ""]).eval()
    data = CrystalDataModule(path="embedded:mp_starter", graph=encoder.graph)
    data.setup()
    crystals = data.store.crystals.take(np.arange(4))
    known = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    holes = known.copy()
    holes[:, 1] = np.nan
    loss, predicted = model.loss(make_batch(crystals, encoder.graph, targets=holes), "l1")
    expected = (predicted[:, 0] - torch.from_numpy(known[:, 0]).float()).abs().mean()
    assert torch.allclose(loss, expected)
    loss.backward()
    assert (head.mlp[-1].weight.grad[1] == 0).all()


def test_the_moving_average_is_what_is_validated_and_exported(tmp_path, small):
    plain, _ = run(tmp_path, "plain", f"data.path={small}", "epochs=1")
    averaged, _ = run(tmp_path, "averaged", f"data.path={small}", "epochs=1", "trainer.ema_decay=0.9")
    still, _ = run(tmp_path, "still", f"data.path={small}", "epochs=1", "optimizer.lr=1e-12")
    start = finetune.make_encoder(finetune_config("pretrained=none")[0])[0].state_dict().keys()
    assert {f"encoder.{k}" for k in start} <= weights(plain).keys()
    key = "head.mlp.0.weight"
    moved = [(weights(f)[key] - weights(still)[key]).norm() for f in (averaged, plain)]
    assert 0 < moved[0] < moved[1]


def test_worker_processes_build_the_same_batches(tmp_path, small):
    alone, _ = run(tmp_path, "alone", f"data.path={small}", *SHORT)
    store = write_store(tmp_path / "crystals.store", [pq.read_table(small)])
    helped, _ = run(tmp_path, "helped", f"data.path={store.name}", "data.num_workers=2", *SHORT)
    assert same(weights(alone), weights(helped))


def test_a_store_travels_to_other_processes_as_a_path(tmp_path, small):
    store = write_store(tmp_path / "crystals.store", [pq.read_table(small)])
    parcel = pickle.dumps(store)
    assert len(parcel) < 1000
    assert pickle.loads(parcel).hash == store.hash


@pytest.mark.parametrize("fault", ["nan", "flat", "overlap"])
def test_a_table_with_a_crystal_that_cannot_be_is_refused_before_training(tmp_path, small, fault):
    table = pq.read_table(small)
    lattice, coords = table["lattice"].to_pylist(), table["frac_coords"].to_pylist()
    if fault == "nan":
        lattice[3][4] = float("nan")
    elif fault == "flat":
        lattice[3] = [4.0, 0, 0, 0, 4.0, 0, 4.0, 4.0, 0]
    else:
        coords[3][:6] = [0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    for name, values in (("lattice", lattice), ("frac_coords", coords)):
        place = table.column_names.index(name)
        table = table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))
    pq.write_table(table, tmp_path / "bad.parquet")
    bad_id = table["material_id"][3].as_py()
    with pytest.raises(DataError, match=rf"1 of \d+ crystals can't be used: {bad_id} \(row 3\).*data import"):
        run(tmp_path, "bad", f"data.path={tmp_path}/bad.parquet", "epochs=1")


def test_mixed_precision_trains(tmp_path, small):
    _, summary = run(tmp_path, "half", f"data.path={small}", "trainer.precision=bf16-mixed", *SHORT)
    assert np.isfinite(summary["test/mae"])


def test_plots_are_drawn(tmp_path, small):
    with drawing():
        folder, _ = run(tmp_path, "plots", f"data.path={small}", *SHORT)
    for name in ("curves.png", "parity_formation_energy_per_atom.png"):
        assert (folder / "plots" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("head", ["mean", "sum"])
def test_losses_and_readouts_train(tmp_path, small, loss, head):
    _, summary = run(tmp_path, "other", f"data.path={small}", f"loss={loss}", f"head={head}", "epochs=1")
    assert np.isfinite(summary["test/mae"])


def test_a_file_for_each_split_may_have_a_split_column_of_its_own(tmp_path):
    counts = {"train": 16, "val": 6, "test": 5}
    nothing = {"train": 0, "val": 0, "test": 0}
    files = {k: subset(tmp_path / f"{k}.parquet", **{**nothing, k: n}) for k, n in counts.items()}
    path = "data.path={" + ", ".join(f"{k}: {file}" for k, file in files.items()) + "}"
    folder, _ = run(tmp_path, "three", path, "epochs=1")
    with (folder / "predictions_test.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5


def test_the_same_crystals_in_two_splits_are_refused(tmp_path, small):
    with pytest.raises(DataError, match="112 crystals are both in train and in test"):
        run(tmp_path, "leak", f"data.path={{train: {small}, test: {small}}}", "epochs=1")


def test_a_target_that_a_split_lacks_gets_no_figure(tmp_path, small):
    def none_in_validation(values, splits):
        values[splits == "val"] = np.nan

    holes = with_changed(small, tmp_path / "holes.parquet", none_in_validation)
    targets = "data.targets=[formation_energy_per_atom,band_gap]"
    _, summary = run(tmp_path, "two", f"data.path={holes}", targets, "epochs=1")
    assert summary["val/mae/formation_energy_per_atom"] is None
    assert summary["val/mae"] == pytest.approx(summary["val/mae/band_gap"])


def test_a_run_that_diverges_exports_nothing(tmp_path, small):
    with pytest.raises(DivergedError, match=r"train/loss is nan; .*lower optimizer\.lr"):
        run(tmp_path, "wild", f"data.path={small}", "optimizer.lr=1e30", "gradient_clip_val=null", "epochs=3")
    assert not (tmp_path / "finetune" / "wild" / "model.safetensors").exists()
    assert not (tmp_path / "finetune" / "wild" / "summary.json").exists()


def test_a_figure_that_is_undefined_is_null_in_the_summary(tmp_path):
    path = subset(tmp_path / "data.parquet", train=16, val=4, test=1)
    folder, summary = run(tmp_path, "one", f"data.path={path}", "epochs=1")
    assert summary["test/r2"] is None
    assert "NaN" not in (folder / "summary.json").read_text()


def test_the_saved_configuration_names_the_encoder_that_was_trained(tmp_path, pretrained, small):
    folder, _ = run(tmp_path, "other", f"pretrained={pretrained}", f"data.path={small}", "encoder.width=48", "epochs=1")
    assert yaml.safe_load((folder / "config.yaml").read_text())["encoder"]["width"] == 32


def test_the_sum_readout_grows_with_the_cell_and_the_mean_does_not():
    torch.manual_seed(0)
    lattice = np.eye(3)[None] * 4.0
    cell = (lattice[0], np.array([11, 17], np.uint8), np.array([[0, 0, 0], [0.5, 0.5, 0.5]]))
    double = (
        lattice[0] * [[2], [1], [1]],
        np.array([11, 17, 11, 17], np.uint8),
        np.array([[0, 0, 0], [0.25, 0.5, 0.5], [0.5, 0, 0], [0.75, 0.5, 0.5]]),
    )
    crystals = from_lists(*zip(cell, double, strict=True))
    for readout, factor in (("mean", 1.0), ("sum", 2.0)):
        encoder = PDDFormer(width=16, layers=2, k=6, n_distances=8, n_basis=8)
        head = PropertyHead(width=16, outputs=1, readout=readout)
        model = PropertyModel(encoder=encoder, head=head, targets=["a"], units=[""]).eval()
        model.mean.fill_(0.3)
        one, two = model(make_batch(crystals, encoder.graph))[:, 0]
        assert torch.allclose(two, factor * one, rtol=1e-4)


def test_metrics_equal_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    true, predicted = rng.normal(size=(50, 2)), rng.normal(size=(50, 2))
    true[:20, 1] = np.nan
    errors = RegressionErrors(["a", "b"])
    for part in range(0, 50, 7):
        errors.update(torch.tensor(predicted[part : part + 7]), torch.tensor(true[part : part + 7]))
    values = errors.compute()
    for place, name in enumerate("ab"):
        known = ~np.isnan(true[:, place])
        y, p = true[known, place], predicted[known, place]
        assert float(values[f"mae/{name}"]) == pytest.approx(metrics.mean_absolute_error(y, p))
        assert float(values[f"rmse/{name}"]) == pytest.approx(metrics.root_mean_squared_error(y, p))
        assert float(values[f"r2/{name}"]) == pytest.approx(metrics.r2_score(y, p))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (["data.targets=[]"], ConfigError, "data.targets"),
        (["data.targets=[colour]"], DataError, "no column 'colour'; it has formation_energy_per_atom"),
        (["data.targets=[formula]"], DataError, "not numbers"),
        (["pretrained=nowhere.safetensors"], CheckpointError, "nowhere.safetensors: no such file"),
        (["data.split.column=part"], DataError, "data.split.by=formula"),
        (["data.batch_size=16", "trainer.accumulate_grad_batches=3"], DataError, "choose a multiple"),
        (["data.max_atoms=3"], DataError, "exceeds the limit of a batch"),
        (["data.targets=[band_gap,band_gap]"], ConfigError, "targets: name each once"),
        (["data.calibration_fraction=0.99"], DataError, "validation crystals leaves none for validation"),
        (["data.calibration_fraction=0.01"], DataError, "validation crystals leaves none for calibration"),
        (
            ["data.split.by=random", "data.split.fractions=[0.8,0.0,0.2]", "data.calibration_fraction=0.5"],
            DataError,
            "there are no validation crystals, of which data.calibration_fraction=0.5 would keep a share",
        ),
    ],
)
def test_a_wrong_request_is_refused_with_the_mend(tmp_path, small, arguments, error, says):
    with pytest.raises(error, match=says):
        run(tmp_path, "wrong", f"data.path={small}", "epochs=1", *arguments)


def test_a_target_without_training_values_is_refused(tmp_path, small):
    def none_in_training(values, splits):
        values[splits == "train"] = np.nan

    holes = with_changed(small, tmp_path / "holes.parquet", none_in_training)
    with pytest.raises(DataError, match=r"holes.*: no training crystal has a value of 'formation_energy_per_atom'"):
        run(tmp_path, "wrong", f"data.path={holes}", "data.targets=[formation_energy_per_atom,band_gap]", "epochs=1")


def test_smaller_training_fractions_lie_within_larger_ones():
    rows = {}
    for share in (0.1, 0.5, 1.0):
        data = CrystalDataModule(path="embedded:mp_starter", graph=GraphSpec(k=2), split=Split(train_fraction=share))
        data.setup()
        rows[share] = set(data.rows["train"].tolist())
    assert rows[0.1] < rows[0.5] < rows[1.0]
    assert len(rows[0.1]) == round(0.1 * len(rows[1.0]))


def test_an_encoder_is_taken_from_a_finetuned_model_too_and_its_file_says_what_it_saw(tmp_path, small, pretrained):
    first, _ = run(tmp_path, "first", f"pretrained={pretrained}", f"data.path={small}", "epochs=1")
    model, _ = model_file.load_property_model(first)
    encoder, _ = model_file.load_encoder(first / "model.safetensors")
    expected = model.encoder.state_dict()
    assert expected.keys() == encoder.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in encoder.state_dict().items())
    _, summary = run(tmp_path, "second", f"pretrained={first}", f"data.path={small}", "epochs=1", "optimizer.lr=1e-30")
    overlap = summary["pretraining_overlap"]
    assert overlap["test_crystals"] == 24
    assert overlap["ids"] == 0, "both were tested on the same crystals"
    assert overlap["labels"] == ["formation_energy_per_atom"]
    store = open_store(str(small))
    seen = model_file.read_pretraining_set(first / "model.safetensors", "property_model")
    split = store.to_table()["split"].to_numpy(zero_copy_only=False)
    for part, counted in (("train", True), ("val", True), ("test", False)):
        known = np.isin(Fingerprints.of(store, np.flatnonzero(split == part)).packed(), seen)
        assert known.all() if counted else not known.any()
    before = model_file.read_pretraining_set(pretrained)
    assert np.isin(before, seen).all()
    second, _ = model_file.load_encoder(tmp_path / "finetune" / "second" / "model.safetensors")
    parameters = dict(second.named_parameters())
    assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in parameters.items())
    fresh, _ = model_file.load_encoder(pretrained)
    assert not all(torch.equal(value, expected[name]) for name, value in fresh.state_dict().items())
