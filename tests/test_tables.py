"""Numbers, units and ids in tables: what can be read in one way alone is read, anything else stops or is counted."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from crysldnet.data.cells import LOOKS_LIKE_A_NUMBER, CellError, plain_numbers, read_numbers
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.split import Split
from crysldnet.data.store import CrystalStore
from crysldnet.data.units import is_unit, same_unit
from crysldnet.errors import DataError
from crysldnet.graphs.spec import GraphSpec
from crysldnet.readers import sources
from crysldnet.readers.stream import CrystalStream, StreamSettings
from crysldnet.tools.importer.importer import ImportReport, import_crystals

nan = float("nan")


def crystal(name: str, **values: Any) -> dict[str, Any]:
    """Return a record of a small crystal; its size depends on its name."""
    a = 4.0 + 0.01 * (sum(name.encode()) % 50)
    structure = {
        "lattice": [a, 0, 0, 0, a, 0, 0, 0, a],
        "atomic_numbers": [11, 17],
        "frac_coords": [0, 0, 0, 0.5, 0.5, 0.5],
    }
    return {"material_id": name, **structure, **values}


def with_table(folder: Path, text: str | bytes, **options: Any) -> tuple[ImportReport, CrystalStore]:
    """Import crystals a to f, or those that are named, with a table."""
    names = options.pop("names", "abcdef")
    (folder / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    out = folder / "out.store"
    report = import_crystals(
        [crystal(name) for name in names], out, targets=folder / "t.csv", overwrite=True, **options
    )
    return report, CrystalStore.open(out)


def refused(folder: Path, text: str) -> str:
    """Return why a table isn't read; nothing is written then."""
    with pytest.raises(DataError) as error:
        with_table(folder, text)
    assert sorted(path.name for path in folder.iterdir()) == ["t.csv"]
    return str(error.value)


READ = [
    (["0", "1,25", "2,5"], True, [0, 1.25, 2.5]),
    (["0,063", "1.063,26", "1.063.260"], True, [0.063, 1063.26, 1063260]),
    (["1,063.26", "+1,063,000", "3"], False, [1063.26, 1063000, 3]),
    (["1'063.26", "1\u202f063", "2’000"], False, [1063.26, 1063, 2000]),
    (["−1.5", "–2", "-3", ".5", "5."], False, [-1.5, -2, -3, 0.5, 5]),
    (["1.5D+03", "2e-3", "1E5"], False, [1500, 0.002, 1e5]),
    (["1", "na", "NaN", "None", "-", "", "N/A"], False, [1] + [nan] * 6),
    ([" 1 ", "\u00a02"], False, [1, 2]),
    (["１．５", "－2", "‑3.5", "1e−3", "'-4", "٣"], False, [1.5, -2, -3.5, 0.001, -4, 3]),
    (["1'063", "2.5"], True, [1063, 2.5]),
]


@pytest.mark.parametrize(("cells", "commas", "values"), READ)
def test_a_number_that_can_be_read_in_one_way_is_read(cells: list[str], commas: bool, values: list[float]) -> None:
    found = read_numbers(Counter(cells), commas=commas)
    assert found is not None
    np.testing.assert_array_equal([found.read[cell].value for cell in cells], values)


