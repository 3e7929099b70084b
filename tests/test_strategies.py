"""Strategies: two processes equal one, all export the same file, and what can't be combined is refused beforehand."""

import contextlib
import copy
import csv
import inspect
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

from conftest import cells_of
from crysldnet import pretrain
from crysldnet.artifacts import model_file
from crysldnet.build import build
from crysldnet.config import choices, compose
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.errors import ConfigError, DataError
from crysldnet.graphs.spec import GraphSpec
from crysldnet.training import strategies
from crysldnet.training.optimizer import AdamW
from crysldnet.training.strategies import Name, check_combination, name_of, refusals, timeout_of
from crysldnet.training.trainer import TrainerSettings, moving_average
from crysldnet.training.watchdog import few_crystals
from encoders import CLASSES, batch_of, small
from test_docs import ROOT, section, table_rows
from tiny import DENOISER, ENCODER, QUIET, pretrain_config, subset
from two_processes import CASES, STEPS, export_untrained, train

WORKER = Path(__file__).parent / "two_processes.py"


def in_two_processes(folder: Path, data: str, *cases: str, processes: int = 2) -> str:
    """Run cases, or all, in two processes that torchrun starts, or another number; return what they print."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*torchrun, str(WORKER), str(folder), data]
    source = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, *command, *cases],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout + done.stderr


def losses_of(folder: Path, case: str) -> list[float]:
    """Return the losses of all processes' batches in the order in which one process would take them."""
    ranks = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{case}.[0-9].json"))]
    return [loss for together in zip(*ranks, strict=True) for loss in together]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]], str]:
    """Every case in two processes that torchrun starts, and the same with one process and two batches a step."""
    folder = tmp_path_factory.mktemp("runs")
    data = str(subset(folder / "data.parquet", train=48, val=16, test=8))
    said = in_two_processes(folder, data)
    with contextlib.redirect_stdout(io.StringIO()):
        losses = {"one": train(folder, data, "one", "trainer.accumulate_grad_batches=2")}
        train(folder, data, "one_averaging", "trainer.accumulate_grad_batches=2", "trainer.ema_decay=0.9")
        losses["one_accumulating"] = train(folder, data, "one_accumulating", "trainer.accumulate_grad_batches=4")
        export_untrained(folder, data, "single")
    losses |= {case: losses_of(folder, case) for case in CASES}
    return folder, losses, said


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return model_file.read(folder / "pretrain" / name / "vae" / "pretraining.safetensors", "pretraining")[1]


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["ddp", "ddp_static", "fsdp2", "ddp_less_memory", "ddp_static_less_memory"])
def test_two_processes_train_as_one_with_two_batches_a_step(runs: Any, case: str) -> None:
    """Same crystals a step: the losses of all batches agree to 1e-6, through two epochs."""
    _, losses, _ = runs
    assert len(losses["one"]) == 12
    assert losses[case] == pytest.approx(losses["one"], rel=1e-6, abs=1e-6)
    first_epoch, second_epoch = np.mean(losses["one"][:6]), np.mean(losses["one"][6:])
    assert abs(first_epoch - second_epoch) > 1e-3, "weights must have changed what is compared"


@pytest.mark.distributed
def test_two_processes_end_at_the_weights_of_one(runs: Any) -> None:
    folder, _, _ = runs
    one, two, other = weights(folder, "one"), weights(folder, "ddp"), weights(folder, "fsdp2_half")
    learned = [key for key in one if "running_" not in key and "num_batches" not in key]
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in learned)
    for case in ("ddp_less_memory", "ddp_static_less_memory"):
        average, averaged = weights(folder, "one_averaging"), weights(folder, case)
        assert all(torch.allclose(average[key], averaged[key], atol=1e-6) for key in learned)
        assert not all(torch.allclose(average[key], one[key], atol=1e-6) for key in learned)
    assert not all(torch.allclose(one[key], other[key], atol=1e-6) for key in learned)


@pytest.mark.distributed
def test_sharding_accumulates_and_recomputes_as_one_process_does(runs: Any) -> None:
    _, losses, _ = runs
    # Rank r takes batches r, r + 2, …, so both go through the same four batches a step.
    for case in ("fsdp2_less_memory", "ddp_accumulating"):
        assert losses[case] == pytest.approx(losses["one_accumulating"], rel=1e-6, abs=1e-6)


