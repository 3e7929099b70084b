"""A run that is stopped or killed goes on as if nothing had been, and what can't be resumed is refused."""

import csv
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from conftest import drawing
from crysldnet import cli, finetune, pretrain
from crysldnet.artifacts import model_file
from crysldnet.config import compose, refuse_changed
from crysldnet.data.datamodule import CrystalDataset
from crysldnet.data.sampler import BatchLimits, BatchSampler
from crysldnet.errors import CheckpointError, ConfigError, Interrupted
from crysldnet.finetune.module import FinetuneModule
from crysldnet.signals import RUN_NAME
from crysldnet.training import checkpointing, plots
from crysldnet.training.checkpoint_file import HEADER, LAST, CheckpointFile, DamagedError, verify
from crysldnet.training.diagnostics import Diagnostics
from crysldnet.training.module import StepModule
from crysldnet.training.run_folder import RunFolder
from tiny import finetune_config, pretrain_config, repeatable, subset

TWO_EPOCHS = ["stage=vae", "stages.vae.epochs=2", "data.batch_size=4", "trainer.log_every_n_steps=1"]
"""Of 24 crystals: 12 steps, or 6 where two batches make a step."""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return subset(tmp_path_factory.mktemp("small") / "data.parquet", train=24, val=8, test=8)


def run(path, data, *arguments):
    config, values = pretrain_config(f"runs={path}", "name=run", f"data.path={data}", *TWO_EPOCHS, *arguments)
    assert pretrain.run(config, values) == 0
    return path / "pretrain" / "run"


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """A run that nothing happens to."""
    return run(tmp_path_factory.mktemp("whole"), small)


def weights(folder):
    return model_file.read(folder / "vae" / "pretraining.safetensors", "pretraining")[1]


def assert_equal_runs(one, other):
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert repeatable(one / "vae" / "metrics.csv") == repeatable(other / "vae" / "metrics.csv")
    assert stage_summary(one) == stage_summary(other)


def stage_summary(folder):
    return json.loads((folder / "summary.json").read_text())["vae"]


def at_batch(monkeypatch, number, action, module=pretrain.PretrainModule):
    """Do something before the training step of a batch, counted from 0 over the whole run; once."""
    original, count = module.training_step, iter(range(10**6))

    def training_step(self, batch, batch_idx):
        if next(count) == number:
            action()
        return original(self, batch, batch_idx)

    monkeypatch.setattr(module, "training_step", training_step)


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("arguments", [[], ["trainer.accumulate_grad_batches=2", "trainer.ema_decay=0.9"]])
def test_a_run_stopped_inside_an_epoch_goes_on_exactly(tmp_path, small, whole, monkeypatch, arguments):
    expected = run(tmp_path / "whole", small, *arguments) if "trainer.accumulate_grad_batches=2" in arguments else whole
    with monkeypatch.context() as patch:
        at_batch(patch, 8, send(signal.SIGTERM))
        with pytest.raises(Interrupted, match=r"SIGTERM in epoch [12], after"):
            run(tmp_path, small, *arguments)
    header = verify(tmp_path / "pretrain/run/vae/checkpoints" / LAST)
    assert (header["epoch"], header["batch"]) == (
        (0, 10) if arguments[:1] == ["trainer.accumulate_grad_batches=2"] else (1, 3)
    )
    assert_equal_runs(expected, run(tmp_path, small, "resume=last", *arguments))


def test_a_run_whose_optimizer_skips_steps_by_itself_goes_on_exactly(tmp_path, small, monkeypatch):
    """As on a GPU: the fused optimizer."""
    with monkeypatch.context() as patch:
        patch.setattr(StepModule, "skips_on_device", True)
        expected = run(tmp_path / "whole", small)
        at_batch(patch, 8, send(signal.SIGTERM))
        with pytest.raises(Interrupted):
            run(tmp_path, small)
    saved = torch.load(tmp_path / "pretrain/run/vae/checkpoints" / LAST, weights_only=True)
    assert all(group["fused"] for group in saved["optimizer_states"][0]["param_groups"])
    assert_equal_runs(expected, run(tmp_path, small, "resume=last"))


