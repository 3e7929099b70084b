"""What ``crysldnet sweep`` promises: W&B's own files, known keys, every run recorded, however it ended."""

import csv
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("optuna")

from crysldnet import cli
from crysldnet.config import argument, choices, compose
from crysldnet.errors import ConfigError, CrysldnetError
from crysldnet.signals import RUN_NAME
from crysldnet.tools import sweep
from crysldnet.tools.sweep.proposals import ARGUMENTS
from crysldnet.tools.sweep.results import best_first, make_axis, write_results
from crysldnet.tools.sweep.study import JOURNAL, Study, Trial
from crysldnet.tools.sweep.trials import agent_environment, metrics_of, online_config, read_history
from crysldnet.training import processes
from tiny import environment_of_a_shell, subset

ROOT = Path(__file__).parents[1]
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
RUN = """
import csv, json, os, signal, sys, time
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[2:])
folder = Path(words["runs"]) / sys.argv[1] / words["name"]
folder.mkdir(parents=True, exist_ok=True)
plan = json.loads(Path(os.environ["PLAN"]).read_text())[words["optimizer.lr"]]
with open(os.environ["PLAN"] + ".log", "a") as log:
    log.write(json.dumps({"line": sys.argv[1:], "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "time": time.time(),
                          "named": "CRYSLDNET_RUN_NAME" in os.environ, "seen": os.environ.get("SEEN")}) + "\\n")
(folder / "config.yaml").touch()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with open(folder / "metrics.csv", "w") as file:
    print("step,val/mae", file=file, flush=True)
    for step, value in enumerate(plan["values"]):
        print(f"{step},{value}", file=file, flush=True)
        time.sleep(plan.get("pause", 0.0))
if plan.get("end", True):
    metric = plan["values"][-1]
    (folder / "summary.json").write_text(json.dumps({"wall_time_s": 1.5, "val/mae": metric}))
else:
    sys.exit(1)
"""
"""A program that logs and ends as it is told, in place of a training that takes minutes."""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(**changes: Any) -> str:
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump({**GRID, **changes}))
        return str(path)

    return write


