"""A run is resumed with the crystals, targets, units and columns that it was begun with, or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from crysldnet import finetune
from crysldnet.config import compose, validate
from crysldnet.data import split
from crysldnet.errors import CrysldnetError, Interrupted
from crysldnet.finetune import FinetuneConfig
from tiny import finetune_config, subset

STOP = "trainer.time_limit_minutes=0.00001"
GIVEN = [
    *("name=a", "epochs=2", STOP, "data.path=data.parquet", "data.targets=[e,kind]", "data.descriptors=[t]"),
    *("data.exclude=[other.parquet]", "data.split.by=file", "data.split.file=split.json"),
]


def with_column(table: pa.Table, name: str, values: pa.Array, unit: str | None = None) -> pa.Table:
    """Return a table with another column of a name, which has a unit or none."""
    field = pa.field(name, values.type, metadata=None if unit is None else {"units": unit})
    if name not in table.column_names:
        return table.append_column(field, values)
    return table.set_column(table.column_names.index(name), field, values)


def write_split(file: str, ids: list[str]) -> None:
    parts = {"train": ids[2:24], "val": ids[24:32], "test": ids[32:]}
    about = {"format_version": split.FORMAT_VERSION, "store_sha256": None, "sha256": split._digest(parts)}
    Path(file).write_text(json.dumps({**about, **parts}))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its first step, and what it was begun with."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        table = pq.read_table(subset(Path("data.parquet"), train=24, val=8, test=8))
        rows = range(len(table))
        table = with_column(table, "e", pa.array([i / 8 for i in rows]), "eV/atom")
        table = with_column(table, "kind", pa.array([f"k{i % 2}" for i in rows]))
        table = with_column(table, "t", pa.array([float(i) for i in rows]), "K")
        pq.write_table(table, "data.parquet")
        pq.write_table(table.slice(0, 2), "other.parquet")
        write_split("split.json", table["material_id"].to_pylist())
        with pytest.raises(Interrupted):
            finetune.run(*finetune_config(*GIVEN))
    return folder


@pytest.fixture
def copied(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in the current folder, to be changed."""
    shutil.copytree(begun, tmp_path / "copied")
    monkeypatch.chdir(tmp_path / "copied")
    return tmp_path / "copied"


def resume() -> None:
    composition = compose("finetune", ["resume=last", "name=a", STOP], Path("runs/finetune/a/config.yaml"))
    finetune.run(validate(composition, FinetuneConfig), composition.values)


CHANGES: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "unit": (lambda t: with_column(t, "e", t["e"], "eV"), r"targets\.e\.unit was 'eV/atom' then, and is 'eV' now"),
    "no unit": (lambda t: with_column(t, "e", t["e"]), r"targets\.e\.unit was 'eV/atom' then, and is '' now"),
    "unit of a descriptor": (lambda t: with_column(t, "t", t["t"], "degC"), r"descriptors\.t was 'K' then"),
    "a descriptor": (lambda t: with_column(t, "t", pc.add(t["t"], 1.0), "K"), "started with other data"),
    "numbers that are texts": (lambda t: with_column(t, "e", t["e"].cast(pa.string()), "eV/atom"), "look like numbers"),
    "truth for classes": (lambda t: with_column(t, "kind", pc.equal(t["kind"], "k1")), "started with other data"),
    "names of classes": (lambda t: with_column(t, "kind", pc.utf8_upper(t["kind"])), "started with other data"),
    "name of a column": (lambda t: t.rename_columns([{"e": "E"}.get(n, n) for n in t.column_names]), "with other data"),
    "order": (lambda t: t.take(list(range(len(t)))[::-1]), "started with other data"),
    "data set": (lambda t: t.replace_schema_metadata({"dataset": "another"}), "dataset was 'mp_starter' then"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_is_not_resumed_where_its_data_have_another(what: str, copied: Path) -> None:
    change, says = CHANGES[what]
    pq.write_table(change(pq.read_table("data.parquet")), "data.parquet")
    with pytest.raises(CrysldnetError, match=says):
        resume()


def test_a_run_is_not_resumed_where_what_it_excludes_is_another(copied: Path) -> None:
    pq.write_table(pq.read_table("data.parquet").slice(0, 1), "other.parquet")
    with pytest.raises(CrysldnetError, match=r"started with other data"):
        resume()


def test_a_run_is_not_resumed_with_another_split_of_the_same_name(copied: Path) -> None:
    write_split("split.json", pq.read_table("data.parquet")["material_id"].to_pylist()[::-1])
    with pytest.raises(CrysldnetError, match=r"started with other data"):
        resume()


def test_a_run_is_resumed_with_the_same(copied: Path) -> None:
    pq.write_table(pq.read_table("data.parquet"), "data.parquet", compression="none")
    with pytest.raises(Interrupted):
        resume()
