"""Strategies and precisions that need a GPU: one GPU or two train as one CPU does."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from crysldnet.artifacts import model_file
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