@pytest.mark.parametrize(
    ("cells", "commas", "reason"),
    [
        (["1,25", "2"], False, "a comma that may be a decimal one"),
        (["1,063"], True, "a comma that may be a decimal one"),
        (["1,063", "3.5"], True, "a comma that may be a decimal one"),
        (["0,5", "3.5"], True, "no decimal comma as others have"),
        (["1 063", "1"], False, "a space or an underscore"),
        (["1_000", "1"], False, "a space or an underscore"),
        (["<0.5", "1"], False, "a bound or an estimate"),
        (["~ 5 GPa", "1 GPa"], False, "a bound or an estimate"),
        (["0.5-0.7", "1"], False, "a range"),
        (["1.5 × 10^3", "1"], False, "a power of ten in words"),
        (["1 GPa", "2 eV"], False, "the unit 'GPa'"),
        (["1 GPa", "2"], False, "where others have none"),
        (["12 apples", "3 apples"], False, "not known as a unit"),
        (["1 GPa ± 3", "1 GPa"], False, "its uncertainty behind the unit"),
        (["True", "1"], False, "stands among numbers"),
        (["ca. 5", "1"], False, "a bound or an estimate"),
        (["10⁻³", "1"], False, "a raised digit"),
        (["5²"], False, "a raised digit"),
        (["1.5*", "1"], False, "the mark of a footnote"),
        (["63.2 ± 3 %"], False, "an uncertainty in percent"),
        (["1.063,26", "1"], False, "a comma that may be a decimal one"),
        (["1.063.260", "1"], False, "points seem to divide thousands"),
        (["01.Mai", "2.5"], True, "a date among numbers"),
        (["2-Jan", "Feb 63", "3"], False, "a date among numbers"),
        (["2024-05-01", "1.2", "3"], False, "a date among numbers"),
    ],
)
def test_a_number_that_can_be_read_in_two_ways_is_refused(cells: list[str], commas: bool, reason: str) -> None:
    with pytest.raises(CellError) as error:
        read_numbers(Counter(cells), commas=commas)
    assert error.value.text in cells
    assert reason in error.value.reason


@pytest.mark.parametrize(
    "cells",
    [
        ["Na", "Na", "NaN", "K"],
        ["None", "FM"],
        ["2021-08-18", "2021-08-19"],
        ["18.08.2021"],
        ["4H", "2H", "3C"],
        ["3D-bulk", "2D"],
        ["0012", "0451"],
        ["225 Fm-3m", "221 Pm-3m"],
        ["1.2.3", "1.3.0"],
        ["1/3", "2/3"],
        ["True", "False"],
        ["a", "b", "1"],
    ],
)
def test_texts_stay_texts(cells: list[str]) -> None:
    assert read_numbers(Counter(cells)) is None


def test_the_quick_look_misses_no_number() -> None:
    cells = [cell for cells, *_ in READ for cell in cells] + [
        "5.64(3)",
        "63 ± 3",
        "63 +/- 3 GPa",
        "5%",
        "300K",
        "5cm-1",
        "<5",
    ]
    found = pc.match_substring_regex(pa.array(cells), LOOKS_LIKE_A_NUMBER).to_pylist()
    assert [cell for cell, is_found in zip(cells, found, strict=True) if not is_found] == [
        "na",
        "NaN",
        "None",
        "-",
        "",
        "N/A",
    ]


def test_decimal_commas_are_read_where_semicolons_or_tabs_divide_the_cells(tmp_path: Path) -> None:
    for mark in (";", "\t"):
        text = "id|gap (eV)|k\na|0|63,26 ± 3\nb|1,25|5,0\n".replace("|", mark)
        report, store = with_table(tmp_path, text, names="ab")
        assert (report.unused, store.units) == ((), {"gap": "eV"})
        assert store.numbers_of("gap").tolist() == [0, 1.25]
        assert store.numbers_of("k").tolist() == [63.26, 5]
        np.testing.assert_array_equal(store.numbers_of("k_uncertainty"), [3, nan])


def test_a_point_may_divide_thousands_where_other_columns_have_decimal_commas(tmp_path: Path) -> None:
    for cells in ("1.063", "-2.145 GPa", "1.063 ± 2"):
        said = refused(tmp_path, f"id;gap;k\na;0,5;{cells}\nb;1;{cells}\n")
        assert f"t.csv line 2: 'k' has '{cells}', whose point may divide thousands" in said
        assert "write 1063 or 1,063" in said or "write -2145 or -2,145" in said
    for other, cells, values in (
        ("0,5", ("1,063", "2"), [1.063, 2]),
        ("0,5", ("1.063.260", "2"), [1063260, 2]),
        ("0,5", ("1.063", "0.5"), [1.063, 0.5]),
        ("0.5", ("1.063", "2.145"), [1.063, 2.145]),
        ("7", ("1.063", "2.145"), [1.063, 2.145]),
    ):
        _, store = with_table(tmp_path, f"id;gap;k\na;{other};{cells[0]}\nb;1;{cells[1]}\n", names="ab")
        assert store.numbers_of("k").tolist() == values
        shutil.rmtree(tmp_path / "out.store")