def test_what_cannot_change_a_result_may_change_on_resume_and_what_can_is_refused(tmp_path, small, whole, monkeypatch):
    with monkeypatch.context() as patch:
        at_batch(patch, 8, send(signal.SIGTERM))
        with pytest.raises(Interrupted):
            run(tmp_path, small, "data.num_workers=1")
    line = ["pretrain", f"runs={tmp_path}", "name=run", "resume=last"]
    for key, then, now in (
        ("trainer.precision", "32-true", "bf16-mixed"),
        ("trainer.swa_fraction", "None", "0.25"),
        ("trainer.ema_decay", "None", "0.9"),
    ):
        with pytest.raises(ConfigError, match=f"{key}: .* was started with {key}={then}, not {now}; resume"):
            cli.run([*line, f"{key}={now}"])
    free = "data.num_workers=0 trainer.progress_bar=true trainer.log_every_n_steps=3 trainer.checkpoint_every_steps=3"
    more = "trainer.keep_checkpoints=1 trainer.activation_checkpointing=true logger=wandb logger.mode=disabled"
    assert cli.run([*line, *free.split(), *more.split()]) == 0
    found, expected = weights(tmp_path / "pretrain/run"), weights(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stop", ["SIGUSR1", "SIGINT", "time limit"])
def test_signals_and_the_time_limit_save_and_stop(tmp_path, small, whole, monkeypatch, stop):
    arguments = []
    with monkeypatch.context() as patch:
        if stop == "time limit":
            arguments = ["trainer.max_time=60"]
            clock = iter([time.monotonic()] * 4 + [time.monotonic() - 3601.0] * 99)
            patch.setattr(checkpointing, "started", lambda: next(clock))
        else:
            at_batch(patch, 3, send(getattr(signal, stop)))
        with pytest.raises(Interrupted, match=stop):
            run(tmp_path, small, *arguments)
    assert verify(tmp_path / "pretrain/run/vae/checkpoints" / LAST)["step"] == 4
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL, "a stopped run leaves no handler behind"
    resumed = run(tmp_path, small, "resume=last")
    assert_equal_runs(whole, resumed)
    with (resumed / "vae" / "metrics.csv").open(newline="") as file:
        rates = [float(row["train/atoms_per_s"]) for row in csv.DictReader(file) if row.get("train/atoms_per_s")]
    assert min(rates) > 1, "time is counted from the resume on"


def test_a_signal_after_the_last_step_is_not_lost(tmp_path, small, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Diagnostics, "on_train_end", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match="stopped by SIGTERM after training"):
            run(tmp_path, small)
    assert_equal_runs(whole, run(tmp_path, small, "resume=last"))


def test_a_time_limit_shorter_than_the_start_still_takes_a_step_each_time(tmp_path, small):
    for step in (1, 2):
        with pytest.raises(Interrupted, match="the time limit"):
            run(tmp_path, small, "trainer.max_time=1e-9", *(["resume=last"] if step > 1 else []))
        assert verify(tmp_path / "pretrain/run/vae/checkpoints" / LAST)["step"] == step


@pytest.mark.parametrize("every", ["steps=1", "minutes=1e-9"])
def test_checkpoints_are_saved_by_steps_and_by_time(tmp_path, small, monkeypatch, every):
    class PowerCut(Exception):
        pass

    def cut():
        raise PowerCut

    at_batch(monkeypatch, 4, cut)
    with pytest.raises(PowerCut):
        run(tmp_path, small, f"trainer.checkpoint_every_{every}", "trainer.keep_checkpoints=3")
    folder = tmp_path / "pretrain/run/vae/checkpoints"
    assert {file.name: verify(file)["step"] for file in folder.iterdir()} == {
        **{"last.ckpt": 4, "last-1.ckpt": 3, "last-2.ckpt": 2}
    }


def run_without_export(path, data, monkeypatch):
    """Train to the end, and be killed before anything is exported."""

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "write_stage", fail)
        with pytest.raises(KeyboardInterrupt):
            run(path, data)


