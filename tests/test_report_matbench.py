"""Reports of real Matbench runs: crystal by crystal as of a finetuning, against plain Python."""

import csv
import importlib.util
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from crysldnet import cli
from crysldnet.data.datasets import open_store
from crysldnet.data.elements import SYMBOLS
from crysldnet.errors import DataError
from crysldnet.signals import RUN_NAME
from html_page import Page, assert_self_contained
from tiny import ENCODER, QUIET, keep_two_curves

if importlib.util.find_spec("matbench") is None:
    pytest.skip("matbench isn't installed", allow_module_level=True)

TASK, TARGET = "matbench_jdft2d", "exfoliation_en"
Calls = list[tuple[bool, int]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Calls]:
    """Two runs of real folds; and of each reading of test crystals whether targets were asked for, and how many folds
    were predicted then."""
    from matbench.task import MatbenchTask

    folder = tmp_path_factory.mktemp("matbench")
    given, calls = MatbenchTask.get_test_data, Calls()

    def watched(task, fold, as_type="tuple", include_target=False):  # type: ignore[no-untyped-def]
        calls.append((include_target, len(list(folder.glob("runs/matbench/a/*/*/predictions.json")))))
        return given(task, fold, as_type, include_target)

    line = ["epochs=1", "min_steps=0", "loss=laplace", "trainer.accelerator=cpu", *ENCODER, *QUIET]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MATMINER_DATA", raising=False)
        for name, folds, seed in (("a", "0,3", 0), ("b", "0", 1)):
            patch.delenv(RUN_NAME, raising=False)
            with pytest.MonkeyPatch.context() as watch:
                if name == "a":
                    watch.setattr(MatbenchTask, "get_test_data", watched)
                assert cli.run(["matbench", *line, f"name={name}", f"folds=[{folds}]", f"seed={seed}"]) == 0
    os.environ.pop(RUN_NAME, None)
    for file in folder.glob("runs/matbench/*/*/*/metrics.csv"):
        keep_two_curves(file)
    return folder, calls