def test_a_cell_that_cannot_be_read_without_guessing_stops_before_anything_is_written(tmp_path: Path) -> None:
    said = refused(tmp_path, 'id,bulk modulus (GPa)\na,63\nb,"20,74"\n')
    assert f"{tmp_path}/t.csv line 3: 'bulk modulus (GPa)' has '20,74', which has a comma" in said
    assert "semicolons" in said
    assert "mixes" not in refused(tmp_path, "id,k\na,1 GPa\nb,2\n")
    assert "'band_gap (eV)' has 'FM', where the column has the unit eV" in refused(tmp_path, "id,band_gap (eV)\na,FM\n")


def test_decimal_commas_that_made_more_cells_are_counted(tmp_path: Path) -> None:
    report, _ = with_table(tmp_path, "id,gap\na,0\nb,1,25\n")
    assert report.unused == ("1 of 2 rows of t.csv could not be used, first 'b' in t.csv line 3",)
    assert report.unused[0] in str(report)
    assert report.report_path is not None
    assert "a decimal comma needs semicolons" in report.report_path.read_text()


def test_values_that_are_left_out_are_counted(tmp_path: Path) -> None:
    report, store = with_table(tmp_path, "id,bulk modulus,e\na,63,1\nb,failed,inf\nc,*,2\nd,4,3\n")
    assert report.unused == (
        "2 of 4 values of 'bulk modulus' could not be used, first 'failed' in t.csv line 3",
        "1 of 4 values of 'e' could not be used, first 'inf' in t.csv line 3",
    )
    np.testing.assert_array_equal(store.numbers_of("bulk modulus"), [63, nan, nan, 4, nan, nan])


def test_a_unit_in_every_cell_is_the_columns(tmp_path: Path) -> None:
    _, store = with_table(tmp_path, "id,k,p\na,63.26 GPa ,12 %\nb,5 GPa,5%\n")
    assert store.units == {"k": "GPa", "p": "%"}
    assert store.numbers_of("k")[:2].tolist() == [63.26, 5]


def test_brackets_that_hold_no_unit_are_part_of_the_name(tmp_path: Path) -> None:
    text = "id,magnetic order (DFT),band_gap (PBE),k (W/(m K))\na,FM,1.0,3\nb,AFM,0.0,4\n"
    report, store = with_table(tmp_path, text, names="ab")
    assert store.texts_of("magnetic order (DFT)").tolist() == ["FM", "AFM"]
    assert store.numbers_of("band_gap (PBE)").tolist() == [1, 0]
    assert store.units == {"k": "W/(m K)"}
    assert any("band_gap" in note or "(first: magnetic order (DFT))" in note for note in report.notes)


def test_sodium_is_a_value_and_what_says_none_is_counted(tmp_path: Path) -> None:
    rows = [("a", "Na", "Na"), ("b", "Na", "NaN"), ("c", "K", "N/A"), ("d", "None", "Li")]
    lines = "\n".join(json.dumps(crystal(name, cation=cation, formula=formula)) for name, cation, formula in rows)
    (tmp_path / "x.jsonl").write_text(lines)
    tables = "id,cation,formula\n" + "\n".join(map(",".join, rows))
    for report, store in (
        (import_crystals(tmp_path / "x.jsonl", tmp_path / "x.store"), CrystalStore.open(tmp_path / "x.store")),
        with_table(tmp_path, tables, names="abcd"),
    ):
        assert store.texts_of("cation").tolist() == ["Na", "Na", "K", "None"]
        assert store.texts_of("formula").tolist() == ["Na", "NaN", None, "Li"]
        assert "texts are 'N/A', which was read as no value: 1 (formula)" in report.notes


