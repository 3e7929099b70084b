"""What goes wrong on a machine or in the numbers ends with a clear error, and what was saved is as it was."""

import csv
import ctypes
import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from crysldnet import cli, pretrain
from crysldnet.artifacts import model_file
from crysldnet.errors import CheckpointError, CrysldnetError, DataError, DivergedError, Interrupted
from crysldnet.models.pretraining import PretrainingModel
from crysldnet.training.checkpoint_file import LAST, verify
from crysldnet.training.fit import _of_a_worker
from crysldnet.training.loggers import MetricsFile
from crysldnet.training.module import StepModule
from test_resume import at_batch, run, weights
from tiny import subset


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return subset(tmp_path_factory.mktemp("small") / "data.parquet", train=24, val=8)


def poison(monkeypatch, number, how):
    """Make one batch's forward pass give something that isn't finite."""
    original, count = PretrainingModel.forward, iter(range(10**6))
    crystals = []

    def forward(self, batch):
        if self.training and next(count) == number:
            crystals.extend(batch.rows.tolist())
            if how == "input":  # everything from the first layer on, and the statistics of batch normalisation
                batch.edge_vec[:] = torch.nan
            output = original(self, batch)
            if how == "term":
                output.terms["strain"] = output.terms["strain"] + torch.inf
            elif how == "gradient":
                output.terms["strain"].register_hook(lambda gradient: gradient * torch.nan)
            return output
        return original(self, batch)

    monkeypatch.setattr(PretrainingModel, "forward", forward)
    return crystals


def everything(trainer):
    """Weights, buffers and the optimizer's moments."""
    state = {name: value.clone() for name, value in trainer.lightning_module.state_dict().items()}
    for i, moments in trainer.optimizers[0].state_dict()["state"].items():
        state |= {f"{i}.{name}": value.clone() for name, value in moments.items()}
    return state


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("input", "train/species is nan, train/displacement is nan, train/strain is nan, train/kl is nan"),
        ("term", "train/strain is inf"),
        ("gradient", "the gradient's norm is nan"),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("on_device", [False, True])
def test_what_is_not_finite_never_reaches_the_weights(
    tmp_path, small, monkeypatch, capsys, how, says, accumulate, on_device
):
    """The fused optimizer skips a step on its device, on CPUs too, and the host looks at it later."""
    monkeypatch.setattr(StepModule, "skips_on_device", on_device)
    crystals = poison(monkeypatch, 4, how)
    states = {}
    original = pretrain.PretrainModule.on_train_batch_end

    def on_train_batch_end(self, *arguments):
        states[arguments[-1] + 6 * self.current_epoch] = everything(self.trainer)
        original(self, *arguments)

    monkeypatch.setattr(pretrain.PretrainModule, "on_train_batch_end", on_train_batch_end)
    folder = run(tmp_path, small, "trainer.max_nonfinite_steps=1", f"trainer.accumulate_grad_batches={accumulate}")
    before, after, later = (states[n] for n in ((3, 4, 5) if accumulate == 1 else (3, 5, 7)))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], later[name]) for name in later), "the next step does change them"
    assert all(value.isfinite().all() for value in weights(folder).values())
    said = capsys.readouterr().err
    assert f"step {4 // accumulate} (epoch 1): {says}; crystals" in said
    assert "skipped (1 of at most 1)" in said
    (line,) = [json.loads(text) for text in (folder / "vae" / "nonfinite_steps.jsonl").read_text().splitlines()][:1]
    if how != "gradient" or accumulate == 1:
        assert len(line["material_ids"]) == len(crystals)
        assert all(material_id in said for material_id in line["material_ids"])


@pytest.mark.parametrize("on_device", [False, True])
def test_one_bad_step_too_many_stops_and_is_counted_over_a_resume(tmp_path, small, monkeypatch, on_device):
    monkeypatch.setattr(StepModule, "skips_on_device", on_device)
    with monkeypatch.context() as patch:
        poison(patch, 8, "term")
        with pytest.raises(DivergedError, match=r"train/strain is inf; crystals mp-.*max_nonfinite_steps \(now 0\)"):
            run(tmp_path, small)
    last = tmp_path / "pretrain/run/vae/checkpoints" / LAST
    state = torch.load(last, weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())
    with monkeypatch.context() as patch:
        poison(patch, 2, "term")
        at_batch(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            run(tmp_path, small, "resume=last", "trainer.max_nonfinite_steps=1")
    with monkeypatch.context() as patch:
        poison(patch, 0, "term")
        with pytest.raises(DivergedError, match=r"now 1"):
            run(tmp_path, small, "resume=last", "trainer.max_nonfinite_steps=1")


@pytest.mark.distributed
def test_a_killed_worker_is_said_and_the_run_resumes(tmp_path, small, monkeypatch):
    def kill_a_worker():
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)

    with monkeypatch.context() as patch:
        at_batch(patch, 8, kill_a_worker)
        with pytest.raises(DataError, match=r"a data loader process died .*resume=last"):
            run(tmp_path, small, "data.num_workers=1")
    assert (run(tmp_path, small, "data.num_workers=0", "resume=last") / "summary.json").exists()