@pytest.mark.distributed
def test_processes_train_in_half_and_double_precision(runs: Any) -> None:
    _, losses, _ = runs
    assert losses["ddp_half"] == pytest.approx(losses["one"], rel=0.05)
    assert losses["ddp_half"] != pytest.approx(losses["one"], abs=1e-6)
    assert losses["ddp_double"] == pytest.approx(losses["one"], rel=0.02)


@pytest.mark.distributed
def test_sharding_trains_in_half_precision_and_with_a_teacher(runs: Any) -> None:
    folder, losses, _ = runs
    assert losses["fsdp2_half"] == pytest.approx(losses["one"], rel=0.05)
    assert losses["fsdp2_half"] != pytest.approx(losses["one"], abs=1e-6)
    assert losses["fsdp2_teacher"][:12] == pytest.approx(losses["fsdp2"], abs=1e-6)
    assert np.isfinite(losses["fsdp2_teacher"]).all()
    summary = json.loads((folder / "pretrain/fsdp2_teacher/summary.json").read_text())
    assert np.isfinite(summary["diffusion"]["val/loss/diffusion"])


def parts_of(file: Path) -> tuple[dict, bytes]:
    """Return the header of a safetensors file, whose keys are in no particular order, and the bytes of its tensors."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@pytest.mark.distributed
def test_a_sharded_property_model_is_tested_at_its_best_epoch_and_exported(runs: Any) -> None:
    folder, _, _ = runs
    run = folder / "finetune/fsdp2"
    model, info = model_file.load_property_model(run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test/mae"] == pytest.approx(info["metrics"]["test/mae"])
    with (run / "predictions_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["material_id"] for row in rows}) == len(rows) == 8
    errors = [abs(float(row["true"]) - float(row["prediction"])) for row in rows]
    assert np.mean(errors) == pytest.approx(summary["test/mae"], rel=1e-3)
    assert all(parameter.ndim == 0 or parameter.numel() for parameter in model.parameters())


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["ddp", "ddp_static", "fsdp2"])
def test_every_strategy_exports_the_same_file_for_the_same_state(runs: Any, case: str) -> None:
    folder, _, _ = runs
    for file in ("encoder.safetensors", "vae/pretraining.safetensors"):
        header, tensors = parts_of(folder / "untrained/single" / file)
        assert parts_of(folder / "untrained" / case / file) == (header, tensors)
        assert len(tensors) > 10_000
    assert tensors != parts_of(folder / "pretrain/ddp/vae/pretraining.safetensors")[1]


@pytest.mark.distributed
def test_the_first_rank_alone_prints_and_the_topology_comes_once_a_stage(runs: Any) -> None:
    _, _, printed = runs
    assert printed.count("masked species found") == len(CASES)
    line = "strategy fsdp2, precision 32-true; a batch of at most "
    assert printed.count(f"{line}8 crystals in each\n") == 4  # fsdp2, both stages of fsdp2_teacher, and finetuning
    assert printed.count(f"{line}4 crystals in each, 2 of them a step\n") == 1


@pytest.mark.distributed
def test_both_runs_of_a_step_take_the_same_number_of_steps(runs: Any) -> None:
    """The schedule counts optimizer steps: its last learning rate is that of the end in every case."""
    folder, _, _ = runs
    last = {}
    for name in ("one", "one_accumulating", "ddp", "fsdp2_less_memory"):
        file = max((folder / f"pretrain/{name}/vae/checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
        state = torch.load(file, weights_only=True)
        assert state["global_step"] == 6
        scheduler = state["lr_schedulers"][0]
        assert (scheduler["total_steps"], scheduler["last_epoch"]) == (6, 5)
        last[name] = scheduler["_last_lr"]
    assert len({tuple(rates) for rates in last.values()}) == 1


# Activation checkpointing and averaging, in one process


def gradients(encoder: nn.Module, batch: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    features = encoder(batch)
    loss = (features * torch.linspace(-1, 1, features.shape[1], dtype=features.dtype)).square().sum()
    encoder.zero_grad()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in encoder.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", CLASSES)
def test_activation_checkpointing_changes_neither_losses_nor_gradients_nor_statistics(name: str, starter: Any) -> None:
    encoder = small(name).double().train()
    batch = batch_of(cells_of(starter, range(3)), encoder)
    other = copy.deepcopy(encoder)
    other.checkpoint_layers()
    assert encoder.state_dict().keys() == other.state_dict().keys()
    for _ in range(2):
        torch.manual_seed(1)
        loss, gradient = gradients(encoder, batch)
        torch.manual_seed(1)
        again, regradient = gradients(other, batch)
        assert torch.equal(loss, again)
        assert len(gradient) == len(regradient) > 0
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(gradient, regradient, strict=True))
    states = zip(encoder.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states), "batch statistics moved twice"
    copied = copy.deepcopy(other)
    torch.manual_seed(2)
    expected = gradients(other, batch)[0]
    torch.manual_seed(2)
    assert torch.equal(gradients(copied, batch)[0], expected)


@pytest.mark.parametrize("name", CLASSES)
def test_activation_checkpointing_keeps_less(name: str, starter: Any) -> None:
    def kept(encoder: nn.Module) -> int:
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        batch = batch_of(cells_of(starter, range(3)), encoder)  # type: ignore[arg-type]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            encoder(batch)
        return sum(sizes)

    plain, less = small(name).double(), small(name).double()
    less.checkpoint_layers()
    assert kept(less) < 0.9 * kept(plain)  # what isn't in layers stays


def test_an_average_follows_closely_at_first_and_slowly_later() -> None:
    module = nn.Linear(1, 1, bias=False)
    averaged = torch.optim.swa_utils.AveragedModel(module, **moving_average(0.99)._kwargs)
    with torch.no_grad():
        for value in range(1, 2001):
            module.weight.fill_(float(value))
            averaged.update_parameters(module)
            if value == 20:  # (1 + n)/(10 + n) = 20/29 at last: it lags by some two steps, where 0.99 lags by 99
                assert 15 < float(averaged.module.weight) < 20
    lag = 2000 - float(averaged.module.weight)
    assert lag == pytest.approx(99, abs=2)


# What goes together


def settings_of(**changed: Any) -> TrainerSettings:
    return TrainerSettings(**{"devices": 2, **changed})


FEATURES: dict[str, dict[str, Any]] = {
    "one device": {"devices": 1},
    "several devices, nodes": {},
    "`trainer.accumulate_grad_batches=2`": {"accumulate_grad_batches": 2},
    "`trainer.precision=bf16-mixed`": {"precision": "bf16-mixed"},
    "`trainer.precision=16-mixed`": {"precision": "16-mixed"},
    "`trainer.precision=64-true`": {"precision": "64-true"},
    "`trainer.compile=true`": {"compile": True},
    "`trainer.activation_checkpointing=true`": {"activation_checkpointing": True},
    "both of these": {"compile": True, "activation_checkpointing": True},
    "`trainer.ema_decay=0.999`": {"ema_decay": 0.999},
    "`trainer.max_nonfinite_steps=10`": {"max_nonfinite_steps": 10},
}


@pytest.mark.slow
def test_a_sharded_run_that_trained_to_its_end_is_exported_on_resume_and_keeps_its_strategy(tmp_path: Path) -> None:
    data = subset(tmp_path / "data.parquet", train=16, val=8)
    words = [*STEPS, "data.batch_size=8", "stages.vae.epochs=1", "trainer.accelerator=cpu", *QUIET, *ENCODER, *DENOISER]
    line = [sys.executable, "-m", "crysldnet", "pretrain", "name=a", f"runs={tmp_path}", f"data.path={data}", *words]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*line, *arguments], capture_output=True, text=True, cwd=tmp_path)

    assert run("strategy=fsdp2").returncode == 0
    folder = tmp_path / "pretrain" / "a"
    info, before = model_file.read(folder / "encoder.safetensors", "encoder")
    for name in ("summary.json", "encoder.safetensors", "vae/pretraining.safetensors"):  # killed after the last step
        (folder / name).unlink()
    other = run("strategy=ddp", "resume=last")
    assert other.returncode == 2
    assert "started with strategy=fsdp2" in other.stderr
    again = run("strategy=fsdp2", "resume=last")
    assert again.returncode == 0, again.stderr[-4000:]
    info_again, after = model_file.read(folder / "encoder.safetensors", "encoder")
    assert (info_again["encoder"], info_again["metrics"]) == (info["encoder"], info["metrics"])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_deepspeed_does_not_ask_the_loader_for_a_number_that_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(strategies, "find_spec", lambda _: True)
    monkeypatch.setattr(strategies, "DeepSpeedStrategy", lambda **settings: given.update(settings) or SimpleNamespace())
    strategies.deepspeed()
    assert given["logging_batch_size_per_gpu"] == 1
    assert "logging_batch_size_per_gpu" in inspect.signature(DeepSpeedStrategy).parameters
    module = CrystalDataModule(path="embedded:mp_starter", graph=GraphSpec(k=3), batch_size=4)
    module.setup()
    assert module.train_dataloader().batch_sampler is None


def test_the_table_of_combinations_is_what_the_check_says() -> None:
    header, *rows = table_rows(section("docs/cluster.md", "## What goes together"))
    names = [cell.strip("`") for cell in header[1:]]
    assert set(names) == set(get_args(Name)) == set(choices("strategy"))
    told = {row[0]: dict(zip(names, row[1:], strict=True)) for row in rows}
    for feature, changed in FEATURES.items():
        for name in names:
            one = {"devices": 1} if name == "auto" and changed else {}  # it can't have more, as its row says
            refused = any(True for _ in refusals(name, settings_of(**{**changed, **one}), "gpu"))  # type: ignore[arg-type]
            assert told[feature][name] == ("no" if refused else "yes"), (feature, name)
    for name in names:
        refused = any(True for _ in refusals(name, settings_of(devices=1), "cpu"))  # type: ignore[arg-type]
        assert told["on CPUs"][name] == ("no" if refused else "yes"), name
    assert set(told) == {*FEATURES, "on CPUs", "gradient clipping"}
    assert set(told["gradient clipping"].values()) == {"yes"}


def test_every_refusal_says_what_to_do_and_names_a_key() -> None:
    keys = set(compose("pretrain").values["trainer"])
    for name in get_args(Name):
        for changed in FEATURES.values():
            for refusal in refusals(name, settings_of(**changed), "cpu"):
                assert any(word in str(refusal) for word in ("use ", "set ", "Set ", "need", "it can in"))
                assert refusal.key == "strategy" or refusal.key.removeprefix("trainer.") in keys


@pytest.mark.parametrize("choice", sorted({*choices("strategy")} - {"deepspeed"}))
def test_every_choice_builds_the_strategy_of_its_name(choice: str) -> None:
    assert name_of(build(compose("pretrain", [f"strategy={choice}"]).values["strategy"], "strategy")) == choice


def test_deepspeed_is_refused_with_the_mend_where_it_is_not_installed(tmp_path: Path) -> None:
    from importlib.util import find_spec

    if find_spec("deepspeed") is not None:
        pytest.skip("it is installed")
    config, values = pretrain_config(f"runs={tmp_path}", "strategy=deepspeed")
    with pytest.raises(ConfigError, match=r"pip install \"crysldnet\[deepspeed\]\""):
        pretrain.run(config, values)
    assert not list(tmp_path.iterdir())


def test_timeouts_may_be_parts_of_a_minute_and_are_positive() -> None:
    node = compose("pretrain", ["strategy=ddp", "strategy.timeout_minutes=0.25"]).values["strategy"]
    assert timeout_of(build(node, "strategy")).total_seconds() == 15
    with pytest.raises(ConfigError, match="timeout_minutes"):
        build({**node, "timeout_minutes": 0.0}, "strategy")


def test_a_combination_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for arguments, key in (
        (["strategy=fsdp2", "trainer.ema_decay=0.99"], "trainer.ema_decay"),
        (["strategy=fsdp2", "trainer.precision=64-true"], "trainer.precision"),
        (["strategy=ddp_static", "trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches"),
        (["trainer.precision=16-mixed"], "trainer.precision"),
        (["strategy=fsdp"], "strategy"),
    ):
        config, values = pretrain_config(f"runs={tmp_path}", "trainer.accelerator=cpu", *arguments)
        with pytest.raises(ConfigError) as caught:
            pretrain.run(config, values)
        assert caught.value.key == key
    assert not list(tmp_path.iterdir())


def test_what_decays_does_not_depend_on_sharding() -> None:
    """Under FSDP a sharded matrix looks like a vector; it remembers that it is a matrix."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    flat = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for parameter in flat.parameters():
        parameter.full_ndim = parameter.ndim  # type: ignore[attr-defined]
        parameter.data = parameter.data.flatten()
    groups = [[len(group["params"]) for group in AdamW(lr=1.0).parameter_groups(m)] for m in (module, flat)]
    assert groups == [[1, 3], [1, 3]]


