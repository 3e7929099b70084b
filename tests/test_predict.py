"""Prediction and embedding: every source alike, in order, whatever the batches; files that are whole or not there."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

import crysldnet
from conftest import drawing
from crysldnet import finetune
from crysldnet.artifacts import model_file
from crysldnet.cli import run
from crysldnet.data import output
from crysldnet.data.datasets import EMBEDDED, open_store
from crysldnet.data.output import write_store
from crysldnet.data.schema import table_from_crystals
from crysldnet.errors import CheckpointError, DataError
from crysldnet.graphs.batch import cut, make_batch
from crysldnet.graphs.crystals import from_lists
from crysldnet.inference import Predictor
from crysldnet.readers import stream as streams
from crysldnet.readers.stream import CrystalStream, StreamSettings, ahead
from crysldnet.readers.structure_files import read_structure
from tiny import finetune_config, subset

EXAMPLES = EMBEDDED / "examples"
FILES = sorted(EXAMPLES.glob("*.cif"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few crystals of the embedded set, with a class beside the numbers."""
    path = subset(tmp_path_factory.mktemp("table") / "crystals.parquet", train=48, val=24, test=16)
    content = pq.read_table(path)
    metal = pa.array(content["band_gap"].to_numpy() == 0)
    pq.write_table(content.append_column("is_metal", metal), path)
    return path


