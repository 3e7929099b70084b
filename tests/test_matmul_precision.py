"""Float32 matrix products: TF32 on GPUs unless set otherwise, and unchanged on CPUs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crysldnet.config import compose, refuse_changed, to_yaml
from crysldnet.errors import ConfigError
from crysldnet.training.matmul import set_matmul_precision
from crysldnet.training.trainer import TrainerSettings, make_trainer


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("chosen", "precision", "said"),
    [(None, "high", "TF32"), ("highest", "highest", "float32"), ("medium", "medium", "bfloat16")],
)
def test_a_gpu_run_sets_the_precision_and_says_so(chosen, precision, said, capfd):
    set_matmul_precision(chosen, "gpu")
    assert torch.get_float32_matmul_precision() == precision
    text = capfd.readouterr().err
    assert f"trainer.matmul_precision={precision}" in text
    assert said in text


@pytest.mark.parametrize("chosen", [None, "medium"])
def test_nothing_changes_on_a_cpu(chosen, tmp_path, capfd):
    before = torch.get_float32_matmul_precision()
    settings = TrainerSettings(accelerator="cpu", matmul_precision=chosen, progress_bar=False)
    make_trainer(settings, "auto", folder=tmp_path, epochs=1, seed=0, gradient_clip_val=None, owner={})
    assert torch.get_float32_matmul_precision() == before
    assert "matmul_precision" not in capfd.readouterr().err


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_resumed_run_keeps_its_precision(command: str, tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    begun = compose(command, ["trainer.matmul_precision=highest"])
    saved.write_text(to_yaml({"defaults": begun.choices, **begun.values}))
    again = compose(command, ["resume=last"], saved)
    assert again.values["trainer"]["matmul_precision"] == "highest"
    refuse_changed(command, again, saved, complete=False)
    other = compose(command, ["resume=last", "trainer.matmul_precision=medium"], saved)
    with pytest.raises(ConfigError, match=r"trainer\.matmul_precision.*started with"):
        refuse_changed(command, other, saved, complete=False)
