"""A module outside the package adds a part of each kind, and every command that can use it does, in children too.

``CELLS`` is the whole table: each command with the kinds of parts that it uses. Each command runs once.
"""

import contextlib
import csv
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

import crysldnet
from crysldnet import build, cli, plugins
from crysldnet.artifacts import model_file
from crysldnet.data.store import CrystalStore
from crysldnet.errors import UNFINISHED, CheckpointError, ConfigError, CrysldnetError, Interrupted
from crysldnet.measures import MEASURES, unit_of
from crysldnet.models.targets import TYPES
from crysldnet.readers.sources import KINDS
from crysldnet.signals import RUN_NAME
from tiny import DENOISER, QUIET, environment_of_a_shell, subset

USE = "plugins=[my_parts]"
COMMON = [USE, *QUIET, "trainer.accelerator=cpu"]
PRETRAIN = ["pretrain", *COMMON, "encoder=species.yaml", "objective=hidden.yaml", "data=few.yaml", *DENOISER]
PRETRAIN += ["stages.vae.epochs=1", "stages.diffusion.epochs=1"]
SHORT = ["epochs=1", "min_steps=0"]
TARGET = ["data.targets=[band_gap]", "target_types={band_gap: square_root}"]
ENCODER = "pretrained=runs/pretrain/a/encoder.safetensors"
FINETUNE = ["finetune", *COMMON, "data=few.yaml", *TARGET, *SHORT, "baselines=false"]
SINGLE, DDP = ["strategy=single.yaml"], ["strategy=ddp.yaml", "trainer.devices=2"]
MATBENCH = ["matbench", *COMMON, *SINGLE, *SHORT, "data._target_=my_parts.Few"]
MATBENCH += ["target_types={exfoliation_en: square_root}"]
JARVIS = ["jarvis", *COMMON, *SINGLE, *SHORT, "recipe=network", "baselines=false", "data._target_=my_parts.Few"]
JARVIS += ["data.path=jarvis.parquet", "properties=[optb88vdw_bandgap,mbj_bandgap]"]
JARVIS += ["target_types={optb88vdw_bandgap: square_root, mbj_bandgap: square_root}"]
JARVIS += ["email=a@example.org", "project_url=https://example.org"]
SWEPT = ["data=few.yaml", *QUIET, "trainer.accelerator=cpu", *SINGLE]
READ = ["files=crystals.cells", USE]
MODEL = ["model=runs/finetune/a", USE]

TO_PRETRAIN = "encoder, objective, data set, strategy"
TO_FINETUNE = "encoder, target type, data set, strategy"


@dataclass(frozen=True)
class Command:
    """A command line, the kinds of parts that it uses, and the commands that it follows.

    Attributes:
        processes: number of child processes in which these parts must be used; 0 for this process.
        alone: it is started as a process of its own, as often as there are exit statuses.
        stop: the first of these processes is stopped while it trains.
    """

    line: list[str]
    kinds: str
    after: tuple[str, ...] = ()
    processes: int = 0
    alone: tuple[int, ...] = ()
    stop: bool = False


def sweep(of: str, *words: str) -> list[str]:
    text = " ".join(f"'{word}'" for word in [*SWEPT, *words])
    return ["sweep", USE, f"sweep={of}.yaml", "count=2", f"name={of}", f"args={text}"]


