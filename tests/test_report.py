"""Reports of real runs: numbers against plain Python, damaged folders refused, pages that need no network."""

import csv
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from matplotlib.figure import Figure

from crysldnet import cli
from crysldnet.config import compose
from crysldnet.data.elements import SYMBOLS
from crysldnet.errors import ConfigError, DataError
from crysldnet.measures import unit_of
from crysldnet.signals import RUN_NAME
from crysldnet.tools.report import names_of
from crysldnet.tools.report.run_files import read_run
from crysldnet.training.plots import draw_curves
from html_page import Page, assert_self_contained
from tiny import ENCODER, QUIET, keep_two_curves, subset

TARGETS = ("formation_energy_per_atom", "band_gap")
TRAIN = [
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "data.batch_size=16",
    "epochs=2",
    "min_steps=0",
    "baselines=false",
    "pretrained=none",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finetuning runs that differ in their seed, on crystals of which some lack a band gap."""
    folder = tmp_path_factory.mktemp("report")
    table = pq.read_table(subset(folder / "data.parquet", train=40, val=10, test=40))
    gaps = table["band_gap"].to_pylist()
    gaps[-7:] = [None] * 7
    place = table.column_names.index("band_gap")
    table = table.set_column(
        place, table.schema.field(place), pa.array(gaps, pa.float64()).cast(table["band_gap"].type)
    )
    pq.write_table(table, folder / "data.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed in (0, 1):
            patch.delenv(RUN_NAME, raising=False)
            targets = f"data.targets=[{','.join(TARGETS)}]"
            line = ["data.path=data.parquet", targets, f"seed={seed}", f"name=seed{seed}"]
            assert cli.run(["finetune", *ENCODER, *QUIET, *TRAIN, *line]) == 0
            keep_two_curves(folder / "runs" / "finetune" / f"seed{seed}" / "metrics.csv")
    os.environ.pop(RUN_NAME, None)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may damage, as the current folder."""
    shutil.copytree(made, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def report(*arguments: str) -> str:
    assert cli.run(["report", "resamples=400", *arguments]) == 0
    return Path("report.html").read_text()


def rows_of(run: Path, target: str) -> list[dict[str, str]]:
    with (run / "predictions_test.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["target"] == target]


def change_rows(run: Path, change: Callable[[dict[str, str]], dict[str, str] | None]) -> None:
    """Rewrite the predictions row by row; None drops one."""
    file = run / "predictions_test.csv"
    with file.open(newline="") as lines:
        rows = [changed for row in csv.DictReader(lines) if (changed := change(row)) is not None]
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_the_numbers_of_a_page_are_those_of_a_plain_loop(folder: Path) -> None:
    text = report("runs/finetune/seed0")
    said = " ".join(Page(text).texts)
    crystals = {row["material_id"]: row for row in pq.read_table("data.parquet").to_pylist()}
    titles = Page(text).values("title")
    for target in TARGETS:
        rows = [row for row in rows_of(folder / "runs/finetune/seed0", target) if row["true"]]
        assert len(rows) == (33 if target == "band_gap" else 40)
        pairs = [(float(row["true"]), float(row["prediction"])) for row in rows]
        errors = [abs(p - t) for t, p in pairs]
        mean = sum(t for t, _ in pairs) / len(pairs)
        squares = sum((p - t) ** 2 for t, p in pairs)
        r2 = 1 - squares / sum((t - mean) ** 2 for t, _ in pairs)
        for value, name in (
            (sum(errors) / len(errors), "MAE"),
            (math.sqrt(squares / len(pairs)), "RMSE"),
            (r2, "R²"),
        ):
            assert f"{value:.4g} {name}" in said
        assert f"{len(rows)} test crystals" in said
        own: dict[str, list[float]] = {}
        for row, error in zip(rows, errors, strict=True):
            assert crystals[row["material_id"]][target] == pytest.approx(float(row["true"]), rel=1e-5)
            for symbol in {SYMBOLS[z] for z in crystals[row["material_id"]]["atomic_numbers"]}:
                own.setdefault(symbol, []).append(error)
        unit = rows[0]["unit"]
        expected = {f"{s}: {sum(e) / len(e):.4g} ({unit}) over {len(e)} crystals" for s, e in own.items()}
        assert expected <= set(titles)
        assert sum(f"({unit}) over" in title for title in titles) == len(own)
        worst = [f"{error:.4g}" for error in sorted(errors, reverse=True)[:4]]  # at most a tenth, of 33 and of 40
        start = text.index(f"<h2>{target} ({unit})")
        assert "<h3>4 worst predictions" in text[start:]
        assert re.findall(r"off by ([^<]+)<", text[start:])[:4] == worst
    assert "7 without a true value" in said


def test_worst_predictions_are_drawn_with_formula_space_group_and_cell(folder: Path) -> None:
    from pymatgen.core import Lattice, Structure
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    text = report("runs/finetune/seed0", "worst=3")
    cards = re.findall(r'<div class="card"><svg class="structure".*?</div>', text)
    assert len(cards) == 6
    crystals = {row["material_id"]: row for row in pq.read_table("data.parquet").to_pylist()}
    for card in cards:
        row = crystals[re.search(r"<br>([\w-]+)<br>true", card)[1]]  # type: ignore[index]
        structure = Structure(
            Lattice(np.reshape(row["lattice"], (3, 3))), row["atomic_numbers"], np.reshape(row["frac_coords"], (-1, 3))
        )
        group = SpacegroupAnalyzer(structure, symprec=0.01)
        symbol = re.sub(r"_(\d)", r"<sub>\1</sub>", group.get_space_group_symbol())
        assert f"{symbol} ({group.get_space_group_number()})" in card
        lengths = " ".join(f"{x:.2f}" for x in structure.lattice.abc)
        angles = " ".join(f"{x:.0f}" for x in structure.lattice.angles)
        assert f"{lengths} Å, {angles}°" in card
        assert card.count("<circle") >= len(structure)


@pytest.mark.parametrize("count", [1, 2])
def test_a_page_needs_no_network(folder: Path, count: int) -> None:
    text = report(*(f"runs/finetune/seed{i}" for i in range(count)))
    page = assert_self_contained(text)
    assert "prefers-color-scheme: dark" in text
    assert "svg" in {tag for tag, *_ in page.attributes}
    assert "script" not in {tag for tag, *_ in page.attributes}
    with pytest.raises(AssertionError):
        assert_self_contained(text.replace("</body>", '<img src="https://example.org/a.png"></img></body>'))


def test_several_runs_are_compared_on_their_common_crystals(folder: Path) -> None:
    change_rows(Path("runs/finetune/seed1"), lambda row: None if row["material_id"] == first_id(folder) else row)
    text = report("runs/finetune/seed0", "runs/finetune/seed1")
    said = " ".join(Page(text).texts)
    assert "39 test crystals in common. The runs have 40, 39 test crystals; the rest is left out here." in said
    values = [{r["material_id"]: r for r in rows_of(folder / f"runs/finetune/seed{i}", TARGETS[0])} for i in (0, 1)]
    common = [id_ for id_ in values[0] if id_ in values[1]]
    means = [
        sum(abs(float(v[id_]["prediction"]) - float(v[id_]["true"])) for id_ in common) / len(common) for v in values
    ]
    assert f"{means[1] - means[0]:+.3g}" in said
    assert all(f"{mean:.4g}" in said for mean in means)
    settings = text[text.index("Settings that differ") :].split("</table>")[0]
    assert re.findall(r"<tr><td>([^<]+)", settings) == ["seed"]
    assert "Runs that differ only in the seed" in said


def first_id(folder: Path) -> str:
    return rows_of(folder / "runs/finetune/seed0", TARGETS[0])[0]["material_id"]


def test_what_cannot_be_compared_is_not(folder: Path) -> None:
    two = ["runs/finetune/seed0", "runs/finetune/seed1"]
    assert "other sign" in report(*two)
    change_rows(Path(two[1]), lambda row: {**row, "material_id": f"other-{row['material_id']}"})
    text = report(*two)
    said = " ".join(Page(text).texts)
    assert said.count("the runs have 0 test crystals in common, so they can't be compared") == 2
    assert "other sign" not in text


def test_other_true_values_are_other_data(folder: Path) -> None:
    id_ = first_id(folder)
    change_rows(
        Path("runs/finetune/seed1"),
        lambda row: {**row, "true": "99"} if row["material_id"] == id_ and row["target"] == TARGETS[0] else row,
    )
    text = report("runs/finetune/seed0", "runs/finetune/seed1")
    assert re.search(rf"{TARGETS[0]} of {id_} is -?[\d.]+ in one run and 99\.0 in another", text)
    assert f"data.parquet has another value than was tested on: {TARGETS[0]} of {id_} was 99 and is" in text
    assert "summary.json says that the MAE is" in text


def test_other_units_are_refused(folder: Path) -> None:
    change_rows(Path("runs/finetune/seed1"), lambda row: {**row, "unit": "meV"})
    assert "band_gap is in meV in one run and in eV in another" in report("runs/finetune/seed0", "runs/finetune/seed1")


def test_without_the_data_all_else_is_shown(folder: Path) -> None:
    whole = report("runs/finetune/seed0")
    Path("data.parquet").unlink()
    text = report("runs/finetune/seed0")
    assert "data.parquet: no such file or folder" in text
    assert "run the command where the run was started" in text
    assert "Predicted against true" in text
    assert re.findall(r"off by ([^<]+)<", text) == re.findall(r"off by ([^<]+)<", whole)
    for what in ('class="structure"', 'class="elements"', "atoms in the cell"):
        assert what in whole
        assert what not in text


def test_standard_deviations_are_calibrated(folder: Path) -> None:
    assert "Miscalibration area" not in report("runs/finetune/seed0")

    def add(row: dict[str, str]) -> dict[str, str]:
        known = row["true"] and row["target"] == TARGETS[0]
        return {**row, "std": str(abs(float(row["prediction"]) - float(row["true"])) / 1.5) if known else ""}

    change_rows(Path("runs/finetune/seed0"), add)
    text = report("runs/finetune/seed0")  # every error is 1.5 standard deviations, so 87 % intervals hold all or none
    assert text.count("Miscalibration area") == 1
    assert "0.0 % in 50 %, 0.0 % in 80 %, 100.0 % in 95 %" in text


def test_the_intervals_of_predict_are_told_with_how_often_they_held(folder: Path) -> None:
    file = Path("runs/finetune/seed0/summary.json")
    summary = json.loads(file.read_text())
    summary["calibration"] = {TARGETS[0]: {"crystals": 40.0, "coverage_50": 0.512, "coverage_95": 0.96}}
    file.write_text(json.dumps(summary))
    text = report("runs/finetune/seed0")
    assert text.count("Intervals of crysldnet predict") == 1
    assert "of the 40 calibration crystals" in text
    assert "51.2 % in 50 %, 96.0 % in 95 %.</p>" in text
    summary["calibration"][TARGETS[0]] |= {"miscalibration_area": 0.2, "miscalibration_area_scaled": 0.05}
    file.write_text(json.dumps(summary))
    assert "Miscalibration area of the standard deviations 0.200, scaled 0.050" in report("runs/finetune/seed0")


def test_classes_have_an_accuracy_and_a_table(folder: Path) -> None:
    def classify(row: dict[str, str]) -> dict[str, str] | None:
        if row["target"] != "band_gap" or not row["true"]:
            return None
        true, predicted = ("metal" if float(row[name]) < 0.5 else "gap" for name in ("true", "prediction"))
        sure = f"{0.5 + int(hashlib.sha256(row['material_id'].encode()).hexdigest()[:8], 16) / 2**33:.4f}"
        return {**row, "target": "kind", "true": true, "prediction": predicted, "unit": "", "probability": sure}

    for i in (0, 1):
        change_rows(Path(f"runs/finetune/seed{i}"), classify)
    rows = rows_of(folder / "runs/finetune/seed0", "kind")
    right = sum(row["true"] == row["prediction"] for row in rows)
    text = report("runs/finetune/seed0", "runs/finetune/seed1")
    assert f"<b>{right / len(rows):.4g}</b>accuracy" in text
    assert "Predicted and true classes" in text
    assert "error rate" in text
    assert "Predicted against true" not in text
    surest = sorted(
        (row for row in rows if row["true"] != row["prediction"]), key=lambda row: -float(row["probability"])
    )
    assert 0 < len(surest) < 20
    shown = re.findall(r"<br>([\w-]+)<br>true \w+<br>predicted \w+ \(([\d.]+)%\)", text)
    most = -(-len(rows) // 10)
    assert 0 < most < len(surest)
    expected = [(row["material_id"], f"{100 * float(row['probability']):.1f}") for row in surest]
    assert shown[:most] == expected[:most]


def test_a_run_of_few_steps_has_a_curve(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer than trainer.log_every_n_steps, and nothing to validate on."""
    subset(Path("few.parquet"), train=16)
    line = ["data.path=few.parquet", "name=few", "trainer.log_every_n_steps=10", "epochs=3", "patience=3"]
    assert cli.run(["finetune", *ENCODER, *QUIET, *TRAIN, *line]) == 0
    assert "patience=3 isn't used: there are no validation crystals" in capsys.readouterr().err
    assert read_run(Path("runs/finetune/few")).curves[""][""]["train/loss"][0] == [3.0]
    assert "Learning curves" in report("runs/finetune/few")
    axis = Figure().subplots()
    draw_curves(axis, "train/loss", read_run(Path("runs/finetune/few")).curves[""], ["C0"])
    assert axis.lines[0].get_marker() == "o", "a line of one point isn't seen"


def test_text_of_the_input_stays_text(folder: Path) -> None:
    change_rows(Path("runs/finetune/seed0"), lambda row: {**row, "material_id": f"<b onclick=x>{row['material_id']}"})
    Path("runs/finetune/seed0").rename("runs/finetune/<i>run")
    text = report("runs/finetune/<i>run")
    assert "<b onclick" not in text
    assert "<i>run" not in text
    assert "&lt;i&gt;run" in text


def test_a_split_without_test_crystals_leaves_curves_alone(folder: Path) -> None:
    run = Path("runs/finetune/seed0")
    (run / "predictions_test.csv").unlink()
    with pytest.raises(DataError, match=r"predictions_test\.csv: missing although summary\.json has errors"):
        report(str(run))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if not k.startswith("test/")}))
    text = report(str(run))
    assert "Learning curves" in text
    assert "errors on the test split" not in text


def cut(path: Path) -> None:
    path.write_text(path.read_text()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / "summary.json").unlink(), r"summary\.json: missing, so the run isn't finished.*resume=last"),
        (lambda r: cut(r / "summary.json"), r"summary\.json: damaged"),
        (lambda r: (r / "summary.json").write_text("[" * 100_000), r"summary\.json: damaged"),
        (lambda r: (r / "summary.json").write_text("{}"), r"summary\.json: it doesn't say which command"),
        (lambda r: (r / "summary.json").write_text('{"command": "sweep"}'), "a sweep; name its runs"),
        (lambda r: (r / "config.yaml").unlink(), r"not the folder of a run \(no config\.yaml\)"),
        (lambda r: (r / "config.yaml").write_text("a: [1"), r"config\.yaml: not readable as YAML"),
        (lambda r: (r / "config.yaml").write_text("text"), r"config\.yaml: it must hold keys"),
        (lambda r: (r / "metrics.csv").unlink(), r"metrics\.csv: missing although .* is finished"),
        (lambda r: (r / "metrics.csv").write_text("epoch,step\n"), r"metrics\.csv: it has no epoch"),
        (lambda r: (r / "metrics.csv").write_text("epoch,val/mae\n1,x\n"), r"metrics\.csv: damaged"),
        (lambda r: (r / "predictions_test.csv").write_bytes(b"\xff\xfe"), r"predictions_test\.csv: unreadable"),
        (lambda r: (r / "predictions_test.csv").write_text("material_id\na\n"), r"lacks the column target"),
        (lambda r: (r / "predictions_test.csv").write_text("material_id,target,true,prediction,unit\n"), "no rows"),
        (lambda r: change_rows(r, lambda row: {**row, "prediction": "nan"}), r"line 2: prediction of \S+ is 'nan'"),
        (lambda r: shutil.rmtree(r), r"seed0: no such folder; name the folder of a run"),
    ],
)
def test_a_damaged_run_is_an_error_that_names_the_file(folder: Path, damage: Callable, message: str) -> None:
    damage(folder / "runs" / "finetune" / "seed0")
    with pytest.raises(DataError, match=message):
        report("runs/finetune/seed0")
    assert not Path("report.html").exists()


def test_a_line_that_was_cut_off_is_named(folder: Path) -> None:
    file = Path("runs/finetune/seed0/predictions_test.csv")
    file.write_text(file.read_text().rstrip()[:-12])
    with pytest.raises(DataError, match=r"predictions_test\.csv, line 81: cut off"):
        report("runs/finetune/seed0")


@pytest.mark.parametrize(("kind", "begins"), [("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_figures_for_a_journal_are_as_wide_as_a_column_and_leave_the_page_alone(
    folder: Path, kind: str, begins: bytes
) -> None:
    before = report("runs/finetune/seed0", "worst=0")
    words = ["report", "resamples=400", "runs/finetune/seed0", "worst=0", f"figures={kind}", "out=page.html"]
    assert cli.run([*words, "images=true"]) == 0
    assert Path("page.html").read_text() == before
    shutil.rmtree("page_images")
    assert cli.run(words) == 0
    assert Path("page.html").read_text() == before
    found = {path.name: path.read_bytes() for path in Path("page_images").iterdir()}
    assert f"parity_seed0_band_gap.{kind}" in found
    assert len(found) == before.count('<figure class="card">')
    for content in found.values():
        assert content.startswith(begins)
        box = rb"/MediaBox \[ ?0 0 ([\d.]+)" if kind == "pdf" else rb'<svg[^>]*? width="([\d.]+)pt"'
        assert float(re.search(box, content)[1]) == pytest.approx(85 / 25.4 * 72, abs=0.5)  # type: ignore[index]
    assert cli.run(words) == 0
    assert {path.name: path.read_bytes() for path in Path("page_images").iterdir()} == found


def test_axes_have_units_and_counts_have_whole_ticks() -> None:
    from crysldnet.tools.report import figures
    from crysldnet.tools.report.predictions import Predictions

    true = np.array([0.0, 1.0, 2.0])
    few = Predictions("gap", "eV", ["a", "b", "c"], true, true + np.array([0.1, 0.2, 0.9]))
    axis = figures.error_histogram(few, "C0").axes[0]
    assert all(tick == round(tick) for tick in axis.get_yticks())
    assert axis.get_xlabel() == "predicted − true (eV)"
    single = figures.curves("val/mae", {"": {"val/mae": ([1.0], [0.3])}}, legend=False).axes[0]
    assert [tick for tick in single.get_xticks() if tick != round(tick)] == []
    lines = {"": {"val/mae": ([1.0, 2.0], [0.3, 0.2])}}
    assert figures.curves("val/mae", lines, legend=False, unit="eV").axes[0].get_ylabel() == "mae (eV)"
    assert unit_of("val/mae/gap", {"gap": "eV", "energy": "eV/atom"}) == "eV"
    assert unit_of("val/mae", {"gap": "eV", "energy": "eV/atom"}) == ""
    assert unit_of("val/r2", {"gap": "eV"}) == ""


def test_images_are_written_beside_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", "runs/finetune/seed0", "out=page.html", "images=true", "worst=0"]) == 0
    images = {path.name: path.read_bytes() for path in Path("page_images").iterdir()}
    assert {"parity_seed0_band_gap.png", "errors_seed0_band_gap.png", "curve_finetune_val_mae.png"} <= set(images)
    assert all(content.startswith(b"\x89PNG") for content in images.values())
    assert Path("page.html").read_text().count('<figure class="card">') == len(images)
    assert "written: page.html" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"nowhere/a\.html: can't be written"):
        report("runs/finetune/seed0", "out=nowhere/a.html")
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        report("runs/finetune/seed0", "out=report.pdf")


def test_runs_are_plain_words_or_a_list() -> None:
    words = ["runs/a b", "runs/lr=0.1", "runs/[x], 'y'", "é"]
    assert compose("report", [words[0], "worst=3", *words[1:]]).values["runs"] == words
    assert compose("report", ["runs=[a,b]", "--worst=3"]).values["runs"] == ["a", "b"]
    with pytest.raises(ConfigError, match="give runs either as plain words or as runs="):
        compose("report", ["a", "runs=[b]"])
    with pytest.raises(ConfigError, match="it has no default"):
        cli.run(["report", "worst=3"])
    with pytest.raises(ConfigError, match="expected group=name or key=value"):
        compose("finetune", ["runs/a"])
    with pytest.raises(ConfigError, match="worst"):
        cli.run(["report", "runs/a", "wrost=3"])


def test_a_run_is_not_compared_with_itself(folder: Path) -> None:
    with pytest.raises(ConfigError, match="named twice"):
        report("runs/finetune/seed1", "runs/finetune/latest")


def test_names_of_runs_are_told_apart(folder: Path) -> None:
    shutil.copytree("runs", "others/runs")
    runs = [read_run(Path(path)) for path in ("runs/finetune/seed0", "others/runs/finetune/seed0")]
    assert names_of(runs) == ["copy/runs/finetune/seed0", "others/runs/finetune/seed0"]
    assert names_of(runs[:1]) == ["seed0"]
    assert yaml.safe_load((runs[0].path / "config.yaml").read_text())["seed"] == 0


def test_a_report_without_explanations_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from crysldnet import cli; cli.run(['report', 'runs/finetune/seed0', 'explained=0']);"
        "sys.exit(','.join({'torch', 'lightning', 'wandb'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_members_of_an_ensemble_are_drawn_together(folder: Path) -> None:
    run = Path("runs/finetune/seed0")
    for i in (0, 1):
        (run / f"member_{i}").mkdir()
        shutil.copy(run / "metrics.csv", run / f"member_{i}" / "metrics.csv")
    (run / "metrics.csv").unlink()
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "members": ["member_0", "member_1"]}))
    text = report(str(run), "worst=0")
    assert text.count("<h2>Learning curves</h2>") == 1
    assert text.count(">member 0</text>") == text.count(">member 1</text>") == 2  # in the drawing of each metric
    (run / "member_1" / "metrics.csv").unlink()
    with pytest.raises(DataError, match=r"member_1/metrics\.csv: missing"):
        report(str(run))
