"""When a process of a run fails, dies or hangs, all end soon, non-zero, with a message that names it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from crysldnet.training import checkpointing
from crysldnet.training.checkpointing import PreemptionCheckpoint
from crysldnet.training.watchdog import BEAT_S, GONE_S, SEARCH_S, RankWatchdog, of_a_collective
from tiny import DENOISER, ENCODER, QUIET, subset

TIMEOUT_S = 10.0
LONG = ["stage=vae", "stages.vae.epochs=100000", "data.batch_size=16", "name=run"]
TWO = ["trainer.devices=2", "strategy=ddp", f"strategy.timeout_minutes={TIMEOUT_S / 60:.3f}"]


HANGING = """
import os, pathlib, sys, time
from crysldnet import cli, pretrain
original = pretrain.PretrainModule.training_step
def training_step(self, batch, batch_idx):
    while pathlib.Path(f"hang_{self.global_rank}").exists():
        time.sleep(0.1)
    return original(self, batch, batch_idx)
pretrain.PretrainModule.training_step = training_step
cli.main()
"""
"""A program whose rank N never returns from a step while there is a file hang_N, though its threads go on."""


def start(folder: Path, *program: str) -> tuple[subprocess.Popen, list[int]]:
    """Start a run of two processes; return it, and both process ids, when the first epoch is done."""
    data = subset(folder / "data.parquet", train=32, val=8)
    words = [*ENCODER, *DENOISER, *QUIET, *LONG, *TWO, f"data.path={data}"]
    run = subprocess.Popen(
        [sys.executable, *(program or ("-m", "crysldnet")), "pretrain", *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "stderr").open("w"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    until = time.monotonic() + 180
    while not list((folder / "runs/pretrain/run/vae/checkpoints").glob("*.ckpt")):
        assert run.poll() is None, said(folder)
        assert time.monotonic() < until, said(folder)
        time.sleep(0.2)
    time.sleep(2 * BEAT_S)  # so that each has told the others where it is
    return run, [run.pid, *started_by(run.pid)]


def started_by(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def said(folder: Path) -> str:
    return (folder / "stderr").read_text()


def gone(pid: int) -> bool:
    """Return whether a process has ended, one that nobody has waited for yet included."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("rank", "sent", "says"),
    [
        (
            1,
            signal.SIGKILL,
            r"rank 1 \(process {pid} on .+\) ended with signal SIGKILL|\[rank: 1\] .* PID {pid} terminated",
        ),
        pytest.param(
            1,
            signal.SIGSTOP,
            r"rank 1 \(process {pid} on .+\) hasn't answered for \d+ s; it was .+ batch \d+, epoch",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            0, signal.SIGKILL, r"rank 0 \(process {pid} on .+\) (is gone|hasn't answered)", marks=pytest.mark.slow
        ),
        pytest.param(0, signal.SIGSTOP, r"rank 0 \(process {pid} on .+\) hasn't answered", marks=pytest.mark.slow),
    ],
)
def test_when_a_rank_dies_or_hangs_all_end_and_it_is_named(tmp_path: Path, rank: int, sent: int, says: str) -> None:
    run, pids = start(tmp_path)
    assert len(pids) == 2
    try:
        os.kill(pids[rank], sent)
        begun = time.monotonic()
        assert run.wait(timeout=TIMEOUT_S + SEARCH_S + 60) != 0
        while not all(gone(pid) for pid in pids):
            assert time.monotonic() - begun < TIMEOUT_S + SEARCH_S + 60, said(tmp_path)
            time.sleep(0.1)
    finally:
        for pid in pids:
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)
    assert re.search(says.format(pid=pids[rank]), said(tmp_path)), said(tmp_path)
    assert said(tmp_path).count("2 processes (2 on ") == 1


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        pytest.param(
            [1], r"The others wait for rank 1 \(process {pids[1]} on .+\): .+ batch \d+", marks=pytest.mark.slow
        ),
        pytest.param([0, 1], r"nothing moved for \d+ s\. All are .+ batch \d+, epoch", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_answers_but_never_comes_is_named(tmp_path: Path, ranks: list[int], says: str) -> None:
    program = tmp_path / "hanging.py"
    program.write_text(HANGING)
    run, pids = start(tmp_path, str(program))
    try:
        for rank in ranks:
            (tmp_path / f"hang_{rank}").touch()
        assert run.wait(timeout=TIMEOUT_S + 2 * SEARCH_S + 60) != 0
    finally:
        for pid in pids:
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)
    assert re.search(says.format(pids=pids), said(tmp_path)), said(tmp_path)


