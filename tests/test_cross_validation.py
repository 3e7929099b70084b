"""finetune folds=N: every crystal is predicted by a model of other formulas, and a model of all crystals is kept."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import crysldnet
from crysldnet import cli, finetune
from crysldnet.config import compose, validate
from crysldnet.data.elements import formulas_of
from crysldnet.data.store import CrystalStore
from crysldnet.errors import ConfigError
from crysldnet.finetune import FinetuneConfig, cross_validation
from tiny import finetune_config, subset

COMMON = ["folds=3", "epochs=2", "data.batch_size=16", "trainer.accelerator=cpu", "baselines=true"]


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    return subset(tmp_path_factory.mktemp("few") / "few.parquet", train=36, val=6, test=6)


def run(folder: Path, few: Path, *words: str) -> int:
    config, values = finetune_config(f"runs={folder}", f"data.path={few}", *COMMON, *words)
    return finetune.run(config, values)


@pytest.fixture(scope="module")
def done(tmp_path_factory, few) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert run(folder, few, "name=a") == 0
    return folder / "finetune" / "a"


def table(run: Path) -> list[dict[str, str]]:
    with (run / "predictions_test.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_crystal_is_predicted_once_by_a_model_that_saw_none_of_its_formula(done: Path, few: Path) -> None:
    store = CrystalStore.open(few)
    formula = dict(zip(store.ids.to_pylist(), formulas_of(store.crystals), strict=True))
    rows = table(done)
    assert sorted(row["material_id"] for row in rows) == sorted(formula)
    for fold in range(3):
        split = json.loads((done / f"fold_{fold}" / "split.json").read_text())
        assert {row["material_id"] for row in rows if row["fold"] == str(fold)} == set(split["test"])
        seen = {formula[i] for i in (*split["train"], *split["val"])}
        assert not seen & {formula[i] for i in split["test"]}
        assert split["val"]
        model = crysldnet.load(done / f"fold_{fold}", device="cpu")
        found = model.predict(few)
        by_id = dict(zip(found.ids, found.values[:, 0], strict=True))
        for row in rows:
            if row["fold"] == str(fold):
                assert by_id[row["material_id"]] == pytest.approx(float(row["prediction"]), abs=1e-4)


def test_the_errors_are_those_of_all_out_of_fold_predictions(done: Path) -> None:
    summary, rows = json.loads((done / "summary.json").read_text()), table(done)
    errors = np.array([abs(float(row["true"]) - float(row["prediction"])) for row in rows])
    assert summary["test/mae"] == pytest.approx(errors.mean(), rel=1e-4)
    for i, fold in enumerate(summary["folds"]):
        own = errors[[row["fold"] == str(i) for row in rows]]
        assert (fold["test_crystals"], fold["test/mae"]) == (len(own), pytest.approx(own.mean(), rel=1e-4))
    compared = summary["baselines"]["formation_energy_per_atom"]
    assert compared["crystals"] == 48
    low, high = compared["model"]["interval"]
    assert low < summary["test/mae"] < high
    true = {row["material_id"]: float(row["true"]) for row in rows}
    constant = []
    for fold in range(3):
        split = json.loads((done / f"fold_{fold}" / "split.json").read_text())
        mean = np.mean([true[i] for i in split["train"]])
        constant += [abs(true[i] - mean) for i in split["test"]]
    assert compared["constant"]["error"] == pytest.approx(np.mean(constant), rel=1e-4)
    assert compared["trees"]["error"] < compared["constant"]["error"]


def test_the_model_that_is_kept_has_all_crystals_for_training_and_validation(done: Path, few: Path) -> None:
    split = json.loads((done / "split.json").read_text())
    assert sorted(split["train"] + split["val"]) == sorted(CrystalStore.open(few).ids.to_pylist())
    assert split["test"] == []
    found = crysldnet.load(done, device="cpu").predict(few)
    assert all("trained" in flags for flags in found.flags)
    assert found.low.shape == (48, 1)


def test_a_report_shows_them(done: Path, tmp_path: Path, few: Path) -> None:
    out = tmp_path / "report.html"
    assert cli.run(["report", str(done), f"out={out}"]) == 0
    text = out.read_text()
    assert "trained on other formulas" in text
    assert "trees on descriptors" in text


def test_a_run_that_is_stopped_goes_on_with_the_same_folds(done: Path, few: Path, tmp_path: Path, monkeypatch) -> None:
    def stop(*_, **__) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cross_validation, "fit_baselines", stop)  # after the first fold
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, few, "name=b")
    stopped = tmp_path / "finetune" / "b"
    before = (stopped / "fold_0" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="fold_0: started with another split of the crystals"):
        run(tmp_path, few, "name=b", "resume=last", "folds=4")
    assert run(tmp_path, few, "name=b", "resume=last") == 0
    assert (stopped / "fold_0" / "model.safetensors").stat().st_mtime_ns == before
    assert table(stopped) == table(done)


def test_ensembles_and_models_on_tables_are_cross_validated_too(few: Path, tmp_path: Path) -> None:
    words = ["ensemble=2", "ensemble_by=folds", "folds=2", "epochs=1", "baselines=false", "name=two"]
    assert run(tmp_path, few, *words) == 0
    two = tmp_path / "finetune" / "two"
    assert len({*two.glob("fold_*/member_*/model.safetensors")}) == 4
    assert len(crysldnet.load(two, device="cpu").members) == 2
    summary = json.loads((two / "summary.json").read_text())
    assert list(summary["baselines"]["formation_energy_per_atom"])[-1] == "model"
    assert run(tmp_path, few, "recipe=frozen", "folds=2", "baselines=false", "name=frozen") == 0
    assert len(table(tmp_path / "finetune" / "frozen")) == 48


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["folds=60"], r"folds: 48 crystals of \d+ formulas can't make 60 parts"),
        (["data.exclude=[embedded:matbench_jdft2d]"], "leave one of both out"),
    ],
)
def test_what_can_not_be_cross_validated_is_refused(few: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, few, *words, "name=c")
    assert not (tmp_path / "finetune").exists()


def test_one_fold_is_refused() -> None:
    with pytest.raises(ConfigError, match="folds must be 2 or more, or 0"):
        validate(compose("finetune", ["folds=1"]), FinetuneConfig)
