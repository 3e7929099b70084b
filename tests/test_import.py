"""Crystals come in from CIF, POSCAR, Parquet and CSV as they are, and what can't be used is refused in words."""

import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Element, Lattice
from pymatgen.core import Structure as PymatgenStructure
from pymatgen.io.cif import CifWriter

from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError
from crysldnet.readers import sources, workers
from crysldnet.readers.structure_files import find_structure_files, read_structure
from crysldnet.readers.table_cells import CsvRecords
from crysldnet.tools.importer.command import main
from crysldnet.tools.importer.importer import ImportReport, import_crystals

EMBEDDED = Path(__file__).parents[1] / "src" / "crysldnet" / "data" / "embedded"
HEAD = "data_x\n" + "".join(f"_cell_length_{x} 4.2\n" for x in "abc")
ANGLES = "".join(f"_cell_angle_{x} 90\n" for x in ("alpha", "beta", "gamma"))
CELL = HEAD + ANGLES
SITES = "loop_\n_atom_site_label\n_atom_site_type_symbol\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\n"
CSCL = CELL + SITES + "Cs1 Cs 0 0 0\nCl1 Cl 0.5 0.5 0.5\n"
POSCAR = "CsCl\n1.0\n4.2 0 0\n0 4.2 0\n0 0 4.2\nCs Cl\n1 1\nDirect\n0 0 0\n0.5 0.5 0.5\n"
NACL = (
    CSCL.replace("4.2", "5.64")
    .replace("Cs", "Na")
    .replace("loop_", "_symmetry_space_group_name_H-M 'F m -3 m'\nloop_", 1)
)


@pytest.mark.parametrize("option", ["--license", "--licence"])
def test_the_license_is_kept_under_each_spelling_of_its_option(tmp_path: Path, option: str) -> None:
    (tmp_path / "a.cif").write_text(CSCL)
    assert main(["import", str(tmp_path / "a.cif"), "--out", str(tmp_path / "s.store"), option, "CC0"]) == 0
    assert CrystalStore.open(tmp_path / "s.store").metadata["license"] == "CC0"


def test_stores_and_files_of_earlier_versions_have_a_license(tmp_path: Path) -> None:
    store = CrystalStore.open(Path(__file__).parent / "fixtures" / "v0.1.0" / "my.store")
    assert store.metadata["license"] == "CC BY 4.0"
    assert "licence" not in store.metadata
    table = pq.read_table(EMBEDDED / "mp_starter.parquet")
    assert b"licence" in table.schema.metadata
    assert "license" in CrystalStore.open(EMBEDDED / "mp_starter.parquet").metadata