def test_one_reading_holds_for_all_pieces_of_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 2)
    gaps = ["na", "na", 1, 2.5, "3.5 ± 0.5", "much", None, float("inf")]
    records = [crystal(f"c{i}", gap=gap, code=f"0{i}", flag=i % 2 == 0, cation="Na") for i, gap in enumerate(gaps)]
    report = import_crystals(records, tmp_path / "x.store", workers=1)
    store = CrystalStore.open(tmp_path / "x.store")
    np.testing.assert_array_equal(store.numbers_of("gap"), [nan, nan, 1, 2.5, 3.5, nan, nan, nan])
    np.testing.assert_array_equal(store.numbers_of("gap_uncertainty"), [nan] * 4 + [0.5] + [nan] * 3)
    assert report.unused == ("2 of 5 values of 'gap' could not be used, first 'much' in row 6",)
    assert store.texts_of("code").tolist() == [f"0{i}" for i in range(8)]
    assert store.texts_of("cation").tolist() == ["Na"] * 8
    assert pa.types.is_boolean(store.type_of("flag"))
    for odd in ("63,26", True, "<5"):
        with pytest.raises(DataError, match=rf"row 7: 'gap' has '{odd}'"):
            import_crystals([*records[:6], crystal("x", gap=odd)], tmp_path / "y.store", workers=1)


def test_what_is_no_record_in_a_list_of_records_is_rejected_alone(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps([crystal("a"), [], 3, None, [1], "x", crystal("b")]))
    report = import_crystals(tmp_path / "x.json", tmp_path / "x.store", workers=1)
    assert (report.kept, report.rejected) == (2, 5)


def test_a_csv_of_crystals_is_read_as_a_table_of_properties_is(tmp_path: Path) -> None:
    cif = "data_x _cell_length_a 4 _cell_length_b 4 _cell_length_c 4 _cell_angle_alpha 90 _cell_angle_beta 90 "
    cif += (
        "_cell_angle_gamma 90 loop_ _atom_site_label _atom_site_fract_x _atom_site_fract_y _atom_site_fract_z Na 0 0 0"
    )
    (tmp_path / "x.csv").write_text(f"id;cif;gap (eV);cation\n001;{cif};1.5;Na\n010;{cif};na;K\n")
    (tmp_path / "y.csv").write_text(f"id;cif;gap;k\na;{cif};0,5;1.063\nb;{cif};1;2.145\n")
    with pytest.raises(DataError, match=r"y.csv line 2: 'k' has '1\.063', whose point may divide thousands"):
        import_crystals(tmp_path / "y.csv", tmp_path / "y.store")
    (tmp_path / "y.csv").write_text(f"id;cif;gap;k\na;{cif};0,5;1.063,2\nb;{cif};1;2\n")
    import_crystals(tmp_path / "y.csv", tmp_path / "y.store")
    store = CrystalStore.open(tmp_path / "y.store")
    assert (store.numbers_of("gap").tolist(), store.numbers_of("k").tolist()) == ([0.5, 1], [1063.2, 2])
    import_crystals(tmp_path / "x.csv", tmp_path / "x.store")
    store = CrystalStore.open(tmp_path / "x.store")
    assert store.ids.to_pylist() == ["001", "010"]
    np.testing.assert_array_equal(store.numbers_of("gap"), [1.5, nan])
    assert (store.texts_of("cation").tolist(), store.units) == (["Na", "K"], {"gap": "eV"})


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_table_with_a_byte_order_mark_is_read(tmp_path: Path, encoding: str) -> None:
    _, store = with_table(tmp_path, "id\tgap (Å)\na\t1,5\n".encode(encoding), names="a")
    assert (store.numbers_of("gap").tolist(), store.units) == ([1.5], {"gap": "Å"})
    with pytest.raises(DataError, match="null characters"):
        with_table(tmp_path, "id,gap\na,1\n".encode("utf-16-le"))


