"""A module outside the package adds an encoder and an objective; every command works with them, in children too."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from crysldnet import build, cli, plugins
from crysldnet.errors import ConfigError, CrysldnetError
from tiny import DENOISER, QUIET, environment_of_a_shell, subset

MODULE = '''
import torch
from torch import nn

from crysldnet.build import Part
from crysldnet.encoders.protocol import Encoder
from crysldnet.graphs.corruption import Corruption
from crysldnet.graphs.spec import GraphSpec
from crysldnet.models.objectives import Objective, Reconstruction, masked_species


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

    def __init__(self, *, latent_dim: Part[int], corruption: Corruption):
        super().__init__()
        self.corruption, self.species = corruption, nn.Linear(latent_dim, 119)

    def forward(self, z, batch):
        loss, measures = masked_species(self.species(z), batch.undo)
        return Reconstruction({"species": loss}, measures)
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
    build._signature.cache_clear()


def test_an_encoder_and_an_objective_from_outside_work_with_every_command(folder):
    common = [USE, *QUIET, "trainer.accelerator=cpu", "data.path=data.parquet", "name=a"]
    own = [
        "encoder=species.yaml",
        "objective=hidden.yaml",
        *DENOISER,
        "stages.vae.epochs=2",
        "stages.diffusion.epochs=1",
    ]
    assert cli.run(["pretrain", *common, *own]) == 0
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
