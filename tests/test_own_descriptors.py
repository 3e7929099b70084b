"""Columns of the user's own as inputs of the head: trained on, kept in the file, asked for at prediction."""

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import crysldnet
from crysldnet import cli, finetune
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.store import CrystalStore
from crysldnet.errors import CrysldnetError, DataError
from crysldnet.finetune.baselines import tabular_features
from crysldnet.graphs.spec import GraphSpec
from crysldnet.models.head import PropertyHead
from tiny import finetune_config, subset

UNIT = {b"units": b"K"}
DATA = ["data.targets=[slope]", "data.descriptors=[temperature]", "data.batch_size=16", "trainer.accelerator=cpu"]


def measured(path: Path, few: Path, *, unit: dict = UNIT, offset: float = 0.0) -> Path:
    """Write crystals whose target is that of the temperature at which it was measured, and a little of the crystal."""
    table = pq.read_table(few)
    temperature = np.random.default_rng(0).uniform(100, 900, len(table))
    energy = table["formation_energy_per_atom"].to_numpy()
    table = table.append_column(
        pa.field("temperature", pa.float64(), metadata=unit), pa.array(temperature + offset)
    ).append_column("slope", pa.array(temperature / 100 + 0.1 * energy))
    pq.write_table(table, path)
    return path


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    return subset(tmp_path_factory.mktemp("few") / "few.parquet", train=48, val=8, test=8)


def trained(folder: Path, path: Path, *words: str) -> Path:
    config, values = finetune_config(f"runs={folder}", f"data.path={path}", *DATA, *words)
    assert finetune.run(config, values) == 0
    return folder / "finetune" / config.name


@pytest.fixture(scope="module")
def data(tmp_path_factory, few) -> Path:
    return measured(tmp_path_factory.mktemp("data") / "measured.parquet", few)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data) -> Path:
    return trained(tmp_path_factory.mktemp("runs"), data, "epochs=30", "optimizer.lr=0.01", "name=a")


def written(run: Path) -> dict[str, float]:
    with (run / "predictions_test.csv").open(newline="") as file:
        return {row["material_id"]: float(row["prediction"]) for row in csv.DictReader(file)}


def test_what_depends_on_a_descriptor_is_learned_and_predicted_from_the_file(run: Path, data: Path) -> None:
    store = CrystalStore.open(data)
    true = store.numbers_of("slope")
    model = crysldnet.load(run, device="cpu")
    assert (model.descriptors, model.info["descriptor_units"]) == (["temperature"], ["K"])
    found = model.predict(data)
    assert np.abs(found.values[:, 0] - true).mean() < 0.25 * np.abs(true - true.mean()).mean()
    by_id = dict(zip(found.ids, found.values[:, 0], strict=True))
    for material_id, value in written(run).items():
        assert by_id[material_id] == pytest.approx(value, abs=1e-4)


def test_the_statistics_are_those_of_the_training_split(run: Path, data: Path) -> None:
    store = CrystalStore.open(data)
    train = store.numbers_of("temperature")[store.texts_of("split") == "train"]
    own = crysldnet.load(run, device="cpu").members[0].descriptors
    assert own is not None
    expected = [train.mean(), train.std(), train.min(), train.max()]
    np.testing.assert_allclose(own.stats[:, 0].numpy(), expected, rtol=1e-6)