def test_a_stage_stopped_after_its_last_step_is_resumed_with_its_metrics(tmp_path, small, whole, monkeypatch):
    run_without_export(tmp_path, small, monkeypatch)
    assert_equal_runs(whole, run(tmp_path, small, "resume=last"))


def test_a_plot_that_a_kill_left_out_is_drawn_on_resume(tmp_path, small, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(plots, "learning_curves", kill)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, small, "stages.vae.epochs=1")
    assert (tmp_path / "pretrain/run/vae/pretraining.safetensors").exists()
    with drawing():
        run(tmp_path, small, "stages.vae.epochs=1", "resume=last")
    assert [file.name for file in (tmp_path / "pretrain/run/plots").iterdir()] == ["vae.png"]


def test_finetuning_stopped_inside_an_epoch_ends_alike_with_the_same_best_epoch(tmp_path, small, monkeypatch):
    def train(name, *arguments, path=tmp_path):
        config, values = finetune_config(
            *[f"runs={path}", f"name={name}", f"data.path={small}", "epochs=3", "data.batch_size=4"],
            *["data.targets=[formation_energy_per_atom]", "trainer.log_every_n_steps=1", *arguments],
        )
        assert finetune.run(config, values) == 0
        folder = path / "finetune" / name
        best = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["global_step"]
        return model_file.read(folder / "model.safetensors", "property_model"), (best, metrics_of(folder))

    def metrics_of(folder):
        return repeatable(folder / "metrics.csv"), (folder / "predictions_test.csv").read_text()

    (_, expected), rest = train("whole")
    with monkeypatch.context() as patch:
        at_batch(patch, 14, send(signal.SIGTERM), FinetuneModule)
        with pytest.raises(Interrupted):
            train("cut")
    moved = tmp_path / "moved"
    (moved / "finetune").mkdir(parents=True)
    (tmp_path / "finetune/cut").rename(moved / "finetune/cut")
    (_, found), rest_found = train("cut", "resume=last", path=moved)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert rest_found == rest


def test_a_stage_that_ended_goes_on_where_it_is_given_more_epochs(tmp_path, small, monkeypatch):
    run_without_export(tmp_path, small, monkeypatch)
    folder = run(tmp_path, small, "resume=last", "stages.vae.epochs=3")
    steps = [int(row["step"]) for row in repeatable(folder / "vae" / "metrics.csv") if row["train/loss"]]
    assert (steps[0], steps[-1]) == (0, 17)


def test_a_stop_between_two_validations_loses_no_step(tmp_path, small, monkeypatch):
    """With min_steps an epoch of the settings is several of Lightning's; most of these end without a checkpoint."""

    def train(name, *arguments):
        config, values = finetune_config(
            *[
                f"runs={tmp_path}",
                f"name={name}",
                f"data.path={small}",
                "epochs=2",
                "min_steps=16",
                "data.batch_size=24",
            ],
            *["data.targets=[formation_energy_per_atom]", "trainer.log_every_n_steps=1", *arguments],
        )
        assert finetune.run(config, values) == 0
        folder = tmp_path / "finetune" / name
        return model_file.read(folder / "model.safetensors", "property_model")[1], repeatable(folder / "metrics.csv")

    expected, rows = train("whole")
    for name, arguments, batch, step in (
        ("told", [], 4, 5),
        ("while a batch is built", [], None, 6),
        ("by steps", ["trainer.checkpoint_every_steps=3"], 5, 6),
    ):
        with monkeypatch.context() as patch:
            if batch is None:
                original, count = CrystalDataset.__getitem__, iter(range(10**6))

                def build(self, request, original=original, count=count):
                    if next(count) == 5:
                        os.kill(os.getpid(), signal.SIGTERM)
                    return original(self, request)

                patch.setattr(CrystalDataset, "__getitem__", build)
            else:
                at_batch(patch, batch, send(signal.SIGTERM), FinetuneModule)
            with pytest.raises(Interrupted, match="stopped by SIGTERM"):
                train(name, *arguments)
        files = sorted((tmp_path / "finetune" / name / "checkpoints").glob("last*.ckpt"))
        assert verify(files[-1])["step"] == step, name
        if name == "by steps":
            assert verify(files[0])["step"] == 3
        found, rows_found = train(name, "resume=last")
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert rows_found == rows