@pytest.fixture(scope="module")
def ensemble(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models as one, of an energy and a class."""
    runs = tmp_path_factory.mktemp("runs")
    config, values = finetune_config(
        f"runs={runs}",
        "name=two",
        f"data.path={table}",
        "data.targets=[formation_energy_per_atom,is_metal]",
        "epochs=1",
        "ensemble=2",
    )
    finetune.run(config, values)
    return runs / "finetune" / "two"


@pytest.fixture(scope="module")
def model(ensemble: Path) -> Path:
    """One of them."""
    return ensemble / "member_0"


@pytest.fixture(scope="module")
def loaded(model: Path) -> Predictor:
    return crysldnet.load(model, device="cpu")


def predict(*arguments: str) -> int:
    return run(["predict", "device=cpu", *arguments])


def test_prediction_imports_only_what_it_needs(model: Path, tmp_path: Path) -> None:
    """Loading the others takes longer than predicting some files."""
    code = (
        "import atexit, sys; from crysldnet.cli import main\n"
        "slow = {'lightning', 'torch_geometric', 'torchmetrics', 'torch._dynamo', 'pandas', 'sklearn', 'matplotlib'}\n"
        "atexit.register(lambda: print(*slow & set(sys.modules)))\n"
        "main()"
    )
    for command in ("predict", "embed"):
        words = [command, "device=cpu", f"model={model}", f"files={EXAMPLES}", f"out={tmp_path / command}.csv"]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_jsonl(path: Path) -> Path:
    lines = []
    for file in FILES:
        lattice, numbers, frac_coords = read_structure(file)
        record = {
            "material_id": file.stem,
            "lattice": lattice.reshape(-1).tolist(),
            "atomic_numbers": numbers.tolist(),
            "frac_coords": frac_coords.reshape(-1).tolist(),
        }
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines))
    return path


def write_source(kind: str, folder: Path) -> Path:
    """Write the six examples in another form."""
    path = folder / f"six.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in FILES:
                archive.write(file, file.name)
    elif kind == "tar.gz":
        with tarfile.open(path, "w:gz") as archive:
            for file in FILES:
                archive.add(file, file.name)
    elif kind == "jsonl":
        write_jsonl(path)
    elif kind == "extxyz":
        ase_io = pytest.importorskip("ase.io")
        ase_io.write(path, [ase_io.read(file) for file in FILES], format="extxyz")
    else:
        crystals = from_lists(*zip(*(read_structure(file) for file in FILES), strict=True))
        ids = [file.stem for file in FILES]
        content = table_from_crystals(crystals, ids, {}, {}, {})
        if kind == "parquet":
            pq.write_table(content, path)
        else:
            write_store(path, [content])
    return path


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "jsonl", "extxyz", "parquet", "store"])
def test_every_source_gives_what_the_files_give(kind, tmp_path, loaded):
    expected = loaded.predict(EXAMPLES)
    found = loaded.predict(write_source(kind, tmp_path))
    assert found.formulas == expected.formulas
    assert np.allclose(found.values, expected.values, rtol=1e-4, atol=1e-5)
    if kind != "extxyz":
        assert found.ids == expected.ids == [file.stem for file in FILES]


def test_a_data_set_by_name_and_a_split_of_it_are_sources(loaded):
    store = open_store("embedded:mp_starter")
    rows = np.flatnonzero(store.texts_of("split") == "test")
    found = loaded.predict("embedded:mp_starter@test", settings=StreamSettings(batch_size=256))
    assert found.ids == store.ids_at(rows)


def test_a_list_on_standard_input_is_read_and_what_is_not_there_is_refused(tmp_path, model, monkeypatch, capsys):
    listed = [*map(str, FILES[:2]), str(tmp_path / "gone.cif"), "", str(FILES[3])]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(listed)))
    assert predict(f"model={model}", "files=-", f"out={tmp_path}/out.csv") == 0
    assert [row["source"] for row in rows_of(tmp_path / "out.csv")][::2] == [FILES[i].name for i in (0, 1, 3)]
    assert "gone.cif: no such file" in capsys.readouterr().err
    assert [row["source"] for row in rows_of(tmp_path / "out.csv.refused.csv")] == [str(tmp_path / "gone.cif")]


def test_what_is_not_there_is_refused_and_the_rest_predicted(tmp_path, model, capsys):
    files = f"files=[{FILES[0]},{tmp_path / 'gone.cif'},{tmp_path / 'odd@gone.cif'}]"
    assert predict(f"model={model}", files, f"out={tmp_path}/out.csv") == 0
    assert {row["source"] for row in rows_of(tmp_path / "out.csv")} == {FILES[0].name}
    told = capsys.readouterr().err
    assert "refused:" in told
    assert "odd@gone.cif: no such file or folder" in told
    assert len(rows_of(tmp_path / "out.csv.refused.csv")) == 2
    with pytest.raises(DataError, match="none of the 1 crystals could be used"):
        predict(f"model={model}", f"files={tmp_path / 'gone.cif'}", f"out={tmp_path}/out.csv")


def test_a_list_of_what_is_not_there_leaves_the_reasons_beside_the_output_or_says_that_it_cannot(
    tmp_path, model, monkeypatch
):
    arguments = (f"model={model}", "files=-", f"out={tmp_path}/new/out.csv")
    monkeypatch.setattr(sys, "stdin", io.StringIO("nowhere.cif\n"))
    with pytest.raises(DataError, match=r"none of the 1 crystals could be used, reasons in .*out\.csv\.refused\.csv"):
        predict(*arguments)
    (refused,) = rows_of(tmp_path / "new/out.csv.refused.csv")
    assert refused["reason"] == "no such file"
    (tmp_path / "new/out.csv.refused.csv").unlink()
    (tmp_path / "new/out.csv.refused.csv").mkdir()
    monkeypatch.setattr(sys, "stdin", io.StringIO("nowhere.cif\n"))
    with pytest.raises(DataError, match=r"reasons can't be listed: .* \(Is a directory\)"):
        predict(*arguments)


def test_an_empty_list_is_an_error(tmp_path, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(DataError, match="standard input lists no file"):
        predict(f"model={model}", "files=-", f"out={tmp_path}/out.csv")


def test_the_order_is_that_of_the_input_and_batches_change_nothing(table, loaded):
    ids = pq.read_table(table)["material_id"].to_pylist()
    whole = loaded.predict(table)
    assert whole.ids == ids
    for settings in (StreamSettings(batch_size=1), StreamSettings(batch_atoms=13), StreamSettings(batch_size=7)):
        parts = loaded.predict(table, settings=settings)
        assert parts.ids == ids
        assert np.allclose(parts.values, whole.values, rtol=1e-4, atol=1e-5)
        assert np.allclose(parts.distance, whole.distance, rtol=1e-3)


def test_batches_stay_within_both_bounds():
    sizes = np.random.default_rng(0).integers(1, 40, 500)
    sizes[[7, 8, 100]] = 90
    pieces = list(cut(sizes, 8, 64))
    assert [start for start, _ in pieces] == [0, *[stop for _, stop in pieces[:-1]]]
    assert pieces[-1][1] == 500
    for start, stop in pieces:
        assert stop - start <= 8
        assert sizes[start:stop].sum() <= 64 or stop - start == 1
    assert list(cut(sizes[:0], 8, 64)) == []


def test_a_parquet_table_of_many_pieces_has_few_groups_of_rows(tmp_path, monkeypatch):
    pieces = [pa.table({"a": np.arange(start, start + 10)}) for start in range(0, 10_000, 10)]
    monkeypatch.setattr(output, "ROW_GROUP_BYTES", 20_000)
    with output.open_table(str(tmp_path / "out.parquet")) as file:
        for piece in pieces:
            file.append(piece)
    written = pq.ParquetFile(tmp_path / "out.parquet")
    assert written.metadata.num_row_groups == 4
    assert written.read().equals(pa.concat_tables(pieces).combine_chunks())


def test_csv_parquet_and_json_lines_say_the_same(tmp_path, ensemble):
    for suffix in ("csv", "parquet", "jsonl"):
        assert predict(f"model={ensemble}", f"files={EXAMPLES}", f"out={tmp_path}/out.{suffix}") == 0
    parquet = pq.read_table(tmp_path / "out.parquet").to_pylist()
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    cells = rows_of(tmp_path / "out.csv")
    assert len(parquet) == len(lines) == len(cells) == 12
    assert list(parquet[0]) == list(lines[0]) == list(cells[0])
    for a, b, c in zip(parquet, lines, cells, strict=True):
        for name, value in a.items():
            if isinstance(value, float):
                assert b[name] == pytest.approx(value, rel=1e-6)
                assert float(c[name]) == pytest.approx(value, rel=1e-6)
            else:
                assert b[name] == value
                assert c[name] == ("" if value is None else value)


def test_an_output_of_another_kind_is_refused_before_anything_is_read(tmp_path, model):
    with pytest.raises(DataError, match=r"must end in \.csv, \.parquet"):
        predict(f"model={model}", f"files={EXAMPLES}", f"out={tmp_path}/out.xlsx")


@pytest.mark.parametrize("command", ["predict", "embed", "suggest", "explain"])
def test_an_output_does_not_replace_a_file_that_is_read(tmp_path, table, model, command):
    own = tmp_path / "own.parquet"
    own.write_bytes(table.read_bytes())
    (tmp_path / "link.parquet").symlink_to(own)
    target = ["target=formation_energy_per_atom"] if command in ("suggest", "explain") else []
    for files in (own, f"[{table},{own}]", tmp_path / "link.parquet"):
        with pytest.raises(DataError, match=r"out=.*own\.parquet: one of the files to read; choose another name"):
            run([command, f"model={model}", f"files={files}", f"out={own}", *target])
    assert own.read_bytes() == table.read_bytes()


def test_several_models_read_each_crystal_once(tmp_path, ensemble, monkeypatch):
    graphs = []
    build = streams.make_batch
    monkeypatch.setattr(
        streams, "make_batch", lambda part, graph, **how: graphs.append(len(part)) or build(part, graph, **how)
    )
    models = [ensemble / "member_0", ensemble / "member_1"]
    assert predict(f"model=[{models[0]},{models[1]}]", f"files={EXAMPLES}", f"out={tmp_path}/both.csv") == 0
    assert sum(graphs) == 6
    rows = rows_of(tmp_path / "both.csv")
    assert len(rows) == 24
    for path in models:
        alone = crysldnet.load(path, device="cpu").predict(EXAMPLES)
        mine = [r for r in rows if r["model"] == str(path) and r["target"] == "formation_energy_per_atom"]
        assert [float(r["prediction"]) for r in mine] == pytest.approx(alone.values[:, 0].tolist(), rel=1e-5)


def test_an_ensemble_predicts_the_mean_and_its_spread(ensemble):
    whole = crysldnet.load(ensemble, device="cpu")
    assert len(whole.members) == 2
    found = whole.predict(EXAMPLES)
    parts = [crysldnet.load(ensemble / f"member_{i}", device="cpu").predict(EXAMPLES) for i in (0, 1)]
    assert np.allclose(found.values[:, 0], (parts[0].values[:, 0] + parts[1].values[:, 0]) / 2, rtol=1e-5)
    spread = np.abs(parts[0].values[:, 0] - parts[1].values[:, 0]) / 2
    assert whole.knowledge is not None
    known = whole.knowledge.calibration.targets[0]
    assert np.allclose(found.std[:, 0], known.scale * np.hypot(spread, known.floor), rtol=1e-3, atol=1e-6)
    assert np.isnan(parts[0].std).all()
    assert not known.normalised  # 24 crystals are too few
    assert np.allclose((found.high - found.low)[:, 0], (found.high - found.low)[0, 0])


def test_a_class_comes_with_probabilities_and_without_an_interval(ensemble, tmp_path):
    found = crysldnet.load(ensemble, device="cpu").predict(EXAMPLES)
    assert found.probabilities is not None
    assert np.allclose(found.probabilities[:, 1].sum(axis=1), 1)
    assert np.isnan(found.low[:, 1]).all()
    rows = [row for row in found.table().to_pylist() if row["target"] == "is_metal"]
    for row in rows:
        shares = json.loads(row["probabilities"])
        assert row["class"] == max(shares, key=shares.__getitem__)
        assert row["probability"] == pytest.approx(shares[row["class"]], rel=1e-4)


def test_the_interval_is_the_conformal_one_of_the_calibration_crystals(table, loaded):
    """Computed anew from the model's predictions for the validation split."""
    content = pq.read_table(table)
    val = np.flatnonzero(np.array(content["split"].to_pylist()) == "val")
    found = loaded.predict(table, interval=0.8)
    scores = np.sort(np.abs(content["formation_energy_per_atom"].to_numpy()[val] - found.values[val, 0]))
    half = scores[math.ceil(0.8 * (len(val) + 1)) - 1]
    assert np.allclose((found.high - found.low)[:, 0] / 2, half, rtol=1e-4)
    assert (loaded.predict(FILES[0], interval=0.5).low > loaded.predict(FILES[0], interval=0.8).low)[0, 0]
    assert np.isnan(loaded.predict(FILES[0], interval=0.99).low).all()  # 24 crystals can't promise that


def test_what_the_training_set_lacks_is_flagged(table, loaded):
    content = pq.read_table(table)
    train = content.filter(pc.equal(content["split"], "train"))
    there = set(np.concatenate(train["atomic_numbers"].to_pylist()).tolist())
    found = loaded.predict("embedded:mp_starter@test", settings=StreamSettings(batch_size=256))
    store = open_store("embedded:mp_starter")
    rows = np.flatnonzero(store.texts_of("split") == "test")
    largest = max(map(len, train["atomic_numbers"].to_pylist()))
    for place, row in enumerate(rows):
        numbers = store.crystals.numbers[store.crystals.ptr[row] : store.crystals.ptr[row + 1]]
        assert bool(found.unseen[place]) == bool(set(numbers.tolist()) - there) == ("element" in found.flags[place])
        assert ("size" in found.flags[place]) == (len(numbers) > largest)
    seen = loaded.predict(train)
    assert not any("element" in flags or "size" in flags for flags in seen.flags)


def test_a_crystal_whose_neighbors_may_change_with_the_next_digit_is_flagged(table, loaded):
    content = pq.read_table(table)
    graph = loaded.encoder.graph
    crystals = open_store(str(table)).crystals
    near = graph.near_cut(crystals)
    assert near.any()
    assert not near.all()
    found = loaded.predict(content)
    assert ["cutoff" in flags for flags in found.flags] == near.tolist()
    loaded.encoder.smooth = True
    try:
        assert not any("cutoff" in flags for flags in loaded.predict(content).flags)
    finally:
        loaded.encoder.smooth = False


def test_crystals_that_were_trained_or_validated_on_are_marked_and_counted(tmp_path, table, model, loaded, capsys):
    splits = pq.read_table(table)["split"].to_pylist()
    flags = loaded.predict(table).flags
    assert all("trained" in flags[row] for row, split in enumerate(splits) if split != "test")
    assert sum("trained" in flags[row] for row, split in enumerate(splits) if split == "test") <= 2, "near duplicates"
    content = pq.read_table(table)
    renamed = content.set_column(0, "material_id", pa.array([f"new-{i}" for i in range(len(content))]))
    assert loaded.predict(renamed).flags == flags, "by their geometry"
    stretched = pa.array([[1.05 * x for x in lattice] for lattice in content["lattice"].to_pylist()])
    moved = content.set_column(content.column_names.index("lattice"), "lattice", stretched)
    assert all(
        "trained" in found for found, split in zip(loaded.predict(moved).flags, splits, strict=True) if split != "test"
    ), "by id"
    both = moved.set_column(0, "material_id", renamed["material_id"])
    assert sum("trained" in found for found in loaded.predict(both).flags) < 8
    assert run(["predict", f"model={model}", f"files={table}", f"out={tmp_path / 'x.csv'}"]) == 0
    count = sum("trained" in found for found in flags)
    assert f"{count} crystals are among those that a model was trained or validated on" in capsys.readouterr().err


def test_a_target_that_stands_beside_the_crystals_in_another_unit_is_noted(table, loaded):
    content = pq.read_table(table)
    for unit, notes in (("meV/atom", 1), ("eV / at", 0), (None, 0)):
        place = content.column_names.index("formation_energy_per_atom")
        field = content.schema.field(place).with_metadata({"units": unit} if unit else {})
        changed = content.set_column(place, field, content["formation_energy_per_atom"])
        assert sum("is predicted in eV/atom" in note for note in loaded.predict(changed).notes) == notes


def test_bad_crystals_of_a_table_are_refused_and_the_rest_is_done(tmp_path, table, model, capsys):
    content = pq.read_table(table)
    lattice = content["lattice"].to_pylist()
    lattice[5][0] = float("nan")
    place = content.column_names.index("lattice")
    pq.write_table(content.set_column(place, "lattice", pa.array(lattice)), tmp_path / "bad.parquet")
    assert predict(f"model={model}", f"files={tmp_path}/bad.parquet", f"out={tmp_path}/out.parquet") == 0
    ids = content["material_id"].to_pylist()
    assert pq.read_table(tmp_path / "out.parquet")["id"].to_pylist()[::2] == ids[:5] + ids[6:]
    (refused,) = rows_of(tmp_path / "out.parquet.refused.csv")
    assert (refused["source"], refused["id"]) == ("bad.parquet row 6", ids[5])
    assert "not finite" in refused["reason"]
    assert f"{len(ids) - 1} crystals predicted, 1 refused" in capsys.readouterr().err


def test_a_damaged_archive_does_not_stop_the_others(tmp_path, model):
    whole = write_source("tar.gz", tmp_path)
    raw = whole.read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(raw[: len(raw) // 2])
    files = f"files=[{tmp_path}/cut.tar.gz,{whole}]"
    assert predict(f"model={model}", files, f"out={tmp_path}/out.csv") == 0
    assert {row["id"] for row in rows_of(tmp_path / "out.csv")} >= {file.stem for file in FILES}
    (refused,) = rows_of(tmp_path / "out.csv.refused.csv")
    assert "cut.tar.gz" in refused["source"]
    assert "Truncated" in refused["reason"]
    with pytest.raises(DataError, match="none of the 1 crystals could be used"):
        predict(f"model={model}", f"files={tmp_path}/cut.tar.gz", f"out={tmp_path}/none.csv")
    assert not (tmp_path / "none.csv").exists()
    (refused,) = rows_of(tmp_path / "none.csv.refused.csv")
    assert "Truncated" in refused["reason"]


def test_reading_stays_just_ahead_of_predicting(loaded):
    """However long the source is: what was read and not yet used is bounded, so memory is too."""
    structure = pytest.importorskip("pymatgen.core").Structure.from_file(FILES[1])
    given, lead = [0], []

    def endless() -> Iterator[object]:
        while True:
            given[0] += 1
            yield structure

    used = 0
    stream = iter(CrystalStream(endless(), [loaded.encoder.graph], StreamSettings(batch_size=100)))
    for portion in stream:
        used += len(portion.ids)
        lead.append(given[0] - used)
        if used >= 1500:
            break
    stream.close()
    assert max(lead) <= 4 * 500
    assert not any(thread.name == "crysldnet-read" for thread in threading.enumerate())


def test_an_error_of_the_source_comes_where_its_item_would_have_come():
    def source() -> Iterator[int]:
        yield from range(3)
        raise DataError("here")

    items = ahead(source(), 2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="here"):
        next(items)


def test_structures_of_pymatgen_and_ase_and_our_crystals_are_taken(loaded):
    core = pytest.importorskip("pymatgen.core")
    ase_io = pytest.importorskip("ase.io")
    expected = loaded.predict(FILES).values
    structures = [core.Structure.from_file(file) for file in FILES]
    series = pytest.importorskip("pandas").Series(structures, index=[file.stem for file in FILES])
    for given in (structures, [ase_io.read(file) for file in FILES], list(map(str, FILES)), series):
        assert np.allclose(loaded.predict(given).values, expected, rtol=1e-3, atol=1e-4)
    crystals = from_lists(*zip(*(read_structure(file) for file in FILES), strict=True))
    assert np.allclose(loaded.predict(crystals).values, expected, rtol=1e-4, atol=1e-5)
    assert np.allclose(loaded.predict(structures[2]).values, expected[2:3], rtol=1e-3, atol=1e-4)
    assert len(loaded.predict(structures[2]).to_dict()["prediction"]) == 2
    assert len(loaded.embed(structures)) == 6
    with pytest.raises(DataError, match="give its values as a list"):
        loaded.predict(dict(zip("ab", structures, strict=False)))


def test_a_crystal_that_cannot_be_used_raises_or_is_left_out(loaded):
    lattice, numbers, frac_coords = read_structure(FILES[0])
    crystals = from_lists([lattice, lattice * 0.1], [numbers, numbers], [frac_coords, frac_coords])
    with pytest.raises(DataError, match=r"row 2: its cell has .* per atom"):
        loaded.predict(crystals)
    found = loaded.predict(crystals, on_error="report")
    assert len(found) == 1
    assert found.refused[0].source == "row 2"
    with pytest.raises(DataError, match="no crystal could be used"):
        loaded.predict(crystals.take(np.array([1])), on_error="report")


def test_what_is_read_otherwise_than_it_stands_there_is_said(tmp_path, loaded, model, capsys):
    lattice = "0 2.04 2.04\n2.04 0 2.04\n2.04 2.04 0"
    (tmp_path / "heavy.vasp").write_text(f"LiD\n1.0\n{lattice}\nLi D\n1 1\ndirect\n0 0 0\n0.5 0.5 0.5\n")
    said = "files have deuterium or tritium, which was read as hydrogen: 1 (heavy.vasp)"
    assert predict(f"model={model}", f"files={tmp_path}", f"out={tmp_path}/out.csv") == 0
    assert f"note: {said}\n" in capsys.readouterr().err
    found = loaded.predict(tmp_path / "heavy.vasp")
    assert found.formulas == ["HLi"]
    assert found.notes == loaded.embed(tmp_path / "heavy.vasp").notes == (said,)
    assert loaded.predict(FILES).notes == ()


def test_a_word_that_is_none_is_refused(model, loaded):
    for say, wrong in (
        ("per must be one of crystal, atom, not 'atoms'", lambda: loaded.embed(FILES, per="atoms")),
        ("on_error must be one of raise, report, not 'ignore'", lambda: loaded.predict(FILES, on_error="ignore")),
        ("device must be one of auto, cpu, gpu, not 'cuda'", lambda: crysldnet.load(model, device="cuda")),
        ("workers must be at least 1", lambda: StreamSettings(workers=-3)),
    ):
        with pytest.raises(DataError, match=say):
            wrong()


def test_importing_the_package_is_light():
    code = (
        "import sys, crysldnet; assert not {'torch', 'numpy', 'pymatgen'} & set(sys.modules); "
        "assert callable(crysldnet.load); assert 'torch' in sys.modules and 'pymatgen' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = crysldnet.nothing


def test_a_model_of_an_earlier_version_predicts_without_intervals(tmp_path, model, loaded):
    info, state = model_file.read(model / "model.safetensors", "property_model")
    info = {k: v for k, v in info.items() if k not in ("format_version", "kind", "calibration")}
    model_file.write(tmp_path / "model.safetensors", "property_model", state, info)
    found = crysldnet.load(tmp_path, device="cpu").predict(EXAMPLES)
    assert np.allclose(found.values, loaded.predict(EXAMPLES).values)
    assert np.isnan(found.low).all()
    assert np.isnan(found.distance).all()
    assert found.table()["low"].null_count == 12


def test_embeddings_are_the_features_of_the_encoder(tmp_path, model, loaded):
    with torch.inference_mode():
        crystals = from_lists(*zip(*(read_structure(file) for file in FILES), strict=True))
        features = loaded.encoder(make_batch(crystals, loaded.encoder.graph)).numpy()
    files = [f"files={EXAMPLES}", "device=cpu", "layers_read=last"]
    assert run(["embed", f"model={model}", *files, f"out={tmp_path}/atoms.npz", "per=atom"]) == 0
    assert run(["embed", f"model={model}", *files, f"out={tmp_path}/atoms.parquet", "per=atom", "batch_size=2"]) == 0
    assert run(["embed", f"model={model}", *files, f"out={tmp_path}/crystals.parquet"]) == 0
    atoms, rows = np.load(tmp_path / "atoms.npz"), pq.read_table(tmp_path / "atoms.parquet")
    assert np.allclose(atoms["embedding"], features, rtol=1e-4, atol=1e-5)
    assert np.allclose(np.stack(rows["embedding"].to_numpy()), features, rtol=1e-3, atol=1e-4)
    assert list(atoms["id"]) == rows["id"].to_pylist() == np.repeat([f.stem for f in FILES], crystals.sizes).tolist()
    whole = pq.read_table(tmp_path / "crystals.parquet")
    means = [features[crystals.crystal == b].mean(axis=0) for b in range(6)]
    assert np.allclose(np.stack(whole["embedding"].to_numpy()), means, rtol=1e-3, atol=1e-4)
    assert run(["embed", f"model={model}", *files[:2], f"out={tmp_path}/all.parquet"]) == 0
    every = np.stack(pq.read_table(tmp_path / "all.parquet")["embedding"].to_numpy())
    width, depth = features.shape[1], loaded.encoder.depth
    assert every.shape == (6, 2 * depth * width)
    assert np.allclose(every[:, (depth - 1) * width : depth * width], means, rtol=1e-3, atol=1e-4)
    spread = [features[crystals.crystal == b].std(axis=0) for b in range(6)]
    assert np.allclose(every[:, -width:], spread, rtol=1e-2, atol=2e-3)
    assert not list(tmp_path.glob(".*"))


def test_an_encoder_is_loaded_from_a_model_and_what_is_neither_is_refused(tmp_path, model):
    encoder = crysldnet.load_encoder(model / "model.safetensors", device="cpu")
    assert encoder.embed(EXAMPLES, layers_read="last").features.shape == (6, encoder.width)
    depth = encoder.encoder.depth
    assert encoder.embed(EXAMPLES).features.shape == (6, 2 * depth * encoder.width)
    assert encoder.embed(EXAMPLES, per="atom").features.shape[1] == depth * encoder.width
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    for load in (crysldnet.load, crysldnet.load_encoder):
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            load(tmp_path / "noise.safetensors")


def test_a_share_of_validation_is_kept_for_calibration_alone(tmp_path, table):
    config, values = finetune_config(
        f"runs={tmp_path}", "name=own", f"data.path={table}", "epochs=1", "data.calibration_fraction=0.5"
    )
    with drawing():
        finetune.run(config, values)
    folder = tmp_path / "finetune" / "own"
    content = pq.read_table(table)
    val = set(content.filter(pc.equal(content["split"], "val"))["material_id"].to_pylist())
    kept = set(json.loads((folder / "split.json").read_text())["val"])
    assert len(kept) == 12
    assert kept < val
    model = crysldnet.load(folder, device="cpu")
    rows = np.flatnonzero([i in val - kept for i in content["material_id"].to_pylist()])
    found = model.predict(table).values[rows, 0]
    truth = content["formation_energy_per_atom"].to_numpy()[rows]
    assert model.knowledge is not None
    scores = model.knowledge.calibration.targets[0].scores
    assert np.allclose(scores, np.sort(np.abs(found - truth)), rtol=1e-3)
    assert (folder / "plots" / "reliability_formation_energy_per_atom.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("free", [0, 8_000])
@pytest.mark.parametrize(
    "command",
    [
        "predict model=MODEL files=DATA out=DISK/p.csv workers=1",
        "predict model=MODEL files=DATA out=DISK/p.parquet workers=1",
        "embed model=MODEL files=DATA out=DISK/p.npz workers=1",
        "data import DATA --out DISK/e.store",
        "data dedupe DATA --out DISK/e.store --by id",
        "data export DATA DISK/e.parquet",
        "data describe DATA --no-structures --html DISK/d.html",
    ],
)
def test_what_writes_to_a_full_disk_says_so_in_a_sentence_and_leaves_nothing(
    disk: tuple[Path, Callable[[], None]], model: Path, command: str, free: int
) -> None:
    """With some space left, writing begins and fails."""
    folder, fill = disk
    fill()
    os.truncate(folder / "filler", (folder / "filler").stat().st_size - free)
    data = "embedded:mp_starter" if free else "embedded:mp_starter@test"
    words = command.replace("MODEL", str(model)).replace("DATA", data).replace("DISK", str(folder)).split()
    with pytest.raises(DataError, match=r"(can't be written \(|can't write to .*: )No space left on device"):
        run(words)
    assert os.listdir(folder) == ["filler"]


def test_a_full_standard_output_is_an_error_in_a_sentence(model: Path) -> None:
    command = [sys.executable, "-m", "crysldnet", "data", "show", "embedded:mp_starter"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "error: a file or the output: can't be written (No space left on device)\n",
    )
