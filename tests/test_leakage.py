"""What data sets share: found as pymatgen finds it, left out where asked for, known to a later test."""

import csv
import json
import sys
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from conftest import COPPER, COPPER_CUBE, ROCKSALT, ROCKSALT_CUBE, cell, cells_of, put_together, supercell
from crysldnet import cli, finetune, pretrain
from crysldnet.artifacts import model_file
from crysldnet.artifacts.provenance import describe_overlap, pretraining_overlap
from crysldnet.data.datasets import open_store
from crysldnet.data.elements import formulas_of
from crysldnet.data.fingerprint import (
    POSSIBLE,
    SIMILAR,
    Fingerprints,
    Tolerance,
    candidates,
    geometry_of,
    overlap,
)
from crysldnet.data.matching import Matcher, duplicates, matches
from crysldnet.data.schema import table_from_crystals
from crysldnet.data.store import CrystalStore
from crysldnet.errors import ConfigError, DataError
from crysldnet.graphs.crystals import Crystals
from crysldnet.signals import RUN_NAME
from crysldnet.tools.datacheck.audit import audit
from tiny import finetune_config, pretrain_config, subset

ANY = Tolerance(np.inf, np.inf)


def store_of(crystals: Crystals, ids: list[str] | None = None) -> CrystalStore:
    names = ids or [str(i) for i in range(len(crystals))]
    return CrystalStore.from_table(table_from_crystals(crystals, names, {}, {}, {}))


def disturbed(crystals: Crystals, strain: float, displacement: float, seed: int = 0) -> Crystals:
    """Strain every cell, displace every atom, move the origin and reorder the atoms."""
    rng = np.random.default_rng(seed)
    change = rng.normal(0, strain, (len(crystals), 3, 3))
    lattice = crystals.lattice @ (np.eye(3) + (change + change.transpose(0, 2, 1)) / 2)
    shift = rng.normal(0, displacement, (len(crystals.numbers), 3))
    frac = crystals.frac_coords + np.einsum("ni,nij->nj", shift, np.linalg.inv(lattice)[crystals.crystal])
    frac += rng.random((len(crystals), 3))[crystals.crystal]
    order = np.concatenate([a + rng.permutation(b - a) for a, b in pairwise(crystals.ptr)])
    return Crystals(lattice, crystals.ptr, crystals.numbers[order], frac[order].astype(np.float32))


@pytest.fixture(scope="module")
def small(starter: CrystalStore) -> Crystals:
    """300 real crystals of at most eight atoms."""
    return starter.crystals.take(np.flatnonzero(starter.crystals.sizes <= 8)[:300])


# --- fingerprints ---


def test_a_fingerprint_does_not_depend_on_cell_origin_or_order(small: Crystals, starter: CrystalStore) -> None:
    cells = cells_of(starter, np.flatnonzero(starter.crystals.sizes <= 6)[:20])
    larger = put_together([supercell(c, (2, 1, 1)) for c in cells])
    assert np.allclose(geometry_of(put_together(cells)), geometry_of(larger), atol=4e-3)
    for one, other in ((ROCKSALT, ROCKSALT_CUBE), (COPPER, COPPER_CUBE)):
        pair = put_together([one, other])
        a, b = geometry_of(pair)
        assert np.allclose(a, b, atol=4e-3)
        assert formulas_of(pair)[0] == formulas_of(pair)[1]
    assert np.allclose(geometry_of(small), geometry_of(disturbed(small, 0.0, 0.0)), atol=4e-3)
    moved = np.abs(geometry_of(small).astype(float) - geometry_of(disturbed(small, 0.05, 0.2))).max(axis=1)
    assert np.median(moved) > 0.02  # which a real change does


def test_close_packings_of_one_metal_are_told_apart() -> None:
    a = 2.55
    hexagonal = [[a, 0, 0], [-a / 2, a * 3**0.5 / 2, 0], [0, 0, a * (8 / 3) ** 0.5]]
    hcp = cell(hexagonal, [29, 29], [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]])
    fcc = cell(a / 2**0.5 * np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]), [29], [[0, 0, 0]])
    packed = Fingerprints.of(store_of(put_together([hcp, fcc])))
    assert len(candidates(packed, packed, SIMILAR)) == 2  # each with itself
    assert len(candidates(packed, packed, POSSIBLE)) == 4


# --- matching, with pymatgen's matcher without a filter as the reference ---


def test_the_filter_loses_no_match_of_strained_displaced_and_reordered_copies(small: Crystals) -> None:
    changed = disturbed(small, strain=0.03, displacement=0.08)
    a, b = store_of(small), store_of(changed)
    matcher = Matcher(small, changed)
    pairs = candidates(Fingerprints.of(a), Fingerprints.of(b), ANY).tolist()
    matched = {(i, j) for i, j in pairs if matcher(i, j)}
    assert sum((i, i) in matched for i in range(len(small))) > 250
    rows = np.arange(len(small))
    assert set(matches(a, rows, b, rows)) == matched


