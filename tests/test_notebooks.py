"""The notebooks in examples/ run from top to bottom, with few crystals, and hold no output."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt

from crysldnet import cli
from tiny import ENCODER, QUIET

FOLDER = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def cells_of(name: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def execute(name: str, **small: Any) -> dict[str, Any]:
    """Run the cells as Jupyter would, with other values for the parameters; return what the notebook defined.

    A line ``!crysldnet …`` is run in this process, with ``{NAME}`` replaced as IPython does.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells_of(name):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            continue
        if source.startswith("!"):
            program, *arguments = shlex.split(source[1:].format(**names))
            assert program == "crysldnet"
            assert cli.run(arguments) == 0
        else:
            exec(compile(source, f"{name}, {cell['id']}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            assert small.keys() <= names.keys()
            names |= small
    return names


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = matplotlib.get_backend()
    matplotlib.use("Agg")
    monkeypatch.setattr(plt, "show", lambda: None)
    yield
    plt.close("all")
    matplotlib.use(before)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_stripped_and_well_formed(name: str) -> None:
    book = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert book["metadata"]["kernelspec"]["language"] == "python"
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    assert "".join(book["cells"][0]["source"]).startswith("# ")
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    page = (FOLDER.parent / "docs/examples.md").read_text()
    assert f"../examples/{name}.ipynb" in page


def test_five_notebooks_are_there_and_each_is_run_here() -> None:
    tests = Path(__file__).read_text()
    assert len(NOTEBOOKS) == 5
    assert all(f'execute("{name}"' in tests or f'execute(\n        "{name}"' in tests for name in NOTEBOOKS)


def test_first_model() -> None:
    names = execute("first_model", COUNT=40)
    assert len(list(Path("cifs").glob("*.cif"))) == 40
    assert names["summary"]["test/mae"] == pytest.approx((names["true"] - names["predicted"]).abs().mean(), rel=1e-5)
    assert len(names["predictions"]) == 10
    assert (names["predictions"]["low"] <= names["predictions"]["high"]).all()
    assert Path("runs/finetune/latest/report.html").exists()


def test_map_of_chemistry() -> None:
    names = execute("map_of_chemistry", COUNT=300)
    assert names["places"].shape == (300, 2)
    assert names["by_neighbors"] < 0.8 * names["by_mean"]


def test_dft_correction() -> None:
    names = execute("dft_correction", LEARNED=60, TESTED=60)
    errors = names["errors"]
    assert errors["learned correction"] < 0.7 * errors["DFT as it is"]


@pytest.mark.slow
def test_matbench_submission() -> None:
    pytest.importorskip("matbench", reason="matbench isn't installed")
    tiny = " ".join([*ENCODER, *QUIET, "epochs=1", "min_steps=0", "data.batch_size=64"])
    names = execute("matbench_submission", SETTINGS=tiny)
    assert len(names["folds"]) == 5
    assert np.mean(list(names["folds"].values())) == pytest.approx(names["errors"].mean(), rel=1e-3)


def test_active_learning() -> None:
    names = execute("active_learning", CANDIDATES=60, START=24, ROUNDS=1, EACH=4)
    assert len(set(names["measured"])) == 28
    assert names["best"] == sorted(names["best"])
