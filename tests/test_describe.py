"""Descriptions of data sets: counts against plain Python, planted faults found, pages that need no network."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import cell, cells_of, put_together
from crysldnet import cli
from crysldnet.data.elements import SYMBOLS
from crysldnet.data.schema import table_from_crystals
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError
from crysldnet.graphs.crystals import Crystals
from crysldnet.html.page import place_of
from crysldnet.tools.datacheck.describe import Histogram, as_text, describe, find_suspicious
from crysldnet.tools.datacheck.description_page import page
from html_page import assert_self_contained
from tiny import subset


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return subset(tmp_path_factory.mktemp("small") / "small.parquet", train=150, val=20, test=30)


def test_counts_are_those_of_a_plain_loop(small: Path) -> None:
    d = describe(str(small))
    rows = CrystalStore.open(small).to_table().to_pylist()
    counted = Counter(symbol for row in rows for symbol in {SYMBOLS[z] for z in row["atomic_numbers"]})
    assert d.elements == dict(counted)
    assert d.crystals == len(rows) == 200
    assert d.atoms == sum(len(row["atomic_numbers"]) for row in rows)
    assert sum(d.atoms_per_crystal.counts) == sum(d.volume_per_atom.counts) == 200
    sizes = Counter(len(row["atomic_numbers"]) for row in rows)
    h = d.atoms_per_crystal
    for count, (low, high) in zip(h.counts, pairwise(h.edges), strict=True):
        assert count == sum(n for size, n in sizes.items() if low < size < high)
    energy = d.properties[0]
    values = np.array([row["formation_energy_per_atom"] for row in rows])
    assert (energy.name, energy.unit, energy.count, energy.missing) == ("formation_energy_per_atom", "eV/atom", 200, 0)
    assert energy.mean == pytest.approx(values.mean())
    assert energy.std == pytest.approx(values.std())
    assert energy.quantiles[2] == pytest.approx(np.median(values))
    assert d.texts == {"formula": 200, "split": 200}
    assert d.repeats["id"] == 0
    assert d.repeats["reduced formula"] == 200 - len({row["formula"] for row in rows})


def with_faults(starter: CrystalStore) -> CrystalStore:
    """Make three bad crystals of real ones: pressed until atoms overlap, swollen, of an impossible energy."""
    crystals = starter.crystals
    heavy = [row for row in range(100) if crystals.sizes[row] <= 12 and 1 not in crystals.take(np.array([row])).numbers]
    cells = cells_of(starter, heavy[:4])
    cells[0] = cells[0]._replace(lattice=cells[0].lattice * 0.35)
    cells[1] = cells[1]._replace(lattice=cells[1].lattice * 4)
    hydrogen = cell(np.eye(3) * 6.0, [1, 1], [[0, 0, 0], [0.74 / 6, 0, 0]])
    energies = [0.0, 0.0, -7.5, -1.0, 0.0]
    table = table_from_crystals(
        put_together([*cells, hydrogen]),
        ["pressed", "swollen", "impossible", "sound", "hydrogen"],
        {"formation_energy_per_atom": pa.array(energies), "total_energy": pa.array([-90.0] * 5)},
        {"formation_energy_per_atom": "eV/atom", "total_energy": "eV"},
        {},
    )
    return CrystalStore.from_table(table, "faulty")


def test_planted_faults_are_found_and_nothing_else(starter: CrystalStore) -> None:
    found = {s.id: s.reason for s in find_suspicious(with_faults(starter))}
    assert set(found) == {"pressed", "swollen", "impossible"}
    assert re.match(r"atoms overlap: \w+–\w+ 0\.\d\d Å apart", found["pressed"])
    assert "Å³ per atom (outside 4 to 200)" in found["swollen"]
    assert found["impossible"] == "formation_energy_per_atom is -7.5 eV/atom"


def test_sheets_in_vacuum_are_named_and_bulk_crystals_are_not(starter: CrystalStore) -> None:
    assert find_suspicious(starter) == []
    d = describe("embedded:matbench_jdft2d", structures=False)
    assert d.suspicious
    assert all("Å³ per atom" in s.reason for s in d.suspicious)


def test_the_page_needs_no_network_and_says_what_the_text_says(small: Path, tmp_path: Path) -> None:
    d = describe(str(small))
    text = page(d)
    parsed = assert_self_contained(re.sub(r"10\.\d{4}/\S+", "", text))
    assert "prefers-color-scheme: dark" in text
    said = " ".join(parsed.texts)
    for p in d.properties:
        assert f"{p.name} ({p.unit})" in said
        assert f"mean {p.mean:.4g}" in said
        assert f"mean {p.mean:.4g}" in as_text(d)
    assert f"{d.crystals:,}" in said


def test_markup_in_a_name_stays_text(tmp_path: Path, starter: CrystalStore) -> None:
    crystals: Crystals = starter.crystals.take(np.array([0]))
    table = table_from_crystals(crystals, ["<script>alert(1)</script>"], {"<b>": pa.array([1.0])}, {}, {})
    store = CrystalStore.from_table(table.replace_schema_metadata({"source": "<i>x</i>"}), "x")
    pq.write_table(store.to_table(), tmp_path / "odd.parquet")
    text = page(describe(str(tmp_path / "odd.parquet")))
    assert "<script>" not in text
    assert "<i>" not in text
    assert "&lt;i&gt;" in text


def test_every_element_has_a_place_of_its_own_in_the_periodic_table() -> None:
    from pymatgen.core import Element

    places = {z: place_of(z) for z in range(1, 119)}
    assert len(set(places.values())) == 118
    for z, (row, column) in places.items():
        element = Element.from_Z(z)
        if element.is_lanthanoid or element.is_actinoid:
            assert row == element.row + (0 if element.row > 7 else 3)
        else:
            assert (row, column) == (element.row, element.group)


def test_a_histogram_of_nothing_and_of_one_value() -> None:
    assert Histogram.of(np.array([])).counts == [0]
    assert sum(Histogram.of(np.array([2.0])).counts) == 1
    assert Histogram.of(np.array([3, 3, 5]), whole=True).counts == [2, 0, 1]


def test_the_command_writes_page_and_picture(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    html, png = tmp_path / "a.html", tmp_path / "a.png"
    assert cli.run(["data", "describe", f"{small}@train", "--html", str(html), "--png", str(png)]) == 0
    printed = capsys.readouterr().out
    assert "crystals  150" in printed
    assert html.read_text().startswith("<!doctype html>")
    assert png.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match=r"nowhere/a\.png: can't be written"):
        cli.run(["data", "describe", str(small), "--png", str(tmp_path / "nowhere" / "a.png")])