def test_repeats_within_a_real_set_are_those_that_pymatgen_finds(starter: CrystalStore) -> None:
    from pymatgen.analysis.structure_matcher import StructureMatcher
    from pymatgen.core import Structure

    crystals = starter.crystals.take(np.flatnonzero(starter.crystals.sizes <= 20))
    formulas = np.array(formulas_of(crystals))
    matcher = StructureMatcher()

    def structure(row: int) -> Structure:
        own = slice(crystals.ptr[row], crystals.ptr[row + 1])
        return Structure(crystals.lattice[row], crystals.numbers[own], crystals.frac_coords[own])

    expected = set()
    for name, count in zip(*np.unique(formulas, return_counts=True), strict=True):
        same = np.flatnonzero(formulas == name).tolist() if count > 1 else []
        for one, other in combinations(same, 2):
            pair = structure(one), structure(other)
            if matcher.fit(*pair) or matcher.fit(*reversed(pair)):
                expected.add((other, one))
    found = duplicates(store_of(crystals))
    assert set(found.items()) == expected
    assert len(expected) > 3


def test_same_structures_in_other_cells_match_and_other_salts_do_not() -> None:
    silver = ROCKSALT._replace(numbers=np.array([47, 17]))
    crystals = put_together([ROCKSALT, ROCKSALT_CUBE, silver])
    store = store_of(crystals)
    assert duplicates(store) == {1: 0}


# --- audit and dedupe ---


def joined(tables: list[pa.Table]) -> pa.Table:
    return pa.concat_tables([t.replace_schema_metadata(None) for t in tables], promote_options="permissive")


@pytest.fixture(scope="module")
def overlapping(tmp_path_factory: pytest.TempPathFactory, starter: CrystalStore) -> tuple[str, str]:
    """A training set of 60 real crystals; a test set of 30, 10 of them its own, 5 disturbed copies under other ids."""
    folder = tmp_path_factory.mktemp("overlapping")
    table = starter.to_table()
    little = np.flatnonzero(starter.crystals.sizes <= 6)
    formulas = np.array(formulas_of(starter.crystals))
    chosen: list[int] = []
    for row in little:  # so that what is shared is known: no formula twice
        if formulas[row] not in formulas[chosen]:
            chosen.append(int(row))
    train, test = chosen[:60], chosen[50:75]
    copies = disturbed(starter.crystals.take(np.array(chosen[:5])), 0.01, 0.03)
    pq.write_table(table.take(train), folder / "train.parquet")
    made = table_from_crystals(copies, [f"copy-{i}" for i in range(5)], {}, {}, {})
    names = made.column_names
    both = [table.take(test).select(names), made]
    pq.write_table(joined(both), folder / "test.parquet")
    return str(folder / "train.parquet"), str(folder / "test.parquet")


def test_an_audit_finds_exactly_what_is_shared(overlapping: tuple[str, str]) -> None:
    shared = audit(*overlapping)
    assert (shared.train_crystals, shared.test_crystals) == (60, 30)
    assert len(shared.ids) == 10
    assert len(shared.formulas) == 15
    assert shared.structures is not None
    assert set(shared.ids) | {f"copy-{i}" for i in range(5)} == set(shared.structures)
    for by in (shared.ids, shared.formulas, shared.structures):
        assert all(len(of) == 1 for of in by.values())
    assert audit(*overlapping, structures=False).structures is None