def trap_in(folder):
    """What makes a file in a folder when it is unpickled."""

    class Trap:
        def __reduce__(self):
            return (open, (str(folder / "owned"), "w"))

    return Trap()


def test_a_run_whose_newest_checkpoint_is_damaged_ends_alike(tmp_path, small, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_batch(patch, 8, send(signal.SIGTERM))
        with pytest.raises(Interrupted):
            run(tmp_path, small, "trainer.checkpoint_every_steps=2")
    last = tmp_path / "pretrain/run/vae/checkpoints" / LAST
    last.write_bytes(last.read_bytes()[:-1000])
    assert_equal_runs(whole, run(tmp_path, small, "resume=last"))
    assert "going on from last-1.ckpt" in capsys.readouterr().err


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("fsync"), sync(descriptor))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append(Path(to).name), replace(self, to))[1])
    files = CheckpointFile({}, keep=2)
    for _ in range(2):
        files.save_checkpoint({"state_dict": {"a": torch.ones(3)}}, tmp_path / LAST)
    assert done == ["fsync", LAST, "fsync", "fsync", "last-1.ckpt", LAST, "fsync"]  # the folder comes last


def test_fsdp_verifies_a_checkpoint_before_lightning_unpickles_it(tmp_path, monkeypatch):
    from crysldnet.training import strategies

    strategy = strategies.fsdp()
    strategy.checkpoint_io = CheckpointFile({})
    monkeypatch.setattr(type(strategy), "is_global_zero", True)
    monkeypatch.setattr(type(strategy), "barrier", lambda *_: None)
    trap = tmp_path / LAST
    CheckpointFile({}).save_checkpoint({"state_dict": {}, "more": trap_in(tmp_path)}, trap)
    with pytest.raises(CheckpointError, match="more than plain values"):
        strategy.load_checkpoint(trap)
    assert not (tmp_path / "owned").exists()


def test_a_damaged_checkpoint_of_the_best_epoch_is_said_with_its_mend(tmp_path, small, monkeypatch, capsys):
    def train(*arguments):
        config, values = finetune_config(
            f"runs={tmp_path}", "name=a", f"data.path={small}", "epochs=2", "data.batch_size=4", *arguments
        )
        return finetune.run(config, values)

    with monkeypatch.context() as patch:
        at_batch(patch, 8, send(signal.SIGTERM), FinetuneModule)
        with pytest.raises(Interrupted):
            train()
    best = tmp_path / "finetune/a/checkpoints/best.ckpt"
    whole = best.read_bytes()
    best.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"best\.ckpt is damaged .*delete this file and continue with resume"):
        train("resume=last")
    assert not (tmp_path / "finetune/a/model.safetensors").exists()
    best.unlink()
    with monkeypatch.context() as patch:  # as if no later epoch were better
        patch.setattr(ModelCheckpoint, "_save_topk_checkpoint", lambda *_: None)
        assert train("resume=last") == 0
    assert "using the weights of the last epoch" in capsys.readouterr().err


def test_a_file_where_the_checkpoints_belong_is_said_before_the_first_step(tmp_path, small):
    (tmp_path / "pretrain/run/vae").mkdir(parents=True)
    (tmp_path / "pretrain/run/vae/checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"a file is in place of the checkpoints folder"):
        run(tmp_path, small)


@pytest.mark.parametrize(("given", "says"), [([], None), (["data.batch_atoms=640"], "with data.batch_atoms=None")])
def test_a_run_of_a_version_without_a_key_is_resumed_unless_the_key_is_given(tmp_path, given, says):
    old = compose("pretrain", []).values
    del old["data"]["batch_atoms"], old["validate_in_train_mode"]
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump(old))
    composition = compose("pretrain", given, saved)
    with pytest.raises(ConfigError, match=says) if says else nullcontext():
        refuse_changed("pretrain", composition, saved, complete=False)


