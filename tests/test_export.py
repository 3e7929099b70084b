"""``crysldnet export``: the program predicts what the model predicts, with torch alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import crysldnet
from crysldnet import cli
from crysldnet.artifacts.model_file import load_property_models
from crysldnet.data.datasets import open_store
from crysldnet.errors import CheckpointError, ConfigError
from crysldnet.graphs.batch import make_batch
from crysldnet.signals import RUN_NAME
from crysldnet.tools import export
from tiny import QUIET, subset

SMALL = ["encoder=neighbor_attention_small", "encoder.width=16", "encoder.layers=2", "epochs=1", "min_steps=0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with a standard deviation, of two targets."""
    folder = tmp_path_factory.mktemp("export")
    data = subset(folder / "d.parquet", train=24, val=8)
    words = [*SMALL, *QUIET, "baselines=false", f"data.path={data}", f"runs={folder}", "name=a", "loss=laplace"]
    os.environ.pop(RUN_NAME, None)
    assert cli.run(["finetune", *words, "data.targets=[formation_energy_per_atom,band_gap]", "head=attention"]) == 0
    os.environ.pop(RUN_NAME, None)
    return folder / "finetune/a"


def test_the_program_predicts_as_the_model_does_without_this_package(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.pt2"
    assert cli.run(["export", f"model={model}", f"out={out}"]) == 0
    loaded = crysldnet.load(model)
    crystals = open_store("embedded:mp_starter").crystals.take(np.arange(1000, 1100))
    torch.save(export.inputs(crystals, loaded.encoder.graph), tmp_path / "inputs.pt")
    code = (
        "import sys, torch; program = torch.export.load(sys.argv[1]).module();"
        "torch.save(program(**torch.load(sys.argv[2])), sys.argv[3]);"
        "sys.exit('crysldnet was imported' if 'crysldnet' in sys.modules else 0)"
    )
    words = [sys.executable, "-c", code, str(out), str(tmp_path / "inputs.pt"), str(tmp_path / "found.pt")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found, expected = torch.load(tmp_path / "found.pt"), loaded.predict(crystals)
    assert found["value"].shape == (100, 2)
    np.testing.assert_allclose(found["value"].numpy(), expected.values, rtol=1e-4, atol=1e-5)
    assert (found["std"] > 0).all()
    extra = {export.ABOUT: ""}
    torch.export.load(out, extra_files=extra)
    said = json.loads(extra[export.ABOUT])
    assert said["targets"] == ["formation_energy_per_atom", "band_gap"]
    assert said["inputs"] == list(export.INPUTS)
    assert said["graph"]["k"] == loaded.encoder.graph.k


def test_an_onnx_file_predicts_as_the_model_does_without_torch(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    assert cli.run(["export", f"model={model}", f"out={out}"]) == 0
    loaded = crysldnet.load(model)
    crystals = open_store("embedded:mp_starter").crystals.take(np.arange(1000, 1100))
    given = export.inputs(crystals, loaded.encoder.graph)
    np.savez(tmp_path / "inputs.npz", **{name: value.numpy() for name, value in given.items()})
    code = (
        "import sys, numpy as np, onnxruntime; session = onnxruntime.InferenceSession(sys.argv[1]);"
        "given = np.load(sys.argv[2]); wanted = [i.name for i in session.get_inputs()];"
        "found = session.run(None, {name: given[name] for name in wanted});"
        "np.savez(sys.argv[3], **dict(zip([o.name for o in session.get_outputs()], found)));"
        "open(sys.argv[4], 'w').write(session.get_modelmeta().custom_metadata_map['crysldnet.json']);"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    files = [str(tmp_path / name) for name in ("inputs.npz", "found.npz", "about.json")]
    words = [sys.executable, "-c", code, str(out), *files]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found, expected = np.load(tmp_path / "found.npz"), loaded.predict(crystals)
    assert set(found) == {"value", "std"}
    np.testing.assert_allclose(found["value"], expected.values, rtol=1e-4, atol=1e-5)
    said = json.loads((tmp_path / "about.json").read_text())
    assert said["targets"] == ["formation_energy_per_atom", "band_gap"]


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_classes_beside_a_number_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(export, "CHECKED", 20)
    data = subset(tmp_path / "d.parquet", train=24, val=8)
    table = pq.read_table(data)
    metal = pa.array([float(gap == 0.0) for gap in table["band_gap"].to_pylist()])
    pq.write_table(table.append_column("metal", metal), data)
    words = [*SMALL, *QUIET, "baselines=false", f"data.path={data}", f"runs={tmp_path}", "name=b", "loss=gaussian"]
    words += ["data.targets=[metal,band_gap]", "target_types={metal: classification}"]
    os.environ.pop(RUN_NAME, None)
    assert cli.run(["finetune", *words]) == 0
    os.environ.pop(RUN_NAME, None)
    out = tmp_path / f"m{suffix}"
    assert cli.run(["export", f"model={tmp_path / 'finetune/b'}", f"out={out}"]) == 0
    [(network, _)] = load_property_models(tmp_path / "finetune/b")
    crystals = open_store("embedded:mp_starter").crystals.take(np.arange(1000, 1003))
    given = export.inputs(crystals, network.encoder.graph)
    found = (export.OnnxSession(out) if suffix == ".onnx" else torch.export.load(out).module())(**given)
    expected = network.eval().predict(make_batch(crystals, network.encoder.graph))
    assert found["probability"].shape == (3, 2, 2)
    torch.testing.assert_close(found["probability"], expected.probability, equal_nan=True)
    torch.testing.assert_close(found["std"], expected.std, equal_nan=True)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_program_of_other_weights_is_noticed_and_nothing_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    make = export.make_program

    def changed(network, crystals):
        [(other, _)] = load_property_models(model)
        with torch.no_grad():
            other.head.mlp[-1].bias += 0.01
        return make(other, crystals)

    monkeypatch.setattr(export, "make_program", changed)
    with pytest.raises(CheckpointError, match=r"the program differs from the model by 0\.0"):
        cli.run(["export", f"model={model}", f"out={tmp_path / 'm'}{suffix}"])
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused_with_the_reason(model: Path, shared: Path) -> None:
    with pytest.raises(ConfigError, match=r"its encoder is PDDFormer, and only that of encoder=neighbor_attention"):
        cli.run(["export", f"model={shared / 'finetune/tiny'}"])
    with pytest.raises(ConfigError, match=r"must end in \.pt2"):
        cli.run(["export", f"model={model}", "out=model.onnx", "format=torch"])
    with pytest.raises(ConfigError, match=r"must end in \.pt2 \(torch\.export\) or \.onnx"):
        cli.run(["export", f"model={model}", "out=model.bin"])
    [(network, _)] = load_property_models(model)
    assert export.refusal([network]) is None
    assert "an ensemble" in str(export.refusal([network, network]))
    assert "trees and kernel ridge" in str(export.refusal([SimpleNamespace()]))
    network.descriptors = object()
    assert "descriptors" in str(export.refusal([network]))
    network.per = {"band_gap": "area"}
    assert "learns band_gap per area" in str(export.refusal([network]))
