"""Runs that are killed many times; minutes each, run by ``make test-slow``. Figures: docs/reliability.md."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_resume import kill_and_resume
from tiny import subset

pytestmark = pytest.mark.slow


def test_fifty_kills_of_a_two_stage_run_leave_no_trace(tmp_path):
    found = kill_and_resume(tmp_path, kills=50, ranks=1, seed=1)
    assert found["exit_statuses"] == {"-9": 50}
    assert found["killed_while_writing_a_file"] > 0
    assert found["lost_and_repeated"] > 0


def test_ten_kills_of_a_run_on_two_ranks_leave_no_trace(tmp_path):
    found = kill_and_resume(tmp_path, kills=10, ranks=2, seed=2)
    assert sum(found["exit_statuses"].values()) == 20
    assert "0" not in found["exit_statuses"], "the rank that wasn't killed ends too, and says that it failed"


AT_AN_EPOCHS_END = """
import os, signal, sys, time
from pathlib import Path
import torch
from kill_and_resume import RUN, audit_every_batch, metric_rows, start, wait, weights

folder, data = Path(sys.argv[1]), sys.argv[2]
line = [*RUN, f"data.path={data}", f"runs={folder}", "trainer.devices=2", *sys.argv[3:]]
line += ["stages.vae.epochs=1", "stages.diffusion.epochs=2"]
torch.set_num_threads(1)
log, audit = folder / "log.txt", folder / "audit.jsonl"
assert wait(start([*line, "name=whole"], 2, log), log) == [0, 0], log.read_text()
audit_every_batch(audit)
pids = start([*line, "name=cut"], 2, log)
while '"diffusion", "epoch": 1' not in (audit.read_text() if audit.exists() else ""):
    time.sleep(0.002)
for pid in pids:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
assert wait(start([*line, "name=cut", "resume=last"], 2, log), log) == [0, 0], log.read_text()
whole, cut = folder / "pretrain" / "whole", folder / "pretrain" / "cut"
a, b = weights(whole), weights(cut)
assert all(torch.equal(a[name], b[name]) for name in a), [name for name in a if not torch.equal(a[name], b[name])]
assert metric_rows(whole, "diffusion") == metric_rows(cut, "diffusion")
"""
"""Validation comes between the last step of an epoch and the first of the next."""


@pytest.mark.parametrize("strategy", [["strategy=ddp"], ["strategy=fsdp2", "trainer.ema_decay=null"]])
def test_ranks_resumed_from_the_end_of_an_epoch_have_the_running_statistics_of_the_first(tmp_path, strategy):
    data = subset(tmp_path / "data.parquet", train=64, val=8)
    done = subprocess.run(
        [sys.executable, "-c", AT_AN_EPOCHS_END, str(tmp_path), str(data), *strategy],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
