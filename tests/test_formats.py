"""Every format gives the same real crystals, whoever wrote the file; what isn't a crystal is refused in words."""

import csv
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ase import Atoms
from ase.io import write as write_ase
from pymatgen.core import Lattice, Structure
from pymatgen.io.ase import AseAtomsAdaptor

from crysldnet.data import schema
from crysldnet.data.datasets import EMBEDDED
from crysldnet.data.schema import STRUCTURE_COLUMNS
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError
from crysldnet.readers import record_files, sources, table_cells
from crysldnet.tools.importer import columns
from crysldnet.tools.importer.importer import ImportReport, import_crystals

FORMATS = Path(__file__).parent / "formats"
EXAMPLES = EMBEDDED / "examples"
RECORDS = [path.name for path in sorted(FORMATS.iterdir()) if path.suffix not in (".py", ".md", ".cif")]


@pytest.fixture(scope="module")
def references() -> dict[str, Structure]:
    """The six examples as pymatgen reads their CIFs."""
    return {path.stem.split("_")[1]: Structure.from_file(path) for path in sorted(EXAMPLES.glob("*.cif"))}


def imported(source: Any, folder: Path, **options: Any) -> tuple[ImportReport, CrystalStore]:
    report = import_crystals(source, folder / "out.store", overwrite=True, **options)
    return report, CrystalStore.open(folder / "out.store")


def rejected(source: Any, folder: Path, **options: Any) -> list[str]:
    """Return the reasons for which crystals were left out."""
    report = import_crystals(source, folder / "out.store", overwrite=True, **options)
    assert report.report_path is not None
    with report.report_path.open(encoding="utf-8") as file:
        return [row["reason"] for row in csv.DictReader(file)]


def structure_at(store: CrystalStore, row: int) -> Structure:
    one = store.crystals.take(np.array([row]))
    return Structure(Lattice(one.lattice[0]), one.numbers.tolist(), one.frac_coords)


def assert_same(mine: Structure, other: Structure) -> None:
    assert mine.composition == other.composition
    assert mine.volume == pytest.approx(other.volume, rel=1e-6)
    np.testing.assert_allclose(
        np.sort(mine.distance_matrix, axis=None), np.sort(other.distance_matrix, axis=None), atol=1e-4
    )


def assert_all_same(store: CrystalStore, references: dict[str, Structure]) -> None:
    ids = store.ids.to_pylist()
    assert sorted(ids) == sorted(references)
    for row, material_id in enumerate(ids):
        assert_same(structure_at(store, row), references[material_id])


@pytest.mark.parametrize("name", RECORDS)
def test_a_file_of_every_format_gives_the_crystals_that_pymatgen_has(
    tmp_path: Path, references: dict[str, Structure], name: str
) -> None:
    report, store = imported(FORMATS / name, tmp_path)
    assert (report.kept, report.rejected) == (6, 0)
    if name.startswith("matbench"):  # it has no ids, but the order of the others
        for row, material_id in enumerate(pq.read_table(FORMATS / "lemat_bulk.parquet")["immutable_id"].to_pylist()):
            assert_same(structure_at(store, row), references[material_id])
        assert store.ids[0].as_py() == "matbench_like-1"
    else:
        assert_all_same(store, references)
    with (EXAMPLES / "targets.csv").open() as file:
        energies = {row["material_id"].split("_")[1]: float(list(row.values())[1]) for row in csv.DictReader(file)}
    for column in ("formation_energy_per_atom", "formation_energy_peratom", "e_form"):
        if column in store.column_names:
            np.testing.assert_allclose(sorted(store.numbers_of(column)), sorted(energies.values()))


def test_there_is_a_file_of_every_format() -> None:
    assert {sources.suffix_of(FORMATS / name) for name in RECORDS} == set(sources.KINDS) - {
        *(".zip", ".tar", ".ndjson", ".xyz")  # made below, or another name of one that is there
    }


def test_an_old_cif_of_the_open_database_is_read_as_pymatgen_reads_it(tmp_path: Path) -> None:
    _, store = imported(FORMATS / "cod_1011031.cif", tmp_path)
    reference = Structure.from_file(FORMATS / "cod_1011031.cif").remove_oxidation_states()
    assert_same(structure_at(store, 0), reference)


