"""What needs a GPU: it trains as a CPU does, no step waits for it, and it builds the graphs of the host."""

import importlib.util
import json
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from benchmarks import trainer as benchmark
from crysldnet.artifacts import model_file
from crysldnet.data.store import CrystalStore
from crysldnet.graphs.batch import CrystalBatch, make_batch
from test_device_graph import GRAPHS, assert_equal
from test_strategies import in_two_processes, losses_of
from tiny import subset
from two_processes import EXACT, ON_GPUS, train

GPUS = min(torch.cuda.device_count(), 2)
pytestmark = pytest.mark.skipif(GPUS == 0, reason="there is no GPU")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[float]]:
    """Return the folder of a run on one CPU with as many batches a step as there are GPUs, its data and losses."""
    folder = tmp_path_factory.mktemp("gpu")
    data = subset(folder / "data.parquet", train=48, val=16)
    words = ["trainer.accelerator=cpu", f"trainer.accumulate_grad_batches={GPUS}", *EXACT]
    return folder, data, train(folder, str(data), "cpu", *words)


@pytest.mark.parametrize("case", ON_GPUS)
def test_gpus_train_as_one_cpu_does(on_cpu: tuple[Path, Path, list[float]], case: str) -> None:
    if case == "gpu_deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed isn't installed")
    folder, data, expected = on_cpu
    in_two_processes(folder, str(data), case, processes=GPUS)
    half = "precision" in " ".join(ON_GPUS[case])
    assert losses_of(folder, case) == pytest.approx(expected, rel=0.05 if half else 1e-3)
    run = folder / "pretrain" / case
    assert json.loads((run / "summary.json").read_text())["status"] == "complete"
    names = {
        name: model_file.read(folder / "pretrain" / name / "encoder.safetensors", "encoder")[1].keys()
        for name in ("cpu", case)
    }
    assert names[case] == names["cpu"]


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_built_on_a_gpu_are_those_of_the_host_to_the_last_bit(name: str, starter: CrystalStore) -> None:
    for start in range(0, 2000, 250):
        crystals = starter.crystals.take(np.arange(start, start + 250))
        built = make_batch(crystals, GRAPHS[name], graph_on="device").pin_memory().to("cuda", non_blocking=True)
        assert built.edge_index.is_cuda
        assert_equal(built.to("cpu"), make_batch(crystals, GRAPHS[name]))


class NoWaiting(pl.Callback):
    """Raises an error if a step that logs nothing waits for the GPU."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_start(self, trainer: pl.Trainer, _module: object, batch: CrystalBatch, _: int) -> None:
        assert batch.positions.is_cuda
        if trainer.global_step in (2, 5, 6):  # the first steps allocate, and step 10 logs
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, *_: object) -> None:
        self.steps += torch.cuda.get_sync_debug_mode() > 0
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_no_step_of_the_trainer_waits_for_the_gpu(command: str, tmp_path: Path) -> None:
    watch = NoWaiting()
    try:
        module = benchmark.train(command, "embedded:mp_starter", 4, 16, tmp_path, watch, "gpu")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.steps == 3
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert all(group["fused"] for group in optimizer.param_groups)  # type: ignore[union-attr]
