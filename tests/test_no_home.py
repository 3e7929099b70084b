"""Where nothing can be kept: no home, a package that can't be written, a full disk, folders of other users."""

import errno
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numba.core.config
import numpy as np
import pytest

from crysldnet.data import crystal_dataset
from crysldnet.data.datasets import open_store
from crysldnet.graphs import compiled
from crysldnet.graphs.spec import GraphSpec

NOTE = "note: compiled code can't be kept"


@pytest.fixture(autouse=True)
def say_again() -> None:
    compiled._say_once.cache_clear()


def double(x: int) -> int:
    return 2 * x


def test_without_a_folder_for_compiled_code_functions_are_compiled_in_memory_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(numba.core.config, "CACHE_LOCATOR_CLASSES", "ZipCacheLocator")
    for function in (double, double):
        assert compiled.njit(cache=True)(function)(21) == 42
    assert capsys.readouterr().err.count(NOTE) == 1


def test_a_cache_that_is_full_or_damaged_is_as_good_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", str(tmp_path))
    assert compiled.njit(cache=True)(double)(21) == 42
    kept = [*tmp_path.rglob("*.nb?")]
    assert len(kept) == 2
    for content in (b"", b"\x80", kept[0].read_bytes()[:-9]):
        for file in kept:
            file.write_bytes(content)
        assert compiled.njit(cache=True)(double)(21) == 42
    assert capsys.readouterr().err == ""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compiled.FunctionCache, "save_overload", full)
    monkeypatch.setattr(compiled.FunctionCache, "load_overload", full)
    assert compiled.njit(cache=True)(double)(21) == 42
    assert f"{NOTE} ([Errno 28] No space left on device)" in capsys.readouterr().err


def test_the_package_is_imported_where_no_compiled_code_can_be_kept() -> None:
    environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "ZipCacheLocator", "HOME": "/proc/nope"}
    command = [sys.executable, "-c", "import crysldnet.graphs.neighbors, crysldnet.graphs.potentials"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("kind", ["own", "open to others", "a link", "another user's"])
def test_counts_of_edges_are_kept_in_the_users_own_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = tmp_path / f"crysldnet-{os.getuid()}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if kind == "a link":
        folder.symlink_to(elsewhere)
    elif kind != "own":
        folder.mkdir()
        folder.chmod(0o777 if kind == "open to others" else 0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if kind == "another user's":
        user = os.getuid() + 1
        folder = folder.rename(tmp_path / f"crysldnet-{user}")
        monkeypatch.setattr(os, "getuid", lambda: user)
    store = open_store("embedded:mp_starter")
    counts = crystal_dataset.edge_counts(store, np.arange(4), GraphSpec(k=4))
    assert (len(counts), counts.min() >= 4) == (4, True)
    assert len([*folder.glob("*.npy")]) == (1 if kind == "own" else 0)
    assert not [*elsewhere.iterdir()]


def test_a_function_is_compiled_anew_when_one_that_it_calls_changed_in_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", str(tmp_path / "cache"))
    caller = "from crysldnet.graphs.compiled import njit\nimport callee_of_it\ntwice = callee_of_it.twice\n"
    caller += "@njit(cache=True)\ndef run(x):\n    return twice(x)\n"
    (tmp_path / "caller_of_it.py").write_text(caller)
    results = []
    for factor in ("2", "2", "200"):
        callee = f"from crysldnet.graphs.compiled import njit\n@njit()\ndef twice(x):\n    return {factor} * x\n"
        if results != [42]:
            (tmp_path / "callee_of_it.py").write_text(callee)
        for name in ("caller_of_it", "callee_of_it"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        run = importlib.import_module("caller_of_it").run
        results.append(run(21))
        hits = sum(run.stats.cache_hits.values())
        assert hits == (1 if len(results) == 2 else 0)
    assert results == [42, 42, 4200]