class Program:
    """Stands in for crysldnet in the processes of a sweep."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plan, script = folder / "plan.json", folder / "program.py"
        script.write_text(RUN)
        monkeypatch.setattr(processes, "PROGRAM", [sys.executable, "-S", str(script)])
        monkeypatch.setenv("PLAN", str(self.plan))

    def does(self, **plans: Any) -> None:
        """Say what runs do, by their learning rate: the values they log, and whether they end well."""
        self.plan.write_text(json.dumps({key.removeprefix("lr"): plan for key, plan in plans.items()}))

    @property
    def runs(self) -> list[dict[str, Any]]:
        """What was run, in the order in which it began."""
        log = Path(f"{self.plan}.log")
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    return Program(tmp_path, monkeypatch)


def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", choices("sweep"))
def test_every_sweep_that_ships_is_valid_and_has_known_keys(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fold_0.json").touch()  # of the sweep of Matbench, see below
    loaded = sweep.load_sweep(name)
    assert loaded.config["program"]  # W&B's agent reads it, though the command doesn't use it
    sweep.check_parameters(loaded, [])
    first = Study(loaded, tmp_path, 0).propose()
    assert first is not None
    assert set(first.values) == set(loaded.parameters)


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
        ({"parameters": {}}, "parameters must hold"),
        ({"parameters": [{"optimizer.lr": 1}]}, "parameters must hold"),
        ({"parameters": {1: {"value": 1.0e-3}}}, "parameter 1 must be a key of crysldnet"),
        ({"parameters": {"data.path=${oc.env:HOME}/": {"value": "x"}}}, r"parameter 'data\.path=.*' must be a key"),
        ({"parameters": {"--seed": {"value": 1}}}, "parameter '--seed' must be a key of crysldnet"),
        ({"parameters": {"optimizer.lr": 1.0e-3}}, r"parameter 'optimizer\.lr' must be a key of crysldnet"),
        ({"method": "guess"}, "not a W&B sweep configuration"),
        ({"parameters": {"optimizer.lr": {"min": 2.0, "max": 1.0}}}, "not a W&B sweep configuration"),
        ({"parameters": {"optimizer": {"parameters": {"lr": {"value": 1.0e-3}}}}}, r"optimizer\.KEY"),
        ({"parameters": {"name": {"value": "x"}}}, "name is set by the sweep itself"),
        ({"parameters": {"runs ": {"value": "x"}}}, "runs  is set by the sweep itself"),
        ({"parameters": {"plugins": {"value": ["evil"]}}}, "plugins run code"),
        ({"parameters": {"plugins ": {"value": ["evil"]}}}, "plugins run code"),
        ({"command": [*GRID["command"], "plugins=[evil]"]}, "plugins run code"),
        ({"command": [*GRID["command"], "--plugins", "evil"]}, "plugins run code"),
        ({"command": ["${env}", "python", "train.py", "${args}"]}, "its command must be"),
        ({"command": [*GRID["command"][:4], "matbench", "${args_no_hyphens}"]}, "its command must be"),
        ({"command": [*GRID["command"][:4], "pretrain", ARGUMENTS]}, "begin it with the stage that it is of, vae/"),
        ({"command": [*GRID["command"], "runs=elsewhere"]}, "its command must be"),
        ({"command": [*GRID["command"], " runs=elsewhere"]}, "its command must be"),
        ({"command": [*GRID["command"], "data.path=${oc.env:HOME}"]}, "its command must be"),
        ({"command": [*GRID["command"][:-1], "${args_no_hyphens}x"]}, "its command must be"),
        ({"command": "sh"}, "its command must be"),
        ({"parameters": {"data.path": {"values": ["a", "${oc.env:HOME}"]}}}, r"data\.path: \$\{…\} would be replaced"),
        ({"parameters": {"data.targets": {"value": [["${oc.env:HOME}"]]}}}, r"data\.targets: \$\{…\} would be"),
        ({"parameters": {"optimizer.lr": {"min": 1.0}}}, r"optimizer\.lr: min and max are needed"),
        ({"parameters": {"optimizer.lr": {"values": []}}}, r"parameters\.optimizer\.lr: "),
        ({"parameters": {"optimizer.lr": {"min": 0.0, "max": 1.0}}}, "a grid needs values, or whole numbers"),
        (
            {"parameters": {"optimizer.lr": {"min": 0, "max": 1, "distribution": "beta"}}},
            "beta isn't among int_uniform",
        ),
        ({"parameters": {"optimizer.lr": {"mu": 0.0, "distribution": "normal"}}}, r"optimizer\.lr\.mu: unknown key"),
        ({"metric": {"name": "val/mae", "goal": "least"}}, r"metric\.goal='least'"),
        ({"early_terminate": {"type": "hyperband"}}, "it needs min_iter from 1 on"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 1}}, "eta from 2 on"),
        ({"erly_terminate": {"type": "hyperband"}}, "erly_terminate: unknown key; did you mean 'early_terminate'"),
    ],
)
def test_what_is_no_sweep_is_refused(write: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep.load_sweep(write(**changes))


FOREIGN = [
    ["sh", "-c", "touch owned"],
    ["${env}", "nice"],
    ["/tmp/python", "-m"],
    ["python", "-c", "evil", "-m"],
    ["-m"],
]


@pytest.mark.parametrize("before", FOREIGN)
def test_the_command_of_a_sweep_starts_no_other_program_unless_that_is_allowed(
    write: Any, tmp_path: Path, before: list[str]
) -> None:
    path = write(command=[*before, "crysldnet", "finetune", ARGUMENTS])
    for backend in ("local", "wandb"):
        with pytest.raises(ConfigError, match=r"starts another program: .*; if you trust it, add allow_command=true"):
            cli.run(["sweep", f"sweep={path}", f"backend={backend}", f"runs={tmp_path}"])
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("before", [[], ["${env}", "python3", "-m"], ["${env}", "${interpreter}", "-m"]])
def test_any_way_to_start_this_program_is_this_interpreter(write: Any, before: list[str]) -> None:
    loaded = sweep.load_sweep(write(command=[*before, "crysldnet", "finetune", ARGUMENTS]))
    assert loaded.launcher == []
    assert online_config(loaded, [], 1)["command"][:3] == ["${env}", sys.executable, "-m"]


def test_a_command_that_is_allowed_starts_the_runs(write: Any, tmp_path: Path, program: Program) -> None:
    path = write(command=["${env}", "env", "SEEN=yes", "python", "-m", "crysldnet", "finetune", ARGUMENTS])
    program.does(**{"lr0.001": {"values": [3.0]}})
    line = ["sweep", f"sweep={path}", "count=1", "name=one", f"runs={tmp_path}", "allow_command=true"]
    assert cli.run(line) == 0
    assert program.runs[0]["seen"] == "yes"
    online = online_config(sweep.load_sweep(path, allow_command=True), [], 1)["command"]
    assert online[:6] == ["${env}", "env", "SEEN=yes", sys.executable, "-m", "crysldnet"]


ODD = [
    "null",
    "true",
    "1e-3",
    "a b",
    "it's",
    '"',
    "$(id)",
    "`id`",
    "[x](y)",
    "{a: b}",
    "a\nb",
    "#",
    " x ",
    "ü",
    "-",
    "",
]
ODD_VALUES = [*ODD, None, True, 1, 1.0, 1.0e-5, ["a, b", "c]"], [[1], [2, 3]], {"a": ["$(id)"]}]


@pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
def test_a_run_gets_each_value_as_the_file_has_it(write: Any, tmp_path: Path, value: Any) -> None:
    study = Study(sweep.load_sweep(write(parameters={"data.path": {"values": [value]}})), tmp_path, 0)
    trial = study.propose()
    assert trial is not None
    made = compose("finetune", study.sweep.line(trial.values, [])).values["data"]["path"]
    assert (type(made), made) == (type(value), value)


def test_a_sweep_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"no such sweep; available: finetune, matbench, pretrain"):
        sweep.load_sweep("fintune")


def test_null_is_a_value_of_a_sweep(write: Any, tmp_path: Path, program: Program) -> None:
    path = write(parameters={**grid(0.1), "patience": {"values": [None, 5]}})
    program.does(**{"lr0.1": {"values": [1.0]}})
    assert cli.run(["sweep", f"sweep={path}", "count=2", "name=none", f"runs={tmp_path}"]) == 0
    assert [compose("finetune", run["line"][1:]).values["patience"] for run in program.runs] == [None, 5]


def test_a_quote_that_is_not_closed_is_said(write: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"args: \"head='mean\" can't be split into words \(No closing quotation\)"):
        cli.run(["sweep", f"sweep={write()}", "args=head='mean", f"runs={tmp_path}"])


@pytest.mark.parametrize("args", ["optimizer.lr=1", "name=x"])
def test_what_the_runs_have_in_common_sets_no_parameter(write: Any, args: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is set by the sweep"):
        cli.run(["sweep", f"sweep={write()}", f"args={args}", f"runs={tmp_path}"])


@pytest.mark.distributed
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


def grid(*rates: float) -> dict[str, Any]:
    return {"optimizer.lr": {"values": list(rates)}}


def test_a_complete_sweep_goes_on_with_more_runs(
    write: Any, tmp_path: Path, program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["sweep", f"sweep={write(parameters=grid(0.1, 0.2, 0.3))}", "name=more", f"runs={tmp_path}"]
    program.does(**{f"lr{i / 10}": {"values": [float(i)]} for i in range(1, 4)})
    for words, count in ((["count=1"], 1), (["count=1", "resume=last"], 1), (["count=3", "resume=last"], 3)):
        os.environ.pop(RUN_NAME, None)
        assert cli.run([*line, *words]) == 0
        assert len(program.runs) == count
        assert f"run_00{count}" in capsys.readouterr().out
    assert json.loads((tmp_path / "sweep/more/summary.json").read_text())["finished"] == 3


def test_a_sweep_whose_runs_all_fail_says_so(write: Any, tmp_path: Path, program: Program) -> None:
    path = write(parameters=grid(*(i / 10 for i in range(1, 9))))
    program.does(**{f"lr{i / 10}": {"values": [1.0], "end": False} for i in range(1, 9)})
    assert cli.run(["sweep", f"sweep={path}", "count=8", "name=none", f"runs={tmp_path}"]) == 1
    assert [row["state"] for row in results(tmp_path / "sweep" / "none")] == ["failed"] * 5  # then it gives up
    assert not (tmp_path / "sweep" / "none" / "summary.json").exists()


def test_a_sweep_by_a_metric_that_its_runs_lack_stops_at_the_first_and_names_those_they_have(
    write: Any, tmp_path: Path, program: Program
) -> None:
    path = write(metric={"name": "val/maee", "goal": "minimize"}, parameters=grid(0.1, 0.2, 0.3))
    program.does(**{f"lr{i / 10}": {"values": [1.0]} for i in range(1, 4)})
    with pytest.raises(ConfigError, match=r"has no val/maee, by which .*grid\.yaml chooses; it has val/mae\. Name one"):
        cli.run(["sweep", f"sweep={path}", "count=3", "name=lacks", f"runs={tmp_path}"])
    assert len(program.runs) == 1


def test_a_sweep_over_a_split_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.split\.file=fold_0\.json: no such file; docs/sweep\.md shows"):
        cli.run(["sweep", "sweep=matbench", "count=1", "name=x", f"runs={tmp_path}"])
    assert not (tmp_path / "sweep").exists()


def test_a_run_is_this_interpreter_with_a_name_of_its_own(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [sys.executable, "-m", "crysldnet"] == processes.PROGRAM
    program = Program(tmp_path, monkeypatch)
    program.does(**{"lr0.001": {"values": [3.0]}})
    assert cli.run(["sweep", f"sweep={write()}", "count=1", "name=one", f"runs={tmp_path}", "args=epochs=1"]) == 0
    (run,) = program.runs
    own = ["name=run_001", f"runs={tmp_path / 'sweep' / 'one'}"]
    assert run["line"] == ["finetune", "logger=wandb", "optimizer.lr=0.001", "logger=csv", "epochs=1", *own]
    assert not run["named"]


@pytest.mark.distributed
def test_a_stopped_sweep_keeps_its_finished_runs(write: Any, tmp_path: Path, program: Program) -> None:
    line = ["sweep", f"sweep={write(parameters=grid(0.1, 0.2, 0.3))}", "name=stopped", f"runs={tmp_path}"]
    program.does(**{"lr0.1": {"values": [3.0]}, "lr0.2": {"values": [2.0] * 100, "pause": 0.2}})
    plan = json.loads(program.plan.read_text())
    code = f"from crysldnet.training import processes as p; p.PROGRAM = {processes.PROGRAM!r}"
    code += "; from crysldnet.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *line], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while len(program.runs) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert process.stderr is not None
    assert "stopped by SIGTERM; continue with resume=last" in process.stderr.read()
    with pytest.raises(ConfigError, match="started with another seed"):
        cli.run([*line, "resume=last", "seed=1"])
    os.environ.pop(RUN_NAME, None)
    program.plan.write_text(json.dumps({**plan, "0.2": {"values": [2.0]}, "0.3": {"values": [1.0]}}))
    assert cli.run([*line, "resume=last"]) == 0
    assert [float(row["val/mae"]) for row in results(tmp_path / "sweep" / "stopped")] == [3.0, 2.0, 1.0]
    begun = [next(word for word in run["line"] if word.startswith("name=")) for run in program.runs]
    assert begun == ["name=run_001", "name=run_002", "name=run_002", "name=run_003"]
    assert program.runs[2]["line"][-1] == "resume=last"


@pytest.mark.parametrize("replaced", ["data.path", "data.path.train", "pretrained", "data.split.file"])
def test_a_sweep_is_not_resumed_with_other_files_under_the_same_names(
    write: Any, tmp_path: Path, program: Program, replaced: str, pretrained: Path
) -> None:
    program.does(**{"lr0.001": {"values": [3.0]}, "lr-1.0": {"values": [2.0]}})
    file, train = tmp_path / "file", tmp_path / "train.parquet"
    subset(train, train=4)
    paths = {"data.path": str(train), "data.path.train": {"train": str(train)}}
    given = [argument("data.path", paths.get(replaced, "embedded:mp_starter"))]
    if replaced in ("pretrained", "data.split.file"):
        file.write_bytes(pretrained.read_bytes() if replaced == "pretrained" else b"{}")
        given.append(f"{replaced}={file}")
    line = ["sweep", f"sweep={write()}", "name=a", f"runs={tmp_path}", argument("args", shlex.join(given))]
    assert cli.run([*line, "count=1"]) == 0
    assert cli.run([*line, "count=2", "resume=last"]) == 0
    file.write_bytes(b"other") if file.exists() else subset(train, train=5)
    with pytest.raises(ConfigError, match=rf"{replaced}: the file isn't the one .*was started with: its sha256 was"):
        cli.run([*line, "count=3", "resume=last"])
    assert len(results(tmp_path / "sweep" / "a")) == 2


@pytest.mark.parametrize("full", ["at its start", "at its first result"])
def test_a_sweep_on_a_full_disk_ends_in_a_sentence_and_goes_on_when_there_is_room(
    write: Any, disk: tuple[Path, Any], program: Program, full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, fill = disk
    program.does(**{"lr0.001": {"values": [3.0]}, "lr-1.0": {"values": [2.0]}})
    line = ["sweep", f"sweep={write()}", "name=a", f"runs={folder}", "count=2"]

    def fill_and_write(*args: Any) -> None:
        fill()
        write_results(*args)

    if full == "at its start":
        fill()
    else:
        monkeypatch.setattr(sweep, "write_results", fill_and_write)
    with pytest.raises((CrysldnetError, OSError), match=r"No space left on device") as caught:
        cli.run(line)
    assert str(folder) in str(caught.value)
    assert not list(folder.rglob("*.partial*"))
    monkeypatch.setattr(sweep, "write_results", write_results)
    (folder / "filler").unlink()
    resume = ["resume=last"] if (folder / "sweep/a/config.yaml").exists() else []
    assert cli.run([*line, *resume]) == 0
    assert [row["state"] for row in results(folder / "sweep" / "a")] == ["finished"] * 2


def test_a_sweep_of_an_earlier_version_is_refused(write: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sweep" / "old"
    folder.mkdir(parents=True)
    for name in ("config.yaml", "trials.json"):
        (folder / name).write_text("[]")
    with pytest.raises(ConfigError, match=r"started by an earlier version .*choose another name"):
        cli.run(["sweep", f"sweep={write()}", "name=old", f"runs={tmp_path}", "resume=last"])


CHILD = """
import fcntl, os, signal, sys, time
from pathlib import Path
from crysldnet import signals
words = dict(word.split("=", 1) for word in sys.argv[2:])
folder = Path(words["runs"]) / sys.argv[1] / words["name"]
folder.mkdir(parents=True, exist_ok=True)
lock = (folder / ".lock").open("a+")
try:
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(2)  # as a run does whose folder is taken
lock.write(f"process {os.getpid()}")
lock.flush()
(folder / "config.yaml").touch()
def save(*_):
    time.sleep(2.0)  # as one that writes a checkpoint
    (folder / "saved").touch()
    os._exit(75)