def test_ids_that_differ_in_case_suffix_or_zeros_are_shown_beside_each_other(tmp_path: Path) -> None:
    report, _ = with_table(tmp_path, "id,gap\nmp-1,1\nMP-2,2\n7,3\nx.json,4\n", names=["mp-1", "mp-2", "007", "x"])
    assert report.report_path is not None
    lines = report.report_path.read_text()
    for there in ("mp-2", "007", "x"):
        assert f"no crystal has this id; there is '{there}'" in lines
    with pytest.raises(DataError, match="Its first id is '7', one of a crystal is '007'"):
        with_table(tmp_path, "id,gap\n7,1\n", names=["007"])


def test_an_unnamed_first_column_is_the_index_of_a_data_frame(tmp_path: Path) -> None:
    _, store = with_table(tmp_path, ",gap\na,1\nb,2\n", names="ab")
    assert store.numbers_of("gap").tolist() == [1, 2]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("eV/atom", "eV atom^-1"),
        ("eV / at", "eV per atom"),
        ("Å^3", "Ang**3"),
        ("μB", "mu_B"),
        ("1/cm", "cm⁻¹"),
        ("W/mK", "W m-1 K-1"),
        ("g/cc", "g/cm^3"),
        ("meV/f.u.", "meV/formula unit"),
    ],
)
def test_a_unit_in_other_spelling_is_the_same(one: str, other: str) -> None:
    assert is_unit(one)
    assert same_unit(one, other)


@pytest.mark.parametrize(("one", "other"), [("eV", "meV"), ("meV", "MeV"), ("eV", "eV/atom"), ("Pa", None), ("x", "y")])
def test_units_that_differ_are_told_apart(one: str, other: str | None) -> None:
    assert not same_unit(one, other)


@pytest.mark.parametrize(
    "text", ["PBE", "DFT", "HSE06", "total", "max", "2", "1", "Voigt", "R", "direct", "DFT+U", "Na", ""]
)
def test_a_word_is_no_unit(text: str) -> None:
    assert not is_unit(text)


def parquet(path: Path, names: str, unit: str | None, values: list[Any], kind: pa.DataType | None = None) -> Path:
    """Write crystals with a property y."""
    table = pa.Table.from_pylist([crystal(name) for name in names])
    field = pa.field("y", kind or pa.float64(), metadata={"units": unit} if unit else None)
    pq.write_table(table.append_column(field, pa.array(values, field.type)), path)
    return path


def test_a_unit_of_one_file_alone_is_not_that_of_others(tmp_path: Path) -> None:
    files = [
        parquet(tmp_path / "meV.parquet", "ab", "meV", [1, 2]),
        parquet(tmp_path / "x.parquet", "cd", None, [1, 2]),
    ]
    with pytest.raises(
        DataError, match=r"'meV' in one file and isn't stated in another \(x.parquet row 1\).*--units y=meV"
    ):
        import_crystals(files, tmp_path / "x.store")
    assert not (tmp_path / "x.store").exists()
    import_crystals(files, tmp_path / "x.store", units={"y": "meV"})
    assert CrystalStore.open(tmp_path / "x.store").units == {"y": "meV"}
    parquet(tmp_path / "x.parquet", "cd", "eV", [1, 2])
    with pytest.raises(DataError, match="'meV' in one file and 'eV' in another"):
        import_crystals(files, tmp_path / "y.store")


def small(**values: Any) -> pa.Table:
    """Return 8 crystals with properties."""
    return pa.Table.from_pylist([crystal(f"c{i}", **{k: v[i] for k, v in values.items()}) for i in range(8)])


