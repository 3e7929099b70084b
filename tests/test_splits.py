"""Splits: none leaks what it promises to keep apart, all are repeatable, and a saved one is read back exactly."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from crysldnet.data.elements import SYMBOLS, reduced_formula
from crysldnet.data.split import SPLITS, Split, read_split_file, split_text
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError

WAYS = [
    {"by": "random"},
    {"by": "formula"},
    {"by": "chemical_system"},
    {"by": "leave_cluster_out", "clusters": 40},
    {"by": "leave_element_out", "elements": ["F"]},
    {"by": "time", "column": "year"},
]


@pytest.fixture(scope="module")
def some(starter: CrystalStore) -> CrystalStore:
    """A thousand real crystals, with a year of discovery that is made up, unknown for some."""
    table = starter.to_table().slice(0, 1000)
    years = [None if i % 50 == 0 else 1990 + (i * 37) % 30 for i in range(1000)]
    dates = [None if y is None else f"{y}-0{1 + i % 9}-01" for i, y in enumerate(years)]
    table = table.append_column("year", pa.array(years, pa.int32())).append_column("date", pa.array(dates))
    return CrystalStore.from_table(table, "some")


def keys_of(store: CrystalStore, by: str) -> np.ndarray:
    """Return what a split keeps together, worked out without the code under test."""
    numbers = [store.crystals.numbers[a:b] for a, b in pairwise(store.crystals.ptr)]
    if by == "formula":
        return np.array([reduced_formula(z) for z in numbers])
    return np.array(["-".join(sorted({SYMBOLS[int(n)] for n in z})) for z in numbers])


def apart(train: set, val: set, test: set) -> None:
    """Assert that no two share anything."""
    assert not train & val
    assert not train & test
    assert not val & test


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way["by"])
def test_a_split_has_no_row_twice_and_depends_on_store_and_seed_alone(some: CrystalStore, way: dict) -> None:
    one, two = Split(**way).rows(some), Split(**way).rows(some)
    assert all(np.array_equal(one[name], two[name]) for name in SPLITS)
    everything = np.concatenate([one[name] for name in SPLITS])
    assert len(set(everything.tolist())) == len(everything)
    assert all(len(one[name]) > 5 for name in SPLITS)
    unused = 20 if way["by"] == "time" else 0
    assert len(everything) == len(some) - unused
    if way["by"] != "time":
        other = Split(**way, seed=1).rows(some)
        assert not np.array_equal(one["train"], other["train"])


@pytest.mark.parametrize("by", ["formula", "chemical_system"])
def test_what_is_kept_together_never_crosses_a_split(some: CrystalStore, by: str) -> None:
    keys = keys_of(some, by)
    rows = Split(by=by).rows(some)  # type: ignore[arg-type]
    apart(*(set(keys[rows[name]]) for name in SPLITS))
    random = Split(by="random").rows(some)
    assert set(keys[random["train"]]) & set(keys[random["test"]])  # which a random split does


def test_a_split_by_chemical_system_is_one_by_formula_too_but_not_the_other_way_round(some: CrystalStore) -> None:
    systems, formulas = keys_of(some, "chemical_system"), keys_of(some, "formula")
    by_system, by_formula = Split(by="chemical_system").rows(some), Split(by="formula").rows(some)
    assert not set(formulas[by_system["train"]]) & set(formulas[by_system["test"]])
    assert set(systems[by_formula["train"]]) & set(systems[by_formula["test"]])


def test_an_element_that_is_left_out_is_in_the_test_alone(some: CrystalStore) -> None:
    rows = Split(by="leave_element_out", elements=["F", "Cl"]).rows(some)
    has = np.array([bool({"F", "Cl"} & set(key.split("-"))) for key in keys_of(some, "chemical_system")])
    assert np.array_equal(rows["test"], np.flatnonzero(has))
    assert not has[rows["train"]].any()
    assert not has[rows["val"]].any()
    assert len(rows["train"]) == pytest.approx(8 / 9 * (~has).sum(), abs=2)


@pytest.mark.parametrize("column", ["year", "date"])
def test_no_test_crystal_is_older_than_a_training_crystal(some: CrystalStore, column: str) -> None:
    rows = Split(by="time", column=column).rows(some)
    times = some.texts_of(column)
    spans = [(min(times[rows[name]]), max(times[rows[name]])) for name in SPLITS]
    for (_, newest), (oldest, _) in pairwise(spans):
        assert newest < oldest
    assert all(times[row] is not None for name in SPLITS for row in rows[name])


def test_a_cluster_never_crosses_a_split_and_its_test_crystals_are_unlike_those_trained_on(
    starter: CrystalStore,
) -> None:
    pytest.importorskip("sklearn")
    from crysldnet.data.split import clusters_of, features_of

    features = features_of(starter)

    def nearest(by: str, seed: int) -> float:
        """Mean distance of a test crystal to the nearest training crystal, in the space of the features."""
        rows = Split(by=by, seed=seed).rows(starter)  # type: ignore[arg-type]
        test, train = features[rows["test"]], features[rows["train"]]
        squares = (test**2).sum(1)[:, None] + (train**2).sum(1)[None] - 2 * test @ train.T
        return float(np.sqrt(squares.min(axis=1).clip(0)).mean())

    clusters = clusters_of(starter, 50, seed=0)
    rows = Split(by="leave_cluster_out").rows(starter)
    apart(*(set(clusters[rows[name]].tolist()) for name in SPLITS))
    by_cluster, at_random, by_formula = (
        np.mean([nearest(by, seed) for seed in range(2)]) for by in ("leave_cluster_out", "random", "formula")
    )
    assert by_cluster > 1.3 * at_random
    assert by_formula < 1.1 * at_random  # which polymorphs alone don't make


@pytest.mark.parametrize("way", [{"by": "random"}, {"by": "formula"}, {"by": "chemical_system"}], ids=lambda w: w["by"])
def test_fractions_of_the_labels_lie_within_each_other_and_leave_the_test_alone(some: CrystalStore, way: dict) -> None:
    shares = [0.01, 0.05, 0.1, 0.2, 0.4, 1.0]
    rows = [Split(**way, train_fraction=share).rows(some) for share in shares]
    whole = len(rows[-1]["train"])
    for share, smaller, larger in zip(shares, rows, rows[1:], strict=False):
        assert set(smaller["train"]) < set(larger["train"])
        assert len(smaller["train"]) == round(share * whole)
        assert np.array_equal(smaller["test"], larger["test"])


def test_a_saved_split_is_read_back_exactly(some: CrystalStore, tmp_path: Path) -> None:
    rows = Split(by="formula", train_fraction=0.3).rows(some)
    path = tmp_path / "split.json"
    path.write_text(split_text(some, rows, {"by": "formula"}))
    again = Split(by="file", file=str(path)).rows(some)
    assert all(np.array_equal(rows[name], again[name]) for name in SPLITS)
    content = json.loads(path.read_text())
    assert content["counts"] == {name: len(rows[name]) for name in SPLITS}
    assert content["train"] == some.ids_at(rows["train"])


def test_a_split_file_is_refused_where_it_is_not_that_split(some: CrystalStore, tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    content = json.loads(split_text(some, Split(by="random").rows(some), {}))

    def refused(says: str, **changed: object) -> None:
        path.write_text(json.dumps({**content, **changed}))
        with pytest.raises(DataError, match=says) as caught:
            read_split_file(path, some)
        assert str(path) in str(caught.value)

    refused("sha256 differs", test=[*content["test"], content["train"][0]])
    refused("made for other data", store_sha256="0" * 64)
    refused("format version is 2", format_version=2)
    refused("not a split file", train=None)
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(DataError, match="not a split file"):
            read_split_file(path, some)
    with pytest.raises(DataError, match="no such file"):
        read_split_file(tmp_path / "absent.json", some)
    fewer = CrystalStore.from_table(some.to_table().slice(0, 900), "fewer")
    path.write_text(json.dumps({**content, "store_sha256": None}))
    assert set(read_split_file(path, some)) == set(SPLITS)
    with pytest.raises(DataError, match="aren't in fewer"):
        read_split_file(path, fewer)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"by": "leave_element_out"}, "split.elements"),
        ({"by": "leave_element_out", "elements": ["Xx"]}, "'Xx' is not the symbol"),
        ({"by": "leave_cluster_out", "clusters": 2}, "at least 3"),
        ({"by": "file"}, "split.file"),
    ],
)
def test_a_split_without_what_it_needs_is_refused(settings: dict, says: str) -> None:
    with pytest.raises(DataError, match=says):
        Split(**settings)


def test_a_store_without_what_a_split_needs_is_refused_with_the_mend(some: CrystalStore) -> None:
    with pytest.raises(DataError, match=r"no column 'when'.*data\.split\.column"):
        Split(by="time", column="when").rows(some)
    with pytest.raises(DataError, match="no crystal has Og"):
        Split(by="leave_element_out", elements=["Og"]).rows(some)
    with pytest.raises(DataError, match=r"lower data\.split\.clusters"):
        Split(by="leave_cluster_out", clusters=2000).rows(some)
