"""Jobs of SLURM: the script is written, submitted, interrupted, requeued and completed, by stand-ins for its programs.

The stand-ins in slurm/ really run the script, with as many processes and the variables that SLURM gives them.
"""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from crysldnet import cli
from crysldnet.config import compose, conf_folder
from crysldnet.errors import ConfigError
from tiny import DENOISER, ENCODER, environment_of_a_shell, subset

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(__file__).parent / "slurm"
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make isn't installed")


def make(folder: Path, *words: str, path: str = os.environ["PATH"], **variables: str) -> subprocess.CompletedProcess:
    """Run make in a copy of the project's root: its Makefile, conf and src."""
    for name in ("Makefile", "conf", "src"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    return subprocess.run(
        ["make", *words, "VENV=none", f"PYTHON={sys.executable}"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**environment_of_a_shell(), "PATH": path, "OMP_NUM_THREADS": "1", **variables},
    )


def free_job() -> str:
    """Return a job number from which Lightning makes a port that is free."""
    for port in range(16000, 24999):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return f"8{port - 15000:04d}"
    raise AssertionError("no port is free")


@pytest.mark.distributed
def test_a_job_that_is_interrupted_is_requeued_and_completes(tmp_path: Path) -> None:
    data = subset(tmp_path / "data.parquet", train=32, val=8)
    job = free_job()
    run = tmp_path / "runs/pretrain" / f"slurm-{job}"
    settings = [
        "data=starter",
        *ENCODER,
        *DENOISER,
        f"data.path={data}",
        "data.batch_size=16",
        "stage=vae",
        "stages.vae.epochs=25",
    ]
    settings.append("data.num_workers=1")
    done = make(
        tmp_path,
        "pretrain",
        "SLURM=1",
        "GPUS=2",
        "SBATCH=--partition=gpu --account=me",
        f"ARGS={shlex.join(settings)}",
        path=f"{PROGRAMS}:{os.environ['PATH']}",
        JOB=job,
        JOB_STATE=str(tmp_path),
        INTERRUPT_AT=str(run / "vae/checkpoints/*.ckpt"),
        INTERRUPT_WITH="SIGUSR1",
    )
    logs = list((tmp_path / "runs/slurm").glob(f"{job}.log"))
    log = logs[0].read_text() if logs else ""
    assert done.returncode == 0, done.stderr + log
    *options, script = (tmp_path / "submitted").read_text().splitlines()
    assert options == ["--partition=gpu", "--account=me"]
    assert script in done.stdout
    assert "start 0, resume=null" in log
    assert f"job {job}, status 75" in log, log
    assert "start 1, resume=last" in log
    assert f"job {job}, status 0" in log, log
    assert not (tmp_path / "status.2").exists()
    assert json.loads((run / "summary.json").read_text())["status"] == "complete"
    assert log.count("masked species found") == 1, "the first rank alone prints"
    assert log.count("2 processes (2 on") == 2, "once a start"


def test_a_script_has_what_was_asked_for_and_quotes_survive(tmp_path: Path) -> None:
    words = ["encoder=pddformer", "data.split.fractions=[0.9, 0.1, 0.0]", "logger.tags=[a&b|c\\d]", "logger=wandb"]
    done = make(tmp_path, "slurm-script", "GPUS=8", "NODES=4", "TIME=2-00:00:00", f"ARGS={shlex.join(words)}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for option in ("nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "time=2-00:00:00", "requeue", "signal=USR1@120"):
        assert f"#SBATCH --{option}" in lines
    assert "@" not in done.stdout.replace("USR1@120", "")
    step = shlex.split(next(line for line in lines if line.startswith("srun ")))
    assert any(word.startswith("--cpus-per-task=") for word in step), "srun doesn't take it from sbatch since 22.05"
    arguments = step[step.index("pretrain") + 1 :]
    assert arguments[-len(words) :] == words
    arguments = [a for a in arguments if not a.startswith(("name=", "resume="))]
    values = compose("pretrain", arguments).values
    assert (values["trainer"]["devices"], values["trainer"]["num_nodes"]) == (8, 4)
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["slurm"]


def test_a_printed_script_can_be_submitted_by_hand_from_another_folder(tmp_path: Path) -> None:
    """With sbatch's options as its own lines, and a folder for the log, which SLURM doesn't make."""
    root, elsewhere, programs = tmp_path / "it's root", tmp_path / "elsewhere", tmp_path / "bin"
    for folder in (root, elsewhere, programs):
        folder.mkdir()
    options = ["--partition=gpu", "-q", "high", "--comment='a|b & c'"]
    printed = make(root, "slurm-script", f"SBATCH={' '.join(options)}")
    assert printed.returncode == 0, printed.stderr
    lines = printed.stdout.splitlines()
    assert {"#SBATCH --partition=gpu", "#SBATCH -q high", "#SBATCH --comment='a|b & c'"} <= set(lines)
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < lines.index("") < 20
    (elsewhere / "job.sh").write_text(printed.stdout)
    (programs / "srun").write_text('#!/bin/bash\necho "in $PWD"; printf "%s\\n" "$@"\n')
    (programs / "srun").chmod(0o755)
    done = subprocess.run(
        [str(PROGRAMS / "sbatch"), "job.sh"],
        cwd=elsewhere,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "JOB": "7", "JOB_STATE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    log = (root / "runs/slurm/7.log").read_text()
    assert f"in {root}" in log
    assert "job 7, status 0" in log
    assert "name=slurm-7" in log


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["GPUS=abc"], "GPUS=abc: give a whole number"),
        (["NODES=0"], "NODES=0: give a whole number"),
        (["CPUS="], "CPUS=: give a whole number"),
        (["RUNS=my runs"], "RUNS is empty or has a character"),
        (["RUNS=it's"], "RUNS is empty or has a character"),
        (["RUNS="], "RUNS is empty"),
        (["ARGS=data.path=(a"], "ARGS: quotes or parentheses aren't closed"),
        (["ARGS=name='a"], "ARGS: quotes or parentheses aren't closed"),
    ],
)
def test_what_slurm_would_stumble_over_later_is_refused_now(tmp_path: Path, words: list[str], says: str) -> None:
    for command in (["slurm-script"], ["pretrain", "SLURM=1"]):
        done = make(tmp_path, *command, *words)
        assert done.returncode != 0
        assert says in done.stderr
        assert "#!/bin/bash" not in done.stdout
    assert not [path for path in tmp_path.iterdir() if path.name not in ("Makefile", "conf", "src")]