@pytest.mark.parametrize("change", ["rows", "values"])
def test_a_run_is_not_resumed_with_other_data_under_the_same_path(tmp_path, small, monkeypatch, change):
    path = tmp_path / "data.parquet"
    table = pq.read_table(small)
    pq.write_table(table, path)
    with monkeypatch.context() as patch:
        at_batch(patch, 2, send(signal.SIGTERM))
        with pytest.raises(Interrupted):
            run(tmp_path, path)
    if change == "rows":
        other = table.slice(1)
    else:
        name = "formation_energy_per_atom"
        other = table.set_column(table.column_names.index(name), name, pc.multiply(table[name], 2.0))
    pq.write_table(other, path)
    with pytest.raises(ConfigError, match=r"was started with other data: .*restore the data"):
        run(tmp_path, path, "resume=last")
    pq.write_table(table, path)
    run(tmp_path, path, "resume=last")


def test_no_draw_depends_on_what_was_drawn_before(tmp_path, small, whole, monkeypatch):
    """So a checkpoint needs no state of Python's, NumPy's and torch's generators: position and seed are enough."""

    def scramble():
        random.seed(os.urandom(8))
        np.random.seed(int.from_bytes(os.urandom(4), "little"))  # noqa: NPY002
        torch.manual_seed(int.from_bytes(os.urandom(7), "little"))

    original = pretrain.PretrainModule.on_train_batch_end

    def between_batches(self, *arguments):
        scramble()
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.PretrainModule, "on_train_batch_end", between_batches)
        assert_equal_runs(whole, run(tmp_path / "between", small))
    at_batch(monkeypatch, 3, scramble)  # the control: inside a batch, after its seed was set, it does matter
    inside = weights(run(tmp_path / "inside", small))
    assert not all(torch.equal(a, b) for a, b in zip(weights(whole).values(), inside.values(), strict=True))


def test_a_sampler_begins_inside_an_epoch_and_skips_and_repeats_nothing():
    rows, atoms = np.arange(50), np.random.default_rng(0).integers(2, 9, 50)
    for world_size in (1, 2):
        for rank in range(world_size):

            def sampler(start, rank=rank, world_size=world_size):
                share = {"shuffle": True, "rank": rank, "world_size": world_size}
                return BatchSampler(rows, atoms, None, BatchLimits(crystals=4), **share, start=start)

            fresh, resumed = sampler((0, 0)), sampler((3, 4))
            fresh.set_epoch(3)
            before_lightning_names_the_epoch = [request.rows.tolist() for request in resumed]
            assert before_lightning_names_the_epoch == [request.rows.tolist() for request in fresh][4:]
            assert len(resumed) == len(fresh)
            for one in (fresh, resumed):
                one.set_epoch(4)
            assert [r.rows.tolist() for r in resumed] == [r.rows.tolist() for r in fresh]


def test_inside_an_epoch_its_batches_stay_shared_as_they_were(tmp_path, small, monkeypatch):
    with monkeypatch.context() as patch:
        at_batch(patch, 8, send(signal.SIGTERM))
        with pytest.raises(Interrupted):
            run(tmp_path, small)
    with pytest.raises(CheckpointError, match=r"inside epoch 2.*may change at the end of an epoch"):
        run(tmp_path, small, "resume=last", "trainer.accumulate_grad_batches=2")