def test_the_check_passes_what_is_asked_for_in_one_process() -> None:
    check_combination("auto", settings_of(devices=1), "cpu")
    with pytest.raises(ConfigError, match="2 processes need strategy=ddp"):
        check_combination("auto", settings_of(), "cpu")


def test_a_gpu_with_few_crystals_is_warned_of() -> None:
    """The batch size is that of all devices."""
    data = CrystalDataModule(path="embedded:mp_starter", graph=GraphSpec(k=8), batch_size=64)
    data.setup()

    def warning(devices: int, device: str = "cuda", accumulate: int = 1) -> str | None:
        strategy = SimpleNamespace(root_device=torch.device(device))
        trainer: Any = SimpleNamespace(
            datamodule=data, world_size=devices, accumulate_grad_batches=accumulate, strategy=strategy
        )
        return few_crystals(trainer)

    assert "a batch of one GPU has only 8 crystals" in str(warning(8))
    assert "shared by all 8 batches of a step" in str(warning(4, accumulate=2))
    assert warning(2) is None
    assert warning(8, "cpu") is None


def test_the_projection_in_the_documents_is_what_its_script_prints() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.projection"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    for table in done.stdout.strip().split("\n\n"):
        assert table in (ROOT / "docs/cluster.md").read_text()
    row = next(row for row in done.stdout.splitlines() if re.search("diffusion.*one core.*25 Gbit/s", row))
    step = float(re.search(r"([\d.]+) s, measured", row)[1])  # type: ignore[index]
    wait = 2 * 536.9e6 * (7 / 8 / 10e9 + 7 / 8 / 3.125e9) + 12 * 20e-6  # of 64 processes, 8 a node
    assert row.split("|")[-3].strip() == f"100% ({step / (step + wait):.0%})"
    assert step / (step + wait) < 0.97