def test_a_dead_worker_is_known_behind_another_error():
    """PyTorch raises in whatever code is running, which may turn that into an error of its own."""
    wrapped = TypeError("unsupported callable")
    wrapped.__cause__ = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nMore of it.")
    assert _of_a_worker(wrapped) == "DataLoader worker (pid 7) is killed by signal: Killed. "
    assert _of_a_worker(RuntimeError("another")) is None


def test_a_full_disk_is_said_and_the_earlier_checkpoint_is_intact(disk, small, monkeypatch):
    folder, fill = disk
    with monkeypatch.context() as patch:
        at_batch(patch, 8, fill)
        with pytest.raises(
            CrysldnetError, match=f"can't write .*({LAST}|metrics.csv): No space left on device; .* intact"
        ):
            run(folder, small)
    checkpoints = folder / "pretrain/run/vae/checkpoints"
    assert [file.name for file in checkpoints.iterdir()] == [LAST], "nothing half-written is left"
    assert verify(checkpoints / LAST)["step"] == 6
    (folder / "filler").unlink()
    assert (run(folder, small, "resume=last") / "summary.json").exists()


def test_a_log_on_a_full_disk_is_an_error(disk):
    folder, fill = disk
    log = MetricsFile(folder / "metrics.csv")
    log.log_metrics({"train/loss": 0.0}, 0)
    fill()

    def go_on():
        for step in range(1, 10_000):  # to the end of the page that the file has
            log.log_metrics({"train/loss": step / 7}, step)

    with pytest.raises(DataError, match=r"can't write .*metrics\.csv: No space left on device"):
        go_on()


def test_an_import_to_a_full_disk_is_said_and_leaves_no_half_store(disk, small):
    folder, fill = disk
    fill()
    for name in ("a.store", "a.parquet"):
        with pytest.raises(CrysldnetError, match=r"can't be written|can't write"):
            cli.run(["data", "import", str(small), "--out", str(folder / name)])
        assert not (folder / name).exists()
    (folder / "filler").unlink()
    assert cli.run(["data", "import", str(small), "--out", str(folder / "a.store")]) == 0


