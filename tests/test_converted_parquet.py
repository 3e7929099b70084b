"""A large Parquet file that is opened directly is converted to a mapped store once, and is the same data as before."""

import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from crysldnet.data import datasets
from crysldnet.data.datasets import CACHE_VARIABLE, open_store
from crysldnet.data.output import StoreWriter
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of converted files, for files of any size."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "CACHED_FROM", 0)
    return tmp_path / "cache" / "stores"


@pytest.fixture
def parquet(starter: CrystalStore, tmp_path: Path) -> Path:
    pq.write_table(starter.to_table(np.arange(40)), tmp_path / "forty.parquet")
    return tmp_path / "forty.parquet"


def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: CrystalStore) -> None:
        raise AssertionError("the crystals were checked again")

    monkeypatch.setattr(CrystalStore, "refuse_faults", fail)


def test_a_converted_file_is_the_same_data_and_is_not_checked_again(
    cache: Path, parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, first = CrystalStore.open(parquet), open_store(str(parquet))
    no_checks(monkeypatch)
    second = open_store(str(parquet))
    for store in (first, second):
        assert isinstance(store.crystals.lattice, np.memmap)
        assert store.to_table().equals(plain.to_table(), check_metadata=True)
        assert (store.hash, store.name, store.units, store.metadata) == (
            plain.hash, plain.name, plain.units, plain.metadata
        )  # fmt: skip
        store.verify()
    assert len(list(cache.glob("*.store"))) == 1


def test_a_converted_file_travels_to_other_processes_as_a_path(cache: Path, parquet: Path) -> None:
    store = open_store(str(parquet))
    data = pickle.dumps(store)
    assert len(data) < 1000
    parquet.unlink()
    other = pickle.loads(data)
    assert other.name == str(parquet)
    assert other.ids.equals(store.ids)


def test_a_changed_file_is_converted_anew(cache: Path, parquet: Path, starter: CrystalStore) -> None:
    before = open_store(str(parquet))
    pq.write_table(starter.to_table(np.arange(1, 41)), parquet)
    after = open_store(str(parquet))
    assert after.ids.to_pylist() == starter.ids.to_pylist()[1:41] != before.ids.to_pylist()


def test_a_file_with_a_bad_crystal_is_refused_every_time(cache: Path, parquet: Path) -> None:
    table = pq.read_table(parquet)
    lattice = table["lattice"].to_pylist()
    lattice[3] = [0.0] * 9
    where = table.column_names.index("lattice")
    pq.write_table(table.set_column(where, table.schema.field("lattice"), [lattice]), parquet)
    for _ in range(2):
        with pytest.raises(DataError, match=r"forty\.parquet: 1 of 40 crystals can't be used"):
            open_store(str(parquet))
    assert not list(cache.glob("*.store"))


@pytest.mark.parametrize("folder", ["none", "{file}/below", "{full}"])
def test_where_the_cache_cannot_be_written_the_file_is_read_as_it_is(
    cache: Path, parquet: Path, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv(CACHE_VARIABLE, folder.format(file=parquet, full=tmp_path / "full"))
    if folder == "{full}":
        monkeypatch.setattr(StoreWriter, "append", no_space)
    store = open_store(str(parquet))
    assert len(store) == 40
    assert not isinstance(store.crystals.lattice, np.memmap)
    assert not list(tmp_path.glob("**/*.store"))


def test_small_files_leave_nothing_in_the_cache(cache: Path, parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "CACHED_FROM", parquet.stat().st_size + 1)
    assert not isinstance(open_store(str(parquet)).crystals.lattice, np.memmap)
    assert not cache.exists()


def test_a_damaged_conversion_is_made_again(cache: Path, parquet: Path) -> None:
    open_store(str(parquet))
    (converted,) = cache.glob("*.store")
    (converted / "numbers.bin").write_bytes(b"")
    assert len(open_store(str(parquet)).crystals.numbers) > 0
    (converted / "store.json").unlink()
    assert isinstance(open_store(str(parquet)).crystals.lattice, np.memmap)


def test_conversions_that_nobody_opens_are_removed_after_a_month(cache: Path, parquet: Path) -> None:
    open_store(str(parquet))
    (used,) = cache.glob("*.store")
    old, recent = cache / "old.store", cache / "recent.store"
    for folder, days in ((old, 31), (recent, 29), (used, 31)):
        if folder != used:
            shutil.copytree(used, folder)
        os.utime(folder, (0, time.time() - days * 86_400))
    open_store(str(parquet))  # which is to open it
    pq.write_table(pq.read_table(parquet).slice(1), parquet)
    open_store(str(parquet))
    assert not old.exists()
    assert recent.exists()
    assert used.exists()


def _open_slowly(path: str, log: str) -> None:
    check = CrystalStore.refuse_faults

    def slow(store: CrystalStore) -> None:
        with open(log, "a") as file:
            file.write("checked\n")
        time.sleep(0.3)
        check(store)

    CrystalStore.refuse_faults = slow  # type: ignore[method-assign]
    assert isinstance(open_store(path).crystals.lattice, np.memmap)


def test_of_several_processes_one_converts(cache: Path, parquet: Path, tmp_path: Path) -> None:
    open_store("embedded:mp_starter")  # compiles before the processes part
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_open_slowly, args=(str(parquet), str(tmp_path / "log"))) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "log").read_text() == "checked\n"