def module(path: Any, targets: list[str], **split: Any) -> CrystalDataModule:
    """Open crystals as a training does."""
    data = CrystalDataModule(
        path=path, graph=GraphSpec(k=4), targets=targets, split=Split(**(split or {"by": "random"}))
    )
    data.setup()
    return data


def test_an_id_in_two_rows_stops_a_training(tmp_path: Path) -> None:
    table = small(y=list(range(8)))
    table = table.set_column(0, "material_id", pa.array(["a", "b", "a", "c", "c", "d", "e", "f"]))
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(
        DataError, match=r"x.parquet: material_id 'a' is in rows 0, 2 \(2 such ids\).*crysldnet data import"
    ):
        module(str(tmp_path / "x.parquet"), ["y"])
    pq.write_table(table.slice(0, 4), tmp_path / "train.parquet")
    pq.write_table(table.slice(5), tmp_path / "val.parquet")
    with pytest.raises(DataError, match=r"train.parquet: material_id 'a' is in rows 0, 2"):
        module({name: str(tmp_path / f"{name}.parquet") for name in ("train", "val")}, ["y"])
    pq.write_table(table.set_column(0, "material_id", pa.array([None, *"bcdefgh"])), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="row 0 has no material_id"):
        module(str(tmp_path / "x.parquet"), ["y"])


def test_ids_that_are_whole_numbers_are_used_as_texts_and_others_are_refused(tmp_path: Path) -> None:
    table = small(y=list(range(8)))
    pq.write_table(table.set_column(0, "material_id", pa.array(range(8))), tmp_path / "x.parquet")
    assert module(str(tmp_path / "x.parquet"), ["y"]).store.ids.to_pylist() == [str(i) for i in range(8)]
    pq.write_table(table.set_column(0, "material_id", pa.array([i / 2 for i in range(8)])), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="'material_id' must hold texts, not double"):
        module(str(tmp_path / "x.parquet"), ["y"])


def test_whole_numbers_in_one_split_and_decimals_in_another_are_numbers(tmp_path: Path) -> None:
    paths = {
        "train": str(parquet(tmp_path / "train.parquet", "abc", "GPa", [1, 2, 3], pa.int64())),
        "val": str(parquet(tmp_path / "val.parquet", "de", "GPa", [1.5, 2.5])),
    }
    data = module(paths, ["y"])
    assert data.store.numbers_of("y").tolist() == [1, 2, 3, 1.5, 2.5]
    assert data.units == ["GPa"]


@pytest.mark.parametrize(
    ("unit", "values", "kind", "says"),
    [
        ("eV", [1, 2], pa.float64(), "its unit is 'meV' in .*train.parquet and 'eV' in .*val.parquet"),
        (None, [1, 2], pa.float64(), "its unit is 'meV' in .* and not stated in .*val.parquet"),
        ("meV", ["1", "2"], pa.string(), "it holds numbers in .* and texts in .*val.parquet"),
    ],
)
def test_splits_that_differ_in_a_target_are_refused(
    tmp_path: Path, unit: str, values: list, kind: Any, says: str
) -> None:
    paths = {
        "train": str(parquet(tmp_path / "train.parquet", "abc", "meV", [1, 2, 3])),
        "val": str(parquet(tmp_path / "val.parquet", "de", unit, values, kind)),
    }
    with pytest.raises(DataError, match=f"data.path: column 'y': {says}"):
        module(paths, ["y"])
    assert "y" not in module(paths, []).store.column_names


