"""Estimators work in scikit-learn as its own do, and train the model that the command trains."""

import pickle
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from pymatgen.core import Structure
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks

import crysldnet
from crysldnet import CrystalClassifier, CrystalRegressor, CrystalTransformer
from crysldnet.api.crystals import read
from crysldnet.errors import ConfigError, DataError
from tiny import DENOISER, ENCODER, subset

NETWORK = {
    "recipe": "network",
    "pretrained": "none",
    "verbose": False,
    "epochs": 2,
    "min_steps": 0,
    "trainer": {"accelerator": "cpu"},
    **{word.split("=")[0].replace(".", "__"): int(word.split("=")[1]) for word in ENCODER},
}
FROZEN = {"recipe": "frozen", "pretrained": "none", "verbose": False}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Forty real crystals: a DataFrame with structures, whose index has their ids."""
    rows = pq.read_table(subset(tmp_path_factory.mktemp("table") / "crystals.parquet", train=40)).to_pylist()
    structures = [
        Structure(np.reshape(row["lattice"], (3, 3)), row["atomic_numbers"], np.reshape(row["frac_coords"], (-1, 3)))
        for row in rows
    ]
    columns = {
        "structure": structures,
        **{key: [row[key] for row in rows] for key in ("band_gap", "volume") if key in rows[0]},
    }
    columns["energy (eV/atom)"] = [row["formation_energy_per_atom"] for row in rows]
    columns["volume"] = [structure.volume for structure in structures]
    return pd.DataFrame(columns, index=[row["material_id"] for row in rows])


@pytest.fixture(scope="module")
def structures(table):
    return table["structure"].tolist()


@pytest.fixture(scope="module")
def labels(table):
    """Two targets, one of which half of the crystals lack."""
    labels = table[["energy (eV/atom)", "volume"]].copy()
    labels.attrs["units"] = {"volume": "Å3"}
    labels.loc[labels.index[::2], "volume"] = np.nan
    return labels


@pytest.fixture(scope="module")
def frozen(table, labels):
    return CrystalRegressor(**FROZEN).fit(table[["structure"]], labels)


@pytest.fixture(scope="module")
def network(table):
    return CrystalRegressor(**NETWORK).fit(table[["structure"]], table["energy (eV/atom)"])


CHECKS = (
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_estimator_tags_renamed",
    "check_get_params_invariance",
    "check_mixin_order",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_set_params",
    "check_valid_tag_types",
)
"""Those of scikit-learn's checks that don't fit to a matrix of numbers."""


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", [CrystalRegressor, CrystalClassifier, CrystalTransformer])
def test_it_passes_the_checks_of_scikit_learn(kind, check):
    getattr(estimator_checks, check)(kind.__name__, kind())


def test_settings_are_parameters():
    model = CrystalRegressor(recipe="frozen", optimizer__lr=0.01, epochs=3)
    assert clone(model).set_params(epochs=4).get_params() == {**model.get_params(), "epochs": 4}
    assert repr(model) == "CrystalRegressor(epochs=3, optimizer__lr=0.01, recipe='frozen')"
    assert "optimizer__lr" in model._repr_html_()
    with pytest.raises(TypeError, match="no parameter 'predict'"):
        model.set_params(predict=1)
    with pytest.raises(NotFittedError):
        model.predict([])


def test_several_targets_with_missing_values_and_units(frozen, table, labels):
    assert dict(zip(frozen.targets_, frozen.units_, strict=True)) == {"energy": "eV/atom", "volume": "Å3"}
    values, low, high = frozen.predict(table, return_interval=True)
    wider = frozen.predict(table, return_interval=True, interval=0.95)
    assert values.shape == (40, 2)
    assert ((low <= values) & (values <= high) & (wider[1] <= low)).all()
    assert frozen.score(table, labels) > 0.5
    found = frozen.predictor_.predict(table)
    assert found.ids == table.index.tolist()
    assert all("trained" in flags for flags in found.flags)
    assert frozen.metrics_["val/mae/energy"] > 0


def test_a_saved_or_pickled_model_predicts_alike(frozen, structures, tmp_path):
    wanted = frozen.predict(structures)
    frozen.save(tmp_path / "one.safetensors")
    frozen.save(tmp_path / "folder")
    for name in ("one.safetensors", "folder"):
        assert np.array_equal(crysldnet.load(tmp_path / name).predict(structures).values, wanted)
    assert np.array_equal(pickle.loads(pickle.dumps(frozen)).predict(structures), wanted)
    assert "energy (eV/atom), volume (Å3)" in repr(crysldnet.load(tmp_path / "folder"))


def test_an_ensemble_is_saved_as_a_folder(structures, table, tmp_path):
    model = CrystalRegressor(**NETWORK, ensemble=2).fit(structures, table["volume"])
    with pytest.raises(ConfigError, match="saved as a folder"):
        model.save(tmp_path / "model.safetensors")
    model.save(tmp_path / "ensemble")
    loaded = crysldnet.load(tmp_path / "ensemble")
    assert len(loaded.members) == 2
    found = loaded.predict(structures, interval=0.6)
    values, low, high = model.predict(structures, return_interval=True, interval=0.6)
    assert np.array_equal(found.values[:, 0], values)
    assert (low < high).all()
    assert np.array_equal(found.low[:, 0], low)


def test_the_same_random_state_gives_the_same_model(network, table, structures):
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    again = clone(network).fit(table[["structure"]], table["energy (eV/atom)"])
    other = clone(network).set_params(random_state=1).fit(table[["structure"]], table["energy (eV/atom)"])
    drawn = np.random.rand(), torch.rand(1)  # noqa: NPY002
    wanted = network.predict(structures)
    assert np.array_equal(again.predict(structures), wanted)
    assert not np.allclose(other.predict(structures), wanted)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    assert drawn == (np.random.rand(), torch.rand(1))  # noqa: NPY002


def test_cross_validation_and_grid_search(structures, table):
    y = table["volume"].to_numpy()
    formulas = [structure.composition.reduced_formula for structure in structures]
    scores = cross_val_score(
        CrystalRegressor(**NETWORK), structures, y, groups=formulas, cv=GroupKFold(2), error_score="raise"
    )
    assert np.isfinite(scores).all()
    pipeline = make_pipeline("passthrough", CrystalRegressor(**NETWORK))
    grid = GridSearchCV(pipeline, {"crystalregressor__optimizer__lr": [1e-9, 1e-2]}, cv=2, error_score="raise")
    grid.fit(table[["structure"]], y)
    assert grid.best_params_ == {"crystalregressor__optimizer__lr": 1e-2}
    assert grid.predict(table[["structure"]]).shape == (40,)


def test_a_classifier_keeps_the_labels(table, structures):
    labels = np.where(table["volume"] > table["volume"].median(), "large", "a small one").astype(object)
    labels[:4] = None
    model = CrystalClassifier(**NETWORK).fit(structures, labels)
    assert model.classes_.tolist() == ["a small one", "large"]
    named = model.predictor_.predict(structures).to_dict()["class"]
    assert model.predict(structures).tolist() == named
    known = labels[4:] == np.array(named[4:])
    assert model.score(structures, labels) == pytest.approx(known.mean())
    shares = model.predict_proba(structures)
    assert np.allclose(shares.sum(axis=1), 1)
    assert (model.classes_[shares.argmax(axis=1)] == model.predict(structures)).all()


def test_several_classifications_keep_the_types_of_their_labels(table):
    frame = pd.DataFrame({"ten": np.where(table["volume"] > 80, 10, 9), "true": table["volume"] > 60}, table.index)
    model = CrystalClassifier(**NETWORK).fit(table[["structure"]], frame)
    assert [classes.tolist() for classes in model.classes_] == [[9, 10], [False, True]]
    found = model.predict(table)
    assert found.shape == (40, 2)
    assert {*found[:, 0]} <= {9, 10}
    assert {*map(type, found[:, 1])} <= {bool, np.bool_}
    nine = model.predict_proba(table)[0][:, 0]
    assert ((nine > 0.5) == (found[:, 0] == 9)).all()


def test_the_same_crystals_come_in_many_forms(table, structures, tmp_path):
    ase = pytest.importorskip("ase.io")
    paths = []
    for place in (3, 1, 2):
        paths.append(tmp_path / f"{place}.cif")
        structures[place].to(filename=str(paths[-1]))
    wanted = [structures[place] for place in (3, 1, 2, 3)]
    forms = {
        "structures": (wanted, "crystal-1"),
        "atoms": ([structure.to_ase_atoms() for structure in wanted], "crystal-1"),
        "paths": ([*paths, paths[0]], "3-1"),
        "array": (np.array([*map(str, paths), str(paths[0])], object), "3-1"),
        "series": (table["structure"].iloc[[3, 1, 2, 0]], table.index[3]),
        "repeated": (table[["structure"]].iloc[[3, 1, 2, 3]], "crystal-1"),
    }
    assert ase is not None
    for name, (given, first) in forms.items():
        crystals, ids, _ = read(given)
        assert ids[0] == first, name
        for found, true in zip(np.split(crystals.numbers, crystals.ptr[1:-1])[:3], wanted[:3], strict=True):
            assert sorted(found) == sorted(true.atomic_numbers), name


def test_a_table_is_matched_by_id_or_read_in_place(table, structures, tmp_path):
    for name, structure in zip(table.index[:30], structures, strict=False):
        structure.to(filename=str(tmp_path / f"{name}.cif"))
    y = table["volume"].iloc[:30]
    one = CrystalRegressor(**NETWORK).fit(tmp_path, y.sample(frac=1, random_state=0))
    other = CrystalRegressor(**NETWORK).fit(
        [tmp_path / f"{name}.cif" for name in sorted(y.index)], y.sort_index().array
    )
    assert np.array_equal(one.predict(structures), other.predict(structures))
    with pytest.raises(DataError, match="matched with y by id"):
        CrystalRegressor(**NETWORK).fit(tmp_path, y.tolist())
    with pytest.raises(DataError, match="no crystal 'other'"):
        CrystalRegressor(**NETWORK).fit(tmp_path, y.rename({y.index[0]: "other"}))
    file = subset(tmp_path / "crystals.parquet", train=40)
    in_place = CrystalRegressor(**NETWORK).fit(file, "formation_energy_per_atom")
    assert in_place.units_ == ["eV/atom"]
    assert in_place.predict(str(file)).shape == (40,)


def test_descriptors_are_columns_beside_the_structures(table):
    frame = table[["structure"]].assign(temperature=np.arange(40.0))
    model = CrystalRegressor(**NETWORK, data__descriptors=["temperature"]).fit(frame, table["volume"])
    hotter = frame.assign(temperature=frame["temperature"] + 20)
    assert not np.array_equal(model.predict(frame), model.predict(hotter))
    with pytest.raises(DataError, match="temperature"):
        model.predict(table[["structure"]])
    with pytest.raises(DataError, match="temperature"):
        clone(model).fit(frame.assign(temperature=np.nan), table["volume"])


def test_rows_that_could_be_mistaken_are_refused(table, structures, tmp_path):
    y = table["volume"]
    model = CrystalRegressor(**NETWORK)
    wrong = {
        "39 rows and there are 40 structures": (structures, y[:39]),
        "bring them into one order": (table[["structure"]], y.iloc[::-1]),
        "could not convert": (structures, ["high"] * 40),
        "infinite": (structures, np.full(40, np.inf)),
        "a.json: a list with paths": ([tmp_path / "a.json", tmp_path / "b.cif"], y[:2]),
        "occurs twice": (structures, pd.DataFrame({"a": y, "a (eV)": y})),
        "states eV": (structures, y.rename("gap (eV)").to_frame()),
        "Structure: a list with paths": ([structures[0], "nothing"], y[:2]),
    }
    wrong["states eV"][1].attrs["units"] = {"gap": "meV"}
    for message, given in wrong.items():
        with pytest.raises(DataError, match=message):
            model.fit(*given)


def test_settings_that_are_unknown_or_its_own_are_refused(structures, table):
    with pytest.raises(ConfigError, match="epoch"):
        CrystalRegressor(epoch=3).fit(structures, table["volume"])
    for key, instead in {"seed": "random_state", "data__path": "crysldnet.finetune"}.items():
        with pytest.raises(ConfigError, match=f"use {instead}"):
            CrystalRegressor(**{key: 3}).fit(structures, table["volume"])


def test_it_is_silent_where_it_is_not_verbose(structures, table, capfd):
    CrystalRegressor(**NETWORK).fit(structures, table["volume"])
    assert capfd.readouterr() == ("", "")
    CrystalRegressor(**{**NETWORK, "verbose": True}).fit(structures, table["volume"])
    shown = capfd.readouterr()
    assert re.search(r"\d training, \d+ validation and 0 test crystals of", shown.err)
    assert "next:" not in shown.err, "the folder of the run is gone"
    assert "epoch 1 of 2" in shown.err


def test_features_for_other_models(network, table, structures, tmp_path):
    network.save(tmp_path / "model.safetensors")
    transformer = CrystalTransformer(str(tmp_path / "model.safetensors"), descriptors=True)
    features = transformer.set_output(transform="pandas").fit_transform(table[["structure"]])
    alone = CrystalTransformer(str(tmp_path / "model.safetensors"), layers_read="last").fit_transform(structures)
    assert alone.shape == (40, 32)
    assert features.index.tolist() == table.index.tolist()
    assert features.columns[0] == "embedding_0"
    named = CrystalTransformer("none", descriptors=True)
    assert features.filter(regex="^(?!embedding)").shape == named.fit_transform(structures).shape
    model = make_pipeline(named, Ridge()).fit(structures, table["volume"])
    assert model.score(structures, table["volume"]) > 0.5
    with pytest.raises(ConfigError, match="name an encoder"):
        CrystalTransformer("none").fit(structures)


def test_commands_are_functions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = subset(tmp_path / "crystals.parquet", train=24, val=6, test=6)
    small = {key.replace("__", "."): value for key, value in NETWORK.items() if key.startswith("encoder")}
    data = {"data": "custom", "data__path": file, "data__split__by": "column", "trainer": {"progress_bar": False}}
    denoiser = {key: yaml.safe_load(value) for key, value in (word.split("=") for word in DENOISER)}
    stages = {f"stages__{stage}__epochs": 1 for stage in ("vae", "diffusion")}
    targets = {"data__targets": ["formation_energy_per_atom"]}
    encoder = crysldnet.pretrain(**small, **data, **denoiser, **targets, **stages)
    assert encoder.model.embed(file).features.shape[0] == 36
    assert encoder.metrics["vae/val/loss"] > 0
    settings = {**data, **targets, "epochs": 1, "min_steps": 0, "logger": ["csv"]}
    run = crysldnet.finetune(pretrained=encoder.folder / "encoder.safetensors", **settings)
    assert run.folder == (tmp_path / "runs/finetune/latest").resolve().relative_to(tmp_path)
    assert run.model.predict(file).values.shape == (36, 1)
    assert f"test/mae={run.metrics['test/mae']:.4g}" in repr(run)
    assert crysldnet.finetune(resume="last").folder == run.folder
    with pytest.raises(ConfigError, match="can't be a value"):
        crysldnet.finetune(optimizer={"lr": object()})


def test_importing_the_package_is_light():
    code = (
        "import sys, crysldnet; dir(crysldnet); sys.exit(','.join({'torch', 'sklearn', 'numpy'} & {*sys.modules}) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
