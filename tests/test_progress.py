"""What a training shows and logs as it goes on: epochs from 1 in every place, one verdict, and the next command."""

import csv
import json
import re
from pathlib import Path

import pytest

from crysldnet import finetune
from crysldnet.console import suggest_next
from crysldnet.finetune.baselines import verdict
from crysldnet.training.loggers import MetricsFile
from crysldnet.training.plots import read_curves
from tiny import finetune_config, subset


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three epochs, and what it printed."""
    folder = tmp_path_factory.mktemp("progress")
    data = subset(folder / "d.parquet", train=32, val=8, test=8)
    config, values = finetune_config(
        f"runs={folder}", "name=r", f"data.path={data}", "epochs=3", "pretrained=none", "data.batch_size=16",
        "trainer.progress_bar=true", "trainer.log_every_n_steps=1", "baselines=true",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        for module in ("training.progress", "training.fit", "finetune.results", "console"):
            patch.setattr(f"crysldnet.{module}.note", said.append)
        patch.delenv("MAKELEVEL", raising=False)
        finetune.run(config, values)
    return folder / "finetune" / "r", said


def test_every_epoch_is_logged_once_and_counted_from_1(run):
    folder, _ = run
    rows = rows_of(folder / "metrics.csv")
    validated = [row for row in rows if row["val/mae"]]
    assert [row["epoch"] for row in validated] == ["1", "2", "3"]
    assert {row["epoch"] for row in rows if row["train/loss"]} == {"1", "2", "3"}
    assert [row["epoch"] for row in rows if row["test/mae"]] == [""]
    assert read_curves(folder / "metrics.csv")["val/mae"][0] == [1.0, 2.0, 3.0]


def test_the_summary_has_the_best_epoch(run):
    folder, _ = run
    summary = json.loads((folder / "summary.json").read_text())
    validated = [row for row in rows_of(folder / "metrics.csv") if row["val/mae"]]
    best = min(validated, key=lambda row: float(row["val/normalised_mae"]))
    assert summary["val/mae"] == pytest.approx(float(best["val/mae"]), rel=1e-6)


def test_a_log_has_a_line_for_each_tenth_with_epoch_figure_and_end(run):
    folder, said = run
    lines = [line for line in said if line.startswith("finetuning: epoch")]
    mae = [float(row["val/mae"]) for row in rows_of(folder / "metrics.csv") if row["val/mae"]]
    assert len(lines) == 2
    for line, epoch, share, value in zip(lines, (1, 2), (33, 66), mae, strict=False):
        pattern = rf"finetuning: epoch {epoch} of 3, val/mae ([\d.]+), {share} %, ends about \d\d:\d\d"
        found = re.fullmatch(pattern, line)
        assert found is not None, line
        assert float(found[1]) == pytest.approx(value, rel=1e-3)


def test_a_run_ends_with_a_verdict_and_the_next_command(run):
    folder, said = run
    sentence = next(line for line in said if line.startswith("formation_energy_per_atom: the MAE on 8 test crystals"))
    assert "the training mean" in sentence
    assert "trees on descriptors" in sentence
    assert said[-2:] == [f"next: crysldnet predict FILES model={folder}", f"next: crysldnet report {folder}"]


def measured(error: float, difference: float, low: float, high: float) -> dict:
    return {"error": error, "difference": difference, "difference_interval": [low, high]}


def test_a_verdict_says_better_worse_or_not_told_apart():
    found = {
        "unit": "eV", "measure": "mae", "crystals": 40, "model": {"error": 0.2},
        "constant": measured(0.8, 0.6, 0.4, 0.8), "trees": measured(0.1, -0.1, -0.2, -0.05),
    }  # fmt: skip
    assert verdict({"gap": found}) == [
        "gap: the MAE on 40 test crystals is 0.2 eV; 75% below the training mean (0.8 eV); "
        "100% above trees on descriptors (0.1 eV)"
    ]
    close = {**found, "measure": "error_rate", "trees": measured(0.25, 0.05, -0.1, 0.2)}
    assert verdict({"metal": close})[0].endswith("; not distinguishable from trees on descriptors (0.25)")


def test_users_of_make_are_told_what_to_type(capsys, monkeypatch):
    monkeypatch.setenv("MAKELEVEL", "1")
    suggest_next("crysldnet predict", "make predict")
    monkeypatch.delenv("MAKELEVEL")
    suggest_next("crysldnet predict", "make predict")
    assert capsys.readouterr().err == "next: make predict\nnext: crysldnet predict\n"


OLD = "epoch,step,train/loss,val/mae\n0,3,0.9,\n0,7,,0.8\n1,11,0.7,\n1,15,,0.6\n2,16,,0.6\n"


def test_files_of_earlier_versions_are_counted_from_1_without_their_last_validation(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text(OLD)
    curves = read_curves(file)
    assert curves == {"train/loss": ([1.0, 2.0], [0.9, 0.7]), "val/mae": ([1.0, 2.0], [0.8, 0.6])}
    resumed = MetricsFile(file, steps=8)
    resumed.log_metrics({"epoch": 1, "train/loss": 0.7}, 11)
    resumed.log_metrics({"epoch": 1, "test/mae": 0.5}, 16)
    assert [(row["epoch"], row["step"]) for row in rows_of(file)] == [("1", "3"), ("1", "7"), ("2", "11"), ("", "16")]
