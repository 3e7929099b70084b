"""The command line, run as a user runs it: real processes, real files, exit statuses that tell the truth."""

import csv
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
import yaml

from crysldnet import cli
from crysldnet.data.datasets import EMBEDDED
from crysldnet.errors import CrysldnetError
from tiny import DENOISER, ENCODER, QUIET, subset

EXAMPLES = EMBEDDED / "examples"
TINY = [*ENCODER, *QUIET]


def crysldnet(*arguments, cwd, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **variables}
    return subprocess.run(
        [sys.executable, "-m", "crysldnet", *arguments], cwd=cwd, capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return subset(tmp_path_factory.mktemp("small") / "data.parquet", train=48, val=16, test=16)


@pytest.fixture
def model(shared):
    return shared / "finetune/tiny"


@pytest.mark.distributed
def test_pretrain_finetune_predict_from_an_empty_folder(tmp_path, small):
    short = [f"data.path={small}", "data.batch_size=16"]
    stages = ["stages.vae.epochs=2", "stages.diffusion.epochs=1"]
    done = crysldnet("pretrain", *TINY, *DENOISER, *short, *stages, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "masked species found" in done.stdout
    encoder, brief = "runs/pretrain/latest/encoder.safetensors", ["epochs=1", "min_steps=0", "baselines=false"]
    done = crysldnet("finetune", f"pretrained={encoder}", *QUIET, *short, *brief, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "MAE (eV/atom)" in done.stdout
    done = crysldnet("predict", "model=runs/finetune/latest", f"files={EXAMPLES}/*.cif", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(list(EXAMPLES.glob("*.cif")))
    assert list(rows[0])[:6] == ["id", "source", "formula", "target", "prediction", "unit"]
    assert rows[0]["unit"] == "eV/atom"
    assert all(abs(float(row["prediction"])) < 50 for row in rows)
    summary = json.loads((tmp_path / "runs/finetune/latest/summary.json").read_text())
    assert summary["status"] == "complete"
    assert {"code_version", "seed", "data_sha256", "wall_time_s", "peak_memory_mb"} <= set(summary)
    for name in ("config.yaml", "metrics.csv", "model.safetensors", "predictions_test.csv", "checkpoints/last.ckpt"):
        assert (tmp_path / "runs/finetune/latest" / name).exists(), name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pretrain", "encoder=pddfromer"], "did you mean 'pddformer'"),
        (["pretrain", "trainer.accelerator=gpu"], "GPU"),
        (["pretrain", "trainer.devices=64", "strategy=ddp"], "64"),
        (["pretrian"], "no command 'pretrian'"),
        (["predict", "model=nowhere", "files=*.cif"], "nowhere"),
        (["finetune", "pretrained=nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (
            ["finetune", "pretrained=a.safetensors", "encoder.width=48"],
            "encoder.width: pretrained=a.safetensors brings",
        ),
        (["finetune", "data.targets=[]"], "data.targets"),
        (["finetune", "data.batch_size=33", "trainer.accumulate_grad_batches=2"], "choose a multiple"),
        (["pretrain", "stage=diffusion", "init=nowhere.safetensors"], "nowhere.safetensors: no such file"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_written(tmp_path, monkeypatch, arguments, says):
    if torch.cuda.is_available() and "GPU" in says:
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CrysldnetError, match=re.escape(says)):
        cli.run(arguments)
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_input_is_one_clear_line_and_status_2(tmp_path):
    done = crysldnet("pretrain", "encoder=pddfromer", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "did you mean 'pddformer'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(CrysldnetError, match="can't make the run folder"):
        cli.run(["pretrain", *TINY, f"data.path={small}"])


def test_bad_files_are_reported_and_the_rest_predicted(tmp_path, capsys, model):
    good = sorted(EXAMPLES.glob("*.cif"))[:2]
    for file in good:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "empty.cif").write_text("")
    (tmp_path / "noise.cif").write_bytes(bytes(range(256)))
    (tmp_path / "overlap.vasp").write_text("X\n1.0\n4 0 0\n0 4 0\n0 0 4\nNa Cl\n1 1\ndirect\n0 0 0\n0.01 0 0\n")
    assert cli.run(["predict", f"model={model}", f"files={tmp_path}", f"out={tmp_path}/out.csv"]) == 0
    with (tmp_path / "out.csv").open() as file:
        assert {Path(row["source"]).name for row in csv.DictReader(file)} == {f.name for f in good}
    said = capsys.readouterr().err
    for name in ("empty.cif", "noise.cif", "overlap.vasp"):
        assert name in said
    assert "2 crystals predicted, 3 refused" in said
    with (tmp_path / "out.csv.refused.csv").open() as file:
        assert {row["source"] for row in csv.DictReader(file)} == {"empty.cif", "noise.cif", "overlap.vasp"}


def test_predicting_only_bad_files_fails_and_leaves_what_was_there(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.cif").write_text("")
    (tmp_path / "predictions.csv").write_text("earlier")
    with pytest.raises(CrysldnetError, match="none of the 1 crystals could be used"):
        cli.run(["predict", f"model={model}", f"files={tmp_path}/*.cif"])
    assert (tmp_path / "predictions.csv").read_text() == "earlier"
    assert not list(tmp_path.glob(".predictions*"))


def test_a_gpu_that_is_not_there_is_said(tmp_path, model):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(CrysldnetError, match="leave it out, to compute on the CPU"):
        cli.run(["predict", f"model={model}", f"files={EXAMPLES}", f"out={tmp_path}/out.csv", "device=gpu"])


def test_a_prediction_does_not_depend_on_its_companions(capsys, model):
    found = []
    for batch_size in (1, 64):
        assert cli.run(["predict", f"model={model}", f"files={EXAMPLES}", "out=-", f"batch_size={batch_size}"]) == 0
        found.append(list(csv.DictReader(capsys.readouterr().out.splitlines())))
    a, b = found
    assert len(a) == len(b) > 3
    for one, other in zip(a, b, strict=True):
        assert float(one["prediction"]) == pytest.approx(float(other["prediction"]), rel=1e-4, abs=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_exits_non_zero_and_resumes(tmp_path, monkeypatch, small, stop):
    monkeypatch.chdir(tmp_path)
    arguments = [*TINY, f"data.path={small}", "data.batch_size=8", "stage=vae", "stages.vae.epochs=400"]
    process = subprocess.Popen(
        [sys.executable, "-m", "crysldnet", "pretrain", *arguments, "name=cut"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    last = tmp_path / "runs/pretrain/cut/vae/checkpoints/last.ckpt"
    deadline = time.time() + 120
    while not last.exists() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "resume=last" in errors
    assert not (tmp_path / "runs/pretrain/cut/summary.json").exists()
    assert not (tmp_path / "runs/pretrain/cut/encoder.safetensors").exists()
    epochs = int(torch.load(last, weights_only=True)["epoch"]) + 2
    assert cli.run(["pretrain", f"stages.vae.epochs={epochs}", "resume=last"]) == 0
    config = yaml.safe_load((tmp_path / "runs/pretrain/cut/config.yaml").read_text())
    assert config["encoder"]["width"] == 32, "a resumed run keeps the settings it was started with"
    assert json.loads((tmp_path / "runs/pretrain/cut/summary.json").read_text())["status"] == "complete"


def test_a_run_with_other_choices_resumes_with_them_and_refuses_others(tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    begun = ["preset=published", *TINY, *DENOISER, "latent.latent_dim=16", f"data.path={small}", "data.batch_size=16"]
    begun += ["stages.vae.epochs=1", "stages.diffusion.epochs=1", "name=p"]
    assert cli.run(["pretrain", *begun]) == 0
    folder = tmp_path / "runs/pretrain/p"
    for file in ("summary.json", "diffusion/pretraining.safetensors", "diffusion/checkpoints/last.ckpt"):
        (folder / file).unlink()
    with pytest.raises(CrysldnetError, match=r"was started with encoder\.variant="):
        cli.run(["pretrain", "name=p", "resume=last", "encoder.variant=corrected"])
    assert cli.run(["pretrain", "name=p", "resume=last"]) == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["objective"]["_target_"].endswith("Published")
    assert {"vae", "diffusion"} <= set(json.loads((folder / "summary.json").read_text()))


def test_help_and_a_mistyped_sha256_are_answered_without_torch() -> None:
    code = (
        "import sys\n"
        "from crysldnet import cli\n"
        "from crysldnet.errors import CrysldnetError\n"
        "for command in cli.COMMANDS:\n"
        "    cli.run([command, '--help'])\n"
        "for words in (['weights', '--help'], ['weights', 'get', 'https://a.org/b.safetensors', '--sha256', '12'],\n"
        "              ['completion', 'csh']):\n"
        "    try:\n"
        "        cli.run(words)\n"
        "        sys.exit('not refused')\n"
        "    except SystemExit as left:\n"
        "        assert left.code == 0, left\n"
        "    except CrysldnetError:\n"
        "        pass\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
