"""A sweep as it ships, with real trainings; half a minute a run, so ``make test-slow`` runs this."""

import csv
import json
import os

import pytest

from crysldnet import cli
from crysldnet.signals import RUN_NAME
from tiny import ENCODER, QUIET, subset

pytestmark = pytest.mark.slow


def test_the_sweep_of_finetuning_proposes_stops_and_ranks_real_runs(tmp_path, capsys):
    data = subset(tmp_path / "data.parquet", train=64, val=24)
    common = " ".join([*ENCODER, *QUIET, f"data.path={data}", "data.batch_size=16", "trainer.accelerator=cpu"])
    os.environ.pop(RUN_NAME, None)
    line = ["sweep", "sweep=finetune", "backend=local", "count=8", "name=s", f"runs={tmp_path}", f"args={common}"]
    assert cli.run(line) == 0
    folder = tmp_path / "sweep" / "s"
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert {row["state"] for row in rows} == {"finished", "stopped"}, "Hyperband ends some, and some go to their end"
    assert len({row["optimizer.lr"] for row in rows}) == 8
    assert {row["head"] for row in rows} == {"mean", "attention"}
    best = json.loads((folder / "summary.json").read_text())["best"]
    finished = {row["run"]: float(row["val/mae"]) for row in rows if row["state"] == "finished"}
    assert best["run"] == min(finished, key=finished.__getitem__)
    for row in rows:
        epochs = {line["epoch"] for line in csv.DictReader((folder / "finetune" / row["run"] / "metrics.csv").open())}
        assert (len(epochs) >= int(row["epochs"])) == (row["state"] == "finished")
    assert best["run"] in (folder / "sweep.html").read_text()
    assert best["run"] in capsys.readouterr().out