def test_ids_of_a_data_frames_index_are_ids(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rows = [{key: value for key, value in crystal("x", y=i).items() if key != "material_id"} for i in range(3)]
    for index in (pandas.Index(["p", "q", "r"]), pandas.Index(["p", "q", "r"], name="material_id")):
        import_crystals(pandas.DataFrame(rows, index=index), tmp_path / "x.store", overwrite=True)
        store = CrystalStore.open(tmp_path / "x.store")
        assert (store.ids.to_pylist(), store.column_names) == (["p", "q", "r"], ["y"])
    frame = pandas.DataFrame(rows)
    frame["material_id"] = [1.0, 2.0, nan]
    report = import_crystals(frame, tmp_path / "x.store", overwrite=True)
    assert (CrystalStore.open(tmp_path / "x.store").ids.to_pylist(), report.rejected) == (["1", "2"], 1)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    table = small(y=list(range(8)))
    table = table.append_column("y", table["y"])
    pq.write_table(table, tmp_path / "x.parquet")
    for source in (tmp_path / "x.parquet", table, pandas.DataFrame([crystal("a")], columns=[*crystal("a"), "lattice"])):
        with pytest.raises(DataError, match=r"column name '(y|lattice)' occurs twice"):
            import_crystals(source, tmp_path / "x.store")
    with pytest.raises(DataError, match="column name 'y' occurs twice"):
        module(str(tmp_path / "x.parquet"), ["y"])


def test_an_id_is_predicted_once(tmp_path: Path) -> None:
    records = [crystal(name) for name in "aba"]
    (portion,) = CrystalStream(records, [], StreamSettings())
    assert (portion.ids, portion.refused) == (["a", "b"], [("row 3", "a", "an earlier crystal has the same id")])


CUBE = {
    "lattice": {"matrix": [[4, 0, 0], [0, 4, 0], [0, 0, 4]]},
    "sites": [{"species": [{"element": "Pt", "occu": 1}], "abc": [0, 0, 0]}],
}
OTHER = {"lattice": {"matrix": [[5, 0, 0], [0, 5, 0], [0, 0, 5]]}, "sites": CUBE["sites"]}
JARVIS = {
    "lattice_mat": [[4, 0, 0], [0, 4, 0], [0, 0, 4]],
    "coords": [[0, 0, 0]],
    "elements": ["Pt"],
    "cartesian": False,
}
DOCUMENTS: dict[str, tuple[Any, list[str]]] = {
    "id_and_property": ({"material_id": "mp-126", "structure": CUBE, "gap": 0.5}, ["mp-126"]),
    "id_last": ({"structure": CUBE, "gap": 0.5, "material_id": "mp-126"}, ["mp-126"]),
    "jarvis": ({"jid": "JVASP-1", "atoms": JARVIS, "gap": 0.5}, ["JVASP-1"]),
    "property_alone": ({"structure": CUBE, "gap": 0.5}, ["x"]),
    "structure_alone": ({"structure": CUBE}, ["x"]),
    "bare": (CUBE, ["x"]),
    "answer": ({"status": "ok", "data": {"material_id": "mp-126", "structure": CUBE, "gap": 0.5}}, ["mp-126"]),
    "by_id": ({"a": CUBE, "b": OTHER}, ["a", "b"]),
    "one_by_id": ({"a": {"structure": CUBE, "gap": 0.5}}, ["a"]),
    "records_by_id": ({"@class": "X", "a": {"structure": CUBE, "gap": 0.5}, "b": {"structure": OTHER}}, ["a", "b"]),
    "list": ([{"material_id": "mp-126", "structure": CUBE, "gap": 0.5}], ["mp-126"]),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_an_object_with_an_id_or_a_property_beside_its_structure_is_one_record(tmp_path: Path, name: str) -> None:
    document, ids = DOCUMENTS[name]
    (tmp_path / "x.json").write_text(json.dumps(document))
    report = import_crystals(tmp_path / "x.json", tmp_path / "x.store")
    store = CrystalStore.open(tmp_path / "x.store")
    assert (store.ids.to_pylist(), report.rejected, report.notes) == (ids, 0, ())
    assert not store.column_names or store.numbers_of("gap")[0] == 0.5


def test_documents_of_one_record_each_are_imported_together(tmp_path: Path) -> None:
    for name, structure in (("a", CUBE), ("b", OTHER)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"material_id": name, "structure": structure, "gap": 1}))
    import_crystals(str(tmp_path / "*.json"), tmp_path / "x.store")
    assert CrystalStore.open(tmp_path / "x.store").ids.to_pylist() == ["a", "b"]