CELLS = {
    "import": Command(["data", "import", "crystals.cells", "--out", "my.store", USE], "file format"),
    "pretrain": Command([*PRETRAIN, *SINGLE, "name=a"], TO_PRETRAIN),
    "second stage": Command(
        [*PRETRAIN, "stage=diffusion", "init=runs/pretrain/a/vae/pretraining.safetensors", "name=b"],
        "encoder, objective, data set",
        ("pretrain",),
    ),
    "finetune": Command([*FINETUNE, ENCODER, *SINGLE, "loss=laplace", "name=a"], TO_FINETUNE, ("pretrain",)),
    "finetune files": Command(
        ["finetune", "crystals.cells", *COMMON, "encoder=species.yaml", TARGET[1], *SHORT, *SINGLE, "name=files"],
        "encoder, target type, strategy, file format",
    ),
    "finetune ensemble": Command(
        [*FINETUNE, ENCODER, *SINGLE, "ensemble=2", "ensemble_by=folds", "name=e"], TO_FINETUNE, ("pretrain",)
    ),
    "finetune folds": Command([*FINETUNE, ENCODER, *SINGLE, "folds=2", "name=f"], TO_FINETUNE, ("pretrain",)),
    "finetune frozen": Command(
        [*FINETUNE, ENCODER, "recipe=frozen", "baselines=true", "name=frozen"],
        "encoder, target type, data set",
        ("pretrain",),
    ),
    "finetune hybrid": Command(
        [*FINETUNE, ENCODER, *SINGLE, "recipe=hybrid", "networks=2", "name=h"], TO_FINETUNE, ("pretrain",)
    ),
    "finetune classes": Command(
        [*FINETUNE, ENCODER, "data.targets=[metal]", "target_types={metal: careful}", "recipe=frozen", "name=c"],
        "encoder, class type, data set",
        ("pretrain",),
    ),
    "predict classes": Command(
        ["predict", "model=runs/finetune/c", *READ, "out=c.csv"],
        "encoder, class type, file format",
        ("finetune classes",),
    ),
    "predict": Command(["predict", *MODEL, *READ[:1], "out=p.csv"], "encoder, target type, file format", ("finetune",)),
    "predict frozen": Command(
        ["predict", "model=runs/finetune/frozen", *READ, "out=q.csv"],
        "encoder, target type, file format",
        ("finetune frozen",),
    ),
    "embed": Command(["embed", *MODEL, *READ[:1], "out=e.parquet"], "encoder, file format", ("finetune",)),
    "embed pretrained": Command(
        ["embed", ENCODER.replace("pretrained", "model"), *READ, "out=f.parquet"], "encoder, file format", ("pretrain",)
    ),
    "explain": Command(["explain", *MODEL, *READ[:1], "out=x.csv"], "encoder, target type, file format", ("finetune",)),
    "suggest": Command(
        ["suggest", *MODEL, "files=others.cells", "n=2", "out=s.csv"],
        "encoder, target type, file format",
        ("finetune",),
    ),
    "export": Command(["export", *MODEL, "out=m.pt2"], "encoder, target type", ("finetune",)),
    "report": Command(["report", "runs/finetune/a", USE, "out=r.html"], "encoder, target type", ("finetune",)),
    "sweep pretrain": Command(sweep("pretrain", *DENOISER, *PRETRAIN[-2:]), TO_PRETRAIN, processes=2),
    "sweep finetune": Command(
        sweep("finetune", ENCODER, *TARGET, *SHORT, "baselines=false"), TO_FINETUNE, ("pretrain",), processes=2
    ),
    "matbench": Command(
        [*MATBENCH, ENCODER, "folds=[0,1]", "parallel=2", "name=m"], TO_FINETUNE, ("pretrain",), processes=2
    ),
    "jarvis": Command([*JARVIS, ENCODER, "parallel=2", "name=j"], TO_FINETUNE, ("pretrain",), processes=2),
    "resume pretrain": Command(
        [*PRETRAIN, *SINGLE, "name=r"], TO_PRETRAIN, processes=2, alone=(UNFINISHED, 0), stop=True
    ),
    "resume finetune": Command(
        [*FINETUNE, "encoder=species.yaml", *SINGLE, "name=r"],
        TO_FINETUNE,
        processes=2,
        alone=(UNFINISHED, 0),
        stop=True,
    ),
    "two ranks pretrain": Command([*PRETRAIN, *DDP, "name=two"], TO_PRETRAIN, processes=2, alone=(0,)),
    "two ranks finetune": Command(
        [*FINETUNE, "encoder=species.yaml", *DDP, "name=two"], TO_FINETUNE, processes=2, alone=(0,)
    ),
}