def test_properties_and_units_come_with_the_records(tmp_path: Path) -> None:
    report, store = imported(FORMATS / "jarvis_dft_3d.json", tmp_path)
    assert store.units == {"formation_energy_peratom": "eV/atom", "optb88vdw_bandgap": "eV"}
    assert np.isnan(store.numbers_of("optb88vdw_bandgap")).all()  # "na" everywhere
    assert store.texts_of("func").tolist() == ["OptB88vdW"] * 6
    assert report.notes == ("columns hold neither numbers nor text and were left out: 1 (efg)",)
    _, store = imported(FORMATS / "cdvae.csv", tmp_path, units={"formation_energy_per_atom": "eV/atom"})
    assert store.units == {"formation_energy_per_atom": "eV/atom"}
    assert store.column_names == ["formation_energy_per_atom", "pretty_formula"]


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.zst", ".tar.xz"])
def test_archives_are_read_without_unpacking(tmp_path: Path, references: dict[str, Structure], suffix: str) -> None:
    archive = tmp_path / f"by_reduced_formula{suffix}"
    files = {f"deep/{path.stem.split('_')[1]}.CIF": path.read_bytes() for path in EXAMPLES.glob("*.cif")}
    files["deep/README.txt"] = files["__MACOSX/._x.cif"] = b"no crystal"
    make_archive(archive, files)
    report, store = imported(archive, tmp_path)
    assert (report.kept, report.rejected) == (6, 0)
    assert_all_same(store, references)
    assert sorted(os.listdir(tmp_path)) == [archive.name, "out.store"]


