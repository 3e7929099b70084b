"""Entries of the JARVIS leaderboard: real runs on a made split, and what is refused."""

import csv
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crysldnet import cli
from crysldnet.data.catalog import published
from crysldnet.data.datasets import open_store
from crysldnet.data.elements import formulas_of
from crysldnet.errors import ConfigError, CrysldnetError, DataError
from crysldnet.signals import RUN_NAME
from crysldnet.tools.jarvis import entry
from crysldnet.tools.jarvis.benchmark import open_benchmark, properties
from tiny import ENCODER, QUIET, subset

NAMES = {"formation_energy_per_atom": "formation_energy_peratom", "band_gap": "optb88vdw_bandgap"}
LINE = ["jarvis", *ENCODER, *QUIET, "recipe=network", "epochs=1", "min_steps=0", "baselines=false"]
LINE += ["trainer.accelerator=cpu", "data.path=data.parquet", "splits=splits", "data.batch_size=16", "name=a"]
LINE += [f"properties=[{','.join(NAMES.values())}]", "email=a@example.org", "project_url=https://example.org"]
ENTRY = Path("runs/jarvis/a/contributions/CrysLDNet")
STEM = "AI-SinglePropertyPrediction-formation_energy_peratom-dft_3d-test-mae"
Splits = dict[str, dict[str, float]]


def write_split(name: str, content: object) -> None:
    Path("splits").mkdir(exist_ok=True)
    with zipfile.ZipFile(f"splits/dft_3d_{name}.json.zip", "w") as archive:
        archive.writestr(f"dft_3d_{name}.json", json.dumps(content))


def split_of(name: str) -> Splits:
    with zipfile.ZipFile(f"splits/dft_3d_{name}.json.zip") as archive:
        return json.loads(archive.read(f"dft_3d_{name}.json"))


