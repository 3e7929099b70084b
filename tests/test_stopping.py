"""A signal stops a command wherever it is: it ends as unfinished, and its run goes on as if nothing had been."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crysldnet import cli
from crysldnet.training.checkpoint_file import verify
from crysldnet.training.trainer import TrainerSettings
from tiny import DENOISER, ENCODER, QUIET, subset

BRIEF = ["epochs=1", "min_steps=0", "baselines=false"]

AT = """
import importlib, os, signal, sys
from operator import attrgetter
from crysldnet import cli
module, owner, name, calls, numbers = sys.argv[1:6]
owner = attrgetter(owner)(importlib.import_module(module)) if owner else importlib.import_module(module)
original, left = getattr(owner, name), [int(calls)]
def told(*arguments, **named):
    left[0] -= 1
    if left[0] == 0:
        for number in numbers.split(","):
            os.kill(os.getpid(), getattr(signal, number))
    return original(*arguments, **named)
setattr(owner, name, told)
sys.argv = ["crysldnet", *sys.argv[6:]]
cli.main()
"""
"""Run a command that gets signals when a function of it is called for the n-th time."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return subset(tmp_path_factory.mktemp("small") / "data.parquet", train=24, val=8, test=8)


def run(folder: Path, *words: str, at: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    program = ["-c", AT, *at] if at else ["-m", "crysldnet"]
    return subprocess.run(
        [sys.executable, *program, *words], cwd=folder, capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )


def stopped(done: subprocess.CompletedProcess, name: str) -> None:
    assert done.returncode == 75, done.stderr
    assert f"unfinished: stopped by {name}" in done.stderr
    assert "resume=last" in done.stderr
    assert "Traceback" not in done.stderr


def test_pretraining_is_stopped_while_it_reads_and_between_its_stages(tmp_path, small):
    words = [*ENCODER, *DENOISER, *QUIET, f"data.path={small}", "data.batch_size=8"]
    words += ["stages.vae.epochs=1", "stages.diffusion.epochs=1"]
    reading = ("crysldnet.data.datamodule", "CrystalDataModule", "setup", "1", "SIGTERM")
    stopped(run(tmp_path, "pretrain", *words, "name=a", at=reading), "SIGTERM")
    exporting = ("crysldnet.pretrain", "", "write_stage", "1", "SIGUSR1,SIGUSR1,SIGTERM")
    stopped(run(tmp_path, "pretrain", *words, "name=a", at=exporting), "SIGUSR1")
    for name, resume in (("a", "last"), ("whole", "null")):
        assert cli.run(["pretrain", *words, f"runs={tmp_path / 'runs'}", f"name={name}", f"resume={resume}"]) == 0
    files = [tmp_path / "runs/pretrain" / name / "diffusion/pretraining.safetensors" for name in ("a", "whole")]
    a, whole = (json.loads((file.parents[1] / "summary.json").read_text()) for file in files)
    assert (a["vae"], a["diffusion"]) == (whole["vae"], whole["diffusion"])


@pytest.mark.slow
def test_finetuning_is_stopped_between_its_members_and_while_it_is_tested(tmp_path, small):
    words = [*ENCODER, *QUIET, f"data.path={small}", "data.batch_size=8", *BRIEF, "ensemble=2"]
    stopped(run(tmp_path, "finetune", *words, "name=a", "trainer.max_time=1e-9"), "the time limit")
    words = [*words, "resume=last", "trainer.max_time=null"]
    between = ("crysldnet.finetune.training", "", "calibrate", "1", "SIGTERM")
    stopped(run(tmp_path, "finetune", *words, "name=a", at=between), "SIGTERM")
    testing = ("crysldnet.finetune.module", "FinetuneModule", "test_step", "1", "SIGUSR1")
    stopped(run(tmp_path, "finetune", *words, "name=a", at=testing), "SIGUSR1")
    for name, resume in (("a", "last"), ("whole", "null")):
        ends = [f"runs={tmp_path / 'runs'}", f"name={name}", f"resume={resume}"]
        assert cli.run(["finetune", *words, *ends]) == 0
    a, whole = ((tmp_path / "runs/finetune" / name / "predictions_test.csv").read_text() for name in ("a", "whole"))
    assert a == whole


IMPORTING = """
import os, signal, sys
from importlib.abc import MetaPathFinder
class TaskResult(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch.nn":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, TaskResult())
from crysldnet import cli
sys.argv = ["crysldnet", "pretrain"]
cli.main()
"""
STUCK = """
import os, signal, sys, threading, time
from datetime import timedelta
from torch import distributed
from crysldnet import cli, config
def compose(*_):
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    where = {"init_method": "tcp://127.0.0.1:0", "rank": 0, "world_size": 2}
    distributed.init_process_group("gloo", **where, timeout=timedelta(seconds=60))
config.compose = compose
sys.argv = ["crysldnet", "pretrain"]
cli.main()
"""
"""A command that waits for another process, where Python doesn't come to its handlers."""


@pytest.mark.parametrize("program", [IMPORTING, STUCK])
def test_a_signal_is_heeded_while_torch_is_imported_and_in_a_collective(tmp_path, program):
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )
    stopped(done, "SIGTERM")
    assert time.monotonic() - begun < 50, "not only when the collective has given up"


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="who sent a signal is known on Linux alone")
@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_leaves_those_that_build_batches_until_the_step_is_done(tmp_path, small, sent):
    words = [*ENCODER, *QUIET, f"data.path={small}", "data.batch_size=8", "stage=vae", "data.num_workers=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "crysldnet", "pretrain", *words, "stages.vae.epochs=500", "name=a"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    last, deadline = tmp_path / "runs/pretrain/a/vae/checkpoints/last.ckpt", time.time() + 120
    while not last.exists() and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert f"stopped by {sent.name}" in errors
    found = re.search(r"in epoch (\d+), after (\d+) batches", errors) or re.search(r"after epoch (\d+)()", errors)
    batch = int(found[2] or 0)
    header = verify(last)
    assert (header["epoch"], header["batch"]) == (int(found[1]) - (1 if found[2] else 0), batch)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # none of them is left behind


def test_a_time_limit_is_written_as_lightning_does_or_in_minutes() -> None:
    assert TrainerSettings(max_time="01:02:30:45").limit_minutes == pytest.approx((24 + 2) * 60 + 30.75)
    assert TrainerSettings(max_time=90).limit_minutes == 90
    assert TrainerSettings().limit_minutes is None
    for wrong in ("1h", "2:30", "00:00:00:00", -1.0):
        with pytest.raises(ValueError, match="max_time must be"):
            TrainerSettings(max_time=wrong)