def make_archive(path: Path, files: dict[str, bytes]) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return
    buffer = io.BytesIO()
    mode = {".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}
    with tarfile.open(fileobj=buffer, mode=mode.get("".join(path.suffixes), "w")) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(buffer.getvalue())
    else:
        path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_a_member_with_a_path_out_of_the_archive_goes_nowhere(tmp_path: Path, suffix: str) -> None:
    text = (EXAMPLES / "KCl_mp-23193.cif").read_bytes()
    (tmp_path / "in").mkdir()
    make_archive(tmp_path / "in" / f"x{suffix}", {"../../evil.cif": text, "/etc/evil2.cif": text})
    _, store = imported(tmp_path / "in" / f"x{suffix}", tmp_path / "in")
    assert store.ids.to_pylist() == ["evil", "evil2"]
    assert os.listdir(tmp_path) == ["in"]


def test_a_member_that_is_encrypted_damaged_or_huge_is_rejected_and_the_rest_is_kept(tmp_path: Path) -> None:
    text = (EXAMPLES / "KCl_mp-23193.cif").read_bytes()
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.cif", b" " * (65 * 2**20))
        for name in ("good", "secret", "broken"):
            archive.writestr(f"{name}.cif", text)
    raw = bytearray(path.read_bytes())
    assert len(raw) < 100_000
    with zipfile.ZipFile(path) as archive:
        secret, broken = archive.getinfo("secret.cif"), archive.getinfo("broken.cif")
    central = raw.index(b"secret.cif", secret.header_offset + 100) - 46
    raw[secret.header_offset + 6] |= 1
    raw[central + 8] |= 1
    raw[broken.header_offset + 60] ^= 0xFF
    path.write_bytes(raw)
    reasons = rejected(path, tmp_path)
    assert len(reasons) == 3
    assert "larger than 64 MiB" in reasons[0]
    assert "it is encrypted" in reasons[1]
    assert "it is damaged" in reasons[2]
    assert CrystalStore.open(tmp_path / "out.store").ids.to_pylist() == ["good"]


def test_a_member_that_says_less_than_it_holds_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    make_archive(path, {"x.cif": b"data_x" + b" " * (65 * 2**20)})
    raw = path.read_bytes()
    path.write_bytes(raw.replace((65 * 2**20 + 6).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    assert "damaged" in rejected(path, tmp_path)[0]


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    for name in ("x.zip", "x.tar", "x.tar.gz", "x.tar.xz"):
        (tmp_path / name).write_bytes(b"nothing of the kind" * 100)
        with pytest.raises(DataError, match=f"{name}: not a (zip|tar) archive"):
            import_crystals(tmp_path / name, tmp_path / "s.store")
    make_archive(tmp_path / "y.zip", {"README": b""})
    with pytest.raises(DataError, match="no structure file in it"):
        import_crystals(tmp_path / "y.zip", tmp_path / "s.store")
    assert not list(tmp_path.glob(".s.store*"))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst", ".xz"])
def test_a_compressed_cif_is_read(tmp_path: Path, references: dict[str, Structure], suffix: str) -> None:
    import bz2
    import gzip
    import lzma

    text = (EXAMPLES / "KCl_mp-23193.cif").read_bytes()
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    compress[".zst"] = lambda content: pa.compress(content, "zstd", asbytes=True)
    (tmp_path / f"mp-23193.cif{suffix}").write_bytes(compress[suffix](text))
    make_archive(tmp_path / "x.tar", {f"mp-23193.cif{suffix}": compress[suffix](text)})
    for name in (f"mp-23193.cif{suffix}", "x.tar"):
        _, store = imported(tmp_path / name, tmp_path)
        assert store.ids.to_pylist() == ["mp-23193"]
        assert_same(structure_at(store, 0), references["mp-23193"])
    (tmp_path / f"cut.cif{suffix}").write_bytes(compress[suffix](text)[:-20])
    assert "can't be read" in rejected(tmp_path / f"cut.cif{suffix}", tmp_path)[0]


@pytest.mark.parametrize("name", ["jarvis_dft_3d.json", "cdvae.csv"])
def test_a_file_of_records_alone_in_a_zip_archive_is_read(tmp_path: Path, name: str) -> None:
    text = (FORMATS / name).read_bytes()
    path = tmp_path / f"{name}.zip"
    make_archive(path, {f"deep/{name}": text, f"__MACOSX/._{name}": b"", "README": b""})
    assert imported(path, tmp_path)[1].ids == imported(FORMATS / name, tmp_path)[1].ids
    make_archive(path, {name: text, f"second-{name}": text})
    with pytest.raises(DataError, match=rf"{name}\.zip: .*it holds 2 files"):
        import_crystals(path, tmp_path / "t.store")
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=rf"{name}\.zip: .*not a zip file"):
        import_crystals(path, tmp_path / "t.store")


def objects(references: dict[str, Structure]) -> Iterator[tuple[str, Any]]:
    """Give the crystals as every kind of Python object that is taken."""
    records = [{"material_id": name, "structure": s, "energy": 1.0} for name, s in references.items()]
    lemat = pq.read_table(FORMATS / "lemat_bulk.parquet")
    yield "pandas", pd.DataFrame(records)
    yield "pandas schema", starter_frame()
    yield "polars LeMat", polars.from_arrow(lemat)
    yield "polars schema", polars.from_arrow(pq.read_table(EMBEDDED / "mp_starter.parquet").slice(0, 6))
    yield "Arrow", lemat
    yield "rows of a data set", (row for row in lemat.to_pylist())
    yield "pandas LeMat", lemat.to_pandas()
    yield "list of records", records
    yield "iterator of Structures", iter(references.values())
    yield "list of Atoms", [AseAtomsAdaptor.get_atoms(s, msonable=False) for s in references.values()]


def starter_frame() -> pd.DataFrame:
    return pq.read_table(EMBEDDED / "mp_starter.parquet").slice(0, 6).to_pandas()


def test_objects_are_imported_from_python(tmp_path: Path, references: dict[str, Structure]) -> None:
    starter = CrystalStore.from_table(pq.read_table(EMBEDDED / "mp_starter.parquet").slice(0, 6))
    for name, source in objects(references):
        report, store = imported(source, tmp_path)
        assert (report.kept, report.rejected) == (6, 0), name
        if "schema" in name:
            assert store.ids.to_pylist() == starter.ids.to_pylist()
            np.testing.assert_array_equal(store.crystals.frac_coords, starter.crystals.frac_coords)
            assert store.numbers_of("band_gap").tolist() == starter.numbers_of("band_gap").tolist()
        elif store.ids[0].as_py() == "crystal-1":
            for row, structure in enumerate(references.values()):
                assert_same(structure_at(store, row), structure)
        else:
            assert_all_same(store, references)


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    for source in (3, [], iter([]), tmp_path / "x.docx"):
        (tmp_path / "x.docx").write_bytes(b"x")
        with pytest.raises(DataError, match=r"no source of crystals|is empty|not a file of crystals by its name"):
            import_crystals(source, tmp_path / "s.store")
    assert rejected([3, {"a": 1}], tmp_path) == [
        "not a record of a crystal but int",
        "it has no structure in a layout that is known",
    ]


STRUCTURE = Structure(Lattice.cubic(4.2), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
ATOMS = {
    "lattice_mat": [[4, 0, 0], [0, 4, 0], [0, 0, 4]],
    "coords": [[0, 0, 0]],
    "elements": ["Po"],
    "cartesian": False,
}
OPTIMADE = {
    "lattice_vectors": [[4, 0, 0], [0, 4, 0], [0, 0, 4]],
    "cartesian_site_positions": [[0, 0, 0]],
    "species_at_sites": ["a"],
    "species": [{"name": "a", "chemical_symbols": ["Po"], "concentration": [1.0]}],
}
SCHEMA = {"lattice": [4, 0, 0, 0, 4, 0, 0, 0, 4], "atomic_numbers": [84], "frac_coords": [0, 0, 0]}
MOLECULE = {"@class": "Molecule", "sites": [{"species": [{"element": "O", "occu": 1}], "xyz": [0, 0, 0]}]}


def species(**values: Any) -> dict[str, Any]:
    return OPTIMADE | {"species": [OPTIMADE["species"][0] | values]}


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return the dictionary of a structure with one value replaced."""
    document = json.loads(json.dumps(STRUCTURE.as_dict()))
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = document
    for key in parents:
        place = place[key]
    place[last] = value
    return document


@pytest.mark.parametrize(
    ("record", "pattern"),
    [
        (changed("sites.0.species", [{"element": "Cs", "occu": 0.5}]), "partial occupancy"),
        (changed("sites.0.species.0.element", "X"), "'X' is not a chemical element"),
        (changed("sites.0.species.0.element", "Vac"), "'Vac' is not a chemical element"),
        (changed("sites.0.abc.0", None), "None stands where a number should"),
        (changed("sites.0.abc.0", "0"), "'0' stands where a number should"),
        (changed("sites.0.abc", [0, 0]), "3 numbers"),
        (changed("sites.0.abc.0", 1e12), "is the unit right"),
        (changed("sites.0.abc.0", float("nan")), "not finite"),
        (changed("lattice.matrix.0", [0, 0, 0]), "no volume"),
        (changed("lattice.matrix", [[4, 0, 0], [0, 4, 0]]), "its structure can't be read"),
        (changed("lattice.pbc", [True, True, False]), "periodic in three directions"),
        (changed("sites", []), "no atoms"),
        (changed("sites.1.abc", [0.01, 0, 0]), "overlap"),
        (MOLECULE, "no structure"),
        ({k: v for k, v in ATOMS.items() if k != "cartesian"}, "whether its coordinates are cartesian"),
        (ATOMS | {"elements": ["Po", "Po"]}, "2 species and 1 coordinates"),
        (OPTIMADE | {"nperiodic_dimensions": 2}, "periodic in 2 directions"),
        (OPTIMADE | {"dimension_types": [1, 0, 0]}, "periodic in 1 directions"),
        (species(concentration=[0.9]), "partial occupancy"),
        (species(chemical_symbols=["Po", "vacancy"], concentration=[0.5, 0.5]), "partial occupancy"),
        (species(chemical_symbols=["vacancy"]), "isn't one atom"),
        (OPTIMADE | {"species_at_sites": ["b"]}, "not a chemical element"),
        ({"structure": "data_x\n_cell_length_a 4"}, "no atoms"),
        ({"structure": "{broken"}, "not valid JSON"),
        (["a"], "not a record of a crystal but list"),
        ({"id": ["a"], **ATOMS}, "its id"),
        (SCHEMA | {"atomic_numbers": [84.5]}, "the atomic number 84.5 is not a whole number"),
        (SCHEMA | {"atomic_numbers": [True]}, "the atomic number True is not a whole number"),
        (SCHEMA | {"atomic_numbers": ["84"]}, "the atomic number '84' is not a whole number"),
        (SCHEMA | {"atomic_numbers": [0]}, "the atomic number 0 is not a whole number between 1 and 118"),
    ],
)
def test_a_record_that_is_no_ordered_crystal_is_refused_in_words(tmp_path: Path, record: Any, pattern: str) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(ATOMS) + "\n" + json.dumps(record) + "\n")
    (reason,) = rejected(tmp_path / "x.jsonl", tmp_path)
    assert pattern in reason
    assert CrystalStore.open(tmp_path / "out.store").ids.to_pylist() == ["x-1"]


def test_atoms_that_are_no_crystal_are_refused(tmp_path: Path) -> None:
    whole = Atoms("Po", cell=[4, 4, 4], pbc=True)
    slab, dummy, mixed = whole.copy(), whole.copy(), whole.copy()
    slab.pbc = (True, True, False)
    dummy.numbers[:] = 0
    mixed.info["occupancy"] = {"0": {"Po": 0.5, "Bi": 0.5}}
    reasons = rejected([whole, slab, dummy, mixed], tmp_path)
    assert ["periodic" in reasons[0], "atomic number" in reasons[1], "partial" in reasons[2]] == [True] * 3


def test_frames_of_extended_xyz_that_cannot_be_read_are_rejected_one_by_one(tmp_path: Path) -> None:
    text = (FORMATS / "crystals.extxyz").read_text()
    frame = text.split("\n2\n", 1)[0] + "\n"
    bad = frame.replace("Ca  ", "Qq  ", 1)
    molecule = "1\nProperties=species:S:1:pos:R:3\nHe 0 0 0\n"
    (tmp_path / "x.extxyz").write_text(text + bad + molecule + frame.replace("mp-3953", "again")[:-40])
    reasons = rejected(tmp_path / "x.extxyz", tmp_path)
    assert len(reasons) == 3
    assert "can be read" in reasons[0]
    assert "no Lattice" in reasons[1]
    assert "ends too early" in reasons[2] or "can be read" in reasons[2]
    assert len(CrystalStore.open(tmp_path / "out.store")) == 6
    (tmp_path / "y.extxyz").write_text(text.replace("\n2\n", "\n3\n", 1))
    with pytest.raises(DataError, match=r"y.extxyz line 18: .* number of atoms; correct it"):
        import_crystals(tmp_path / "y.extxyz", tmp_path / "s.store")


@pytest.mark.parametrize("numbers", [[84.5], [True], ["84"], [119]])
def test_an_ase_database_whose_atomic_numbers_are_no_whole_numbers_is_refused(tmp_path: Path, numbers: Any) -> None:
    document = json.loads((FORMATS / "crystals_ase.json").read_text())
    document["1"]["numbers"] = numbers * len(document["1"]["numbers"]["__ndarray__"][2])
    (tmp_path / "x.json").write_text(json.dumps(document))
    (reason,) = rejected(tmp_path / "x.json", tmp_path)
    assert f"the atomic number {numbers[0]!r} is not a whole number" in reason


@pytest.mark.parametrize(
    ("properties", "atom", "pattern"),
    [
        ("species:S:1:pos:R:3:foo:R:100000000", "Na 0 0 0", "claim 100000004 columns where an atom has 4"),
        ("species:S:1:pos:R:3", "Na 0 0 0 0", "claim 4 columns where an atom has 5"),
        ("Z:R:1:pos:R:3", "11.5 0 0 0", "Z are not a column of whole numbers"),
        ("Z:L:1:pos:R:3", "T 0 0 0", "Z are not a column of whole numbers"),
    ],
)
def test_a_frame_whose_columns_are_not_what_it_claims_is_rejected_at_once(
    tmp_path: Path, properties: str, atom: str, pattern: str
) -> None:
    (tmp_path / "x.extxyz").write_text(f'1\nLattice="4 0 0 0 4 0 0 0 4" Properties={properties}\n{atom}\n')
    start = time.process_time()
    (reason,) = rejected(tmp_path / "x.extxyz", tmp_path)
    assert pattern in reason
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("name", "head", "blank", "tail"),
    [
        ("x.json", b"[", b" ", b"]"),
        ("x.json", b"[1]", b"\n", b""),
        ("x.json", b'{"a"', b"\t", b":1}"),
        ("x.json", b'[{"a":', b" ", b"1}]"),
        ("x.jsonl", b"", b"\n", b""),
        ("x.extxyz", b"", b"\n", b""),
        ("x.extxyz", b"999999999\n", b"\n", b""),
        ("x.csv", b"id,cif\n", b"\n", b""),
    ],
)
def test_a_file_of_blanks_is_refused_before_much_of_it_is_read(
    tmp_path: Path, name: str, head: bytes, blank: bytes, tail: bytes
) -> None:
    (tmp_path / name).write_bytes(head + blank * 40_000_000 + tail)
    start = time.process_time()
    with pytest.raises(DataError, match=r"blanks in a row|empty lines in a row|MiB of lines"):
        import_crystals(tmp_path / name, tmp_path / "s.store", workers=1)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("name", "text", "pattern"),
    [
        ("x.json", json.dumps(dict.fromkeys(map(str, range(101)), 0)), "over 100 keys"),
        ("x.json", json.dumps({"a": "a" * 3000, "b": "b" * 3000}), "before any record"),
        ("x.csv", "id,cif\na," + "b" * 5000, "line 1: a line of over"),
        ("x.csv", "id,cif" + "," * 5000, "a line of over"),
        (
            "x.jsonl",
            "\n".join(json.dumps({"atoms": ATOMS, "id": f"{i}", f"p{i}": i}) for i in range(21)),
            "over 20 prop",
        ),
    ],
    ids=["keys", "head", "line", "header", "columns"],
)
def test_a_file_that_would_fill_the_memory_is_refused(
    tmp_path: Path, name: str, text: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_files, "MOST_KEYS", 100)
    monkeypatch.setattr(record_files, "LIMIT", 5000)
    monkeypatch.setattr(table_cells, "LONGEST_LINE", 5000)
    monkeypatch.setattr(columns, "MOST_COLUMNS", 20)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=pattern):
        import_crystals(tmp_path / name, tmp_path / "s.store", workers=1)
    assert os.listdir(tmp_path) == [name]


def test_a_whole_number_beyond_every_decimal_is_read_as_an_infinite_one_is(tmp_path: Path) -> None:
    values = ["1e400", "1" + "0" * 4000, str(1 - 2**1024), str(2**1023), str(2**63)]
    rows = [f'{{"id": "{i}", "atoms": {json.dumps(ATOMS)}, "y": {value}}}' for i, value in enumerate(values)]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    report, store = imported(tmp_path / "x.jsonl", tmp_path)
    np.testing.assert_array_equal(store.numbers_of("y"), [np.nan] * 3 + [2.0**1023, 2.0**63])
    assert report.unused == ("3 of 5 values of 'y' could not be used, first 'inf' in x.jsonl line 1",)


def test_energies_of_ase_have_their_unit(tmp_path: Path) -> None:
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.db import connect

    atoms = Atoms("Po", cell=[4, 4, 4], pbc=True)
    atoms.calc = SinglePointCalculator(atoms, energy=-1.5, forces=np.zeros((1, 3)))
    write_ase(tmp_path / "x.extxyz", atoms)
    with connect(tmp_path / "x.db") as database:
        database.write(atoms, key_value_pairs={"gap": 0.5, "source": "me"})
    for name in ("x.extxyz", "x.db"):
        _, store = imported(tmp_path / name, tmp_path)
        assert (store.units["energy"], store.numbers_of("energy").tolist()) == ("eV", [-1.5])
    assert (store.numbers_of("gap").tolist(), store.texts_of("source").tolist()) == ([0.5], ["me"])


def test_what_only_calls_itself_a_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"SQLite format 3\0" + b"junk" * 100)
    (tmp_path / "y.db").write_bytes(b"junk")
    for name in ("x.db", "y.db"):
        with pytest.raises(DataError, match=rf"{name}: (not an SQLite|ase can't read)"):
            import_crystals(tmp_path / name, tmp_path / "s.store")


def test_a_parquet_file_few_bytes_of_which_are_many_values_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "MOST_VALUES", 1000)
    path = tmp_path / "x.parquet"
    numbers = np.full(1_000_000, 11, np.uint8)
    columns = {"material_id": ["a"], "lattice": [np.eye(3).ravel()], "atomic_numbers": [numbers]}
    pq.write_table(pa.table({**columns, "frac_coords": [np.zeros(3_000_000)]}), path)
    for open_ in (CrystalStore.open, lambda path: import_crystals(path, tmp_path / "s.store")):
        with pytest.raises(DataError, match=r"x\.parquet: column 'atomic_numbers\S*' claims 1,000,000 values in"):
            open_(path)


def test_metadata_that_are_not_utf8_are_read(tmp_path: Path, references: dict[str, Structure]) -> None:
    _, store = imported(EXAMPLES, tmp_path)
    table = store.to_table().replace_schema_metadata({b"dataset": b"caf\xe9"})
    field = pa.field("y", pa.float64(), metadata={b"units": b"\xb5eV"})
    pq.write_table(table.append_column(field, pa.array([1.0] * len(table))), tmp_path / "x.parquet")
    store = CrystalStore.open(tmp_path / "x.parquet")
    assert (store.metadata, store.units) == ({"dataset": "caf\ufffd"}, {"y": "\ufffdeV"})
    _, store = imported(tmp_path / "x.parquet", tmp_path)
    assert_all_same(store, {f"{path.stem}": references[path.stem.split("_")[1]] for path in EXAMPLES.glob("*.cif")})


@pytest.mark.parametrize(
    "made",
    [
        "CREATE VIEW systems AS WITH RECURSIVE t(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM t) SELECT id FROM t",
        "CREATE VIEW information AS WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n FROM t) SELECT n FROM t",
        "CREATE VIRTUAL TABLE systems USING fts5(id)",
    ],
    ids=["rows", "version", "virtual"],
)
def test_a_database_of_rows_without_end_is_refused(tmp_path: Path, made: str) -> None:
    with closing(sqlite3.connect(tmp_path / "x.db")) as database:
        database.execute(made)
    with pytest.raises(DataError, match=r"x\.db: '(systems|information)' in it is a view or a virtual table"):
        import_crystals(tmp_path / "x.db", tmp_path / "s.store")


def test_nothing_that_a_file_names_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    record = {**STRUCTURE.as_dict(), "@module": "trap", "@class": "Trap"}
    (tmp_path / "x.json").write_text(json.dumps([{"structure": record, "x": {"@module": "trap", "@class": "Trap"}}]))
    _, store = imported(tmp_path / "x.json", tmp_path)
    assert len(store) == 1
    assert "trap" not in sys.modules


def test_json_is_read_in_every_arrangement(tmp_path: Path) -> None:
    rows = [[STRUCTURE.as_dict(), 1.0], [STRUCTURE.as_dict(), float("nan")]]
    documents = {
        "one": STRUCTURE.as_dict(),
        "list": [STRUCTURE.as_dict(), ATOMS],
        "by_id": {"a": STRUCTURE.as_dict(), "b": {"atoms": ATOMS, "gap": 1}},
        "split": {"index": ["p", "q"], "columns": ["s", "gap"], "data": rows},
        "columns_last": {"data": rows, "columns": ["structure", "gap"]},
    }
    expected = {
        "one": ["one"],
        "list": ["list-1", "list-2"],
        "by_id": ["a", "b"],
        "split": ["p", "q"],
        "columns_last": ["columns_last-1", "columns_last-2"],
    }
    for name, document in documents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
        _, store = imported(tmp_path / f"{name}.json", tmp_path)
        assert store.ids.to_pylist() == expected[name]
    assert store.numbers_of("gap")[0] == 1
    assert np.isnan(store.numbers_of("gap")[1])


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("", "neither a list nor an object"),
        ("[", "damaged after record 0|not a JSON file"),
        ('{"a": 1}', "no crystal in a layout"),
        ("[]", "no crystal in a layout"),
        (json.dumps([ATOMS])[:-1], "damaged after record 1"),
        (json.dumps([ATOMS, ATOMS])[:-20], "damaged after record 1"),
        (json.dumps([ATOMS]) + "]", "damaged after record 1 .*something follows"),
        ("[" * 100_000, "nested too deeply|damaged|not a JSON"),
        ('{"data": [' + "[" * 100_000, "nested too deeply|not a JSON"),
        ("\ufeff" + json.dumps([ATOMS]).replace("4", "9" * 5000, 1), "damaged|not a JSON"),
    ],
    ids=["empty", "open", "other", "none", "cut", "cut_record", "more", "deep", "deeper", "number"],
)
def test_json_that_cannot_be_read_to_its_end_is_refused(tmp_path: Path, text: str, pattern: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=pattern):
        import_crystals(tmp_path / "x.json", tmp_path / "s.store")
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_value_longer_than_the_window_of_the_json_reader_is_read_whole(tmp_path: Path) -> None:
    long = {"atoms": ATOMS, "id": "long", "text": "ä" * 3_000_000}
    (tmp_path / "x.json").write_text(json.dumps([{"atoms": ATOMS, "id": "a"}, long], ensure_ascii=False))
    _, store = imported(tmp_path / "x.json", tmp_path)
    assert store.ids.to_pylist() == ["a", "long"]
    assert len(store.texts_of("text")[1]) == 3_000_000


def test_columns_take_one_type_over_the_whole_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 2)
    values = [1, 2, 3, 4.5, "many", None, "6.0", 7]
    words = ["a", "b", "c", 4.5, "d", True, "e", "f"]
    records = [
        {"id": str(i), "atoms": ATOMS, "mixed": values[i], "words": words[i], "late": i if i > 5 else None}
        for i in range(8)
    ]
    records[4]["nested"] = [1]
    records[0]["nested"] = 1
    report, store = imported(records, tmp_path, workers=1)
    np.testing.assert_array_equal(store.numbers_of("mixed"), [1, 2, 3, 4.5, np.nan, np.nan, 6, 7])
    assert store.texts_of("words").tolist() == ["a", "b", "c", "4.5", "d", "True", "e", "f"]
    assert report.unused == ("1 of 7 values of 'mixed' could not be used, first 'many' in row 5",)
    assert store.numbers_of("late")[5:].tolist()[1:] == [6, 7]
    assert store.column_names == ["mixed", "words", "late"]
    assert "columns hold neither numbers nor text and were left out: 1 (nested)" in report.notes


def test_a_csv_of_cifs_lists_its_bad_rows(tmp_path: Path) -> None:
    with (FORMATS / "cdvae.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    rows[1][2], rows[2] = "much", rows[2][:-1]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    reasons = rejected(tmp_path / "x.csv", tmp_path)
    assert reasons == [
        "it has 4 cells where the header has 5",
        "formation_energy_per_atom is 'much', not a finite number; its value is null",
    ]
    (tmp_path / "y.csv").write_text("id,gap\na,1\n")
    with pytest.raises(DataError, match="goes with --targets"):
        import_crystals(tmp_path / "y.csv", tmp_path / "s.store")


def test_several_files_make_one_store_and_an_id_is_taken_once(tmp_path: Path) -> None:
    report, store = imported([FORMATS / "optimade.json", FORMATS / "mp_documents.json", EXAMPLES], tmp_path)
    assert (report.kept, report.rejected) == (12, 6)
    assert store.metadata["source"] == "examples, optimade.json, mp_documents.json"
    for name in ("a", "b"):
        shutil.copy(FORMATS / "lemat_bulk.parquet", tmp_path / f"{name}.parquet")
    report, _ = imported(str(tmp_path / "*.parquet"), tmp_path)
    assert (report.kept, report.rejected) == (6, 6)


KILLED = """
import os, sys
from crysldnet.data.output import StoreWriter
from crysldnet.readers import sources, workers
from crysldnet.tools.importer.importer import import_crystals
from crysldnet.tools.importer.assembly import Spool

def kill_at(kind, method, call):
    original, calls = getattr(kind, method), iter(range(int(call)))
    def counted(*args):
        if next(calls, None) is None:
            os.kill(os.getpid(), 9)
        return original(*args)
    setattr(kind, method, counted)

sources.PIECE = 100
workers.PATIENCE = 0
if __name__ == "__main__":
    if sys.argv[5:]:
        kill_at({"Spool": Spool, "StoreWriter": StoreWriter}[sys.argv[5]], *sys.argv[6:])
    import_crystals(sys.argv[1], sys.argv[2], targets=sys.argv[3], workers=int(sys.argv[4]))
"""


def many_lines(path: Path, count: int) -> None:
    """Write the starter set as JSON lines, repeated, some records being bad and some ids being there twice."""
    table = pq.read_table(EMBEDDED / "mp_starter.parquet", columns=list(STRUCTURE_COLUMNS)).slice(0, 500)
    rows = table.to_pylist()
    with path.open("w") as file:
        for i in range(count):
            row = dict(rows[i % 500], material_id=f"c{i if i % 97 else 0}", gap=i / 7)
            if i % 89 == 5:
                row["lattice"] = row["lattice"][:8]
            file.write(json.dumps(row) + "\n")


def content(store: Path) -> dict[str, bytes]:
    report = store.with_name(f"{store.name}.rejects.csv")
    return {path.name: path.read_bytes() for path in store.iterdir()} | {"rejects": report.read_bytes()}


@pytest.mark.distributed
def test_a_killed_import_leaves_nothing_and_the_next_one_gives_the_same_bytes(tmp_path: Path) -> None:
    many_lines(tmp_path / "x.jsonl", 3000)
    (tmp_path / "t.csv").write_text("id,y\n" + "".join(f"c{i},{i}\n" for i in range(2, 3000, 2)))
    (tmp_path / "run.py").write_text(KILLED)
    inputs = set(tmp_path.iterdir())

    def start(out: str, workers: int, *kill: str) -> subprocess.Popen:
        arguments = [str(tmp_path / "x.jsonl"), str(tmp_path / out), str(tmp_path / "t.csv"), str(workers), *kill]
        return subprocess.Popen([sys.executable, str(tmp_path / "run.py"), *arguments])

    assert start("cut.store", 2, "Spool", "append", "9").wait() == -signal.SIGKILL  # while processes read
    assert set(tmp_path.iterdir()) == inputs
    whole = start("whole.store", 1)
    for method in ("append", "_finish"):  # while the pieces are put together, and when all is written but the name
        assert start("cut.store", 1, "StoreWriter", method, "0").wait() == -signal.SIGKILL
        assert list(tmp_path.glob(".cut.store.partial-*"))
        assert not (tmp_path / "cut.store").exists()
    assert start("cut.store", 2).wait() == 0
    assert whole.wait() == 0
    assert content(tmp_path / "cut.store") == content(tmp_path / "whole.store")
    assert len(CrystalStore.open(tmp_path / "cut.store")) == 3000 - 34 - 30
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_of_two_imports_to_one_output_the_later_one_is_refused(tmp_path: Path) -> None:
    def crystals() -> Iterator[dict[str, Any]]:
        import_crystals(FORMATS / "optimade.json", tmp_path / "s.store")
        yield from pq.read_table(FORMATS / "lemat_bulk.parquet").to_pylist()

    with pytest.raises(DataError, match="already exists"):
        import_crystals(crystals(), tmp_path / "s.store")
    assert CrystalStore.open(tmp_path / "s.store").metadata["source"] == "optimade.json"
    assert {path.name for path in tmp_path.iterdir()} == {"s.store", "s.store.notes.csv"}


def test_the_reading_of_records_imports_neither_pymatgen_nor_ase(tmp_path: Path) -> None:
    script = (
        "import sys; from crysldnet.tools.importer.importer import import_crystals;"
        "import_crystals(sys.argv[1], sys.argv[2]);"
        "sys.exit(','.join({'pymatgen', 'ase', 'monty'} & set(sys.modules)) or 0)"
    )
    for name in ("mp_documents.json", "cod_1011031.cif"):
        arguments = [str(FORMATS / name), str(tmp_path / f"{name}.store")]
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