def forget() -> None:
    """Forget the module and its parts, as a new process knows nothing of them."""
    plugins.LOADED.clear()
    for name in (plugins.VARIABLE, RUN_NAME):
        os.environ.pop(name, None)
    sys.modules.pop("my_parts", None)
    for known, name in ((TYPES, "square_root"), (TYPES, "careful"), (KINDS, ".cells"), (MEASURES, "certainty")):
        known.pop(name, None)
    MEASURES.pop("mean_squared_error", None)
    build._signature.cache_clear()


@dataclass
class Runs:
    """The commands that were run in a working folder, each with the processes that used each kind of part."""

    folder: Path
    python_path: str
    module_path: list[str]
    used: dict[str, dict[str, set[int]]] = field(default_factory=dict)
    printed: dict[str, str] = field(default_factory=dict)

    def after(self, name: str) -> dict[str, set[int]]:
        """Run a command and those that it follows, unless they were run."""
        if name not in self.used:
            for other in CELLS[name].after:
                self.after(other)
            self.used[name] = self._run(name, CELLS[name])
        return self.used[name]

    def forget(self) -> None:
        """Forget the module, and where it was found."""
        forget()
        os.environ["PYTHONPATH"], sys.path[:] = self.python_path, self.module_path

    def _run(self, name: str, command: Command) -> dict[str, set[int]]:
        log, text = self.folder / f"{name}.used", io.StringIO()
        self.forget()
        os.environ["MY_PARTS_USED"] = str(log)
        try:
            if not command.alone:
                with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                    assert cli.run(command.line) == 0, text.getvalue()
            for place, status in enumerate(command.alone):
                line = [*command.line[:1], *QUIET, "name=r", "resume=last"] if place else command.line
                stop = {"MY_PARTS_STOP": "1"} if command.stop and not place else {}
                started = [sys.executable, "-m", "crysldnet", *line]
                done = subprocess.run(started, capture_output=True, text=True, env={**os.environ, **stop})
                assert done.returncode == status, done.stderr
        finally:
            os.environ.pop("MY_PARTS_USED")
            self.forget()
        self.printed[name] = text.getvalue()
        found = defaultdict(set)
        for kind, _, process in (line.rpartition(" ") for line in log.read_text().splitlines()):
            found[kind].add(int(process))
        return found


@pytest.fixture
def outside(made: Runs) -> Iterator[Runs]:
    yield made
    made.forget()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """A working folder with the module, a YAML file for each of its parts, and a few crystals."""
    folder = tmp_path_factory.mktemp("outside")
    fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        for name in ("PYTHONPATH", plugins.VARIABLE, RUN_NAME, "MATMINER_DATA"):
            patch.setenv(name, os.environ.get(name, ""))
        yield Runs(folder, os.environ["PYTHONPATH"], list(sys.path))
        forget()


def fill(folder: Path) -> None:
    shutil.copy(Path(__file__).with_name("my_parts.py"), folder)
    files = {
        "species": {"_target_": "my_parts.Species", "width": 16},
        "hidden": {"_target_": "my_parts.Hidden", "corruption": {"mask_fraction": 0.3}},
        "few": {"_target_": "my_parts.Few", "path": "data.parquet", "batch_size": 8},
        "single": {"_target_": "my_parts.my_single"},
        "ddp": {"_target_": "my_parts.my_ddp", "bucket_cap_mb": 1},
    }
    own = {"pretrain": {"objective": "hidden.yaml", "encoder": "species.yaml"}, "finetune": {}}
    for command, chosen in own.items():
        words = [f"{key}={value}" for key, value in chosen.items()]
        files[command] = {
            "program": "crysldnet",
            "command": ["python", "-m", "crysldnet", command, *words, "${args_no_hyphens}"],
            "method": "grid",
            "metric": {"name": "vae/val/loss" if command == "pretrain" else "val/mae", "goal": "minimize"},
            "parameters": {"optimizer.lr": {"values": [1e-3, 2e-3]}},
        }
    for name, values in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    table = pq.read_table(subset(folder / "data.parquet", train=48, val=12, test=12))
    table = table.append_column("metal", pc.equal(table["band_gap"], 0.0))
    pq.write_table(table, folder / "data.parquet")
    renamed = table.rename_columns([{"band_gap": "optb88vdw_bandgap"}.get(c, c) for c in table.column_names])
    renamed = renamed.append_column("mbj_bandgap", renamed["optb88vdw_bandgap"])
    pq.write_table(renamed, folder / "jarvis.parquet")
    write_cells(folder / "crystals.cells", CrystalStore.open(folder / "data.parquet"))
    write_cells(folder / "others.cells", CrystalStore.open(subset(folder / "others.parquet", train=0, val=16)))


