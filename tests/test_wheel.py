"""The built wheel works away from the source: configuration and crystals are inside."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tiny import environment_of_a_shell

ROOT = Path(__file__).parents[1]


def test_the_lock_has_a_sha256_of_every_version_but_that_of_torch():
    locked = (ROOT / "requirements.lock").read_text().replace(" \\\n    ", " ").splitlines()
    assert all(re.fullmatch(r"\S+==\S+( --hash=sha256:[0-9a-f]{64})+", line) for line in locked)
    pinned = [
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith(("#", "torch=="))
    ]
    names = [re.sub(r"[-_.]+", "-", line.partition("==")[0].lower()) + line[line.index("==") :] for line in pinned]
    assert sorted(line.split()[0] for line in locked) == sorted(names)


def test_what_is_installed_fits_together_but_for_the_pins_of_matbench():
    """matbench 0.6 pins versions that don't install on Python 3.11; it comes without them."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    ours = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    complaints = [line for line in done.stdout.splitlines() if line.split()[0] in {"crysldnet", *ours}]
    assert [line for line in complaints if not line.startswith("matbench 0.6 ")] == []


def test_public_modules_are_imported_without_a_warning():
    modules = "crysldnet, crysldnet.inference, crysldnet.api.estimators, crysldnet.pretrain, crysldnet.finetune"
    modules += (
        ", crysldnet.tools.report, crysldnet.tools.importer.command, crysldnet.tools.sweep, crysldnet.tools.suggest"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", f"import {modules}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


CONDA = {"torch": "pytorch", "torch-geometric": "pytorch_geometric", "matplotlib": "matplotlib-base"}
"""Names of packages that differ on conda-forge."""


def test_the_recipe_for_conda_asks_for_what_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "packaging/meta.yaml").read_text()
    assert f'version = "{project["version"]}"' in text
    run = text.split("  run:\n")[1].split("\n\n")[0]
    asked = [re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in project["dependencies"]]
    wanted = [f"{CONDA.get(name, name)} {versions}" for name, versions in asked]
    assert re.findall(r"^    - (.+)$", run, re.MULTILINE) == [f"python {project['requires-python']}", *wanted]


def test_the_image_copies_what_is_there_and_what_the_ignore_file_lets_through():
    text = (ROOT / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert copied
    assert all((ROOT / name).exists() for name in copied)
    assert {f"!{name}" for name in copied} <= set((ROOT / ".dockerignore").read_text().split())
    script = text.split("\nRUN ")[1].split("\nWORKDIR")[0]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.search(r"\.\[([\w,]+)\]", script)[1].split(",")) <= set(extras)


@pytest.mark.skipif(shutil.which("make") is None, reason="make isn't installed")
def test_make_says_what_an_installation_takes_and_shows_the_bar_of_pip(tmp_path):
    words = ["make", "-n", "install", f"VENV={tmp_path}/venv"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment_of_a_shell())
    said = done.stdout.split("-m venv")[0]
    assert re.search(r"[\d.]+ GB.*minutes", said, re.DOTALL)
    assert "--quiet" not in done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_configuration_crystals_and_licences(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configuration = {f"crysldnet/conf/{p.relative_to(ROOT / 'conf')}" for p in (ROOT / "conf").rglob("*.yaml")}
    assert configuration <= names
    embedded = {"mp_starter.parquet", "matbench_jdft2d.parquet", "matbench_phonons.parquet", "README.md"}
    assert {f"crysldnet/data/embedded/{name}" for name in embedded} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 6_000_000


@pytest.mark.distributed
def test_the_installed_wheel_pretrains_in_an_empty_folder(wheel, tmp_path):
    """Installed into an environment of its own, which sees the dependencies but not the source tree."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    target = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, str(wheel)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    source = str(ROOT / "src")
    paths = [p for p in sys.path if p.endswith("site-packages") and p != source]
    (Path(target) / "dependencies.pth").write_text("\n".join(paths) + "\n")
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    where = subprocess.run(
        [python, "-c", "import crysldnet; print(crysldnet.__file__)"],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert where.stdout.strip().startswith(target), where.stderr
    tiny = "encoder.width=8 encoder.layers=2 encoder.k=3 encoder.n_distances=4 encoder.n_basis=8 denoiser.width=8"
    tiny += " denoiser.layers=1 denoiser.heads=2 stages.vae.epochs=1 stages.diffusion.epochs=1 data.batch_size=128"
    done = subprocess.run(
        [python, "-m", "crysldnet", "pretrain", *tiny.split(), "trainer.progress_bar=false"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "runs/pretrain/latest/encoder.safetensors").exists()
