"""Memory that runs out ends a command in one sentence with what would have fit."""

import re
import sys

import pytest
import torch

from crysldnet import cli
from crysldnet.errors import DeviceError
from crysldnet.finetune import module as finetune_module
from crysldnet.platforms import is_out_of_memory, no_gpu
from tiny import ENCODER, QUIET, subset

SHORT = [*ENCODER, *QUIET, "pretrained=none", "epochs=1", "min_steps=0", "baselines=false", "data.batch_size=4"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_ran_out_is_told_from_other_errors(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_torch_itself_says_so_in_these_words():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value), caught.value


def test_a_training_that_runs_out_of_memory_says_what_would_have_fit(tmp_path, monkeypatch):
    data = subset(tmp_path / "d.parquet", train=16, val=4)
    monkeypatch.chdir(tmp_path)
    sizes = []
    step = finetune_module.FinetuneModule.training_step

    def limited(self, batch, batch_idx):
        if len(sizes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        sizes.append(len(batch.numbers))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(finetune_module.FinetuneModule, "training_step", limited)
    with pytest.raises(DeviceError) as caught:
        cli.run(["finetune", f"data.path={data}", *SHORT])
    text = str(caught.value)
    found = re.match(
        r"out of memory in a batch of 4 crystals, (\d+) atoms and [\d,]+ edges; the largest batch that", text
    )
    assert found is not None, text
    assert f"the largest batch that fit had {max(sizes)} atoms" in text
    budget = int(re.search(r"data\.max_atoms=(\d+)", text)[1])
    assert budget == (max(sizes) if max(sizes) < int(found[1]) else int(found[1]) // 2)
    assert "trainer.accumulate_grad_batches=2" in text


def test_any_other_command_ends_with_one_sentence(monkeypatch, capsys):
    def out_of_memory(_):
        raise MemoryError

    monkeypatch.setattr(cli, "run", out_of_memory)
    monkeypatch.setattr(sys, "argv", ["crysldnet", "predict", "model=m", "files=f"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: out of memory; lower batch_size or batch_atoms")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    "words", [["finetune", "trainer.accelerator=gpu"], ["predict", "model=base", "files=a", "device=gpu"]]
)
def test_a_gpu_that_is_not_there_is_said_with_the_reason(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DeviceError, match=re.escape(no_gpu())) as caught:
        cli.run(words)
    assert "leave it out, to compute on the CPU" in str(caught.value)