def test_descriptors_are_given_in_python_in_every_form(run: Path, data: Path) -> None:
    import pandas

    model = crysldnet.load(run, device="cpu")
    store = CrystalStore.open(data)
    values = store.numbers_of("temperature")
    expected = model.predict(data).values
    table = store.to_table().drop_columns(["temperature"])
    for given in (
        {"temperature": values},
        values,
        values[:, None],
        pandas.DataFrame({"temperature": values, "other": values}),
    ):
        np.testing.assert_allclose(model.predict(table, descriptors=given).values, expected, atol=1e-5)
    np.testing.assert_allclose(
        model.predict(data, descriptors={"temperature": 300}).values,
        model.predict(table, descriptors=np.full(len(values), 300)).values,
        atol=1e-5,
    )
    frame = store.to_table().to_pandas()
    np.testing.assert_allclose(model.predict(frame).values, expected, atol=1e-5)
    assert "descriptor" in model.predict(store.crystals.take(np.arange(1)), descriptors=[5000.0]).flags[0]
    assert not any("descriptor" in flags for flags in model.predict(data).flags[:8])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"no column 'temperature', which the model needs"),
        ({"pressure": 1.0}, "no model needs 'pressure'; needed are temperature"),
        (np.ones((3, 2)), r"an array of shape \[crystals, 1\] is needed, not \(3, 2\)"),
        (np.ones(63), "63 values, but there are more crystals"),
        (np.ones(65), "65 values for 64 crystals"),
        ({"temperature": np.nan}, "must be one finite number"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_refused(run: Path, data: Path, given, message: str) -> None:
    table = CrystalStore.open(data).to_table().drop_columns(["temperature"])
    with pytest.raises(DataError, match=message):
        crysldnet.load(run, device="cpu").predict(table, descriptors=given)


def test_the_command_names_file_and_column_and_takes_a_value_for_all(run, data, few, tmp_path, capsys) -> None:
    out = tmp_path / "out.csv"
    with pytest.raises(CrysldnetError, match="none of the 64 crystals could be used"):
        cli.run(["predict", f"model={run}", f"files={few}", f"out={out}", "device=cpu"])
    assert "few.parquet row 1: no column 'temperature', which the model needs" in capsys.readouterr().err
    line = ["predict", f"model={run}", f"out={out}", "device=cpu"]
    assert cli.run([*line, f"files={few}", "descriptors={temperature: 300}"]) == 0
    with out.open() as file:
        found = [float(row["prediction"]) for row in csv.DictReader(file)]
    expected = crysldnet.load(run, device="cpu").predict(few, descriptors={"temperature": 300}).values[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    celsius = measured(tmp_path / "celsius.parquet", few, unit={b"units": b"degC"}, offset=-273.15)
    with pytest.raises(DataError, match="temperature is in degC, and the model learned it in K"):
        crysldnet.load(run, device="cpu").predict(celsius)


def test_a_descriptor_that_states_no_unit_is_taken_in_that_of_the_model_with_a_note(run, data, few, tmp_path) -> None:
    model = crysldnet.load(run, device="cpu")
    note = "temperature states no unit, and was taken to be in K, in which the model learned it"
    assert note in model.predict(measured(tmp_path / "bare.parquet", few, unit={})).notes
    assert note not in model.predict(data).notes
    assert note not in model.predict(few, descriptors={"temperature": 300}).notes


def test_crystals_without_a_value_are_left_out(run: Path, data: Path, tmp_path: Path) -> None:
    table = pq.read_table(data)
    values = table["temperature"].to_pylist()
    values[3] = None
    place = table.column_names.index("temperature")
    gappy = tmp_path / "gappy.parquet"
    pq.write_table(table.set_column(place, table.schema.field("temperature"), pa.array(values, pa.float64())), gappy)
    module = CrystalDataModule(
        path=str(gappy), graph=GraphSpec(k=1), targets=["slope"], descriptors=["temperature"], batch_size=8
    )
    module.setup()
    assert module.left_out == {"no value of temperature (descriptors)": 1}
    found = crysldnet.load(run, device="cpu").predict(gappy, on_error="report")
    assert len(found) == 63
    assert "no value of 'temperature'" in found.refused[0].reason
    assert tabular_features(module, np.arange(3))[:, -1].tolist() == module.descriptor_values[:3, 0].tolist()


def test_a_constant_descriptor_and_one_that_is_a_target_are_refused(data: Path, tmp_path: Path) -> None:
    table = pq.read_table(data)
    constant = tmp_path / "constant.parquet"
    pq.write_table(table.append_column("pressure", pa.array([2.0] * len(table))), constant)
    with pytest.raises(DataError, match="pressure is 2 for every training crystal"):
        trained(tmp_path, constant, "data.descriptors=[pressure]", "epochs=1", "name=b")
    with pytest.raises(CrysldnetError, match="name each once, and no target"):
        trained(tmp_path, data, "data.descriptors=[slope]", "epochs=1", "name=c")


@pytest.mark.parametrize("readout", ["mean", "attention", "atoms", "sum"])
@pytest.mark.parametrize("layers", [0, 1])
def test_every_readout_reads_them(readout: str, layers: int) -> None:
    torch.manual_seed(0)
    head = PropertyHead(width=4, outputs=2, readout=readout, descriptors=3, layers=layers)
    crystal = torch.tensor([0, 0, 1])
    features = torch.randn(2 if head.per_crystal else 3, 4)
    beside = torch.randn(2, 3, requires_grad=True)
    out = head(features, crystal, 2, beside)
    assert out.shape == (2, 2)
    (gradient,) = torch.autograd.grad(out[0].sum(), beside)
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0


def test_an_ensemble_and_a_frozen_encoder_read_them(run: Path, data: Path, tmp_path: Path) -> None:
    words = [f"pretrained={run / 'model.safetensors'}", "mode=frozen", "head.layers_read=all", "epochs=20"]
    both = trained(tmp_path, data, *words, "ensemble=2", "ensemble_by=folds", "optimizer.lr=0.01", "name=two")
    model = crysldnet.load(both, device="cpu")
    found = model.predict(data)
    by_id = dict(zip(found.ids, found.values[:, 0], strict=True))
    for material_id, value in written(both).items():
        assert by_id[material_id] == pytest.approx(value, abs=1e-4)
    assert not np.allclose(found.values, model.predict(data, descriptors={"temperature": 300}).values)


def test_models_on_tables_read_them(data: Path, tmp_path: Path) -> None:
    frozen = trained(tmp_path, data, "recipe=frozen", "name=frozen")
    store = CrystalStore.open(data)
    model, true = crysldnet.load(frozen, device="cpu"), store.numbers_of("slope")
    found = model.predict(data).values[:, 0]
    assert np.abs(found - true).mean() < 0.5 * np.abs(true - true.mean()).mean()
    assert not np.allclose(found, model.predict(data, descriptors={"temperature": 300}).values[:, 0])
    with pytest.raises(DataError, match="no column 'temperature'"):
        model.predict(store.to_table().drop_columns(["temperature"]))