def test_without_sbatch_nothing_is_submitted_and_it_is_said(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("make", "sh", "bash", "date", "mkdir", "sed", "echo"):
        (programs / name).symlink_to(str(shutil.which(name)))
    done = make(tmp_path, "pretrain", "SLURM=1", "GPUS=8", path=str(programs))
    assert done.returncode != 0
    assert "sbatch isn't here" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("variables", "program"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "crysldnet", "SLURM_NTASKS_PER_NODE": "4"}, "SLURM"),
        ({"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "4"}, "torchrun"),
    ],
)
def test_another_number_of_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], program: str
) -> None:
    """As where srun starts fewer tasks, or torchrun has another --nproc-per-node; each process refuses for itself."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    says = rf"{program} started 4 process\(es\), but trainer.devices=2 × trainer.num_nodes=1 asks for 2"
    with pytest.raises(ConfigError, match=says):
        cli.run(["pretrain", "trainer.accelerator=cpu", "trainer.devices=2", "strategy=ddp"])
    assert not (tmp_path / "runs").exists()


def test_more_nodes_than_anything_has_started_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_ADDR", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"trainer\.num_nodes=4: nothing has started processes on other machines"):
        cli.run(["pretrain", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.num_nodes=4", "strategy=ddp"])


@pytest.mark.distributed
def test_torchrun_starts_the_command_itself(tmp_path: Path) -> None:
    data = subset(tmp_path / "data.parquet", train=16, val=8)
    words = [*ENCODER, f"data.path={data}", "data.batch_size=16", "stage=vae", "stages.vae.epochs=1", "name=a"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "crysldnet"]
    done = subprocess.run(
        [*torchrun, "pretrain", "trainer.devices=2", "strategy=ddp", "trainer.progress_bar=false", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("masked species found") == 1
    assert json.loads((tmp_path / "runs/pretrain/a/summary.json").read_text())["status"] == "complete"


def test_the_template_is_part_of_the_configuration() -> None:
    assert (conf_folder() / "slurm.sh").is_file()