# The sampler, for many ranks


@pytest.mark.parametrize("seed", range(12))
def test_batches_of_real_crystals_suit_any_number_of_ranks(starter: Any, seed: int) -> None:
    """Random world sizes up to 64, batch sizes and bounds, on the sizes of real crystals."""
    rng = np.random.default_rng(seed)
    world = [1, 2, 3, 7, 8, 16, 24, 31, 32, 48, 63, 64][seed]
    accumulate = int(rng.integers(1, 4))
    each = int(rng.integers(2, 9))
    rows = rng.permutation(len(starter))[: int(rng.integers(max(world * accumulate * each, 600), 3200))]
    sizes = starter.crystals.sizes
    largest = int(sizes[rows].max())
    bounded = ["crystals", "atoms of a batch", "atoms of a step"][seed % 3]
    data = CrystalDataModule(
        graph=GraphSpec(k=4),
        batch_size=world * accumulate * each if bounded != "atoms of a step" else None,
        max_atoms=largest * 2 if bounded == "atoms of a batch" else None,
        batch_atoms=world * accumulate * largest * 2 if bounded == "atoms of a step" else None,
        seed=seed,
        store=starter,
        rows={"train": np.sort(rows), "val": rows[:0], "test": rows[:0]},
    )
    data.setup()
    for epoch in (0, 3):
        samplers = [data._sampler("train", rank, world, accumulate) for rank in range(world)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        lists = [list(sampler) for sampler in samplers]
        assert {len(batches) for batches in lists} == {len(lists[0])}
        assert len(lists[0]) % accumulate == 0
        assert len(lists[0]) // accumulate == data.steps_per_epoch(world, accumulate)
        seen = np.concatenate([request.rows for batches in lists for request in batches])
        assert np.array_equal(np.sort(seen), np.sort(rows)), "every crystal exactly once"
        atoms = np.array([sum(int(sizes[request.rows].sum()) for request in batches) for batches in lists])
        limit = 0.05 if atoms.mean() >= 500 else 0.1  # where an epoch is very short, one crystal is several percent
        assert np.abs(atoms / atoms.mean() - 1).max() < limit
        whole = [request.rows for batches in lists for request in batches]
        if bounded != "atoms of a step":
            assert max(len(rows) for rows in whole) <= each
        if bounded != "crystals":
            assert max(sizes[rows].sum() for rows in whole) <= 2 * largest
        again = data._sampler("train", world - 1, world, accumulate)
        again.set_epoch(epoch)
        assert all(np.array_equal(a.rows, b.rows) for a, b in zip(again, lists[-1], strict=True))


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    config, _ = pretrain_config("data.batch_size=20")
    data = pretrain.make_data(config, pretrain.build_model(config, with_flow=False))
    data.setup()
    assert data.steps_per_epoch(4, 1) > 0
    with pytest.raises(DataError, match="8 processes × 1"):
        data.steps_per_epoch(8, 1)
