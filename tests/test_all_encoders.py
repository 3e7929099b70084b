"""Every encoder pretrains both stages, exports, finetunes and predicts, on real crystals and from the command line."""

import csv
import json
from pathlib import Path

import pytest

from crysldnet.artifacts import model_file
from crysldnet.cli import run
from crysldnet.config import choices
from crysldnet.data.datasets import EMBEDDED
from encoders import CLASSES, SMALL, WIDTH
from tiny import DENOISER, QUIET, subset

SHORT = ["trainer.accelerator=cpu", "data.batch_size=16"]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return subset(tmp_path_factory.mktemp("data") / "few.parquet", train=32, val=8, test=8, max_atoms=8)


def test_every_class_has_a_choice_of_its_name() -> None:
    assert set(CLASSES) <= set(choices("encoder"))


@pytest.mark.parametrize("name", CLASSES)
def test_encoder_goes_the_whole_way(name: str, few: Path, tmp_path: Path) -> None:
    tiny = [f"encoder.{key}={value}" for key, value in {"width": WIDTH, **SMALL[name]}.items()]
    common = [f"runs={tmp_path}", f"data.path={few}", "name=a", *SHORT, *QUIET]
    stages = ["stages.vae.epochs=1", "stages.diffusion.epochs=1", "objective.hidden=16"]
    assert run(["pretrain", f"encoder={name}", *tiny, *stages, *DENOISER, *common]) == 0
    encoder = tmp_path / "pretrain" / "a" / "encoder.safetensors"
    info, before = model_file.read(encoder, "encoder")
    assert info["encoder"]["_target_"].endswith(f".{CLASSES[name].__name__}")

    brief = ["epochs=1", "min_steps=0", "baselines=false", "optimizer.lr=1e-9"]
    assert run(["finetune", f"pretrained={encoder}", *brief, *common]) == 0
    _, after = model_file.read(tmp_path / "finetune" / "a" / "model.safetensors", "property_model")
    for key, weight in before.items():
        if "running_" not in key and "num_batches" not in key:
            assert (after[f"encoder.{key}"] - weight).abs().max() < 1e-6, key

    out = tmp_path / "predictions.csv"
    files = EMBEDDED / "examples"
    assert run(["predict", f"model={tmp_path / 'finetune' / 'a'}", f"files={files}", f"out={out}", "device=cpu"]) == 0
    values = [float(row["prediction"]) for row in csv.DictReader(out.open())]
    assert len(values) == 6
    assert len(set(values)) == 6
    summary = json.loads((tmp_path / "finetune" / "a" / "summary.json").read_text())
    assert min(values) > -20
    assert max(values) < 20
    assert summary["test/mae"] > 0