def write_cells(path: Path, store: CrystalStore) -> None:
    with path.open("w") as file:
        for row, (name, gap) in enumerate(zip(store.ids.to_pylist(), store.numbers_of("band_gap"), strict=True)):
            c = store.crystals.take(np.array([row]))
            cell = [name, c.lattice[0].tolist(), c.numbers.tolist(), c.frac_coords.tolist(), gap]
            file.write(json.dumps(cell) + "\n")


def cells() -> Iterator[object]:
    for name, command in CELLS.items():
        for kind in command.kinds.split(", "):
            marks = [pytest.mark.distributed] if command.processes else []
            yield pytest.param(name, kind, id=f"{name}-{kind}", marks=marks)


@pytest.mark.parametrize(("command", "kind"), list(cells()))
def test_a_command_uses_a_part_from_outside(outside: Runs, command: str, kind: str) -> None:
    processes = outside.after(command)[kind]
    if not CELLS[command].processes:
        assert processes == {os.getpid()}
    else:
        assert len(processes - {os.getpid()}) >= CELLS[command].processes


def test_a_measure_from_outside_has_its_title_unit_and_baseline_everywhere(outside: Runs) -> None:
    outside.after("pretrain")
    assert "certainty of a species (%)" in outside.printed["pretrain"]
    outside.after("finetune frozen")
    summary = json.loads(Path("runs/finetune/frozen/summary.json").read_text())
    assert summary["baselines"]["band_gap"]["measure"] == "mean_squared_error"
    printed = outside.printed["finetune frozen"]
    assert "(eV²)" in printed
    assert "band_gap: the squared error on 12 test crystals is" in printed
    assert "the mean of others (" in printed
    for name, title in (("pretrain/a", "vae: masked species found"), ("finetune/frozen", "squared error (eV²)")):
        assert cli.run(["report", f"runs/{name}", USE, "out=measures.html"]) == 0
        assert title in Path("measures.html").read_text()
    assert unit_of("vae/val/certainty", {}) == "%"


