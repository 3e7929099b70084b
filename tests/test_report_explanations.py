"""Explained predictions of a report add up to those in the run's table, and nothing is explained that isn't in it."""

import csv
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crysldnet import cli
from crysldnet.errors import ConfigError, DataError
from crysldnet.tools.report.explanations import _compare, chosen
from crysldnet.tools.report.predictions import Predictions
from html_page import Page, assert_self_contained
from tiny import ENCODER, QUIET, subset

TRAIN = [*ENCODER, *QUIET, "data=custom", "data.path=data.parquet", "data.split.by=column", "data.batch_size=16"]
TRAIN += ["epochs=1", "min_steps=0", "baselines=false", "pretrained=none", "trainer.accelerator=cpu", "name=a"]
RUN = Path("runs/finetune/a")


def train(*more: str) -> None:
    subset(Path("data.parquet"), train=40, val=12, test=24)
    assert cli.run(["finetune", *TRAIN, *more]) == 0


def report(*more: str) -> str:
    assert cli.run(["report", str(RUN), "resamples=100", *more]) == 0
    return Path("report.html").read_text()


def rows() -> dict[tuple[str, str], dict[str, str]]:
    with (RUN / "predictions_test.csv").open(newline="") as file:
        return {(row["target"], row["material_id"]): row for row in csv.DictReader(file)}


