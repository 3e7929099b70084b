"""Models on tables of features are trained, exported, loaded and used as networks are."""

import csv
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import crysldnet
from crysldnet import cli
from crysldnet.artifacts.model_file import load_property_model, read
from crysldnet.errors import ConfigError, DataError
from crysldnet.finetune import make_encoder, run
from crysldnet.finetune.ensemble import resolve
from crysldnet.finetune.settings import make_data
from tiny import ENCODER, QUIET, finetune_config, subset

pytest.importorskip("sklearn")

TARGETS = "data.targets=[formation_energy_per_atom,is_metal,volume]"
DATA = ["data=custom", "data.path=crystals.parquet", "data.split.by=column"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Crystals with a number, two classes, and a number that two thirds of them lack."""
    folder = tmp_path_factory.mktemp("recipes")
    table = pq.read_table(subset(folder / "crystals.parquet", train=70, val=14, test=12))
    volume = np.abs(np.linalg.det(np.array(table["lattice"].to_pylist()).reshape(-1, 3, 3)))
    volume[np.arange(len(volume)) % 3 > 0] = np.nan
    table = table.append_column("is_metal", pa.array(table["band_gap"].to_numpy() == 0.0))
    pq.write_table(table.append_column("volume", pa.array(volume, from_pandas=True)), folder / "crystals.parquet")
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def frozen(folder):
    """A run on descriptors alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = finetune_config("recipe=frozen", "name=frozen", "atomic_references=[volume]", *DATA, TARGETS)
        assert run(*config) == 0
    return folder / "runs" / "finetune" / "frozen"


@pytest.fixture(scope="module")
def hybrid(folder):
    """A run of two networks from scratch beside the tabular members; it is killed after the first one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("crysldnet.finetune.hybrid.WORTH_IT", -1.0)
        arguments = ["recipe=hybrid", "networks=2", "epochs=2", "name=hybrid", *DATA, TARGETS.replace(",volume", "")]
        with pytest.MonkeyPatch.context() as killed:
            killed.setattr("crysldnet.finetune.networks.note", interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(*finetune_config(*arguments))
        first = (folder / "runs" / "finetune" / "hybrid" / "network_0" / "model.safetensors").stat().st_mtime_ns
        assert run(*finetune_config(*arguments, "resume=last")) == 0
        assert first == (folder / "runs" / "finetune" / "hybrid" / "network_0" / "model.safetensors").stat().st_mtime_ns
    return folder / "runs" / "finetune" / "hybrid"


def interrupt(*_, **__):
    raise KeyboardInterrupt


def predictions_of(path):
    with (path / "predictions_test.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_loaded_file_predicts_what_the_run_tested(frozen, here, tmp_path):
    alone = tmp_path / "model.safetensors"
    alone.write_bytes((frozen / "model.safetensors").read_bytes())
    rows = predictions_of(frozen)
    test = pq.read_table("crystals.parquet").filter(pa.compute.field("split") == "test")
    pq.write_table(test, tmp_path / "test.parquet")
    found = crysldnet.load(alone).predict(tmp_path / "test.parquet")
    assert len(found) == 12
    by_id = {(row["material_id"], row["target"]): row for row in rows}
    for i, material_id in enumerate(found.ids):
        energy, metal = (by_id[material_id, target] for target in found.targets[:2])
        assert found.values[i, 0] == pytest.approx(float(energy["prediction"]), rel=1e-5)
        assert found.classes[1][int(found.values[i, 1])] == metal["prediction"]
        assert found.probabilities[i, 1, :2].sum() == pytest.approx(1)
    assert (found.low[:, 0] < found.values[:, 0]).all()
    assert (found.values[:, 0] < found.high[:, 0]).all()
    assert (found.std[:, 0] > 0).all()
    assert not any("trained" in flags for flags in found.flags)


def test_a_hybrid_has_networks_among_its_members(hybrid, here, tmp_path):
    summary = json.loads((hybrid / "summary.json").read_text())
    for members in summary["blend"].values():
        assert list(members) == ["network", "extra_trees", "boosted_trees", "kernel_ridge"]
    test = pq.read_table("crystals.parquet").filter(pa.compute.field("split") == "test")
    pq.write_table(test, tmp_path / "test.parquet")
    found = crysldnet.load(hybrid).predict(tmp_path / "test.parquet")
    energies = [float(row["prediction"]) for row in predictions_of(hybrid) if row["unit"]]
    assert sorted(found.values[:, 0]) == pytest.approx(sorted(energies), rel=1e-4)
    assert len(load_property_model(hybrid)[0].networks) == 2
    splits = [json.loads((hybrid / f"network_{i}" / "split.json").read_text()) for i in (0, 1)]
    held = [split["counts"]["train"] for split in splits]
    assert sum(held) == 84  # each saw what the other didn't


def test_networks_that_add_nothing_are_left_out(hybrid, here, capfd):
    """Two networks of two epochs know less than trees do; those of the other run serve again."""
    shutil.copytree(hybrid, hybrid.parent / "again")
    (hybrid.parent / "again" / "summary.json").unlink()
    arguments = ["recipe=hybrid", "networks=2", "epochs=2", "name=again", *DATA, TARGETS.replace(",volume", "")]
    assert run(*finetune_config(*arguments, "resume=last")) == 0
    assert "are left out" in " ".join(capfd.readouterr().err.split())
    info, state = read(hybrid.parent / "again" / "model.safetensors", "property_model")
    assert (info["recipe"], info["networks"]) == ("frozen", 0)
    assert not any(name.startswith("networks.") for name in state)
    summary = json.loads((hybrid.parent / "again" / "summary.json").read_text())
    assert all(sum(of["weight"] for of in own.values()) == pytest.approx(1) for own in summary["blend"].values())


def test_auto_trains_no_network_for_few_crystals_unless_its_settings_are_given(here, capfd, monkeypatch):
    one = [*QUIET, *DATA, "data.targets=[formation_energy_per_atom]", "baselines=false"]
    assert cli.run(["finetune", "name=auto", "pretrained=none", *one]) == 0
    assert "recipe=auto: for 84 crystals, trees and kernel ridge" in " ".join(capfd.readouterr().err.split())
    assert read(here / "runs" / "finetune" / "auto" / "model.safetensors", "property_model")[0]["recipe"] == "frozen"
    assert json.loads((here / "runs" / "finetune" / "auto" / "summary.json").read_text())["recipe"] == "frozen"
    short = ["epochs=1", "min_steps=0"]
    assert cli.run(["finetune", "name=given", *ENCODER, *one, *short]) == 0
    assert "recipe=auto" not in capfd.readouterr().err
    assert type(load_property_model(here / "runs" / "finetune" / "given")[0]).__name__ == "PropertyModel"
    for reason, words in (("over 20", []), ("several processes", ["trainer.devices=2"]), ("fewer than 100", [])):
        with monkeypatch.context() as patch:
            patch.setattr("crysldnet.finetune.ensemble.FEW", 20 if "over" in reason else 1000)
            patch.setattr("crysldnet.finetune.ensemble.FEWEST", 100 if "fewer" in reason else 10)
            config, _ = finetune_config("recipe=auto", *DATA, "data.targets=[formation_energy_per_atom]", *words)
            assert resolve(config, make_data(config, make_encoder(config)[0])).recipe == "network"
    assert capfd.readouterr().err.count("recipe=auto finetunes a network") == 3


def test_the_networks_of_a_hybrid_are_part_of_its_file(hybrid, frozen):
    info, state = read(hybrid / "model.safetensors", "property_model")
    assert info["networks"] == 2
    assert any(name.startswith("networks.1.encoder.") for name in state)
    assert info["encoder"]["_target_"].endswith("PDDFormer")
    assert read(frozen / "model.safetensors", "property_model")[0]["encoder"]["_target_"].endswith("ElementProperties")


def test_crystals_of_training_and_validation_are_flagged(frozen, here, tmp_path):
    table = pq.read_table("crystals.parquet")
    pq.write_table(table.filter(pa.compute.field("split") != "test"), tmp_path / "seen.parquet")
    found = crysldnet.load(frozen).predict(tmp_path / "seen.parquet")
    assert all("trained" in flags for flags in found.flags)


def test_it_learns_and_reports_errors_out_of_fold(frozen):
    summary = json.loads((frozen / "summary.json").read_text())
    assert summary["recipe"] == "frozen"
    assert summary["train_crystals"] == 84
    assert summary["val/r2/formation_energy_per_atom"] > 0.5
    assert summary["test/r2/formation_energy_per_atom"] > 0.5
    assert summary["val/log_loss/is_metal"] < 0.69
    assert summary["calibration"]["formation_energy_per_atom"]["crystals"] == 84
    assert summary["calibration"]["volume"]["crystals"] < 40
    for members in summary["blend"].values():
        assert sum(member["weight"] for member in members.values()) == pytest.approx(1)
    assert read(frozen / "model.safetensors", "property_model")[0]["format_version"] == 4


def test_a_report_shows_it(frozen, here):
    assert cli.run(["report", str(frozen), "out=page.html", "resamples=400"]) == 0
    assert "formation_energy_per_atom" in (here / "page.html").read_text()


def test_a_killed_run_starts_again_and_ends_alike(frozen, here):
    arguments = ["recipe=frozen", "name=killed", "atomic_references=[volume]", *DATA, TARGETS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crysldnet.finetune.hybrid.fit_stack", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(*finetune_config(*arguments))
    assert run(*finetune_config(*arguments, "resume=last")) == 0
    one, other = ((frozen.parent / name / "predictions_test.csv").read_bytes() for name in ("frozen", "killed"))
    assert one == other


def test_what_tables_cannot_do_is_refused(here):
    with pytest.raises(ConfigError, match="don't grow with the cell"):
        run(*finetune_config("recipe=frozen", "head=sum", *DATA, TARGETS))
    few = ["data.split.train_fraction=0.05", "data.targets=[volume]"]
    with pytest.raises(DataError, match="use recipe=network"):
        run(*finetune_config("recipe=frozen", "name=few", *DATA, *few))