signal.signal(signal.SIGTERM, save)
signals.end_with_the_parent()
if "resume" in words:
    (folder / "summary.json").write_text('{"wall_time_s": 1.0, "val/mae": 0.5}')
    sys.exit()
(folder / "trains").write_text(str(os.getpid()))
time.sleep(60)
"""
"""A run that ends slowly when it is told to, and well when it is resumed."""


@pytest.mark.distributed
def test_the_runs_of_a_killed_sweep_end_and_a_resumed_one_waits_for_them(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(processes, "PROGRAM", [sys.executable, str(tmp_path / "child.py")])
    line = ["sweep", f"sweep={write(parameters=grid(0.1, 0.2))}", "parallel=2", "name=killed", f"runs={tmp_path}"]
    code = f"from crysldnet.training import processes as p; p.PROGRAM = {processes.PROGRAM!r}"
    code += "; from crysldnet.cli import main; main()"
    parent = subprocess.Popen([sys.executable, "-c", code, *line], cwd=ROOT)
    own = [tmp_path / "sweep/killed/finetune" / name for name in ("run_001", "run_002")]
    while not all((folder / "trains").exists() for folder in own):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert cli.run([*line, "resume=last"]) == 0
    assert all((folder / "saved").exists() for folder in own)
    assert [row["state"] for row in results(tmp_path / "sweep/killed")] == ["finished", "finished"]
    assert "run_001: process " in capfd.readouterr().err
    assert "the process that started this one is gone" in (tmp_path / "sweep/killed/run_001.log").read_text()


@pytest.mark.distributed
def test_an_agent_of_wandb_ends_with_the_sweep_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/__init__.py").touch()
    (tmp_path / "wandb/__main__.py").write_text("import sys, time\nprint(sys.argv, flush=True)\ntime.sleep(60)")
    code = "from pathlib import Path; from crysldnet.tools.sweep.trials import run_agents; "
    code += f"run_agents('me/sweep', Path({str(tmp_path)!r}), [{{}}])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=tmp_path)
    log = tmp_path / "agent_0_0" / "agent.log"
    while not (log.exists() and log.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    assert "'agent', '--forward-signals', 'me/sweep'" in log.read_text()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while "is gone" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_runs_go_on_at_the_same_time_each_with_a_gpu_of_its_own(
    write: Any, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    path = write(parameters=grid(0.1, 0.2, 0.3, 0.4))
    program.does(**{f"lr{rate}": {"values": [rate], "pause": 0.5} for rate in (0.1, 0.2, 0.3, 0.4)})
    assert cli.run(["sweep", f"sweep={path}", "count=4", "name=two", f"runs={tmp_path}"]) == 0
    runs = program.runs
    assert {run["gpu"] for run in runs[:2]} == {run["gpu"] for run in runs[2:]} == {"4", "7"}
    assert runs[1]["time"] - runs[0]["time"] < 0.5 <= runs[2]["time"] - runs[0]["time"]
    assert len({row["optimizer.lr"] for row in results(tmp_path / "sweep" / "two")}) == 4


HYPERBAND = {"type": "hyperband", "min_iter": 2, "eta": 2}


def test_a_run_that_hyperband_gives_up_is_stopped_and_recorded(write: Any, tmp_path: Path, program: Program) -> None:
    path = write(parameters=grid(0.1, 0.2, 0.3), early_terminate=HYPERBAND)
    program.does(
        **{
            "lr0.1": {"values": [5.0, 3.0, *[1.0] * 200]},
            "lr0.2": {"values": [4.0, 2.0, *[0.5] * 200]},
            "lr0.3": {"values": [9.0] * 200, "pause": 0.2},
        }
    )
    assert cli.run(["sweep", f"sweep={path}", "name=early", f"runs={tmp_path}"]) == 0
    rows = results(tmp_path / "sweep" / "early")
    assert [row["state"] for row in rows] == ["finished", "finished", "stopped"]
    assert float(rows[2]["val/mae"]) == 9.0
    summary = json.loads((tmp_path / "sweep" / "early" / "summary.json").read_text())
    assert (summary["finished"], summary["stopped"], summary["failed"]) == (2, 1, 0)
    assert summary["best"]["run"] == "run_002"


def test_hyperband_stops_what_isnt_among_the_best_and_only_what_runs(write: Any, tmp_path: Path) -> None:
    study = Study(sweep.load_sweep(write(parameters=grid(0.1, 0.2, 0.3), early_terminate=HYPERBAND)), tmp_path, 0)
    for name, history in (("run_001", (3.0, 2.0, 1.0)), ("run_002", (3.0, 1.0, 0.8))):
        study.propose()
        assert not study.report(name, history)
        study.end(name, "finished", history[-1], 1.0)
    study.propose()
    assert not study.report("run_003", (9.0,))  # too early to say
    assert study.report("run_003", (9.0, 8.0))
    assert study.end("run_003", "stopped", None, 1.0).metric == 8.0
    assert study.trials()["run_003"].history == (9.0, 8.0)


def test_without_early_termination_no_run_is_stopped(write: Any, tmp_path: Path) -> None:
    study = Study(sweep.load_sweep(write(parameters=grid(*(i / 10 for i in range(1, 9))))), tmp_path, 0)
    for i in range(1, 9):
        study.propose()
        assert not study.report(f"run_00{i}", [float(i)] * 5)
        study.end(f"run_00{i}", "finished", float(i), 1.0)


def test_a_loss_that_isnt_finite_is_no_value_of_the_metric(write: Any, tmp_path: Path) -> None:
    study = Study(sweep.load_sweep(write()), tmp_path, 0)
    study.propose()
    study.report("run_001", (2.0, float("nan"), 1.0))
    assert study.trials()["run_001"].history == (2.0, 1.0)


@pytest.mark.parametrize(
    ("given", "first"),
    [
        ({"min_iter": 5}, 5),
        ({"max_iter": 27, "s": 2}, 3),
        ({"max_iter": 27, "s": 2, "eta": 2}, 6),
    ],
)
def test_hyperband_begins_as_wandb_says(write: Any, given: dict[str, int], first: int) -> None:
    early = sweep.load_sweep(write(early_terminate={"type": "hyperband", **given})).early_terminate
    assert early is not None
    assert early.first == first


MANY = {
    "optimizer.lr": {"distribution": "log_uniform_values", "min": 1.0e-4, "max": 1.0e-2},
    "layer_decay": {"min": 0.5, "max": 1.0},
    "epochs": {"min": 10, "max": 20},
    "data.batch_size": {"distribution": "q_log_uniform_values", "min": 16, "max": 128, "q": 8},
    "head.dropout": {"distribution": "q_uniform", "min": 0.0, "max": 0.5, "q": 0.25},
    "optimizer.weight_decay": {"distribution": "log_uniform", "min": -5, "max": -2},
    "head": {"values": ["mean", "attention"]},
    "patience": {"value": 7},
}


def test_values_are_drawn_as_wandb_describes_them(write: Any, tmp_path: Path) -> None:
    loaded = sweep.load_sweep(write(method="random", parameters=MANY))
    sweep.check_parameters(loaded, [])
    study = Study(loaded, tmp_path, 0)
    drawn: dict[str, list[Any]] = {name: [] for name in MANY}
    for _ in range(60):
        trial = study.propose()
        assert trial is not None
        for name, value in trial.values.items():
            drawn[name].append(value)
    below = sum(lr < 1.0e-3 for lr in drawn["optimizer.lr"])
    assert 15 < below < 45  # half of them, where the logarithm is uniform
    assert all(1.0e-4 <= lr <= 1.0e-2 for lr in drawn["optimizer.lr"])
    assert all(isinstance(v, float) and 0.5 <= v <= 1.0 for v in drawn["layer_decay"])
    assert set(drawn["epochs"]) == set(range(10, 21))
    assert all(isinstance(v, int) and v % 8 == 0 and 16 <= v <= 128 for v in drawn["data.batch_size"])
    assert set(drawn["head.dropout"]) == {0.0, 0.25, 0.5}
    assert all(math.exp(-5) <= v <= math.exp(-2) for v in drawn["optimizer.weight_decay"])
    assert set(drawn["head"]) == {"mean", "attention"}
    assert set(drawn["patience"]) == {7}


def test_a_bayesian_sweep_learns_from_the_metric_of_earlier_runs(write: Any, tmp_path: Path) -> None:
    rate = {"optimizer.lr": {"distribution": "log_uniform_values", "min": 1.0e-5, "max": 1.0e-1}}
    study = Study(sweep.load_sweep(write(method="bayes", parameters=rate)), tmp_path, 0)
    errors = []
    for _ in range(20):
        trial = study.propose()
        assert trial is not None
        errors.append(abs(math.log10(trial.values["optimizer.lr"]) + 3.0))
        study.end(trial.name, "finished", errors[-1], 1.0)
    assert sum(error < 0.3 for error in errors[5:]) >= 7  # by chance, 2 of 15 are within a factor of 2


def test_a_failed_run_is_no_reason_to_try_its_values_again(write: Any, tmp_path: Path) -> None:
    study = Study(sweep.load_sweep(write(parameters=THREE)), tmp_path, 0)
    tried = []
    while (trial := study.propose()) is not None:
        tried.append(trial.values["optimizer.lr"])
        study.end(
            trial.name,
            "failed" if trial.values["optimizer.lr"] < 0 else "finished",
            None if trial.values["optimizer.lr"] < 0 else 2.5,
            1.0,
        )
    assert tried == THREE["optimizer.lr"]["values"]


@pytest.mark.parametrize("name", choices("sweep"))
def test_proposals_repeat_with_the_seed(name: str, tmp_path: Path) -> None:
    loaded = sweep.load_sweep(name)
    sequences = []
    for turn, seed in enumerate((0, 0, 1)):
        (folder := tmp_path / str(turn)).mkdir()
        values: list[Any] = []
        for number in range(7):
            if turn == 1 or number == 0:  # resumed again and again
                study = Study(loaded, folder, seed)
            trial = study.propose()
            assert trial is not None
            values.append(trial.values)
            study.end(trial.name, "finished", 0.1 * number, 1.0)
        sequences.append(values)
    assert sequences[0] == sequences[1]
    assert sequences[0] != sequences[2]
    assert sequences[0][0] != sequences[0][1]


def test_a_study_goes_on_after_a_kill_in_the_middle_of_a_line(write: Any, tmp_path: Path) -> None:
    loaded = sweep.load_sweep(write(parameters=grid(0.1, 0.2, 0.3)))
    study = Study(loaded, tmp_path, 0)
    study.propose()
    study.end("run_001", "finished", 1.0, 1.0)
    study.propose()
    study.report("run_002", (5.0,))
    journal = tmp_path / JOURNAL
    whole = journal.read_bytes()
    for end in range(len(whole) - 400, len(whole), 23):  # whatever of its end was written
        journal.write_bytes(whole[:end])
        Path(f"{journal}.lock").symlink_to(journal)  # of the killed one
        begun = Study(loaded, tmp_path, 0)
        names = [name for name, t in begun.trials().items() if t.state == "running"] or [begun.propose().name]  # type: ignore[union-attr]
        assert begun.begin_again(*names).values == {"optimizer.lr": 0.2}
        begun.report("run_002", (5.0, 4.0))
        begun.end("run_002", "finished", 4.0, 1.0)
        assert begun.propose().values == {"optimizer.lr": 0.3}  # type: ignore[union-attr]
        assert begun.trials()["run_002"].history == (5.0, 4.0)


def test_the_best_run_comes_first_then_stopped_and_failed_ones(write: Any) -> None:
    loaded = sweep.load_sweep(write())
    trials = [Trial(name, {}, "finished", metric, 1.0) for name, metric in (("a", 2.0), ("b", 1.0))]
    trials += [Trial("c", {}, "failed", None, 1.0), Trial("d", {}, "stopped", 0.5, 1.0)]
    assert [t.name for t in best_first(loaded, trials)] == ["b", "a", "d", "c"]
    loaded = sweep.load_sweep(write(metric={"name": "val/mae", "goal": "maximize"}))
    assert [t.name for t in best_first(loaded, trials)] == ["a", "b", "d", "c"]


def test_the_metric_of_pretraining_is_that_of_the_stage_it_names(tmp_path: Path) -> None:
    summary = {"seed": 0, "vae": {"val/masked_accuracy": 0.2, "val/x": 1}, "diffusion": {"val/masked_accuracy": 0.3}}
    staged = {"vae/val/masked_accuracy": 0.2, "vae/val/x": 1.0, "diffusion/val/masked_accuracy": 0.3}
    assert metrics_of(summary) == {"seed": 0.0, **staged}
    assert metrics_of({"val/mae": float("nan"), "val/mae/gap": 2.0}) == {"val/mae/gap": 2.0}
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "metrics.csv").write_text("step,val/x\n1,0.5\n2,\n3,0.25\n")
    assert read_history(tmp_path, "vae/val/x") == (0.5, 0.25)
    assert read_history(tmp_path, "diffusion/val/x") == ()


def test_a_sweep_ends_when_its_target_is_reached(write: Any, tmp_path: Path, program: Program) -> None:
    program.does(**{f"lr{rate}": {"values": [value]} for rate, value in ((0.1, 3.0), (0.2, 0.5), (0.3, 1.0))})
    metric = {"name": "val/mae", "goal": "minimize", "target": 1.0}
    path = write(metric=metric, parameters=grid(0.1, 0.2, 0.3))
    assert cli.run(["sweep", f"sweep={path}", "name=target", f"runs={tmp_path}"]) == 0
    assert [float(row["val/mae"]) for row in results(tmp_path / "sweep" / "target")] == [3.0, 0.5]


def some_trials(study: Study, metrics: Sequence[float | None]) -> list[Trial]:
    for i, metric in enumerate(metrics):
        trial = study.propose()
        assert trial is not None
        if metric is None:
            study.end(trial.name, "failed", None, 10.0)
            continue
        study.report(trial.name, (metric + 1, metric))
        stopped = i % 3 == 2
        study.end(trial.name, "stopped" if stopped else "finished", None if stopped else metric, 10.0)
    return list(study.trials().values())


def test_the_page_shows_every_run_and_needs_no_network(tmp_path: Path) -> None:
    loaded = sweep.load_sweep("finetune")
    trials = some_trials(Study(loaded, tmp_path, 0), [50.0, 41.5, 60.0, None, 45.0])
    write_results(tmp_path, loaded, trials)
    text = (tmp_path / "sweep.html").read_text()
    first_chart = text.split("<svg", 2)[1].split("</svg>")[0]
    lines = re.findall(r'<polyline class="run (\w+)" data-run="(run_\d+)" points="([^"]+)"', first_chart)
    assert {name for _, name, _ in lines} == {t.name for t in trials}
    points = {name: where.split() for _, name, where in lines}
    axes = len(loaded.parameters) + 1
    assert [len(points[t.name]) for t in trials] == [axes, axes, axes, axes - 1, axes]  # a failed run has no metric
    heights = {t.name: float(points[t.name][-1].split(",")[1]) for t in trials if t.metric is not None}
    assert min(heights, key=heights.__getitem__) == "run_002"  # the best is at the top
    assert {name for state, name, _ in lines if state == "stopped"} == {"run_003"}
    assert "41.5" in text
    assert not re.search(r"https?://|src=|@import|url\(", text)


def test_an_axis_is_logarithmic_where_the_parameter_is(write: Any) -> None:
    assert make_axis("lr", [1e-5, 1e-3, 1e-1], logarithmic=True).place(1e-3) == pytest.approx(0.5)
    assert make_axis("lr", [0.0, 1.0, 4.0]).place(1.0) == pytest.approx(0.25)
    assert make_axis("head", ["mean", "sum"]).ticks == [(0.25, "mean"), (0.75, "sum")]
    parameters = sweep.load_sweep("finetune").parameters
    assert parameters["optimizer.lr"].logarithmic
    assert not parameters["epochs"].logarithmic


def test_the_sweep_that_goes_online_has_this_interpreter_and_a_folder_for_each_agent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded = sweep.load_sweep("finetune")
    online = online_config(loaded, ["epochs=2"], 20)
    assert {**online, "command": 0} == {**loaded.config, "command": 0, "run_cap": 20}
    assert online["run_cap"] == 20
    assert online["command"][:5] == ["${env}", sys.executable, "-m", "crysldnet", "finetune"]
    assert online["command"][-3:] == [ARGUMENTS, "epochs=2", "runs=${envvar:CRYSLDNET_SWEEP_RUNS}"]
    assert loaded.config["command"][1] == "python"
    monkeypatch.setenv("SLURM_NTASKS", "4")
    environment = agent_environment({"CUDA_VISIBLE_DEVICES": "3"}, tmp_path)
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert environment["SLURM_NTASKS"] is None  # it is taken out
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    monkeypatch.setenv("CRYSLDNET_SWEEP_RUNS", str(tmp_path))
    filled = utils.create_sweep_command(list(online["command"]))  # W&B's agent fills the macro in
    assert filled[-1] == f"runs={tmp_path}"


def test_without_an_account_the_online_sweep_says_what_to_do(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if wandb.api.api_key is not None:
        pytest.skip("this machine has an account")
    with pytest.raises(ConfigError, match=r"needs an account: wandb login; backend=local"):
        cli.run(["sweep", f"sweep={write()}", "backend=wandb", f"runs={tmp_path}"])


@pytest.mark.skipif(shutil.which("make") is None, reason="make isn't installed")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("SWEEP=finetune COUNT=20", "crysldnet sweep sweep=finetune count=20 backend=wandb"),
        ("SWEEP=pretrain LOCAL=1", "crysldnet sweep sweep=pretrain count=4 backend=local"),
        ("COUNT=3 LOCAL=0 SLURM=0", "python -m crysldnet sweep sweep=finetune count=3 backend=wandb"),
        ("COUNT=8 SLURM=1", "srun env python -m crysldnet sweep sweep=finetune count=8 backend=wandb"),
    ],
)
def test_make_sweep_runs_on_wandb_or_here(given: str, expected: str) -> None:
    line = ["make", "-n", "sweep", *given.split(), "VENV=none", "PYTHON=python"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment_of_a_shell())
    assert expected in done.stdout.replace("PYTHONPATH=src ", "")
    assert expected.startswith("srun") == ("srun" in done.stdout)


def test_the_matbench_sweep_sees_no_test_crystal_of_its_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crysldnet.data.datasets import open_store

    page = (ROOT / "docs" / "sweep.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    parts = json.loads((tmp_path / "fold_0.json").read_text())
    store = open_store("embedded:matbench_jdft2d")
    tested = set(store.ids_at((store.numbers_of("matbench_test_fold") == 0).nonzero()[0]))
    assert len(parts["train"]) > 8 * len(parts["val"]) > 100
    assert parts["test"] == []
    assert not tested & {*parts["train"], *parts["val"]}
    assert len(tested) + len(parts["train"]) + len(parts["val"]) == len(store)
    assert "data.split.file=fold_0.json" in sweep.load_sweep("matbench").arguments