@pytest.fixture(scope="module")
def starter() -> list[PymatgenStructure]:
    """The first real crystals of the starter set with 2 to 24 atoms."""
    rows = pq.read_table(EMBEDDED / "mp_starter.parquet").slice(0, 40).to_pylist()
    return [
        PymatgenStructure(
            Lattice(np.reshape(row["lattice"], (3, 3))), row["atomic_numbers"], np.reshape(row["frac_coords"], (-1, 3))
        )
        for row in rows
        if 2 <= len(row["atomic_numbers"]) <= 24
    ][:12]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three good files."""
    path = tmp_path / "crystals"
    path.mkdir()
    for name in ("a", "b", "c"):
        (path / f"{name}.cif").write_text(CSCL)
    return path


def rejects(report: ImportReport) -> list[tuple[str, str, str]]:
    if report.report_path is None:
        return []
    with report.report_path.open(encoding="utf-8") as file:
        return [(row["source"], row["id"], row["reason"]) for row in csv.DictReader(file)]


def with_targets(folder: Path, text: str | bytes, **options) -> tuple[ImportReport, CrystalStore]:
    table = folder.parent / "t.csv"
    table.write_bytes(text.encode() if isinstance(text, str) else text)
    out = folder.parent / "out.store"
    report = import_crystals(folder, out, targets=table, overwrite=True, **options)
    return report, CrystalStore.open(out)


def assert_same_crystal(numbers: np.ndarray, lattice: np.ndarray, frac: np.ndarray, other: PymatgenStructure) -> None:
    mine = PymatgenStructure(Lattice(lattice), numbers.tolist(), frac)
    assert mine.composition == other.composition
    assert mine.volume == pytest.approx(other.volume, rel=1e-6)
    np.testing.assert_allclose(
        np.sort(mine.distance_matrix, axis=None), np.sort(other.distance_matrix, axis=None), atol=1e-4
    )


@pytest.mark.parametrize("symprec", [None, 0.01], ids=["P1", "symmetry"])
def test_cif_files_come_back_from_the_store_as_pymatgen_reads_them(
    tmp_path: Path, starter: list[PymatgenStructure], symprec: float | None
) -> None:
    (tmp_path / "cifs").mkdir()
    for i, structure in enumerate(starter):
        CifWriter(structure, symprec=symprec).write_file(tmp_path / "cifs" / f"{i:02}.cif")
    report = import_crystals(tmp_path / "cifs", tmp_path / "s.store")
    crystals = CrystalStore.open(tmp_path / "s.store").crystals
    assert (report.kept, report.rejected, report.notes) == (len(starter), 0, ())
    for i in range(len(starter)):
        with warnings.catch_warnings(action="ignore"):
            reference = PymatgenStructure.from_file(tmp_path / "cifs" / f"{i:02}.cif")
        one = crystals.take(np.array([i]))
        assert_same_crystal(one.numbers, one.lattice[0], one.frac_coords, reference)
        if symprec is None:
            assert_same_crystal(one.numbers, one.lattice[0], one.frac_coords, starter[i])


def test_poscar_files_of_every_name_are_read(tmp_path: Path, starter: list[PymatgenStructure]) -> None:
    names = ["x.vasp", "y.POSCAR", "mp-1/POSCAR", "mp-2/contcar", "POSCAR_z"]
    for name, structure in zip(names, starter, strict=False):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        structure.to(filename=str(tmp_path / "in" / name), fmt="poscar")
    import_crystals(tmp_path / "in", tmp_path / "s.store")
    store = CrystalStore.open(tmp_path / "s.store")
    ids = store.ids.to_pylist()
    assert sorted(ids) == ["POSCAR_z", "mp-1", "mp-2", "x", "y"]
    for material_id, structure in zip(["x", "y", "mp-1", "mp-2", "POSCAR_z"], starter, strict=False):
        one = store.crystals.take(np.array([ids.index(material_id)]))
        assert_same_crystal(one.numbers, one.lattice[0], one.frac_coords, structure)


def test_an_asymmetric_unit_is_expanded_to_the_whole_cell(tmp_path: Path) -> None:
    (tmp_path / "nacl.cif").write_text(NACL)
    lattice, numbers, frac_coords = read_structure(tmp_path / "nacl.cif")
    assert sorted(numbers) == [11] * 4 + [17] * 4
    distances = Lattice(lattice).get_all_distances(frac_coords[numbers == 11], frac_coords[numbers == 17])
    assert distances.min() == pytest.approx(5.64 / 2)


def test_coordinates_near_a_third_stay_where_there_is_no_symmetry(tmp_path: Path) -> None:
    symmetry = "_symmetry_equiv_pos_as_xyz 'x, y, z'\nloop_"
    (tmp_path / "x.cif").write_text(CSCL.replace("loop_", symmetry).replace("Cl 0.5", "Cl 0.33335"))
    assert 0.33335 in read_structure(tmp_path / "x.cif")[2]


BAD_FILES = {
    "not_a_cif.cif": ("<html>404</html>", "not a CIF: there is no data_ block"),
    "binary.cif": (b"\x89PNG\0\0\x01", "binary file"),
    "empty.cif": ("", "the file is empty"),
    "blank.vasp": (" \n\n", "the file is empty"),
    "no_sites.cif": (CELL, "no atoms"),
    "empty_loop.cif": (CELL + SITES, "atoms"),
    "partial.cif": (
        CELL + SITES + "_atom_site_occupancy\nFe1 Fe 0 0 0 0.5\nCo1 Co 0 0 0 0.5\n",
        r"site Fe1 has partial occupancy \(0.5\).*ordered approximation",
    ),
    "shared.cif": (CELL + SITES + "Fe1 Fe 0 0 0\nCo1 Co 0 0 0\n", "same place.*ordered approximation"),
    "disorder.cif": (CELL + SITES + "_atom_site_disorder_group\nFe1 Fe 0 0 0 1\n", "site Fe1 is disordered"),
    "hydrogens.cif": (CELL + SITES + "_atom_site_attached_hydrogens\nO1 O 0 0 0 2\n", "site O1 has hydrogens"),
    "nan_lattice.cif": (CSCL.replace("_a 4.2", "_a nan"), "_cell_length_a is 'nan', not a finite number"),
    "no_angle.cif": (HEAD + SITES + "Cs1 Cs 0 0 0\n", "no _cell_angle_alpha"),
    "zero_length.cif": (CSCL.replace("_c 4.2", "_c 0"), "no volume"),
    "flat.cif": (CSCL.replace("gamma 90", "gamma 180"), "no volume"),
    "impossible.cif": (CSCL.replace("alpha 90", "alpha 20").replace("beta 90", "beta 20"), "impossible.cif"),
    "nan_coordinate.cif": (CSCL.replace("0.5 0.5 0.5", "0.5 0.5 nan"), "site Cl1 has the coordinate 'nan'"),
    "unknown_coordinate.cif": (CSCL.replace("0.5 0.5 0.5", "0.5 . 0.5"), "site Cl1 has the coordinate '.'"),
    "cut_off.cif": (CSCL[:-6], "cut_off.cif"),
    "z119.cif": (CSCL.replace("Cl1 Cl", "Uue1 Uue"), r"'Uue' is not a chemical element \(1 to 118\)"),
    "dummy.cif": (CSCL.replace("Cl1 Cl", "X1 X"), "'X' is not a chemical element"),
    "water.cif": (CSCL.replace("Cl1 Cl", "Wat1 Wat"), "'Wat' is not a chemical element"),
    "symmetry.cif": (NACL.replace("F m -3 m", "Q 17 z"), "symmetry isn't understood.*Q 17 z"),
    "z119.vasp": (POSCAR.replace("Cs Cl", "Cs Uue"), "'Uue' is not a chemical element"),
    "dummy.vasp": (POSCAR.replace("Cs Cl", "Cs X"), "'X' is not a chemical element"),
    "vasp4.vasp": (POSCAR.replace("Cs Cl\n", ""), "doesn't name its elements"),
    "nan_lattice.vasp": (POSCAR.replace("4.2 0 0", "nan 0 0"), "lattice has a value that is not finite"),
    "zero_volume.vasp": (POSCAR.replace("0 0 4.2", "0 4.2 0"), "no volume"),
    "nan_coordinate.vasp": (POSCAR.replace("0.5 0.5 0.5", "0.5 nan 0.5"), "coordinate is not finite"),
    "no_atoms.vasp": (POSCAR.replace("1 1\n", "0 0\n"), "no atoms"),
    "cut_off.vasp": (POSCAR[:-12], "ends too early"),
    "words.vasp": ("this\nis\nno\nPOSCAR\nat\nall\nreally\n", "not a POSCAR file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_used_is_refused_in_words_with_its_name(tmp_path: Path, name: str) -> None:
    text, pattern = BAD_FILES[name]
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=pattern) as caught:
        read_structure(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_reporting_lists_every_bad_file_and_keeps_the_rest(tmp_path: Path, folder: Path) -> None:
    for name, (text, _) in BAD_FILES.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    report = import_crystals(folder, tmp_path / "s.store")
    assert CrystalStore.open(tmp_path / "s.store").ids.to_pylist() == ["a", "b", "c"]
    assert (report.kept, report.rejected, report.report_path) == (3, len(BAD_FILES), tmp_path / "s.store.rejects.csv")
    assert {source for source, _, _ in rejects(report)} == set(BAD_FILES)
    assert not any(str(tmp_path) in reason for _, _, reason in rejects(report))


def test_raising_stops_at_the_first_bad_file_and_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    (folder / "bb.cif").write_text("nothing")
    for out in ("s.store", "s.parquet"):
        with pytest.raises(DataError, match=r"bb.cif \(bb\): not a CIF"):
            import_crystals(folder, tmp_path / out, on_error="raise")
    assert os.listdir(tmp_path) == ["crystals"]


def test_an_import_that_keeps_nothing_writes_only_its_report(tmp_path: Path) -> None:
    (tmp_path / "x.cif").write_text("nothing")
    report = import_crystals(tmp_path / "x.cif", tmp_path / "s.store")
    assert report.kept == 0
    assert "nothing written" in str(report)
    assert sorted(os.listdir(tmp_path)) == ["s.store.rejects.csv", "x.cif"]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (CSCL.replace("0.5 0.5 0.5", "0.05 0 0"), "atoms 1 and 2 overlap"),
        (
            CELL + SITES + "".join(f"H{i} H {i / 1001:.6f} 0 0\n" for i in range(1001)),
            "1001 atoms, over the limit of 1000",
        ),
        (NACL.replace("5.64", "1.1"), "Å³ per atom"),
    ],
    ids=["overlap", "large", "dense"],
)
def test_a_crystal_that_cannot_be_right_is_rejected(tmp_path: Path, folder: Path, text: str, pattern: str) -> None:
    (folder / "bad.cif").write_text(text)
    report = import_crystals(folder, tmp_path / "s.store")
    ((source, material_id, reason),) = rejects(report)
    assert (report.kept, source, material_id) == (3, "bad.cif", "bad")
    assert pattern in reason


def test_the_limit_of_atoms_holds_for_the_expanded_cell(tmp_path: Path, folder: Path) -> None:
    (folder / "nacl.cif").write_text(NACL)
    report = import_crystals(folder, tmp_path / "s.store", max_atoms=7)
    assert rejects(report) == [("nacl.cif", "nacl", "it has 8 atoms, over the limit of 7 (max_atoms)")]


def test_deuterium_and_tritium_are_read_as_hydrogen_and_said_once(tmp_path: Path, folder: Path) -> None:
    (folder / "d.cif").write_text(CSCL.replace("Cl1 Cl", "D1 D"))
    (folder / "t.vasp").write_text(POSCAR.replace("Cl\n", "T\n"))
    report = import_crystals(folder, tmp_path / "s.store")
    assert sorted(CrystalStore.open(tmp_path / "s.store").crystals.numbers)[:2] == [1, 1]
    assert report.notes == (
        "files state no symmetry and were read as P 1: 4 (first: a.cif)",
        "files have deuterium or tritium, which was read as hydrogen: 2 (first: d.cif)",
    )


def test_a_label_t1_is_no_tritium_where_no_type_is_stated(tmp_path: Path) -> None:
    (tmp_path / "zeolite.cif").write_text(
        CELL + SITES.replace("_atom_site_type_symbol\n", "") + "T1 0 0 0\nO1 0.5 0.5 0.5\n"
    )
    with pytest.raises(DataError, match="'T1' is not a chemical element"):
        read_structure(tmp_path / "zeolite.cif")


def test_mixed_sites_are_not_read_as_their_first_element(tmp_path: Path) -> None:
    for symbol in ("Fe,Co", "Fe0.5Co0.5", "Fe+Co"):
        (tmp_path / "mixed.cif").write_text(CSCL.replace("Cl1 Cl", f"M1 {symbol}"))
        with pytest.raises(DataError, match="not a chemical element"):
            read_structure(tmp_path / "mixed.cif")


def test_a_space_group_in_another_setting_than_the_cell_is_refused(tmp_path: Path) -> None:
    """Both settings that the name R -3 m stands for would multiply atoms in an orthorhombic cell."""
    cell = NACL.replace("F m -3 m", "R -3 m").replace("_b 5.64", "_b 6.64")
    (tmp_path / "x.cif").write_text(cell)
    with pytest.raises(DataError, match="symmetry isn't understood"):
        read_structure(tmp_path / "x.cif")
    operations = "loop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\n-y,x-y,z\n-x+y,-x,z\nloop_"
    (tmp_path / "x.cif").write_text(CSCL.replace("loop_", operations, 1))
    with pytest.raises(DataError, match="symmetry operations don't fit its cell"):
        read_structure(tmp_path / "x.cif")


def test_of_several_blocks_the_first_with_atoms_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.cif").write_text("data_global\n_journal_name x\n" + CSCL + NACL)
    notes: list[str] = []
    assert len(read_structure(tmp_path / "x.cif", notes=notes)[1]) == 2
    assert any("several crystals" in note for note in notes)


def test_every_noted_file_is_listed_and_can_be_rejected(tmp_path: Path, folder: Path) -> None:
    for name, formula in (("a.cif", "Cs Cl H2"), ("b.cif", "Cs2 Cl"), ("c.cif", "Cs Cl")):
        symmetry = "_symmetry_Int_Tables_number 1\nloop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\n"
        (folder / name).write_text(CSCL.replace("loop_", f"_chemical_formula_sum '{formula}'\n{symmetry}loop_", 1))
    report = import_crystals(folder, tmp_path / "s.store")
    assert (report.kept, report.notes_path) == (3, tmp_path / "s.store.notes.csv")
    assert report.notes_path is not None
    with report.notes_path.open(newline="") as file:
        noted = list(csv.DictReader(file))
    assert [(row["source"], row["id"]) for row in noted] == [("a.cif", "a"), ("b.cif", "b")]
    assert all("state a formula that their atoms don't give" in row["note"] for row in noted)
    assert f"what was noted, and of which: {report.notes_path}" in str(report)
    arguments = ["import", str(folder), "--out", str(tmp_path / "s.store"), "--overwrite", "--on-note", "reject"]
    assert main(arguments) == 0
    assert CrystalStore.open(tmp_path / "s.store").ids.to_pylist() == ["c"]
    with (tmp_path / "s.store.rejects.csv").open(newline="") as file:
        rejected = [(row["source"], row["reason"]) for row in csv.DictReader(file)]
    assert [source for source, _ in rejected] == ["a.cif", "b.cif"]
    assert "state a formula that their atoms don't give" in rejected[0][1]
    assert not (tmp_path / "s.store.notes.csv").exists()  # of the import before


def test_files_are_found_in_folders_by_patterns_and_in_lists(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "D.CIF").write_text(CSCL)
    (folder / ".hidden.cif").write_text(CSCL)
    (folder / "notes.txt").write_text("x")
    assert [f.name for f in find_structure_files(folder)] == ["a.cif", "b.cif", "c.cif", "D.CIF"]
    assert [f.name for f in find_structure_files(str(folder / "*"))] == ["a.cif", "b.cif", "c.cif"]
    assert [f.name for f in find_structure_files([folder / "c.cif", str(folder / "[ac].cif")])] == ["c.cif", "a.cif"]
    for source in (folder / "*.vasp", folder / "none", folder / "notes.txt"):
        with pytest.raises(DataError, match=r"no structure file|no such file|not a structure file"):
            find_structure_files(source)


def test_files_of_the_same_stem_are_named_by_their_paths(tmp_path: Path) -> None:
    for name in ("in/a/x.cif", "in/b/x.cif", "in/y.cif", "in/z.cif", "in/z.vasp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(POSCAR if name.endswith("vasp") else CSCL)
    import_crystals(tmp_path / "in", tmp_path / "s.store")
    assert CrystalStore.open(tmp_path / "s.store").ids.to_pylist() == ["a/x", "b/x", "y", "z.cif", "z.vasp"]


def test_targets_join_by_id_whatever_their_order_and_suffix(folder: Path) -> None:
    report, store = with_targets(
        folder, "file,band_gap (eV),note\nc.cif,3,\nb,,hot\na.cif,1e0,cold\n", units={"band_gap": "eV"}
    )
    assert (report.kept, rejects(report), store.units) == (3, [], {"band_gap": "eV"})
    np.testing.assert_array_equal(store.numbers_of("band_gap"), [1, np.nan, 3])
    assert store.texts_of("note").tolist() == ["cold", "hot", None]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("a,1\nb,2\nzz,3\n", [("t.csv line 4", "zz", "no crystal has this id")]),
        ("a,1\n,2\n", [("t.csv line 3", "", "the id is empty")]),
        ("a,1\nb,abc\n", [("t.csv line 3", "b", "gap is 'abc', not a finite number; its value is null")]),
        ("a,1\nb,inf\n", [("t.csv line 3", "b", "gap is 'inf', not a finite number; its value is null")]),
        ("a,1\nb\n", [("t.csv line 3", "b", "it has 1 cells where the header has 2")]),
        (
            "a,1\nb,2\nb.cif,3\n",
            [(f"t.csv line {line}", "b", "the id is in 2 rows, so none of them is used") for line in (3, 4)],
        ),
    ],
    ids=["unknown", "empty", "word", "infinite", "short", "duplicate"],
)
def test_a_bad_row_of_targets_is_listed_with_its_line(folder: Path, rows: str, expected: list) -> None:
    report, store = with_targets(folder, f"id,gap\n{rows}")
    assert rejects(report) == expected
    assert report.kept == 3
    gap = store.numbers_of("gap")
    assert gap[0] == 1
    assert np.isnan(gap[1]) == ("b,2" not in rows or len(expected) == 2)
    with pytest.raises(DataError, match=r"t.csv line \d"):
        with_targets(folder, f"id,gap\n{rows}", on_error="raise")


def test_a_crystal_without_a_row_is_kept_with_null_and_counted(folder: Path) -> None:
    report, store = with_targets(folder, "id,gap\na,1\n")
    np.testing.assert_array_equal(store.numbers_of("gap"), [1, np.nan, np.nan])
    assert "crystals have no row in t.csv, so their values are null: 2 (first: b)" in report.notes


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfid,gap\r\na,1\r\nb,2\r\n",
        b"id;gap\na;1\nb;2\n",
        b"id\tgap\na\t1\nb\t2\n",
        b'"id","gap"\n"a","1"\n\n"b","2"',
        b",id,gap\n0,a,1\n1,b,2\n",
    ],
    ids=["bom_crlf", "semicolon", "tab", "quoted", "index"],
)
def test_dialects_of_csv_are_read(folder: Path, text: bytes) -> None:
    report, store = with_targets(folder, text)
    assert rejects(report) == []
    assert (store.column_names, store.numbers_of("gap")[:2].tolist()) == (["gap"], [1, 2])


def test_a_header_in_the_encoding_of_windows_is_read_with_a_note(folder: Path, capsys) -> None:
    _, store = with_targets(folder, b"id;L\xfccke (eV/\xc5)\r\na;1,5\r\nb;2,5\r\n")
    assert (store.column_names, store.numbers_of("Lücke")[:2].tolist()) == (["Lücke"], [1.5, 2.5])
    assert store.units["Lücke"] == "eV/Å"
    assert "its header isn't UTF-8; read in the encoding of Windows (cp1252): id;Lücke" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (b"id,gap\na,1\nb,\xe9\n", "t.csv line 3: not UTF-8"),
        (
            b"id,gap\nB\xe4r,1\n",
            r"t.csv line 2: not UTF-8; in the encoding of Windows \(cp1252\) it is 'Bär'.*CSV UTF-8",
        ),
        (b"id,T,gap\na,20 \xb0C,1\n", "it is '°C'"),
        (b"id,g\xe4p\na,1\n\xe9,2\n", "t.csv line 1: not UTF-8"),
        (b"id,g\x81p\na,1\n", "t.csv line 1: not UTF-8"),
        (b"", "the table is empty"),
        (b"a,1\n", "no column is called material_id, id"),
        (b"id\na\n", "no column beside the ids"),
        (b"id,gap,gap (eV)\na,1,2\n", "'gap' is taken or occurs twice"),
        (b"id,lattice\na,1\n", "'lattice' is taken"),
        (b"id,gap\nx,1\n", "no row belongs to a crystal"),
        (b'id,gap\na,"1\n', "t.csv line 2"),
    ],
    ids=[
        "encoding",
        "encoding_of_an_id",
        "encoding_of_a_unit",
        "encoding_of_ids",
        "undefined",
        "empty",
        "no_id",
        "no_property",
        "twice",
        "taken",
        "foreign",
        "quote",
    ],
)
def test_a_table_that_cannot_be_read_says_why(folder: Path, text: bytes, pattern: str) -> None:
    with pytest.raises(DataError, match=pattern):
        with_targets(folder, text)
    assert not (folder.parent / "out.store").exists()


def test_units_for_an_unknown_property_or_against_the_header_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'band_gap'"):
        with_targets(folder, "id,band_gap\na,1\n", units={"bandgap": "eV"})
    with pytest.raises(DataError, match="'eV' in the file and 'meV'"):
        with_targets(folder, "id,band_gap (eV)\na,1\n", units={"band_gap": "meV"})


def test_parquet_comes_back_equal_through_a_store(tmp_path: Path) -> None:
    original = pq.read_table(EMBEDDED / "mp_starter.parquet").slice(0, 1500)
    pq.write_table(original, tmp_path / "in.parquet")
    import_crystals(tmp_path / "in.parquet", tmp_path / "s.store")
    assert main(["export", str(tmp_path / "s.store"), str(tmp_path / "out.parquet")]) == 0
    first, last = CrystalStore.from_table(original), CrystalStore.open(tmp_path / "out.parquet")
    for name in ("lattice", "ptr", "numbers", "frac_coords"):
        np.testing.assert_array_equal(getattr(first.crystals, name), getattr(last.crystals, name))
    assert first.ids.to_pylist() == last.ids.to_pylist()
    for name in ("formation_energy_per_atom", "band_gap"):
        np.testing.assert_array_equal(first.numbers_of(name), last.numbers_of(name))
        assert first.units[name] == last.units[name]
    assert first.texts_of("split").tolist() == last.texts_of("split").tolist()
    assert first.metadata == last.metadata


def test_bad_rows_of_parquet_are_rejected_one_by_one(tmp_path: Path) -> None:
    rows = pq.read_table(EMBEDDED / "mp_starter.parquet").slice(0, 7).to_pylist()
    rows[1]["lattice"] = rows[1]["lattice"][:8]
    rows[2]["frac_coords"] = None
    rows[3]["material_id"] = rows[0]["material_id"]
    rows[4]["material_id"] = None
    rows[5]["band_gap"] = float("inf")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    report = import_crystals(tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert [(source, reason) for source, _, reason in rejects(report)] == [
        ("in.parquet row 2", "lattice must have 9 numbers"),
        ("in.parquet row 3", "column 'frac_coords' is empty"),
        ("in.parquet row 5", "the id is empty"),
        ("in.parquet row 6", "band_gap is infinite; its value is null"),
        ("in.parquet row 4", "an earlier crystal has the same id"),
    ]
    store = CrystalStore.open(tmp_path / "out.parquet")
    assert store.ids.to_pylist() == [rows[i]["material_id"] for i in (0, 5, 6)]
    assert np.isnan(store.numbers_of("band_gap")).tolist() == [False, True, False]


def test_a_file_that_is_no_table_of_crystals_is_refused(tmp_path: Path) -> None:
    (tmp_path / "junk.parquet").write_text("junk")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    for name, pattern in (("junk", "not a readable Parquet"), ("other", "no column material_id")):
        with pytest.raises(DataError, match=f"{name}.parquet: {pattern}"):
            import_crystals(tmp_path / f"{name}.parquet", tmp_path / "s.store")


def test_a_store_that_was_cut_off_or_changed_is_found_out(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "s.store"
    import_crystals(folder, path)
    assert main(["verify", str(path)]) == 0
    for name in ("lattice.bin", "columns.arrow"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(DataError, match=name):
            main(["verify", str(path)])
        (path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=f"{name}: {len(whole) // 2} bytes where the store says {len(whole)}"):
            CrystalStore.open(path)
        (path / name).write_bytes(whole)


def test_a_place_that_cannot_be_written_is_said_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.cif").write_text("nothing")
    (tmp_path / "file").write_text("")
    for out in ("file/s.store", "file/s.parquet"):
        with pytest.raises(DataError, match="can't be written"):
            import_crystals(tmp_path / "x.cif", tmp_path / out, on_error="raise")


def test_only_an_earlier_import_is_overwritten_and_only_when_asked(tmp_path: Path, folder: Path) -> None:
    for out in (tmp_path / "s.store", tmp_path / "s.parquet"):
        import_crystals(folder, out)
        with pytest.raises(DataError, match="already exists"):
            import_crystals(folder, out)
        assert import_crystals(folder, out, overwrite=True).kept == 3
    with pytest.raises(DataError, match="is not a crystal store"):
        import_crystals(folder, folder, overwrite=True)
    assert len(os.listdir(folder)) == 3


@pytest.mark.distributed
def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 50)
    monkeypatch.setattr(workers, "PATIENCE", 0)
    (tmp_path / "in").mkdir()
    for i in range(210):
        (tmp_path / "in" / f"{i:03}.vasp").write_text("junk" if i == 77 else POSCAR.replace("4.2", str(4 + i / 1000)))
    for count in (1, 2):
        report = import_crystals(tmp_path / "in", tmp_path / f"{count}.store", workers=count)
        assert (report.kept, rejects(report)[0][0]) == (209, "077.vasp")
    for file in (tmp_path / "1.store").iterdir():
        assert file.read_bytes() == (tmp_path / "2.store" / file.name).read_bytes()


def test_no_absolute_path_is_stored_and_what_is_stated_is_kept(tmp_path: Path, folder: Path) -> None:
    import_crystals(folder, tmp_path / "s.store")
    assert CrystalStore.open(tmp_path / "s.store").metadata == {"source": "crystals"}
    for file in (tmp_path / "s.store").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
    about = {"source": "my lab", "license": "CC0", "citation": "me"}
    import_crystals(folder, tmp_path / "t.store", metadata=about)
    assert CrystalStore.open(tmp_path / "t.store").metadata == about


def test_importing_the_data_modules_does_not_import_pymatgen() -> None:
    script = "import sys, crysldnet.tools.importer.command; sys.exit(bool({'pymatgen', 'gemmi'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_examples_are_imported_from_the_command_line_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examples, out = EMBEDDED / "examples", str(tmp_path / "x.store")
    targets = str(examples / "targets.csv")
    assert main(["import", str(examples), "--out", out, "--targets", targets, "--license", "CC BY 4.0"]) == 0
    assert main(["show", out]) == 0
    shown = capsys.readouterr().out
    for text in ("6 crystals kept", "crystals  6", "formation_energy_per_atom (eV/atom): 6 values", "CC BY 4.0"):
        assert text in shown
    store = CrystalStore.open(out)
    for i, material_id in enumerate(store.ids.to_pylist()):
        one = store.crystals.take(np.array([i]))
        symbols = {Element.from_Z(z).symbol for z in one.numbers}
        assert all(symbol in material_id.split("_")[0] for symbol in symbols)


def test_the_exit_status_is_1_only_when_every_crystal_was_rejected(tmp_path: Path, folder: Path) -> None:
    (folder / "bad.cif").write_text("nothing")
    assert main(["import", str(folder), "--out", str(tmp_path / "s.store")]) == 0
    assert main(["import", str(folder / "bad.cif"), "--out", str(tmp_path / "t.store")]) == 1
    with pytest.raises(DataError, match="NAME=UNIT"):
        main(["import", str(folder), "--out", str(tmp_path / "u.store"), "--units", "eV"])


@pytest.mark.parametrize("command", ["import", "export", "verify", "show"])
def test_help_gives_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"example:\n  crysldnet data {command}" in capsys.readouterr().out


def test_a_link_to_nothing_is_rejected_alone_and_by_name(tmp_path: Path, folder: Path) -> None:
    (folder / "gone.cif").symlink_to("../nowhere.cif")
    (folder / "deep").mkdir()
    (folder / "deep" / "gone.cif").symlink_to("nowhere.cif")
    for source in (folder, str(folder / "**" / "*.cif"), [*map(str, folder.rglob("*.cif"))]):
        report = import_crystals(source, tmp_path / "s.store", overwrite=True)
        reasons = {source: reason for source, _, reason in rejects(report)}
        assert (report.kept, report.rejected) == (3, 2)
        assert reasons["gone.cif"] == "no such file, but a link to ../nowhere.cif"


def test_a_linked_folder_is_gone_through_once(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "d.cif").write_text(CSCL)
    (folder / "first").symlink_to(tmp_path / "elsewhere")
    (folder / "second").symlink_to(tmp_path / "elsewhere" / "deep")
    (folder / "up").symlink_to(tmp_path)
    for source in (folder, str(folder / "**")):
        found = [file.name for file in find_structure_files(source)]
        assert found == ["a.cif", "b.cif", "c.cif", "d.cif"], found


def test_a_folder_with_brackets_is_a_folder_and_what_follows_it_is_a_pattern(tmp_path: Path, folder: Path) -> None:
    brackets = folder.rename(tmp_path / "set[1]")
    for pattern in ("set[1]/*.cif", "set[1]", "set[1]/[ab].cif", "*/?.cif", "./set[1]/a.cif"):
        expected = ["a", "b"] if "[ab]" in pattern else ["a"] if "a.cif" in pattern else ["a", "b", "c"]
        report = import_crystals(tmp_path / pattern, tmp_path / "s.store", overwrite=True)
        assert (report.kept, CrystalStore.open(tmp_path / "s.store").ids.to_pylist()) == (len(expected), expected)
        assert [file.stem for file in find_structure_files(tmp_path / pattern)] == expected
    (brackets / "set[1].cif").write_text(CSCL)
    assert len(find_structure_files(tmp_path / "set[1]" / "set[1].cif")) == 1
    with pytest.raises(DataError, match="no structure file"):
        find_structure_files(tmp_path / "set[2]" / "*.cif")


@pytest.mark.parametrize(
    "name", [b"caf\xe9.cif", b"caf\xe9.cif.gz", b"caf\xe9.cif.xz", b"caf\xe9.parquet", b"caf\xe9.jsonl", b"caf\xe9.csv"]
)
def test_a_file_whose_name_is_not_utf8_is_read(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    record = {"lattice": [4.0, 0, 0, 0, 4, 0, 0, 0, 4], "atomic_numbers": [84], "frac_coords": [0.0, 0, 0]}
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([record | {"material_id": "a"}]), tmp_path / "x.parquet")
        (tmp_path / "x.parquet").rename(path)
    elif path.suffix == ".jsonl":
        path.write_text(json.dumps(record))
    elif path.suffix == ".csv":
        path.write_text(f'cif\n"{CSCL}"\n')
    else:
        compress = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
        path.write_bytes(compress(CSCL.encode()))
    assert import_crystals(path, tmp_path / "s.store").kept == 1
    (material_id,) = CrystalStore.open(tmp_path / "s.store").ids.to_pylist()
    assert material_id == ("a" if path.suffix == ".parquet" else material_id)
    assert material_id == "a" or material_id.startswith(r"caf\xe9")
    with pytest.raises(DataError, match=r"s\\xe9.store: its name isn't UTF-8"):
        import_crystals(path, tmp_path / os.fsdecode(b"s\xe9.store"))


def test_a_table_whose_name_is_not_utf8_is_read(tmp_path: Path, folder: Path) -> None:
    table = tmp_path / os.fsdecode(b"caf\xe9.csv")
    table.write_text("id,y\na,1\nb,many\nz,2\n")
    report = import_crystals(folder, tmp_path / "s.store", targets=table)
    places = [source for source, *_ in rejects(report)]
    assert places == [r"caf\xe9.csv line 4", r"caf\xe9.csv line 3"]


def test_a_pipe_that_is_called_as_a_structure_file_is_rejected_and_not_waited_for(tmp_path: Path, folder: Path) -> None:
    os.mkfifo(folder / "pipe.cif")
    assert rejects(import_crystals(folder, tmp_path / "s.store")) == [
        ("pipe.cif", "pipe", "not a file that can be read")
    ]


@pytest.mark.parametrize("suffix", [".json", ".jsonl.gz", ".csv", ".extxyz", ".db", ".parquet", ".zip", ".tgz"])
def test_a_pipe_that_is_called_as_a_file_of_records_is_refused_and_not_waited_for(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    with pytest.raises(DataError, match=rf"pipe{suffix}: not a file that can be read"):
        import_crystals(tmp_path / f"pipe{suffix}", tmp_path / "s.store")


def test_a_script_from_standard_input_imports_with_workers(tmp_path: Path, folder: Path) -> None:
    script = (
        "from crysldnet.readers import workers, sources; workers.PATIENCE = 0; sources.PIECE = 1;"
        "from crysldnet.tools.importer.importer import import_crystals;"
        f"print(import_crystals({str(folder)!r}, {str(tmp_path / 's.store')!r}, workers=2).kept)"
    )
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_a_folder_named_like_the_home_folder_is_read_where_it_stands(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "~").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "~" / "x.cif").write_text(CSCL)
    (tmp_path / "home" / "x.cif").write_text(CSCL.replace("4.2", "5.0"))
    lengths = []
    for source in ("./~/x.cif", "~/x.cif", "~/x.cif"):
        import_crystals(source, tmp_path / "s.store", progress=False, overwrite=True)
        lengths.append(float(CrystalStore.open(tmp_path / "s.store").crystals.lattice[0, 0, 0]))
        if len(lengths) == 2:
            Path("./~/x.cif").unlink()
    np.testing.assert_allclose(lengths, [4.2, 4.2, 5.0], rtol=1e-6)


def test_a_table_of_structures_in_the_encoding_of_windows_is_refused_with_what_it_may_hold(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("id,cif,phase\na,x,Härte\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"t\.csv: not UTF-8; in the encoding of Windows \(cp1252\) it is 'Härte'"):
        list(CsvRecords(tmp_path / "t.csv").entries())