class Mallinfo(ctypes.Structure):
    """What glibc says of its heap; ``uordblks`` are the bytes in use."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


def test_memory_is_flat_over_twenty_epochs(tmp_path, small, monkeypatch):
    """In bytes and blocks that are in use: freed memory that glibc keeps hides a leak in the size of the process."""
    library = ctypes.CDLL("libc.so.6")
    if not hasattr(library, "mallinfo2"):
        pytest.skip("glibc is too old to say what is in use")
    library.mallinfo2.restype = Mallinfo
    original = pretrain.PretrainModule.on_train_epoch_end

    def growth(epochs, leak):
        used, kept = [], []

        def on_train_epoch_end(self):
            original(self)
            if leak:
                kept.append((torch.ones(1 << 18), [object() for _ in range(1000)]))
            gc.collect()
            used.append((library.mallinfo2().uordblks + library.mallinfo2().hblkhd, sys.getallocatedblocks()))

        with monkeypatch.context() as patch:
            patch.setattr(pretrain.PretrainModule, "on_train_epoch_end", on_train_epoch_end)
            run(tmp_path / str(leak), small, f"stages.vae.epochs={epochs}", "trainer.log_every_n_steps=50")
        return (used[-1][0] - used[4][0]) / 2**20, used[-1][1] - used[4][1]

    mebibytes, blocks = growth(20, leak=False)
    assert mebibytes < 0.5
    assert blocks < 2000
    mebibytes, blocks = growth(8, leak=True)
    assert mebibytes > 2.5, "three epochs that leak 1 MiB each are seen"
    assert blocks > 2500


def test_a_resumed_run_keeps_its_wandb_id(tmp_path, small, monkeypatch):
    wandb = pytest.importorskip("wandb")
    left = wandb.init(mode="disabled")  # by something else in this process; it must get nothing of this run
    online = ["logger=wandb", "logger.mode=offline"]
    with monkeypatch.context() as patch:
        at_batch(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            run(tmp_path, small, *online)
    folder = run(tmp_path, small, "resume=last", *online)
    new = (folder / "wandb_id").read_text()
    assert {path.name.split("-")[3] for path in (folder / "wandb").glob("offline-run-*")} == {new}
    assert left.id != new
    assert wandb.run is None or wandb.run.id == new


@pytest.mark.distributed
def test_training_goes_on_where_the_process_of_wandb_is_gone(tmp_path, small, monkeypatch, capsys):
    """As when a scheduler signals all processes, that one included; the run has to come to its checkpoint."""
    pytest.importorskip("wandb")
    (tmp_path / "catboost.py").touch()  # one of the packages whose import W&B reports
    monkeypatch.syspath_prepend(tmp_path)

    def end_wandb():
        own = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout.splitlines()
        found = [int(line.split()[0]) for line in own if f" {os.getpid()} " in line and "wandb-core" in line]
        assert found
        for pid in found:
            os.kill(pid, signal.SIGTERM)
        time.sleep(1.0)

    with monkeypatch.context() as patch:
        at_batch(patch, 3, end_wandb)
        folder = run(tmp_path, small, "logger=wandb", "logger.mode=offline")
    assert "W&B's process is gone" in capsys.readouterr().err
    rows = list(csv.DictReader((folder / "vae/metrics.csv").open(newline="")))
    assert max(int(row["step"]) for row in rows) > 3
    assert (folder / "summary.json").exists()
    importlib.import_module("catboost")
    again = run(tmp_path, small, "name=again", "logger=wandb", "logger.mode=offline")
    assert (again / "wandb_id").exists()


def test_metrics_survive_a_cut_off_row_and_new_columns(tmp_path):
    file = tmp_path / "metrics.csv"
    log = MetricsFile(file)
    for step in range(4):
        log.log_metrics({"epoch": 0, "train/loss": step / 7}, step)
    log.log_metrics({"epoch": 0, "val/loss": 0.5}, 3)
    with file.open("a") as lines:
        lines.write("0,4,0.57")  # a killed process's last row
    resumed = MetricsFile(file, steps=3)
    resumed.log_metrics({"epoch": 0, "train/loss": 3 / 7}, 3)
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(int(row["step"]), float(row["train/loss"])) for row in rows] == [(n, n / 7) for n in range(4)]
    assert MetricsFile(file, steps=0).path.exists() is False


def test_a_finished_file_is_not_lost_where_a_new_one_cannot_be_written(disk):
    folder, fill = disk
    path = folder / "encoder.safetensors"
    model_file.write(path, "encoder", {"a": torch.zeros(10)}, {})
    fill()
    with pytest.raises(CheckpointError, match="No space left"):
        model_file.write(path, "encoder", {"a": torch.ones(10**6)}, {})
    assert model_file.read(path, "encoder")[1]["a"].eq(0).all()


@pytest.mark.slow
def test_two_ranks_stop_resume_and_skip_together(tmp_path):
    data = subset(tmp_path / "data.parquet", train=64, val=8)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("two_ranks.py")), str(tmp_path), str(data)],
        capture_output=True,
        text=True,
        env={name: v for name, v in os.environ.items() if name != "WANDB_SERVICE"} | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["whole"] == [0, 0]
    assert found["wandb_runs"] == (1 if importlib.util.find_spec("wandb") else 0), "one for both ranks"
    assert found["stopped"] == [75, 75], "one rank was told to stop, and both do, at the same step"
    assert found["stopped_says"].count("stopped by SIGTERM in epoch") == 2, "the other one knows why, too"
    assert found["on_one"] == [2]
    assert "whose batches are shared by 2 process(es)" in found["on_one_says"]
    assert found["resumed"] == [0, 0]
    assert found["equal_weights"]
    assert found["equal_metrics"]
    assert found["one_then_two"] == [75, 0, 0]
    assert found["seen_on_two"] == [64, 64, [1]], "the epoch that two took over has every crystal once"
    assert found["sharded_whole"] == [0, 0]
    assert found["sharded_stopped"] == [75, 75]
    assert found["sharded_resumed"] == [0, 0]
    assert found["sharded_equal"]
    assert 0 not in found["broken"], "one rank raises an error, and both end"
    assert re.search(r"rank 1 \(process \d+ on .*\) failed: ValueError: the second card fell out", found["broken_says"])
    assert found["resumed"] == [0, 0]
    assert found["poisoned"] == [2, 2]
    assert "train/strain is inf; crystals mp-" in found["poisoned_says"]
    assert found["skipped"] == [0, 0]
    assert [(line["rank"], line["not_finite"]) for line in found["bad"]] == [(1, {"train/strain": float("inf")})]
