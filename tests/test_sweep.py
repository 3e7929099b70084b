"""What ``crysldnet sweep`` promises: W&B's own files, known keys, every run recorded, however it ended."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from crysldnet import cli, sweep
from crysldnet.config import choices
from crysldnet.errors import ConfigError
from crysldnet.sweep.proposals import import_sweeps
from crysldnet.training.run_folder import NAME_VARIABLE

if importlib.util.find_spec("sweeps") is None:
    pytest.skip("the sweeps package isn't installed", allow_module_level=True)

TINY = (
    "data=jdft2d data.targets=[exfoliation_energy] data.split.train_fraction=0.1 epochs=1 min_steps=0 encoder.width=16 "
    "encoder.layers=2 encoder.k=6 encoder.n_distances=8 encoder.n_basis=16 trainer.progress_bar=false "
    "trainer.accelerator=cpu"
)
GRID: dict[str, Any] = {
    "program": "crysldnet",
    "command": ["${env}", "python", "-m", "crysldnet", "finetune", "logger=wandb", "${args_no_hyphens}"],
    "method": "grid",
    "metric": {"name": "val/mae", "goal": "minimize"},
    "parameters": {"optimizer.lr": {"values": [1.0e-3, -1.0]}},
}
THREE = {"optimizer.lr": {"values": [1.0e-3, -1.0, 1.0e-5]}}


@pytest.fixture(autouse=True)
def _no_run_name() -> Iterator[None]:
    before = os.environ.pop(NAME_VARIABLE, None)
    yield
    os.environ.pop(NAME_VARIABLE, None)
    if before is not None:
        os.environ[NAME_VARIABLE] = before


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(**changes: Any) -> str:
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump({**GRID, **changes}))
        return str(path)

    return write


class FakeRuns:
    """Stands in for the processes: writes a summary with the metric of a run, or none."""

    def __init__(self, metrics: list[float | None]) -> None:
        self.metrics, self.lines, self.environments = list(metrics), [], []

    def __call__(self, line: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        self.lines.append(line)
        self.environments.append(env)
        words = dict(word.split("=", 1) for word in line if "=" in word)
        metric = self.metrics.pop(0)
        if metric is not None:
            folder = Path(words["runs"]) / "finetune" / words["name"]
            folder.mkdir(parents=True)
            (folder / "config.yaml").touch()
            (folder / "summary.json").write_text(json.dumps({"wall_time_s": 1.5, "val/mae": metric}))
        return SimpleNamespace(returncode=0 if metric is not None else 1)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        constants = {"DEVNULL": subprocess.DEVNULL, "STDOUT": subprocess.STDOUT}
        monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(run=self, **constants))


def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", choices("sweep"))
def test_every_sweep_that_ships_is_valid_and_has_known_keys(name: str) -> None:
    loaded = sweep.load_sweep(name)
    assert loaded.config["program"]  # W&B's agent reads it, though the command doesn't use it
    first = sweep.propose(loaded, [], 0)
    assert first is not None
    sweep.check_parameters(loaded, first, [])
    assert set(first) == set(loaded.parameters)


def test_an_unknown_key_is_refused_by_its_name(write: Any, tmp_path: Path) -> None:
    path = write(parameters={"optimizer.lrr": {"values": [1.0e-3]}})
    with pytest.raises(ConfigError, match=r"optimizer\.lrr: unknown key; did you mean 'lr'"):
        cli.run(["sweep", f"sweep={path}", f"runs={tmp_path}"])
    assert not (tmp_path / "sweep").exists()


def test_every_listed_value_is_checked_before_the_first_run(write: Any, tmp_path: Path) -> None:
    path = write(parameters={"head.layers": {"values": [1, 2, "many"]}})
    with pytest.raises(ConfigError, match=r"head\.layers='many'"):
        cli.run(["sweep", f"sweep={path}", f"runs={tmp_path}"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "guess"}, "not a W&B sweep configuration"),
        ({"parameters": {"optimizer.lr": {"min": 2.0, "max": 1.0}}}, "not a W&B sweep configuration"),
        ({"parameters": {"optimizer": {"parameters": {"lr": {"value": 1.0e-3}}}}}, r"optimizer\.KEY"),
        ({"parameters": {"name": {"value": "x"}}}, "name is set by the sweep itself"),
        ({"command": ["${env}", "python", "train.py", "${args}"]}, "its command must be"),
        ({"command": [*GRID["command"][:4], "matbench", "${args_no_hyphens}"]}, "its command must be"),
    ],
)
def test_what_is_no_sweep_is_refused(write: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep.load_sweep(write(**changes))


def test_a_sweep_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"no such sweep; there are: finetune, pretrain"):
        sweep.load_sweep("fintune")


@pytest.mark.parametrize("args", ["optimizer.lr=1", "name=x"])
def test_what_the_runs_have_in_common_sets_no_parameter(write: Any, args: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is set by the sweep"):
        cli.run(["sweep", f"sweep={write()}", f"args={args}", f"runs={tmp_path}"])


def test_a_local_sweep_runs_to_its_end_and_records_a_failed_run(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.run(["sweep", f"sweep={write()}", "count=5", "name=whole", f"runs={tmp_path}", f"args={TINY}"])
    folder = tmp_path / "sweep" / "whole"
    assert status == 0
    rows = results(folder)
    assert [row["state"] for row in rows] == ["finished", "failed"]
    assert [float(row["optimizer.lr"]) for row in rows] == [1.0e-3, -1.0]
    own = folder / "finetune" / rows[0]["run"]
    assert float(rows[0]["val/mae"]) == json.loads((own / "summary.json").read_text())["val/mae"]
    assert yaml.safe_load((own / "config.yaml").read_text())["optimizer"]["lr"] == 1.0e-3
    assert "lr must be over 0" in (folder / "run_002.log").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["finished"], summary["failed"]) == (1, 1)
    assert summary["best"]["run"] == "run_001"
    printed = capsys.readouterr().out
    assert printed.index("run_001") < printed.index("run_002")


def test_a_sweep_whose_runs_all_fail_says_so(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeRuns([None, None]).install(monkeypatch)
    assert cli.run(["sweep", f"sweep={write()}", "name=none", f"runs={tmp_path}"]) == 1
    assert [row["state"] for row in results(tmp_path / "sweep" / "none")] == ["failed"] * 2
    assert not (tmp_path / "sweep" / "none" / "summary.json").exists()


def test_a_run_is_this_interpreter_with_a_name_of_its_own(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = FakeRuns([3.0])
    runs.install(monkeypatch)
    assert cli.run(["sweep", f"sweep={write()}", "count=1", "name=one", f"runs={tmp_path}", "args=epochs=1"]) == 0
    assert len(runs.lines) == 1
    assert runs.lines[0][:4] == [sys.executable, "-m", "crysldnet", "finetune"]
    assert runs.lines[0][4:] == [
        "logger=wandb",
        "optimizer.lr=0.001",
        "logger=csv",
        "epochs=1",
        "name=run_001",
        f"runs={tmp_path / 'sweep' / 'one'}",
    ]
    assert all(NAME_VARIABLE not in environment for environment in runs.environments)


def test_a_stopped_sweep_keeps_its_finished_runs(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["sweep", f"sweep={write(parameters=THREE)}", "name=stopped", f"runs={tmp_path}"]

    class Stopped(FakeRuns):
        def __call__(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
            if not self.metrics:
                raise KeyboardInterrupt
            return super().__call__(*args, **kwargs)

    Stopped([3.0]).install(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        cli.run(line)
    os.environ.pop(NAME_VARIABLE)
    with pytest.raises(ConfigError, match="begun with another seed"):
        cli.run([*line, "resume=last", "seed=1"])
    os.environ.pop(NAME_VARIABLE)
    rest = FakeRuns([2.0, 1.0])
    rest.install(monkeypatch)
    assert cli.run([*line, "resume=last"]) == 0
    assert [float(row["val/mae"]) for row in results(tmp_path / "sweep" / "stopped")] == [3.0, 2.0, 1.0]
    assert len(rest.lines) == 2


def test_the_metric_of_earlier_runs_is_fed_back(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = import_sweeps()
    loaded = sweep.load_sweep(write(parameters=THREE))
    seen: list[Any] = []
    original = package.next_run
    monkeypatch.setattr(package, "next_run", lambda config, runs: seen.append(runs) or original(config, runs))
    first = sweep.propose(loaded, [], 0)
    trials = [sweep.Trial("a", first, 2.5, 1.0), sweep.Trial("b", {"optimizer.lr": -1.0}, None, 1.0)]
    assert sweep.propose(loaded, trials, 0) == {"optimizer.lr": 1.0e-5}
    assert [run.state for run in seen[1]] == ["finished", "failed"]
    assert seen[1][0].summary_metric("val/mae") == 2.5
    assert sweep.propose(loaded, [*trials, sweep.Trial("c", {"optimizer.lr": 1.0e-5}, 1.0, 1.0)], 0) is None


@pytest.mark.parametrize("name", ["finetune", "pretrain"])
def test_proposals_repeat_with_the_seed(name: str) -> None:
    loaded = sweep.load_sweep(name)
    sequences = []
    for seed in (0, 0, 1):
        trials: list[sweep.Trial] = []
        for number in range(4):
            values = sweep.propose(loaded, trials, seed)
            assert values is not None
            trials.append(sweep.Trial(f"run_{number}", values, 0.1 * number, 1.0))
        sequences.append([trial.values for trial in trials])
    assert sequences[0] == sequences[1]
    assert sequences[0] != sequences[2]
    assert sequences[0][0] != sequences[0][1]


def test_the_best_run_comes_first_and_failed_ones_last(write: Any) -> None:
    loaded = sweep.load_sweep(write())
    trials = [sweep.Trial(name, {}, metric, 1.0) for name, metric in (("a", 2.0), ("b", None), ("c", 1.0))]
    assert [t.name for t in sweep.best_first(loaded, trials)] == ["c", "a", "b"]
    assert [t.name for t in sweep.best_first(replace(loaded, maximize=True), trials)] == ["a", "c", "b"]


def test_the_metric_of_pretraining_is_that_of_its_last_stage() -> None:
    summary = {"seed": 0, "vae": {"val/masked_accuracy": 0.2, "val/x": 1}, "diffusion": {"val/masked_accuracy": 0.3}}
    assert sweep.find_metric(summary, "val/masked_accuracy") == 0.3
    assert sweep.find_metric(summary, "val/x") == 1.0
    assert sweep.find_metric({"val/mae": float("nan")}, "val/mae") is None
    assert sweep.find_metric(summary, "val/mae") is None


def test_a_sweep_ends_when_its_target_is_reached(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeRuns([3.0, 0.5, 1.0]).install(monkeypatch)
    path = write(metric={"name": "val/mae", "goal": "minimize", "target": 1.0}, parameters=THREE)
    assert cli.run(["sweep", f"sweep={path}", "name=target", f"runs={tmp_path}"]) == 0
    assert [float(row["val/mae"]) for row in results(tmp_path / "sweep" / "target")] == [3.0, 0.5]
