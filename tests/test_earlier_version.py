"""Files of version 0.1.0 load, predict the same numbers, and go on to the same bits; made by ``fixtures/write.py``."""

import csv
import gzip
import json
import platform
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from crysldnet import cli
from crysldnet.artifacts import model_file
from crysldnet.data.datasets import EMBEDDED
from crysldnet.data.store import CrystalStore

FILES = Path(__file__).parent / "fixtures" / "v0.1.0"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the files, as they lay when they were written."""
    shutil.copytree(FILES, tmp_path / "work")
    (tmp_path / "work" / "unfinished").rename(tmp_path / "work" / "runs")
    for packed in (tmp_path / "work").rglob("*.ckpt.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def weights(path: Path, kind: str) -> dict[str, torch.Tensor]:
    return model_file.read(path, kind)[1]


def assert_same_weights(one: Path, other: Path, kind: str) -> None:
    """Compare bits where the files were made with this torch on such a machine, else numbers.

    Rounding differs between instruction sets and grows from step to step.
    """
    a, b = weights(one, kind), weights(other, kind)
    assert a.keys() == b.keys()
    made = json.loads((FILES / "made_with.json").read_text())
    here = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "machine": platform.machine()}
    tolerance = {"rtol": 0, "atol": 0} if made == here else {"rtol": 0.1, "atol": 0.01}
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_an_encoder_gives_the_same_features(folder):
    assert (
        cli.run(["embed", "model=encoder.safetensors", "files=data.parquet", "layers_read=last", "out=now.parquet"])
        == 0
    )
    before, now = pq.read_table("features.parquet"), pq.read_table("now.parquet")
    assert now["id"] == before["id"]
    features = [np.stack(table["embedding"].to_numpy()) for table in (before, now)]
    np.testing.assert_allclose(features[1], features[0], rtol=1e-4, atol=1e-5)
    assert np.std(features[0]) > 0.01


def test_a_model_predicts_the_same_numbers(folder):
    assert cli.run(["predict", "model=model.safetensors", "files=data.parquet", "out=now.csv"]) == 0
    tables = []
    for name in ("predictions.csv", "now.csv"):
        with open(name, newline="") as file:
            tables.append(list(csv.DictReader(file)))
    before, now = tables
    assert len(before) == 80
    for key in ("id", "target", "unit", "class"):
        assert [row[key] for row in now] == [row[key] for row in before]
    for key in ("prediction", "std", "low", "high", "distance"):
        old, new = ([float(row[key] or "nan") for row in rows] for rows in (before, now))
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize(
    ("command", "file", "kind"),
    [("pretrain", "encoder.safetensors", "encoder"), ("finetune", "model.safetensors", "property_model")],
)
def test_a_run_goes_on_to_the_same_bits(folder, command, file, kind):
    begun = Path("runs") / command / "begun"
    assert not (begun / "summary.json").exists()
    assert cli.run([command, "name=begun", "resume=last", "trainer.max_time=null"]) == 0
    assert_same_weights(begun / file, FILES / file, kind)
    summary = json.loads((begun / "summary.json").read_text())
    assert summary["status"] == "complete"


def test_a_store_has_the_same_crystals(folder):
    store = CrystalStore.open(folder / "my.store")
    with (EMBEDDED / "examples" / "targets.csv").open(newline="") as file:
        rows = {row["material_id"]: row for row in csv.DictReader(file)}
    assert sorted(store.ids.to_pylist()) == sorted(rows)
    (column,) = (name for name in next(iter(rows.values())) if name.startswith("formation_energy"))
    values = store.numbers_of("formation_energy_per_atom")
    for name, value in zip(store.ids.to_pylist(), values, strict=True):
        assert value == pytest.approx(float(rows[name][column]))
    assert (store.crystals.sizes > 0).all()