TASK = {"task_id": "mp-126", "input": {"structure": OTHER}, "output": {"structure": CUBE, "energy": -6.05}, "gap": 0.5}


@pytest.mark.parametrize("form", ["file", "list", "lines", "object"])
def test_a_record_of_several_structures_is_refused_until_one_is_chosen(tmp_path: Path, form: str) -> None:
    path = tmp_path / ("x.jsonl" if form == "lines" else "x.json")
    path.write_text(json.dumps([TASK] if form == "list" else TASK))
    source = TASK if form == "object" else path
    report = import_crystals(source, tmp_path / "x.store")
    assert (report.kept, report.rejected) == (0, 1)
    assert report.report_path is not None
    assert "it has several structures (input.structure, output.structure)" in report.report_path.read_text()
    import_crystals(source, tmp_path / "x.store", structure="output.structure")
    store = CrystalStore.open(tmp_path / "x.store")
    assert (store.ids.to_pylist(), store.crystals.lattice[0, 0, 0], store.numbers_of("gap").tolist()) == (
        ["mp-126"],
        4,
        [0.5],
    )
    assert import_crystals(source, tmp_path / "y.store", structure="outputs").kept == 0


def test_the_structure_that_is_chosen_of_several_is_named(tmp_path: Path) -> None:
    record = {"id": "a", "initial_structure": OTHER, "structure": CUBE}
    report = import_crystals([record], tmp_path / "x.store")
    assert CrystalStore.open(tmp_path / "x.store").crystals.lattice[0, 0, 0] == 4
    (note,) = (note for note in report.notes if "several" in note)
    assert "initial_structure, structure, of which 'structure' was read" in note
    import_crystals([record], tmp_path / "x.store", structure="initial_structure", overwrite=True)
    assert CrystalStore.open(tmp_path / "x.store").crystals.lattice[0, 0, 0] == 5


def test_an_object_that_is_neither_one_record_nor_records_by_id_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"a": CUBE, "b": OTHER, "gap": 0.5}))
    with pytest.raises(DataError, match="'gap' stands beside structures"):
        import_crystals(tmp_path / "x.json", tmp_path / "x.store")
    (tmp_path / "x.json").write_text(json.dumps({"version": 1} | {f"m{i}": CUBE for i in range(20)}))
    with pytest.raises(DataError, match="'version' stands beside structures"):
        import_crystals(tmp_path / "x.json", tmp_path / "x.store")
    (tmp_path / "x.json").write_text(json.dumps({"a": CUBE, "b": OTHER, "c": {"error": "failed"}}))
    report = import_crystals(tmp_path / "x.json", tmp_path / "x.store")
    assert (report.kept, report.rejected) == (2, 1)


def test_a_column_of_plain_numbers_is_read_at_once_as_cell_by_cell():
    rng = np.random.default_rng(0)
    texts = [repr(v) for v in (rng.normal(size=200) * 10.0 ** rng.integers(-12, 12, 200)).tolist()]
    texts += ["", "1", "-2", "+3", "1e3", "-1.5E-3", ".5", "5.", "0", "-0.25", "0.0"]
    numbers, careful = plain_numbers(pa.array(texts)), read_numbers(Counter(texts))
    assert numbers is not None
    assert careful is not None
    assert numbers.equals(careful.columns("y", texts)["y"])


@pytest.mark.parametrize(
    "odd", ["0012", "-01", "inf", "NaN", "nan", "1,5", "1 ", "1_0", "0x10", "1e999", "1.5D3", "1±2", "Na", "true", "-"]
)
def test_a_column_with_another_cell_is_read_cell_by_cell(odd):
    assert plain_numbers(pa.array(["1", "2.5", odd])) is None


def test_a_column_without_a_value_is_not_taken_for_numbers():
    assert plain_numbers(pa.array(["", ""])) is None
