"""The package works where POSIX's modules aren't, as on Windows."""

import ast
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crysldnet.data.datasets import EMBEDDED
from crysldnet.platforms import is_own, lock
from tiny import ENCODER, QUIET, subset

PACKAGE = Path(__file__).parents[1] / "src" / "crysldnet"
POSIX = ("fcntl", "resource", "pwd", "grp", "termios")

HIDE = f"""
import os, signal, sys
import filelock, gemmi, lightning.pytorch, matplotlib.figure, numba, pyarrow.parquet, scipy, sklearn, torch
for name in {POSIX}:
    sys.modules[name] = None
for place, names in ((os, "getuid fork"), (signal, "sigwaitinfo pthread_sigmask")):
    for name in names.split():
        delattr(place, name)
import crysldnet.finetune, crysldnet.pretrain, crysldnet.inference.predict, crysldnet.tools.importer.command
import crysldnet.tools.matbench, crysldnet.tools.report, crysldnet.tools.sweep, crysldnet.tools.suggest
from crysldnet import cli
"""


def run_hidden(folder: Path, *arguments: str) -> str:
    code = f"{HIDE}\nsys.exit(cli.run({list(arguments)!r}))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CRYSLDNET_CACHE": "none"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_only_one_module_imports_what_only_posix_has():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {*names} & {*POSIX} or path.name == "platforms.py", f"{path} imports {names}"


def test_it_trains_and_predicts_with_those_modules_hidden(tmp_path):
    data = subset(tmp_path / "d.parquet", train=16, val=4, test=4)
    settings = [*ENCODER, *QUIET, f"data.path={data}", "pretrained=none", "epochs=1", "min_steps=0", "baselines=false"]
    said = run_hidden(tmp_path, "finetune", "name=r", *settings)
    assert "its file system doesn't support locks" in said
    run_hidden(tmp_path, "predict", "model=runs/finetune/r", f"files={EMBEDDED}/examples", "out=p.csv")
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert all(abs(float(row["prediction"])) < 50 for row in rows)


def test_a_lock_is_held_by_one_process(tmp_path):
    path = tmp_path / "lock"
    code = "import sys; from crysldnet.platforms import lock; sys.exit(10 + lock(open(sys.argv[1], 'a+')))"
    with path.open("a+") as file:
        assert lock(file)
        assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 10
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 11


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no user ids")
def test_a_folder_that_others_can_write_to_is_not_ones_own(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir(mode=0o700)
    assert is_own(folder)
    folder.chmod(0o777)
    assert not is_own(folder)
    (tmp_path / "link").symlink_to(folder)
    assert not is_own(tmp_path / "link")