def cards(text: str) -> list[tuple[str, list[float]]]:
    """Return the id and the numbers of each card: the average crystal, contributions, the prediction."""
    found = []
    for card in text.split('<div class="card explained">')[1:]:
        numbers = re.findall(r'<td class="number">([^<]+)', card.split("</table>")[0])
        found.append((re.search(r"<span class=soft>([^<]+)", card)[1], [float(x) for x in numbers]))  # type: ignore[index]
    return found


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "least"), [(["recipe=network"], 1), (["recipe=frozen"], 5), (["recipe=hybrid", "networks=2"], 5)]
)
def test_the_contributions_on_the_page_add_up_to_the_predictions_of_the_table(
    recipe: list[str], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crysldnet.finetune.hybrid.WORTH_IT", -1.0)  # networks of one epoch would be left out
    train("data.targets=[formation_energy_per_atom]", *recipe)
    text, table = report("explained=6"), rows()
    found = cards(text)
    assert len(found) == 6
    for id_, numbers in found:
        want = float(table["formation_energy_per_atom", id_]["prediction"])
        assert sum(numbers[:-1]) == pytest.approx(want, rel=1e-2, abs=2e-3)
        assert numbers[-1] == pytest.approx(want, rel=1e-2, abs=1e-3)
        assert len(numbers) - 2 >= least
    errors = {id_: abs(float(row["true"]) - float(row["prediction"])) for (_, id_), row in table.items()}
    ranked = sorted(errors, key=lambda id_: -errors[id_])
    assert [id_ for id_, _ in found[:5]] == ranked[:5]
    assert found[5][0] in ranked[11:13]
    assert "(eV/atom)" in text.split("<caption>")[1]
    assert "average training crystal" in text
    assert "so its value can be one that the property can't have, such as a negative band gap" in text


def test_drawings_are_well_formed_and_the_page_is_the_same_each_time() -> None:
    train("data.targets=[formation_energy_per_atom]", "recipe=network")
    text = report()
    page = assert_self_contained(text)
    assert text == report()
    drawings = re.findall(r'<svg class="structure".*?</svg>', text)
    ringed = [drawing for drawing in drawings if 'class="ring"' in drawing]
    assert len(ringed) == len(cards(text)) > 1
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.attrib["role"] == "img"
        assert re.fullmatch(r"unit cell of \w+ with \d+ atoms?", root.attrib["aria-label"])
    for drawing in ringed:
        atoms = ElementTree.fromstring(drawing).findall("g")
        signs = {}
        for atom in atoms:
            title, ring = atom.findtext("title") or "", atom.findall("circle")[0].attrib["fill"]
            assert re.fullmatch(r"[A-Z][a-z]? \d+: [+-][\d.e-]+ eV/atom", title)
            assert signs.setdefault(title, ring) == ring  # images of an atom have its color
            red, blue = int(ring[1:3], 16), int(ring[5:7], 16)
            assert (red > blue) == (": +" in title) or abs(red - blue) <= 2
    labels = [label for label in page.values("aria-label") if label.startswith("color bar")]
    assert len(labels) == len(ringed)
    assert all("eV/atom" in label for label in labels)


def test_classes_are_explained_by_the_probability_of_the_predicted_one() -> None:
    table = pq.read_table(subset(Path("data.parquet"), train=40, val=12, test=24))
    pq.write_table(table.append_column("metal", pa.array(table["band_gap"].to_numpy() == 0.0)), "data.parquet")
    assert cli.run(["finetune", *TRAIN, "data.targets=[metal]", "recipe=network"]) == 0
    found, told = cards(report()), rows()
    assert found
    for id_, numbers in found:
        assert sum(numbers[:-1]) == pytest.approx(float(told["metal", id_]["probability"]), abs=1e-2)


def test_what_cannot_be_explained_is_told_in_a_sentence() -> None:
    train("data.targets=[band_gap]", "target_types={band_gap: hurdle}", "recipe=network")
    text = report()
    assert "Not shown: band_gap is a number of two parts" in text
    assert cards(text) == []
    assert "Where predictions come from" not in report("explained=0")
    (RUN / "model.safetensors").unlink()
    assert re.search(r"Not shown: [^<]*model\.safetensors", report())


def test_another_prediction_than_that_of_the_table_is_not_explained() -> None:
    train("data.targets=[formation_energy_per_atom]", "recipe=network")
    file = RUN / "predictions_test.csv"
    table = list(rows().values())
    for row in table:
        row["prediction"] = str(float(row["prediction"]) + 0.5)
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    text = report()
    assert re.search(r"Not shown: the model of the run predicts [^<]* and predictions_test\.csv has", text)
    assert cards(text) == []


def test_the_models_of_folds_are_not_explained_by_the_final_one() -> None:
    train("data.targets=[formation_energy_per_atom]", "recipe=network", "folds=2", "data.split.by=formula")
    said = " ".join(Page(report()).texts)
    assert "Not shown: the predictions are those of the folds" in said


def test_the_worst_and_a_typical_prediction_are_chosen() -> None:
    true = np.array([0.0, 0.0, np.nan, 0.0, 0.0, 0.0])
    p = Predictions("gap", "eV", list("abcdef"), true, np.array([0.3, 0.1, 9.0, 0.5, 0.4, 0.2]))
    assert chosen(p, 1) == [3]
    assert chosen(p, 3) == [3, 4, 0]
    sure = np.array([0.9, 0.6, 0.7, 0.8, 0.55, 0.95])
    classes = Predictions("kind", "", list("abcdef"), true, np.array([1.0, 0, 0, 0, 1.0, 0]), None, ["x", "y"], sure)
    assert chosen(classes, 3) == [0, 4, 3]
    with pytest.raises(ConfigError, match="explained must be from 0 to 6"):
        cli.run(["report", "a", "explained=7"])


def test_a_prediction_near_zero_may_be_rounded_to_bfloat16() -> None:
    true = np.array([4.8, 0.0, 1.2, 0.0])
    p = Predictions("gap", "eV", list("abcd"), true, np.array([0.005042, 0.005, 0.006, 0.005]))
    _compare(p, 0, 0.005976, "32-true")
    _compare(p, 0, 0.08, "bf16-mixed")
    with pytest.raises(DataError, match="was changed after the run"):
        _compare(p, 0, 0.08, "32-true")
    with pytest.raises(DataError, match="was changed after the run"):
        _compare(p, 0, 0.12, "bf16-mixed")


def test_the_class_of_the_table_is_explained_even_if_rounding_chose_it() -> None:
    """With bfloat16, the table can name a class that is slightly less likely for the model in float32."""
    table = pq.read_table(subset(Path("data.parquet"), train=40, val=12, test=24))
    pq.write_table(table.append_column("metal", pa.array(table["band_gap"].to_numpy() == 0.0)), "data.parquet")
    words = ["data.targets=[metal]", "recipe=network", "trainer.precision=bf16-mixed"]
    assert cli.run(["finetune", *TRAIN, *words]) == 0
    told = rows()
    assert len(cards(report())) > 1
    other = {"true": "false", "false": "true"}
    for row in told.values():
        row["prediction"] = other[row["prediction"].lower()]
        row["probability"] = str(1 - float(row["probability"]))
    with (RUN / "predictions_test.csv").open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(next(iter(told.values()))))
        writer.writeheader()
        writer.writerows(told.values())
    text = report()
    found = cards(text)
    assert len(found) > 1
    for id_, numbers in found:
        row = told["metal", id_]
        assert numbers[-1] == pytest.approx(float(row["probability"]), abs=0.05)
        assert f"probability of {row['prediction']}" in text.lower()