def make_data() -> None:
    """Write crystals under the names of JARVIS, and the split of each property as the leaderboard has it."""
    table = pq.read_table(subset(Path("data.parquet"), train=40, val=10, test=12))
    table = table.rename_columns([NAMES.get(name, name) for name in table.column_names])
    pq.write_table(table, "data.parquet")
    for name in NAMES.values():
        rows = zip(table["material_id"].to_pylist(), table["split"].to_pylist(), table[name].to_pylist(), strict=True)
        split: Splits = {"train": {}, "val": {}, "test": {}}
        for id_, part, value in rows:
            split[part][id_] = value
        write_split(name, split)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two properties at once."""
    folder = tmp_path_factory.mktemp("jarvis")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv(RUN_NAME, raising=False)
        make_data()
        assert cli.run([*LINE, "parallel=2"]) == 0
        patch.delenv(RUN_NAME, raising=False)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may damage, as the current folder."""
    shutil.copytree(made, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.delenv(RUN_NAME, raising=False)
    return tmp_path / "copy"


@pytest.mark.distributed
def test_an_entry_has_the_predictions_of_the_official_test_crystals(folder: Path) -> None:
    assert sorted(path.name for path in ENTRY.iterdir()) == sorted(
        [f"AI-SinglePropertyPrediction-{name}-dft_3d-test-mae.csv.zip" for name in NAMES.values()]
        + ["metadata.json", "run.sh"]
    )
    summary = json.loads(Path("runs/jarvis/a/summary.json").read_text())
    for name in NAMES.values():
        stem = f"AI-SinglePropertyPrediction-{name}-dft_3d-test-mae"
        with zipfile.ZipFile(ENTRY / f"{stem}.csv.zip") as archive:
            assert archive.namelist() == [f"{stem}.csv"]
            rows = list(csv.DictReader(io.StringIO(archive.read(f"{stem}.csv").decode())))
        split = split_of(name)
        assert list(rows[0]) == ["id", "prediction"]
        assert {row["id"] for row in rows} == split["test"].keys()
        assert len(rows) == len(split["test"]) == 12
        mae = np.mean([abs(float(row["prediction"]) - split["test"][row["id"]]) for row in rows])
        told = summary["properties"][name]
        assert told["mae"] == pytest.approx(mae)
        assert [told[f"{part}_crystals"] for part in ("train", "val", "test")] == [40, 10, 12]
        own = json.loads(Path(f"runs/jarvis/a/finetune/{name}/summary.json").read_text())
        assert own["test/mae"] == pytest.approx(mae, rel=1e-5)
        used = json.loads(Path(f"runs/jarvis/a/finetune/{name}/split.json").read_text())
        assert {part: set(used[part]) for part in split} == {part: {*own} for part, own in split.items()}
    metadata = json.loads((ENTRY / "metadata.json").read_text())
    assert metadata["author_email"] == "a@example.org"
    assert metadata["time_taken_seconds"] > 0
    assert (ENTRY / "run.sh").read_text().startswith("#!/bin/bash\npip install crysldnet==")


@pytest.mark.distributed
def test_validate_finds_what_the_leaderboard_would_trip_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = ["jarvis", "validate", str(ENTRY), "--splits", "splits"]
    assert cli.run(check) == 0
    assert "valid" in capsys.readouterr().out
    with zipfile.ZipFile(ENTRY / f"{STEM}.csv.zip") as archive:
        text = archive.read(f"{STEM}.csv").decode()

    def rewritten(change: Callable[[list[str]], list[str]]) -> str:
        with zipfile.ZipFile(ENTRY / f"{STEM}.csv.zip", "w") as archive:
            archive.writestr(f"{STEM}.csv", "\n".join(change(text.splitlines())) + "\n")
        assert cli.run(check) == 1
        return capsys.readouterr().err

    assert "test crystals without a prediction: 1; others: 0" in rewritten(lambda lines: lines[:-1])
    assert "ids that occur again: 1" in rewritten(lambda lines: [*lines, lines[-1]])
    assert "isn't finite" in rewritten(lambda lines: [*lines[:-1], lines[-1].split(",")[0] + ",nan"])
    assert "columns id and prediction" in rewritten(lambda lines: ["id,target", *lines[1:]])
    assert "columns id and prediction" in rewritten(lambda lines: lines[:1])
    entry.write_entry(ENTRY, {"optb88vdw_bandgap": {}}, {"model_name": "", "git_url": "x"}, "echo")
    (ENTRY / "other.csv.zip").write_bytes(b"")
    assert cli.run(check) == 1
    said = capsys.readouterr().err
    for problem in ("model_name must be text", "MM-DD-YYYY", "git_url must be a list", "doesn't start with #!"):
        assert problem in said
    assert "other.csv.zip: not a name" in said


@pytest.mark.distributed
def test_a_run_goes_on_with_the_properties_that_are_left(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path("runs/jarvis/a")
    before = (ENTRY / f"{STEM}.csv.zip").read_bytes()
    kept = (run / "finetune/optb88vdw_bandgap/model.safetensors").stat().st_mtime_ns
    (run / "summary.json").unlink()
    shutil.rmtree(run / "finetune/formation_energy_peratom")
    shutil.rmtree(ENTRY)
    assert cli.run(["jarvis", "name=a", "resume=last"]) == 0
    assert (ENTRY / f"{STEM}.csv.zip").read_bytes() == before  # same seed, data and settings
    assert (run / "finetune/optb88vdw_bandgap/model.safetensors").stat().st_mtime_ns == kept
    with pytest.raises(ConfigError, match="already exists"):
        cli.run([*LINE, "name=b", "out=runs/jarvis/a"])
    split = split_of("optb88vdw_bandgap")
    split["train"] |= dict([split["val"].popitem()])
    write_split("optb88vdw_bandgap", split)
    (run / "summary.json").unlink()
    with pytest.raises(ConfigError, match="splits"):
        cli.run(["jarvis", "name=a", "resume=last"])


@pytest.mark.distributed
def test_a_failed_property_is_named(folder: Path) -> None:
    name = "formation_energy_peratom"
    with pytest.raises(CrysldnetError, match=r"1 of 1 properties failed: formation_energy_peratom, see .*resume=last"):
        cli.run([*LINE, "name=b", f"properties=[{name}]", f"target_types={{{name}: log}}"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda split: split["train"].update({"JVASP-1": 0.1}), r"crystals that aren't in .*: 1 of 63 \(JVASP-1"),
        (lambda split: split["val"].update(dict([next(iter(split["test"].items()))])), "ids that occur again: 1"),
        (lambda split: split["test"].update({next(iter(split["test"])): 5.5}), r"is .* and 5\.5 in"),
        (lambda split: split["test"].clear(), "not a split of the leaderboard"),
    ],
)
def test_a_split_that_does_not_fit_the_data_is_refused(
    change: Callable[[Splits], None], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_data()
    split = split_of("formation_energy_peratom")
    change(split)
    write_split("formation_energy_peratom", split)
    with pytest.raises(DataError, match=said):
        open_benchmark(open_store("data.parquet"), "formation_energy_peratom", Path("splits"))
    with pytest.raises(DataError, match=said):
        cli.run(LINE)
    assert not Path("runs").exists()


def test_ids_alone_and_shared_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_data()
    table = pq.read_table("data.parquet")
    again = table.slice(0, 1).set_column(0, "material_id", pa.array(["again"]))
    pq.write_table(pa.concat_tables([table, again.cast(table.schema)]), "data.parquet")
    store = open_store("data.parquet")
    ids, formulas = store.ids.to_pylist(), formulas_of(store.crystals)
    twin, twice = 0, len(ids) - 1
    assert (formulas[twin], ids[twice]) == (formulas[twice], "again")
    rest = [id_ for i, id_ in enumerate(ids) if i not in (twice, twin)]
    write_split("optb88vdw_bandgap", {"train": [*rest[:-5], ids[twin]], "test": [*rest[-5:], ids[twice]]})
    found = open_benchmark(store, "optb88vdw_bandgap", Path("splits"))
    known = {formulas[ids.index(id_)] for id_ in [*rest[:-5], ids[twin]]}
    assert found.shared_formulas == sum(formulas[ids.index(id_)] in known for id_ in [*rest[-5:], ids[twice]]) >= 1
    assert found.truth == pytest.approx(
        {id_: float(store.numbers_of("optb88vdw_bandgap")[ids.index(id_)]) for id_ in [*rest[-5:], ids[twice]]}
    )
    assert len(found.rows["val"]) == 0
    with pytest.raises(DataError, match=r"no dft_3d_mbj_bandgap\.json\.zip|no column 'mbj_bandgap'"):
        open_benchmark(store, "mbj_bandgap", Path("splits"))


def test_the_default_properties_are_those_of_the_published_set() -> None:
    assert len(properties()) == 9
    from crysldnet.config import compose

    values = compose("jarvis", ["email=a@b.org", "project_url=https://b.org"]).values
    assert values["properties"] == properties() == [own.name for own in published()["jarvis_dft_3d"].properties]
    for line, said in (
        (["email=''", "project_url=x"], "email"),
        (["email=a@b.org", "project_url=x", "data.targets=[a]"], "benchmark decides"),
        (["email=a@b.org", "project_url=x", "target_types={a: log}"], "isn't|is not"),
        (["email=a@b.org", "project_url=x", "properties=[]"], "one property or more"),
        (["email=a@b.org", "project_url=x", "algorithm=a/b"], "make a folder"),
        (["email=nonsense"], r"^email='nonsense': not an address, such as name@example\.org"),
        (["email=a@b..org", "project_url=x"], "not an address"),
        (["properties=[bandgap]"], r"^properties: no property 'bandgap'; did you mean 'mbj_bandgap'\?"),
        (["properties=[slme, mass]", "email=a@b.org"], "no property 'mass'; available: formation_energy_peratom, optb"),
        (["email=a@b.org"], "^project_url: it has no default"),
    ):
        with pytest.raises(ConfigError, match=said):
            cli.run(["jarvis", *line])
