"""Hundreds of targets: what is printed, drawn and reported stays readable."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crysldnet import cli
from crysldnet.console import SHOWN, listed
from crysldnet.tools.datacheck.describe import as_text, describe
from crysldnet.tools.datacheck.description_page import page
from crysldnet.tools.report import report_page
from crysldnet.training import plots
from tiny import QUIET, subset

NAMES = [f"absorption_at_{i:03d}_meV" for i in range(SHOWN + 4)]
LAST = NAMES[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with crystals that have many properties."""
    folder = tmp_path_factory.mktemp("many")
    table = pq.read_table(subset(folder / "small.parquet", train=16, val=8, test=8))
    rng = np.random.default_rng(0)
    for name in NAMES:
        table = table.append_column(name, pa.array(rng.normal(size=len(table))))
    pq.write_table(table.drop_columns(["formation_energy_per_atom", "band_gap"]), folder / "many.parquet")
    return folder


def test_the_first_of_many_names_are_listed_and_how_many_more_there_are() -> None:
    assert listed(NAMES, 2) == f"{NAMES[0]}, {NAMES[1]} and {SHOWN + 2} more"
    assert listed(["a", "b"]) == "a, b"
    assert listed({}) == ""


def test_a_run_of_many_targets_shows_the_first_and_keeps_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ["encoder=cgcnn", "encoder.width=8", "encoder.layers=1", "epochs=1", "min_steps=0", "name=many"]
    data = ["data=custom", "data.path=many.parquet", "data.split.by=column", f"data.targets=[{','.join(NAMES)}]"]
    drawn: dict[str, list[str]] = {"parity": [], "reliability": []}
    for kind, targets in drawn.items():
        monkeypatch.setattr(plots, kind, lambda *given, to=targets: to.extend(set(NAMES).intersection(map(str, given))))
    assert cli.run(["finetune", *arguments, *data, *QUIET]) == 0
    printed = capsys.readouterr().out
    assert f"MAE {NAMES[SHOWN - 1]}" in printed
    assert f"{NAMES[SHOWN - 1]} and 4 more" in " ".join(printed.split())
    assert LAST not in printed
    run = Path("runs/finetune/many")
    assert drawn == {"parity": NAMES[:SHOWN], "reliability": NAMES[:SHOWN]}
    for file in ("metrics.csv", "summary.json", "predictions_test.csv"):
        assert LAST in (run / file).read_text(), file
    monkeypatch.setattr(report_page, "SHOWN", 2)
    assert cli.run(["report", str(run), "out=page.html", "resamples=100"]) == 0
    written = Path("page.html").read_text()
    assert f"{SHOWN + 2} more are in metrics.csv" in written
    assert LAST not in written
    assert written.count("<h3>Predicted against true</h3>") == 2


def test_a_description_shows_the_first_of_many_properties(folder: Path) -> None:
    found = describe(str(folder / "many.parquet"), structures=False)
    assert len(found.properties) > SHOWN
    for text in (as_text(found), page(found)):
        assert f"and {len(found.properties) - SHOWN} more properties" in text
        assert LAST not in text