@pytest.mark.distributed
@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ranks_that_cannot_meet_end_and_say_why(tmp_path: Path, killed: bool) -> None:
    """The port is in use; or the first process is killed while the other one is on its way to their meeting."""
    data = subset(tmp_path / "data.parquet", train=8, val=4)
    program = tmp_path / "orphan.py"
    program.write_text("from crysldnet import cli, signals\nsignals.ORPHAN_S = 3.0\ncli.main()\n")
    children: list[int] = []
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        place = {} if killed else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        run = subprocess.Popen(
            [sys.executable, str(program), "pretrain", *ENCODER, *DENOISER, *QUIET, *TWO, f"data.path={data}"],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=(tmp_path / "stderr").open("w"),
            env={**os.environ, "OMP_NUM_THREADS": "1", **place},
        )
        try:
            until = time.monotonic() + 180
            while run.poll() is None:
                assert time.monotonic() < until, said(tmp_path)
                children = started_by(run.pid) or children
                if killed and children and len(os.listdir(f"/proc/{children[0]}/task")) > 2:  # it watches the first one
                    run.kill()
                time.sleep(0.02)
            ended = time.monotonic()
            while not all(gone(pid) for pid in children):
                assert time.monotonic() - ended < 60, "a rank outlives the one that started it"
                time.sleep(0.1)
        finally:
            for pid in (run.pid, *children):
                if not gone(pid):
                    os.kill(pid, signal.SIGKILL)
    if killed:
        assert len(children) == 1
        assert f"process {run.pid}, which started this one, is gone; this one ends" in said(tmp_path)
    else:
        assert run.returncode == 2, said(tmp_path)
        assert f"error: the processes of this run can't connect at 127.0.0.1:{port}: " in said(tmp_path)
        assert "set MASTER_PORT to a free one, or leave it unset" in said(tmp_path)
        assert "which started this one" not in said(tmp_path)


@pytest.mark.parametrize(("step_ms", "every"), [(3.0, 33), (40.0, 2), (900.0, 1)])
def test_ranks_agree_before_slow_steps_and_about_ten_times_a_second_before_fast_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_ms: float, every: int
) -> None:
    from torch import distributed

    trainer = SimpleNamespace(world_size=2, global_step=0, accumulate_grad_batches=1, current_epoch=0)
    told = PreemptionCheckpoint(tmp_path, every_steps=50, every_minutes=None, limit_minutes=None)
    agreed, saved = [], []
    clock, reduce = [0.0], distributed.all_reduce

    def counted(*arguments: object, **named: object) -> None:
        agreed.append(trainer.global_step)
        reduce(*arguments, **named)

    monkeypatch.setattr(checkpointing.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(distributed, "all_reduce", counted)
    monkeypatch.setattr(told, "_save", lambda *_, **__: saved.append(trainer.global_step))
    monkeypatch.setattr(told, "_agreed", (0, 0.0))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for step in range(200):
            trainer.global_step, clock[0] = step, step * step_ms / 1000.0
            told.on_train_batch_start(trainer, None, None, step)  # type: ignore[arg-type]
        told._signal = signal.SIGTERM
        assert told._agree(trainer)[0] == signal.SIGTERM, "at once at the end of an epoch"  # type: ignore[arg-type]
    finally:
        distributed.destroy_process_group()
    assert set(np.diff(agreed[1:-1])) == {every}
    assert saved == [50, 100, 150], "steps are counted alike on all ranks"


def test_the_rank_that_all_others_wait_for_is_told_from_them() -> None:
    watch = RankWatchdog(timedelta(minutes=1))
    watch.rank, watch._names = 0, [f"rank {i}" for i in range(4)]
    watch._moves, watch._place = 12, "in the backward pass of batch 5"
    watch._heard = dict.fromkeys((1, 2, 3), ("9", 0.0, 12, watch._place))
    watch._heard[2] = ("9", 0.0, 11, "in the forward pass of batch 5")
    said = watch._places()
    assert said == (
        "The others wait for rank 2: in the forward pass of batch 5; rank 1, 3, 0: in the backward pass of batch 5"
    )
    watch._heard.pop(2)
    assert watch._places() == "All are in the backward pass of batch 5"


def test_errors_of_a_collective_are_told_from_a_ranks_own() -> None:
    assert of_a_collective(RuntimeError("[../third_party/gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:2"))
    assert of_a_collective(RuntimeError("NCCL communicator was aborted on rank 3."))
    assert not of_a_collective(RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"))
    assert not of_a_collective(ValueError("gloo"))
    assert GONE_S < SEARCH_S