@pytest.fixture
def run(made: tuple[Path, Calls], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first run, as a copy that a test may damage; the second is beside it."""
    shutil.copytree(made[0], tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    return Path("runs/matbench/a")


def report(*arguments: str | Path) -> str:
    assert cli.run(["report", "resamples=400", *map(str, arguments)]) == 0
    return Path("report.html").read_text()


def said(text: str) -> str:
    return " ".join(Page(text).texts)


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / TASK / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def change_rows(run: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    rows = [change(row) for row in rows_of(run)]
    with (run / TASK / "predictions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_the_table_holds_each_test_crystal_of_its_folds_as_it_was_predicted(run: Path) -> None:
    rows = rows_of(run)
    store = open_store(f"embedded:{TASK}")
    true = dict(zip(store.ids.to_pylist(), store.numbers_of("exfoliation_energy").tolist(), strict=True))
    official = dict(zip(store.ids.to_pylist(), store.numbers_of("matbench_test_fold").tolist(), strict=True))
    assert ",".join(rows[0]) == "material_id,target,true,prediction,unit,std,probability,fold"
    assert sorted(row["material_id"] for row in rows) == sorted(i for i, fold in official.items() if fold in (0, 3))
    kept = {}
    for fold in (0, 3):
        record = json.loads((run / TASK / f"fold_{fold}" / "predictions.json").read_text())
        values = zip(record["predictions"], record["std"], strict=True)
        kept |= {id_: (fold, *pair) for id_, pair in zip(record["ids"], values, strict=True)}
    for row in rows:
        fold, predicted, std = kept[row["material_id"]]
        assert (row["target"], row["unit"], row["probability"]) == (TARGET, "meV/atom", "")
        assert row["fold"] == str(fold) == f"{official[row['material_id']]:.0f}"
        assert float(row["true"]) == pytest.approx(true[row["material_id"]], rel=1e-5)
        assert (float(row["prediction"]), float(row["std"])) == pytest.approx((predicted, std), rel=1e-5)


def test_true_values_are_read_when_all_folds_are_predicted(made: tuple[Path, Calls]) -> None:
    asked = {with_target: [done for w, done in made[1] if w == with_target] for with_target in (True, False)}
    assert set(asked[True]) == {2}
    assert {0, 1} <= set(asked[False])


def test_the_numbers_of_a_page_are_those_of_a_plain_loop(run: Path) -> None:
    text = report(run)
    page = assert_self_contained(text)
    rows = rows_of(run)
    pairs = [(float(row["true"]), float(row["prediction"])) for row in rows]
    errors = [abs(predicted - true) for true, predicted in pairs]
    squares = sum(error**2 for error in errors)
    mean = sum(true for true, _ in pairs) / len(pairs)
    r2 = 1 - squares / sum((true - mean) ** 2 for true, _ in pairs)
    shown = text[text.index(f"<h2>{TASK}: {TARGET} (meV/atom)</h2>") :]
    for value, name in ((sum(errors) / len(errors), "MAE"), (math.sqrt(squares / len(errors)), "RMSE"), (r2, "R²")):
        assert f"<b>{value:.4g}</b>{name}" in shown
    assert f"<b>{len(rows)}</b>test crystals" in shown
    assert re.findall(r"off by ([^<]+)<", shown) == [f"{error:.4g}" for error in sorted(errors, reverse=True)[:20]]
    for title in ("Predicted against true", "Errors", "Error by number of atoms", "Calibration"):
        assert f"<h3>{title}</h3>" in shown

    store = open_store(f"embedded:{TASK}")
    place, ptr = {id_: i for i, id_ in enumerate(store.ids.to_pylist())}, store.crystals.ptr
    own: dict[str, list[float]] = {}
    for row, error in zip(rows, errors, strict=True):
        i = place[row["material_id"]]
        for symbol in {SYMBOLS[z] for z in store.crystals.numbers[ptr[i] : ptr[i + 1]].tolist()}:
            own.setdefault(symbol, []).append(error)
    titles = {f"{s}: {sum(e) / len(e):.4g} (meV/atom) over {len(e)} crystals" for s, e in own.items()}
    assert {title for title in page.values("title") if "over" in title} == titles
    assert shown.count('class="structure"') == 20


def test_a_fold_whose_error_is_not_the_recorded_one_is_named(run: Path) -> None:
    assert "summary.json says" not in report(run, "worst=0")
    change_rows(run, lambda row: {**row, "prediction": "500"} if row["fold"] == "3" else row)
    found = said(report(run, "worst=0"))
    score = json.loads((run / "summary.json").read_text())["tasks"][TASK]["scores"]["fold_3"]["mae"]
    assert f"summary.json says that the MAE of fold 3 is {score:.6g}, the table of predictions gives" in found
    assert "the MAE of fold 0" not in found


def test_other_true_values_have_no_structures(run: Path) -> None:
    change_rows(run, lambda row: {**row, "true": "1000"} if row["material_id"] == "mb-jdft2d-012" else row)
    text = report(run)
    assert f"embedded:{TASK} has another value than was tested on: {TARGET} of mb-jdft2d-012 was 1000 and" in text
    assert "Predicted against true" in text
    assert 'class="structure"' not in text


def test_without_standard_deviations_there_is_no_calibration(run: Path) -> None:
    change_rows(run, lambda row: {**row, "std": ""})
    assert "Calibration" not in report(run, "worst=0")


def test_runs_are_compared_on_the_folds_that_both_have(run: Path) -> None:
    other = run.with_name("b")
    text = report(run, other, "worst=0")
    errors = [
        {row["material_id"]: abs(float(row["prediction"]) - float(row["true"])) for row in rows_of(path)}
        for path in (run, other)
    ]
    common = [id_ for id_ in errors[0] if id_ in errors[1]]
    means = [sum(own[id_] for id_ in common) / len(common) for own in errors]
    assert f"{len(common)} test crystals in common. The runs have 255, {len(common)} test crystals" in said(text)
    assert len(common) == 128
    start = text.index(f"<h3>{TASK} (meV/atom)</h3>")
    cells = re.findall(r">([^<]*)</td>", text[start:].split("</table>")[0])
    assert (cells[0], cells[1], cells[3]) == ("a", f"{means[0]:.4g}", "reference")
    assert (cells[6], cells[7], cells[9]) == ("b", f"{means[1]:.4g}", f"{means[1] - means[0]:+.3g}")
    low, high = map(float, cells[10].split(" to "))
    assert low < means[1] - means[0] < high
    assert "differ only in the seed" not in text  # nor the folds


def test_runs_on_other_data_differ_in_more_than_the_seed(run: Path) -> None:
    again = run.with_name("again")
    shutil.copytree(run, again)
    config = yaml.safe_load((again / "config.yaml").read_text())
    (again / "config.yaml").write_text(yaml.safe_dump({**config, "seed": 1, "parallel": 2}))
    assert f"MAE {TASK} (meV/atom)" in report(run, again, "worst=0").split("Runs that differ only in the seed")[1]
    summary = json.loads((again / "summary.json").read_text())
    summary["tasks"][TASK]["data_sha256"] = "other"
    (again / "summary.json").write_text(json.dumps(summary))
    text = report(run, again, "worst=0")
    assert "Runs that differ only in the seed" not in text
    assert f"<td>data_sha256 {TASK}</td>" in text.split("Settings that differ")[1]


def test_a_run_without_the_table_shows_scores_and_curves_alone(run: Path) -> None:
    (run / TASK / "predictions.csv").unlink()
    text = report(run)
    assert f"Folds of {TASK}" in text
    assert f"Learning curves of {TASK}" in text
    assert "errors on the test crystals" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {k: v for k, v in row.items() if k != "fold"}, r"a/.*/predictions\.csv: it lacks the column fold"),
        (lambda row: {**row, "fold": "x"}, r"predictions\.csv, line 2: fold of mb-jdft2d-\d+ is 'x', not a number"),
        (lambda row: {**row, "prediction": "inf"}, r"predictions\.csv, line 2: prediction of mb-jdft2d-\d+ is 'inf'"),
    ],
)
def test_a_damaged_table_is_named(run: Path, change: Callable, message: str) -> None:
    change_rows(run, change)
    with pytest.raises(DataError, match=message):
        report(run)