def test_a_model_of_a_kind_from_outside_is_trained_on_its_scale_and_predicts_within_its_bounds(outside: Runs) -> None:
    outside.after("predict")
    plugins.load(["my_parts"])
    model, info = model_file.load_property_model("runs/finetune/a")
    assert info["target_types"] == [{"type": "square_root", "spread": "laplace"}]
    store = CrystalStore.open("data.parquet")
    trained = np.isin(store.ids.to_pylist(), json.loads(Path("runs/finetune/a/split.json").read_text())["train"])
    assert float(model.mean) == pytest.approx(np.sqrt(store.numbers_of("band_gap")[trained]).mean(), rel=1e-5)
    with open("p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 72
    assert all(float(row["prediction"]) >= 0 and float(row["low"] or 0) >= 0 for row in rows)


@pytest.mark.parametrize("name", ["finetune/a", "finetune/frozen", "pretrain/a"])
def test_a_file_says_which_plugin_it_needs(outside: Runs, name: str) -> None:
    for run in ("finetune", "finetune frozen"):
        outside.after(run)
    load = crysldnet.load_encoder if name == "pretrain/a" else crysldnet.load
    message = rf"{name}/\w+\.safetensors: parts of it are defined in my_parts, which isn't .* plugins=\[my_parts\]"
    with pytest.raises(CheckpointError, match=message):
        load(f"runs/{name}")
    os.environ[plugins.VARIABLE] = "my_parts"  # as in a child process
    assert load(f"runs/{name}").embed("data.parquet").features.shape[0] == 72


@pytest.mark.distributed
@pytest.mark.parametrize(
    "words", ["matbench fold runs/matbench/m matbench_jdft2d 0", "jarvis property runs/jarvis/j mbj_bandgap"]
)
def test_a_part_of_a_run_that_is_started_by_hand_finds_the_plugin_of_the_run(outside: Runs, words: str) -> None:
    outside.after(words.split()[0])
    assert cli.run(words.split()) == 0
    assert {"my_parts"} == plugins.LOADED


def test_a_benchmark_is_not_continued_with_a_plugin_that_has_changed(folder: Path) -> None:
    run = [*COMMON, "encoder=species.yaml", *SHORT, "name=m"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crysldnet.tools.matbench.run_fold", stop)
        with pytest.raises(Interrupted):
            cli.run(["matbench", *run])
    with (folder / "my_parts.py").open("a") as file:
        file.write("\n# changed\n")
    with pytest.raises(ConfigError, match="my_parts: the file isn't the one that the run"):
        cli.run(["matbench", "name=m", "resume=last"])


def stop(*_: object) -> None:
    raise Interrupted("stopped by the test")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder of a test's own."""
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("PYTHONPATH", plugins.VARIABLE, RUN_NAME):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    forget()
    yield tmp_path
    forget()


def test_a_run_is_not_resumed_with_a_plugin_that_has_changed(folder):
    stopped = ["epochs=500", "min_steps=0", "baselines=false", "trainer.max_time=00:00:00:01"]
    common = [USE, *QUIET, "trainer.accelerator=cpu", "data.path=data.parquet", "name=a", "encoder=species.yaml"]
    with pytest.raises(Interrupted):
        cli.run(["finetune", *common, *stopped])
    with (folder / "my_parts.py").open("a") as file:
        file.write("\n# changed\n")
    with pytest.raises(ConfigError, match="my_parts: the file isn't the one that the run"):
        cli.run(["finetune", "name=a", "resume=last"])


def test_an_unknown_kind_of_target_is_refused(outside: Runs) -> None:
    outside.after("pretrain")
    with pytest.raises(ConfigError, match=r"target_types\.band_gap: no kind of target 'square_rot'.*square_root"):
        cli.run([*FINETUNE, "target_types={band_gap: square_rot}", "name=other"])


def test_the_installed_program_finds_a_plugin_in_the_working_folder(folder):
    program = Path(sys.executable).with_name("crysldnet")
    line = [program, "pretrain", USE, "encoder=species.yaml", "--print-config"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment_of_a_shell())
    assert done.returncode == 0, done.stderr
    assert "my_parts.Species" in done.stdout


def test_a_class_of_no_plugin_or_that_a_plugin_only_imports_is_refused(folder):
    with pytest.raises(ConfigError, match=r"needs plugins=\[my_parts\]"):
        cli.run(["pretrain", "encoder=species.yaml"])
    Path("species.yaml").write_text("_target_: my_parts.GraphSpec\n")
    with pytest.raises(ConfigError, match="not on the list"):
        cli.run(["pretrain", USE, "encoder=species.yaml"])
    with pytest.raises(ConfigError, match=r"no module 'my_part'; put my_part\.py into"):
        cli.run(["pretrain", "plugins=[my_part]"])
    Path("my_parts.py").write_text("import not_installed_anywhere\n")
    sys.modules.pop("my_parts", None)
    plugins.LOADED.clear()
    os.environ[plugins.VARIABLE] = ""
    with pytest.raises(CrysldnetError, match="my_parts needs not_installed_anywhere"):
        cli.run(["pretrain", USE])


def test_installed_packages_name_plugins_by_entry_points(folder, monkeypatch):
    point = importlib.metadata.EntryPoint("mine", "my_parts", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == plugins.GROUP else [])
    plugins.load()
    assert {"my_parts"} == plugins.LOADED
    assert os.environ[plugins.VARIABLE] == "my_parts"