def test_at_the_end_of_an_epoch_its_batches_may_be_shared_otherwise(tmp_path, small, monkeypatch):
    with monkeypatch.context() as patch:
        at_batch(patch, 5, send(signal.SIGTERM))
        with pytest.raises(Interrupted, match="after epoch 1 of 2"):
            run(tmp_path, small)
    folder = run(tmp_path, small, "resume=last", "trainer.accumulate_grad_batches=2")
    assert json.loads((folder / "summary.json").read_text())["status"] == "complete"


@pytest.mark.parametrize("bound", ["data.max_atoms=16", "data.max_edges=200"])
def test_fewer_steps_an_epoch_than_were_planned_are_refused(tmp_path, small, monkeypatch, bound):
    """What bounds the batch of one device makes half as many steps of twice as many devices."""
    with monkeypatch.context() as patch:
        at_batch(patch, 5, send(signal.SIGTERM))
        with pytest.raises(Interrupted):
            run(tmp_path, small, bound)
    last = tmp_path / "pretrain/run/vae/checkpoints" / LAST
    header = {**verify(last), "epoch": 1, "batch": 0}
    trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=1, strategy="single", max_epochs=2)
    steps = header["steps_per_epoch"]
    checkpointing.check_position(last, header, trainer, steps)
    checkpointing.check_position(last, {**header, "finished": True}, trainer, steps // 2)
    with pytest.raises(CheckpointError, match="inside epoch 2 under an earlier version"):
        checkpointing.check_position(last, {**header, "batch": 3, "world_size": 2, "order": 1}, trainer, steps)
    with pytest.raises(CheckpointError, match=rf"an epoch had {steps} steps and would have {steps // 2} now"):
        checkpointing.check_position(last, header, trainer, steps // 2)
    with pytest.raises(CheckpointError, match=r"inside epoch 1|an epoch had"):
        run(tmp_path, small, bound, "resume=last", "trainer.accumulate_grad_batches=2")


def test_a_complete_run_says_so_and_nothing_is_trained(whole, capsys):
    before = (whole / "summary.json").read_bytes()
    for name in ("name=run", "name=null"):
        assert cli.run(["pretrain", f"runs={whole.parents[1]}", name, "resume=last"]) == 0
        assert "this run is complete" in capsys.readouterr().err
    assert (whole / "summary.json").read_bytes() == before


def test_a_folder_in_use_is_refused_and_a_killed_process_leaves_no_lock(tmp_path):
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        folder = RunFolder(str(tmp_path), "pretrain", "shared", resume=False)
        folder.save_config({"a": 1})
        os.write(tell, b".")
        time.sleep(600)
    os.read(ready, 1)
    os.environ.pop(RUN_NAME, None)
    with pytest.raises(ConfigError, match=f"process {pid} on .* is using this folder"):
        RunFolder(str(tmp_path), "pretrain", "shared", resume=True)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert RunFolder(str(tmp_path), "pretrain", "shared", resume=True).name == "shared"


OWNER = {"command": "pretrain", "stage": "vae", "model": {"encoder": {"width": 32}}}


def written(folder, count=3, owner=OWNER, keep=3):
    files = CheckpointFile(owner, keep)
    for step in range(1, count + 1):
        files.save_checkpoint({"weights": torch.full((50,), float(step)), HEADER: {"step": step}}, folder / LAST)
    return files


def test_the_last_checkpoints_are_kept_in_order(tmp_path):
    files = written(tmp_path, count=5)
    found = {file.name: verify(file)["step"] for file in tmp_path.iterdir()}
    assert found == {"last.ckpt": 5, "last-1.ckpt": 4, "last-2.ckpt": 3}
    assert files.newest(tmp_path)[0].name == LAST
    assert files.load_checkpoint(tmp_path / LAST)["weights"].eq(5).all()
    assert written(tmp_path / "nothing", count=0).newest(tmp_path / "nothing") is None


def test_a_checkpoint_of_thousands_of_targets_is_written_and_other_targets_are_refused(tmp_path):
    names = [f"absorption_at_{i:04d}_meV_direction_xx" for i in range(3000)]
    written(tmp_path, owner={**OWNER, "targets": names}).newest(tmp_path)
    assert verify(tmp_path / LAST)["step"] == 3
    with pytest.raises(CheckpointError, match="it belongs to another run: targets is"):
        CheckpointFile({**OWNER, "targets": [*names[:-1], "other"]}).newest(tmp_path)


def flip(place):
    def damage(content):
        changed = bytearray(content)
        changed[int(place * (len(content) - 1))] ^= 1
        return bytes(changed)

    return damage


@pytest.mark.parametrize(
    "damage",
    [lambda _: b"", lambda c: c[:10], lambda c: c[: len(c) // 2], lambda c: c[:-1], *map(flip, np.linspace(0, 1, 40))],
)
def test_a_damaged_checkpoint_is_seen_and_the_one_before_it_used(tmp_path, capsys, damage):
    files = written(tmp_path)
    last = tmp_path / LAST
    last.write_bytes(damage(last.read_bytes()))
    with pytest.raises(DamagedError):
        verify(last)
    path, header = files.newest(tmp_path)
    assert (path.name, header["step"]) == ("last-1.ckpt", 2)
    said = capsys.readouterr().err
    assert "last.ckpt is" in said
    assert "going on from last-1.ckpt" in said


def test_without_a_good_checkpoint_the_run_is_refused(tmp_path):
    files = written(tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint is left to resume from.*last-2\.ckpt is empty"):
        files.newest(tmp_path)


def test_a_checkpoint_of_another_model_or_a_newer_version_is_refused(tmp_path, monkeypatch):
    written(tmp_path)
    other = CheckpointFile({**OWNER, "model": {"encoder": {"width": 64}}})
    with pytest.raises(CheckpointError, match=r"model\.encoder\.width is 32 there and 64 here"):
        other.newest(tmp_path)
    with pytest.raises(CheckpointError, match="another run"):
        other.load_checkpoint(tmp_path / LAST)
    monkeypatch.setattr("crysldnet.training.checkpoint_file.FORMAT_VERSION", 9)
    files = written(tmp_path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"format version is 9.*upgrade"):
        files.newest(tmp_path)


def test_a_checkpoint_is_never_unpickled(tmp_path):
    files, last = CheckpointFile(OWNER), tmp_path / LAST
    files.save_checkpoint({"weights": trap_in(tmp_path), HEADER: {"step": 1}}, last)  # whole, with the right digest
    assert files.newest(tmp_path) is not None
    with pytest.raises(CheckpointError, match="isn't loaded"):
        files.load_checkpoint(last)
    last.write_bytes(pickle.dumps(trap_in(tmp_path)))
    with pytest.raises(CheckpointError, match="damaged"):
        files.newest(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.distributed
def test_a_run_killed_at_random_moments_ends_as_one_left_alone(tmp_path):
    """Both stages, three kills; `make test-slow` has fifty, and ten on two ranks."""
    found = kill_and_resume(tmp_path, kills=3, ranks=1)
    assert found["exit_statuses"] == {"-9": 3}


def kill_and_resume(folder: Path, kills: int, ranks: int, seed: int = 0) -> dict:
    data = subset(folder / "data.parquet", train=64, val=8)
    script = Path(__file__).with_name("kill_and_resume.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(data), str(kills), str(ranks), str(seed)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == kills
    assert found["equal_weights"], found
    assert found["equal_metrics"], found
    assert found["exactly_once"], found
    assert found["repeated_with_other_rows"] == 0
    assert found["in_order"], found
    return found


def test_ranks_that_torchrun_started_agree_on_a_name(tmp_path, monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2"}
    for name, value in {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(RUN_NAME, raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    names = []
    for rank in (0, 1):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        names.append(RunFolder(str(tmp_path), "pretrain", None, resume=False).name)
        monkeypatch.delenv(RUN_NAME, raising=False)
        time.sleep(1.1)  # the name is the time
    assert names[0] == names[1]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with pytest.raises(ConfigError, match="can't agree on a name"):
        RunFolder(str(tmp_path), "pretrain", None, resume=False)