def test_the_audit_command_lists_what_it_counts_and_its_status_can_stop_a_pipeline(
    overlapping: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train, test = overlapping
    out = tmp_path / "shared.csv"
    assert cli.run(["data", "audit", "--train", train, "--test", test, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "by id         10 (33.3%)" in printed
    assert "by structure  15 (50.0%)" in printed
    rows = list(csv.DictReader(out.open()))
    assert [sum(r["by"] == by for r in rows) for by in ("id", "formula", "structure")] == [10, 15, 15]
    assert cli.run(["data", "audit", "--train", train, "--test", test, "--strict", "--no-structures"]) == 1
    apart = ["data", "audit", "--train", "embedded:mp_starter@train", "--test", "embedded:mp_starter@test", "--strict"]
    assert cli.run(apart) == 0


def test_dedupe_keeps_the_first_of_each_and_lists_the_rest(
    overlapping: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train, test = overlapping
    first, second = pq.read_table(train), pq.read_table(test)
    both = joined([table.select(second.column_names) for table in (first, second)])
    pq.write_table(both, tmp_path / "both.parquet")
    arguments = ["data", "dedupe", str(tmp_path / "both.parquet"), "--out", str(tmp_path / "unique.store")]
    assert cli.run(arguments) == 0
    kept = CrystalStore.open(tmp_path / "unique.store")
    assert len(kept) == 75
    assert kept.ids.to_pylist()[:60] == first["material_id"].to_pylist()
    removed = list(csv.DictReader((tmp_path / "unique.store.removed.csv").open()))
    assert sum(r["reason"] == "same id" for r in removed) == 10
    assert {r["material_id"] for r in removed if r["reason"] == "same structure"} == {f"copy-{i}" for i in range(5)}
    assert cli.run([*arguments, "--by", "id", "--overwrite"]) == 0
    assert len(CrystalStore.open(tmp_path / "unique.store")) == 80
    with pytest.raises(DataError, match="already exists"):
        cli.run(arguments)


@pytest.mark.parametrize(("by", "left"), [("formula", 45), ("structure", 45)])
def test_dedupe_against_a_test_set_leaves_nothing_of_it(
    overlapping: tuple[str, str], tmp_path: Path, by: str, left: int
) -> None:
    train, test = overlapping
    out = str(tmp_path / "apart.parquet")
    assert cli.run(["data", "dedupe", train, "--out", out, "--against", test, "--against-by", by]) == 0
    shared = audit(out, test)
    assert shared.train_crystals == left
    assert not shared.ids
    assert not shared.structures
    assert cli.run(["data", "dedupe", train, "--out", out, "--against", train, "--overwrite"]) == 1


# --- pretraining and what comes after ---

SHORT = ["stage=vae", "stages.vae.epochs=1", "data.batch_size=16", "trainer.accelerator=cpu", "data.split.by=random"]


def pretrained(tmp_path: Path, name: str, *arguments: str) -> Path:
    config, values = pretrain_config(*SHORT, f"runs={tmp_path / 'runs'}", f"name={name}", *arguments)
    assert pretrain.run(config, values) == 0
    return tmp_path / "runs" / "pretrain" / name


@pytest.fixture(autouse=True)
def fresh_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_NAME, raising=False)


@pytest.mark.parametrize("by", ["formula", "structure"])
def test_pretraining_leaves_out_what_is_excluded_and_says_so(
    overlapping: tuple[str, str], tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = overlapping
    folder = pretrained(tmp_path, by, f"data.path={train}", f"data.exclude=[{test}]", f"data.exclude_by={by}")
    monkeypatch.delenv(RUN_NAME, raising=False)
    summary = json.loads((folder / "summary.json").read_text())
    info, _ = model_file.read(folder / "encoder.safetensors", "encoder")
    split = json.loads((folder / "split.json").read_text())
    (record,) = summary["excluded"]
    assert record == info["provenance"]["excluded"][0]
    assert record["sha256"] == open_store(test).hash
    assert record["name"] == test
    assert record["by"] == by
    gone = set(open_store(train).ids.to_pylist()) - {
        i for ids in (split["train"], split["val"], split["test"]) for i in ids
    }
    assert record["crystals"] == len(gone) > 5
    tested = Fingerprints.of(open_store(test))
    counts = pretraining_overlap(str(folder), tested)
    assert counts is not None
    assert counts["ids"] == counts["formulas"] == counts["similar"] == 0
    without = pretraining_overlap(str(pretrained(tmp_path, "all", f"data.path={train}")), tested)
    assert without is not None
    assert without["ids"] > 5


def test_an_encoder_remembers_the_crystals_of_both_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_store("embedded:mp_starter").to_table()
    little = np.flatnonzero(open_store("embedded:mp_starter").crystals.sizes <= 6)
    for name, rows in (("one", little[:40]), ("two", little[30:70])):
        pq.write_table(whole.take(rows), tmp_path / f"{name}.parquet")
    fractions = "data.split.fractions=[1.0, 0.0, 0.0]"
    first = pretrained(tmp_path, "first", f"data.path={tmp_path / 'one.parquet'}", fractions)
    monkeypatch.delenv(RUN_NAME, raising=False)
    second = pretrained(
        tmp_path, "second", f"data.path={tmp_path / 'two.parquet'}", fractions, "stage=diffusion",
        f"init={first / 'vae' / 'pretraining.safetensors'}", "stages.diffusion.epochs=1",
    )  # fmt: skip
    seen = model_file.read_pretraining_set(second / "encoder.safetensors")
    assert seen is not None
    assert len(seen) == 70
    assert overlap(Fingerprints.of(CrystalStore.from_table(whole), little[:80]).packed(), seen)["ids"] == 70


def test_finetuning_reports_the_test_crystals_that_pretraining_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = subset(tmp_path / "small.parquet", train=40, val=10, test=12)
    everything = pretrained(tmp_path, "all", f"data.path={path}", "data.split.fractions=[1.0, 0.0, 0.0]")
    monkeypatch.delenv(RUN_NAME, raising=False)
    apart = pretrained(tmp_path, "apart", f"data.path={path}", "data.split.by=column")

    def summary(name: str, encoder: str) -> dict:
        monkeypatch.delenv(RUN_NAME, raising=False)
        arguments = [f"runs={tmp_path / 'runs'}", f"name={name}", f"data.path={path}", f"pretrained={encoder}"]
        config, values = finetune_config(*arguments, "epochs=1", "data.batch_size=16", "trainer.accelerator=cpu")
        assert finetune.run(config, values) == 0
        return json.loads((tmp_path / "runs/finetune" / name / "summary.json").read_text())["pretraining_overlap"]

    capsys.readouterr()
    assert summary("leaky", str(everything)) == {
        "test_crystals": 12, "pretraining_crystals": 62, "ids": 12, "formulas": 12, "similar": 12
    }  # fmt: skip
    assert "same reduced formula" in capsys.readouterr().out
    assert summary("apart", str(apart)) == {
        "test_crystals": 12, "pretraining_crystals": 40, "ids": 0, "formulas": 0, "similar": 0
    }  # fmt: skip
    assert summary("scratch", "none") is None
    saved = json.loads((tmp_path / "runs/finetune/apart/split.json").read_text())
    assert saved["counts"] == {"train": 40, "val": 10, "test": 12}


def test_a_file_that_does_not_say_what_it_was_trained_on_is_not_called_clean(tmp_path: Path) -> None:
    path = subset(tmp_path / "small.parquet", train=30, val=4)
    folder = pretrained(tmp_path, "old", f"data.path={path}")
    info, state = model_file.read(folder / "encoder.safetensors", "encoder")
    model_file.write(folder / "encoder.safetensors", "encoder", state, {k: v for k, v in info.items() if k != "kind"})
    counts = pretraining_overlap(str(folder), Fingerprints.of(open_store(str(path))))
    assert counts is not None
    assert counts["ids"] is None
    assert "isn't known" in describe_overlap(counts)
    assert model_file.load_encoder(folder / "encoder.safetensors")


def test_a_wrong_exclusion_is_refused_before_training(tmp_path: Path) -> None:
    path = subset(tmp_path / "small.parquet", train=30, val=4)
    with pytest.raises(DataError, match="no such file"):
        pretrained(tmp_path, "wrong", f"data.path={path}", "data.exclude=[nowhere.parquet]")
    with pytest.raises(ConfigError, match=r"data\.exclude_by"):
        pretrained(tmp_path, "wrong", f"data.path={path}", "data.exclude_by=id")
    with pytest.raises(DataError, match="no crystal is left to train on"):
        pretrained(tmp_path, "wrong", f"data.path={path}", f"data.exclude=[{path}]")
    assert not (tmp_path / "runs" / "pretrain" / "wrong").exists()


def test_the_embedded_splits_share_no_formula_and_no_structure() -> None:
    for one, other in combinations(("train", "val", "test"), 2):
        shared = audit(f"embedded:mp_starter@{one}", f"embedded:mp_starter@{other}")
        assert not shared.ids
        assert not shared.formulas
        assert not shared.structures


def test_structures_of_the_test_split_leave_no_trace_in_a_pretrained_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = subset(tmp_path / "one.parquet", train=30, val=4, test=10)
    table = pq.read_table(path)
    other = open_store("embedded:matbench_phonons").to_table().slice(0, 10)
    rows = table.to_pylist()
    tests = [row for row in rows if row["split"] == "test"]
    for row, new in zip(tests, other.to_pylist(), strict=True):
        row |= {name: new[name] for name in ("lattice", "atomic_numbers", "frac_coords")}
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "two.parquet")
    states = []
    for name in ("one", "two"):
        monkeypatch.delenv(RUN_NAME, raising=False)
        folder = pretrained(tmp_path, name, f"data.path={tmp_path / name}.parquet", "data.split.by=column")
        states.append(model_file.read(folder / "encoder.safetensors", "encoder")[1])
    assert open_store(str(tmp_path / "one.parquet")).hash != open_store(str(tmp_path / "two.parquet")).hash
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_without_pymatgen_structures_are_refused_with_a_way_out_and_formulas_work(
    overlapping: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pymatgen.analysis.structure_matcher", None)
    with pytest.raises(DataError, match="compare by formula"):
        audit(*overlapping)
    assert len(audit(*overlapping, structures=False).formulas) == 15
