"""Explanations add up to the prediction, and name what it comes from."""

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import crysldnet
from crysldnet import cli
from crysldnet.errors import ConfigError, DataError
from crysldnet.graphs.crystals import from_lists
from crysldnet.inference.explain import explain_crystals, explain_portion
from crysldnet.models.explanation import shapley
from crysldnet.readers.stream import CrystalStream, StreamSettings
from tiny import ENCODER, QUIET, subset

TARGETS = {"formation_energy_per_atom": "number", "volume": "log", "is_metal": "classes"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Crystals with a number, a number over 0 and two classes."""
    file = subset(tmp_path_factory.mktemp("explain") / "crystals.parquet", train=48, val=12, test=6)
    table = pq.read_table(file)
    volume = np.abs(np.linalg.det(np.array(table["lattice"].to_pylist()).reshape(-1, 3, 3)))
    table = table.append_column("is_metal", pa.array(table["band_gap"].to_numpy() == 0.0))
    table = table.append_column("temperature", pa.array(np.linspace(200.0, 900.0, len(table))))
    pq.write_table(table.append_column("volume", pa.array(volume)), file)
    return file


def trained(data, tmp_path, *more):
    line = ["data=custom", f"data.path={data}", "data.split.by=column", f"data.targets=[{','.join(TARGETS)}]"]
    line += ["target_types={volume: log}", "epochs=1", "min_steps=0", "baselines=false", f"runs={tmp_path}", "name=a"]
    assert cli.run(["finetune", *ENCODER, *QUIET, *line, *more]) == 0
    return tmp_path / "finetune" / "a"


def explained(model, data, place, columns=()):
    stream = CrystalStream(str(data), [model.encoder.graph], StreamSettings(batch_size=1), dict.fromkeys(columns, ""))
    return [explain_portion(model, portion, place) for portion in list(stream)[-6:]]


NETWORKS = {
    "mean": ["head.layers_read=all"],
    "last layer": ["head.layers_read=last", "atomic_references=[formation_energy_per_atom]"],
    "attention": ["head=attention"],
    "atoms": ["head=atoms"],
    "descriptor": ["data.descriptors=[temperature]"],
    "ensemble": ["ensemble=2"],
    "frozen": [
        "recipe=frozen",
        "atomic_references=[formation_energy_per_atom]",
        "data.targets=[formation_energy_per_atom]",
        "target_types={}",
    ],
    "hybrid": ["recipe=hybrid", "networks=2", "data.targets=[volume,is_metal]"],
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_contributions_add_up_to_the_prediction(kind, data, tmp_path, monkeypatch):
    monkeypatch.setattr("crysldnet.finetune.hybrid.WORTH_IT", -1.0)  # networks of one epoch would be left out
    model = crysldnet.load(trained(data, tmp_path, *NETWORKS[kind]), device="cpu")
    predicted = model.predict(str(data))
    values = predicted.values[-6:]
    for place, target in enumerate(model.targets):
        for row, one in enumerate(explained(model, data, place, model.descriptors)):
            found, want = one.found, values[row, place]
            if target == "is_metal":
                assert found.label == model.members[0].classes[place][int(want)]
                want = predicted.probabilities[-6 + row, place, int(want)]
            assert found.prediction == pytest.approx(want, rel=1e-3, abs=1e-3)
            assert found.total == pytest.approx(want, rel=1e-2, abs=1e-3)
            parts = [*found.atoms, *found.columns.values()]
            assert len(found.atoms) == one.crystal.sizes[0]
            assert abs(found.prediction - found.reference) < 1e-9 or np.abs(parts).max() > 0
            if kind in ("frozen", "hybrid"):
                assert sum(name.startswith("encoder") for name in found.columns) <= 1
                assert len(found.columns) > 50
            assert (kind == "descriptor") == ("temperature" in found.columns)


def test_atoms_of_a_symmetric_pair_contribute_alike_and_the_order_of_atoms_does_not_matter(data, tmp_path):
    model = crysldnet.load(trained(data, tmp_path), device="cpu")
    cube = np.eye(3) * 5.64
    face = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    salt = from_lists([cube], [[11] * 4 + [17] * 4], [np.concatenate([face, np.add(face, [0.5, 0, 0])])])
    stream = CrystalStream(salt, [model.encoder.graph], StreamSettings(batch_size=1))
    atoms = explain_portion(model, next(iter(stream)), 0).found.atoms
    assert np.ptp(atoms[:4]) < 1e-5
    assert np.ptp(atoms[4:]) < 1e-5
    assert abs(atoms[0] - atoms[4]) > 1e-4
    order = [6, 0, 5, 1, 4, 2, 7, 3]
    turned = from_lists([cube], [salt.numbers[order]], [salt.frac_coords[order]])
    (again,) = explain_crystals(model, turned, "formation_energy_per_atom")
    assert again.found.atoms == pytest.approx(atoms[order], abs=1e-5)
    with pytest.raises(ConfigError, match="target: choose one of"):
        explain_crystals(model, salt)


def test_shapley_values_are_exact_for_a_sum_and_share_a_product():
    start, x = np.zeros(4), np.array([1.0, 2.0, 3.0, 5.0])
    groups = [np.array([0]), np.array([1]), np.array([2, 3])]
    found = shapley(lambda rows: rows[:, 0] * 7 + rows[:, 2] + rows[:, 3], x, start, groups)
    assert found == pytest.approx([7, 0, 8])
    assert shapley(lambda rows: rows[:, 0] * rows[:, 1], x, start, groups) == pytest.approx([1, 1, 0])


def test_the_command_writes_a_page_and_a_table(data, tmp_path, capsys):
    run = trained(data, tmp_path)
    words = ["explain", f"model={run}", f"files={data}", "target=volume"]
    assert cli.run([*words, f"out={tmp_path / 'page.html'}"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="structure"') == 66
    assert "http" not in page.replace("http://www.w3.org", "")
    assert cli.run([*words, f"out={tmp_path / 'table.csv'}"]) == 0
    table = pyarrow.csv.read_csv(tmp_path / "table.csv").to_pandas()
    sums = table.groupby("id")["contribution"].sum()
    assert np.allclose(sums, table.groupby("id")["prediction"].first(), rtol=1e-2)
    assert set(table["kind"]) == {"reference", "atom"}
    with pytest.raises(ConfigError, match="target: choose one of"):
        cli.run([*words[:-1], f"out={tmp_path / 'other.html'}"])


def test_a_number_of_two_parts_is_refused(data, tmp_path):
    run = trained(data, tmp_path, "data.targets=[band_gap]", "target_types={band_gap: hurdle}")
    model = crysldnet.load(run, device="cpu")
    with pytest.raises(DataError, match="two parts"):
        explained(model, data, 0)
