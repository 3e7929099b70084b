"""The table at the end of a finetuning: the model's error beside a constant's and that of trees, with intervals."""

import json
from pathlib import Path

import numpy as np
import pytest

from crysldnet import cli
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.store import CrystalStore
from crysldnet.finetune import baselines
from crysldnet.finetune.baselines import baseline_rows, compare, fit_baselines, flat_metrics
from crysldnet.graphs.spec import GraphSpec
from crysldnet.models.targets import Classes, Log, Number, TargetType
from tiny import ENCODER, QUIET, subset

TRAIN, TEST = np.arange(150), np.arange(150, 250)


def module_of(store: CrystalStore, values: np.ndarray, targets: list[str]) -> CrystalDataModule:
    """Crystals with these values [n, T] as targets."""
    data = CrystalDataModule(graph=GraphSpec(k=1), store=store, rows={"train": TRAIN, "val": TEST[:0], "test": TEST})
    data.store, data.rows, data.targets, data.target_values = store, data._given[1], targets, values
    return data


def compared(data: CrystalDataModule, types: list[TargetType], predicted: np.ndarray, total: bool = False) -> dict:
    others = fit_baselines(data, types, TRAIN, TEST, total=total)
    return compare({"model": predicted, **others}, data, types, TEST)


@pytest.fixture(scope="module")
def energies(starter: CrystalStore) -> np.ndarray:
    return starter.numbers_of("formation_energy_per_atom")[:250, None]


def test_a_constant_is_the_mean_of_the_training_values_and_trees_do_better(starter, energies) -> None:
    data = module_of(starter, energies, ["formation_energy_per_atom"])
    true = energies[TEST]
    found = compared(data, [Number()], true + 0.1)["formation_energy_per_atom"]
    assert (found["measure"], found["unit"], found["crystals"]) == ("mae", "eV/atom", 100)
    assert found["model"]["error"] == pytest.approx(0.1)
    assert found["constant"]["error"] == pytest.approx(np.abs(true - energies[TRAIN].mean()).mean())
    assert found["trees"]["error"] < 0.5 * found["constant"]["error"]
    for name in ("constant", "trees"):
        low, high = found[name]["interval"]
        assert low < found[name]["error"] < high
        assert found[name]["difference"] == pytest.approx(found[name]["error"] - 0.1)
        assert found[name]["difference_interval"][0] == pytest.approx(low - 0.1, abs=1e-9)
    spread = np.abs(true - energies[TRAIN].mean()).std() / np.sqrt(len(true))
    assert found["constant"]["interval"][1] - found["constant"]["error"] == pytest.approx(1.96 * spread, rel=0.15)


def test_missing_values_count_neither_in_the_fit_nor_in_the_error(starter, energies) -> None:
    some = np.concatenate([energies, energies], axis=1)
    some[TRAIN[::2], 1] = some[TEST[::2], 1] = np.nan
    data = module_of(starter, some, ["whole", "half"])
    found = compared(data, [Number(), Number()], np.zeros((100, 2)))
    assert [found[name]["crystals"] for name in ("whole", "half")] == [100, 50]
    expected = np.abs(energies[TEST[1::2]] - energies[TRAIN[1::2]].mean()).mean()
    assert found["half"]["constant"]["error"] == pytest.approx(expected)
    assert found["half"]["trees"]["error"] < found["half"]["constant"]["error"]
    assert {"test_trees/mae/half", "test_constant/mae/whole"} <= flat_metrics(found, data.targets).keys()
    some[TEST, 1] = np.nan
    assert list(compared(data, [Number(), Number()], np.zeros((100, 2)))) == ["whole"]


def test_classes_are_judged_by_the_share_of_wrong_ones(starter, energies) -> None:
    low = (energies < np.median(energies[TRAIN]) + 0.3).astype(float)
    data = module_of(starter, low, ["low"])
    found = compared(data, [Classes(("false", "true"))], 1 - low[TEST])["low"]
    assert (found["measure"], found["model"]["error"]) == ("error_rate", 1.0)
    assert found["constant"]["error"] == pytest.approx((low[TEST] == 0).mean())
    assert found["trees"]["error"] < found["constant"]["error"]
    assert baseline_rows(found)[-1][0] == "most frequent class"


def test_totals_are_compared_by_the_atom_and_logarithms_learned_as_such(starter, energies) -> None:
    sizes = starter.crystals.sizes[:250, None]
    data = module_of(starter, energies * sizes, ["total"])
    found = compared(data, [Number()], np.zeros((100, 1)), total=True)["total"]
    expected = np.abs((energies[TEST] - energies[TRAIN].mean()) * sizes[TEST]).mean()
    assert found["constant"]["error"] == pytest.approx(expected)
    assert found["trees"]["error"] < 0.5 * expected
    data = module_of(starter, 10 ** (3 * energies), ["wide"])
    as_log = compared(data, [Log()], np.ones((100, 1)))["wide"]["trees"]["error"]
    assert as_log < compared(data, [Number()], np.ones((100, 1)))["wide"]["trees"]["error"]


def test_trees_are_left_out_where_they_would_take_long(starter, energies, monkeypatch, capsys) -> None:
    monkeypatch.setattr(baselines, "MOST_CRYSTALS", 249)
    data = module_of(starter, energies, ["energy"])
    assert "trees" not in compared(data, [Number()], energies[TEST])["energy"]
    assert "no comparison with trees: 250 crystals, over 249" in capsys.readouterr().err
    monkeypatch.setattr(baselines, "MOST_CRYSTALS", 250)
    monkeypatch.setattr(baselines, "MOST_COLUMNS", 0)
    assert "trees" not in compared(data, [Number()], energies[TEST])["energy"]


def test_a_run_prints_keeps_and_reports_them(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    few = subset(tmp_path / "few.parquet", train=24, val=4, test=6)
    words = [*ENCODER, *QUIET, f"data.path={few}", "epochs=1", "min_steps=0", "trainer.accelerator=cpu"]
    assert cli.run(["finetune", *words, "ensemble=2", "ensemble_by=folds", "name=a"]) == 0
    assert "6 test crystals" in capsys.readouterr().out
    summary = json.loads(Path("runs/finetune/a/summary.json").read_text())
    found = summary["baselines"]["formation_energy_per_atom"]
    assert found["model"]["error"] == pytest.approx(summary["test/mae"], rel=1e-5)
    assert summary["test_trees/mae"] == found["trees"]["error"]
    values = CrystalStore.open(few).numbers_of("formation_energy_per_atom")
    assert found["constant"]["error"] == pytest.approx(np.abs(values[28:] - values[:28].mean()).mean())
    assert cli.run(["report", "runs/finetune/a"]) == 0
    assert "trees on descriptors" in Path("report.html").read_text()
    assert cli.run(["finetune", *words, "baselines=false", "name=b"]) == 0
    assert "baselines" not in json.loads(Path("runs/finetune/b/summary.json").read_text())
