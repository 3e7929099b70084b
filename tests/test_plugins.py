"""A module outside the package adds an encoder, an objective, a kind of target, a strategy and a file format.

Every command works with them, in children too.
"""

import csv
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from crysldnet import build, cli, plugins
from crysldnet.artifacts.model_file import load_property_model
from crysldnet.data.store import CrystalStore
from crysldnet.errors import ConfigError, CrysldnetError, Interrupted
from crysldnet.measures import MEASURES
from crysldnet.models.targets.base import TYPES
from crysldnet.readers.sources import KINDS
from tiny import DENOISER, QUIET, environment_of_a_shell, subset

MODULE = '''
import json
from functools import partial

import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from crysldnet.build import Part
from crysldnet.encoders.protocol import Encoder
from crysldnet.graphs.corruption import Corruption
from crysldnet.graphs.spec import GraphSpec
from crysldnet.measures import Measure
from crysldnet.models.objectives import Objective, Reconstruction, masked_species
from crysldnet.models.targets import Number
from crysldnet.readers.rows import Rows
from crysldnet.readers.sources import register
from crysldnet.readers.structure_files import checked


class Species(Encoder):
    """Each atom's species alone."""

    def __init__(self, *, width: int = 16, k: int = 4):
        super().__init__()
        self.width, self.graph = width, GraphSpec(k=k)
        self.species = nn.Embedding(119, width)

    def forward(self, batch):
        return self.species(batch.numbers)


class Hidden(Objective):
    """Hidden species alone."""

    measures = (Measure("certainty", "certainty of a species", "%", better="higher", shown=True),)

    def __init__(self, *, latent_dim: Part[int], corruption: Corruption):
        super().__init__()
        self.corruption, self.species = corruption, nn.Linear(latent_dim, 119)

    def forward(self, z, batch):
        logits = self.species(z)
        loss, measures = masked_species(logits, batch.undo)
        certain = 100 * logits.detach().softmax(-1).amax(-1)
        measures["certainty"] = (certain.sum(), torch.tensor(float(len(certain))))
        return Reconstruction({"species": loss}, measures)


class SquareRoot(Number):
    """A number from 0 on, trained on its square root."""

    name = "square_root"
    grows = False
    bounds = (0.0, float("inf"))

    def coordinate(self, values):
        return values.clamp_min(0.0).sqrt()

    def from_line(self, line):
        return line.clamp_min(0.0).square()

    def slope(self, values):
        return 2.0 * values.sqrt()


class MyDDP(DDPStrategy):
    """As that of Lightning."""


def my_ddp(*, bucket_cap_mb: int = 25) -> DDPStrategy:
    return MyDDP(bucket_cap_mb=bucket_cap_mb)


class CellsReader:
    """Files of a crystal a line: id, lattice, atomic numbers, coordinates and band gap, as JSON."""

    def __init__(self, path):
        self.path, self.name, self.metadata, self.total = path, path.name, {}, None

    def tasks(self, settings):
        yield partial(read_cells, str(self.path), settings)


def read_cells(path, settings):
    rows = Rows()
    with open(path) as lines:
        for number, line in enumerate(lines, 1):
            name, lattice, numbers, places, gap = json.loads(line)
            structure = checked(np.array(lattice), np.array(numbers), np.array(places))
            rows.add(f"{path}:{number}", name, structure, {"band_gap": gap})
    return rows.piece(settings.max_atoms)


register(".cells", CellsReader)
'''
USE = "plugins=[my_parts]"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the module, its YAML files and a few crystals."""
    (tmp_path / "my_parts.py").write_text(MODULE)
    (tmp_path / "species.yaml").write_text("_target_: my_parts.Species\nwidth: 16\n")
    (tmp_path / "hidden.yaml").write_text("_target_: my_parts.Hidden\ncorruption: {mask_fraction: 0.3}\n")
    subset(tmp_path / "data.parquet", train=16, val=4, test=4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "PLUGINS", set())
    monkeypatch.setenv(plugins.VARIABLE, "")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("my_parts", None)
    TYPES.pop("square_root", None)
    KINDS.pop(".cells", None)
    MEASURES.pop("certainty", None)
    build._signature.cache_clear()


def test_an_encoder_and_an_objective_from_outside_work_with_every_command(folder, capsys):
    common = [USE, *QUIET, "trainer.accelerator=cpu", "data.path=data.parquet", "name=a"]
    own = [
        "encoder=species.yaml",
        "objective=hidden.yaml",
        *DENOISER,
        "stages.vae.epochs=2",
        "stages.diffusion.epochs=1",
    ]
    assert cli.run(["pretrain", *common, *own]) == 0
    assert "certainty of a species (%)" in capsys.readouterr().out
    encoder = "pretrained=runs/pretrain/a/encoder.safetensors"
    short = [encoder, "epochs=1", "min_steps=0", "baselines=false"]
    assert cli.run(["finetune", *common, *short]) == 0
    assert cli.run(["finetune", "name=a", "resume=last"]) == 0
    assert cli.run(["predict", USE, "model=runs/finetune/a", "files=data.parquet"]) == 0
    assert cli.run(["embed", USE, "model=runs/pretrain/a/encoder.safetensors", "files=data.parquet"]) == 0
    assert pq.read_table("embeddings.parquet").num_rows == 24
    grid = {
        "program": "crysldnet",
        "command": ["python", "-m", "crysldnet", "finetune", "${args_no_hyphens}"],
        "method": "grid",
        "metric": {"name": "val/mae", "goal": "minimize"},
        "parameters": {"optimizer.lr": {"values": [1e-3]}},
    }
    Path("sweep.yaml").write_text(yaml.safe_dump(grid))
    arguments = " ".join(["data.path=data.parquet", "trainer.accelerator=cpu", *QUIET, *short])
    assert cli.run(["sweep", USE, "sweep=sweep.yaml", "count=1", f"args={arguments}", "name=s"]) == 0
    assert json.loads(Path("runs/sweep/s/summary.json").read_text())["status"] == "complete"


def test_a_run_is_not_resumed_with_a_plugin_that_has_changed(folder):
    stopped = ["epochs=500", "min_steps=0", "baselines=false", "trainer.max_time=00:00:00:01"]
    common = [USE, *QUIET, "trainer.accelerator=cpu", "data.path=data.parquet", "name=a", "encoder=species.yaml"]
    with pytest.raises(Interrupted):
        cli.run(["finetune", *common, *stopped])
    with (folder / "my_parts.py").open("a") as file:
        file.write("\n# changed\n")
    with pytest.raises(ConfigError, match="my_parts: the file isn't the one that the run"):
        cli.run(["finetune", "name=a", "resume=last"])


def write_cells(path, store):
    with path.open("w") as file:
        for row, (name, gap) in enumerate(zip(store.ids.to_pylist(), store.numbers_of("band_gap"), strict=True)):
            c = store.crystals.take(np.array([row]))
            cell = [name, c.lattice[0].tolist(), c.numbers.tolist(), c.frac_coords.tolist(), gap]
            file.write(json.dumps(cell) + "\n")


def test_a_kind_of_target_and_a_file_format_from_outside_work_with_every_command(folder):
    write_cells(folder / "crystals.cells", CrystalStore.open(folder / "data.parquet"))
    assert cli.run(["data", "import", "crystals.cells", "--out", "my.store", USE]) == 0
    (folder / "mine.yaml").write_text(
        "_target_: crysldnet.data.datamodule.CrystalDataModule\npath: my.store\ntargets: [band_gap]\nbatch_size: 8\n"
        "split: {by: formula, fractions: [0.6, 0.2, 0.2], seed: 0}\n"
    )
    common = [USE, *QUIET, "trainer.accelerator=cpu", "data=mine.yaml", "encoder=species.yaml"]
    common += ["target_types={band_gap: square_root}", "epochs=2", "min_steps=0"]
    assert cli.run(["finetune", *common, "loss=laplace", "ensemble=2", "name=a"]) == 0
    model, info = load_property_model("runs/finetune/a/member_0")
    assert info["target_types"] == [{"type": "square_root", "spread": "laplace"}]
    store = CrystalStore.open("my.store")
    split = json.loads(Path("runs/finetune/a/split.json").read_text())
    trained = [store.ids.to_pylist().index(name) for name in split["train"]]
    assert float(model.mean) == pytest.approx(np.sqrt(store.numbers_of("band_gap")[trained]).mean(), rel=1e-5)
    assert cli.run(["predict", USE, "model=runs/finetune/a", "files=crystals.cells"]) == 0
    with open("predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    assert all(float(row["prediction"]) >= 0 and float(row["low"] or 0) >= 0 for row in rows)
    assert cli.run(["finetune", *common, "recipe=frozen", "folds=2", "baselines=true", "name=b"]) == 0
    TYPES.pop("square_root")
    with pytest.raises(CrysldnetError, match=r"no kind of target 'square_root'.* plugins="):
        load_property_model("runs/finetune/b")
    with pytest.raises(ConfigError, match=r"target_types\.band_gap: no kind of target 'square_rot'"):
        cli.run(["finetune", *common, "target_types={band_gap: square_rot}", "name=c"])


@pytest.mark.slow
def test_a_strategy_from_outside_runs_on_two_ranks_and_matbench_in_parallel(folder):
    (folder / "mine.yaml").write_text("_target_: my_parts.my_ddp\nbucket_cap_mb: 1\n")
    common = [USE, *QUIET, "trainer.accelerator=cpu", "encoder=species.yaml", "epochs=1", "min_steps=0"]
    two = ["strategy=mine.yaml", "trainer.devices=2", "data.path=data.parquet", "name=a"]
    program = [sys.executable, "-m", "crysldnet"]
    done = subprocess.run([*program, "finetune", *common, *two], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 × CPU" in done.stderr + done.stdout
    folds = ["parallel=2", "folds=[0,1]", "name=m"]
    done = subprocess.run([*program, "matbench", *common, *folds], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(Path("runs/matbench/m/summary.json").read_text())
    assert len(summary["tasks"]["matbench_jdft2d"]["scores"]) == 2


def test_the_installed_program_finds_a_plugin_in_the_working_folder(folder):
    program = Path(sys.executable).with_name("crysldnet")
    line = [program, "pretrain", USE, "encoder=species.yaml", "--print-config"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment_of_a_shell())
    assert done.returncode == 0, done.stderr
    assert "my_parts.Species" in done.stdout


def test_a_class_of_no_plugin_or_that_a_plugin_only_imports_is_refused(folder):
    with pytest.raises(ConfigError, match=r"needs plugins=\[its module\]"):
        cli.run(["pretrain", "encoder=species.yaml"])
    Path("species.yaml").write_text("_target_: my_parts.GraphSpec\n")
    with pytest.raises(ConfigError, match="not on the list"):
        cli.run(["pretrain", USE, "encoder=species.yaml"])
    with pytest.raises(ConfigError, match=r"no module 'my_part'; put my_part\.py into"):
        cli.run(["pretrain", "plugins=[my_part]"])
    Path("my_parts.py").write_text("import not_installed_anywhere\n")
    sys.modules.pop("my_parts", None)
    build.PLUGINS.clear()
    os.environ[plugins.VARIABLE] = ""
    with pytest.raises(CrysldnetError, match="my_parts needs not_installed_anywhere"):
        cli.run(["pretrain", USE])


def test_installed_packages_name_plugins_by_entry_points(folder, monkeypatch):
    point = importlib.metadata.EntryPoint("mine", "my_parts", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == plugins.GROUP else [])
    plugins.load()
    assert {"my_parts"} == build.PLUGINS
    assert os.environ[plugins.VARIABLE] == "my_parts"
