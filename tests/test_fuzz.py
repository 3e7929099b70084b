"""Damaged input is refused, or gives what another library reads in the same bytes, or the undamaged crystal.

The damage is drawn with a fixed seed, so the tests see the same 2,600 inputs every time.
"""

import contextlib
import io
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase.io.cif
import numpy as np
import polars
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Element, Lattice, Structure
from pymatgen.io.cif import CifParser, CifWriter

from crysldnet.data.datasets import EMBEDDED
from crysldnet.data.schema import crystals_from_table
from crysldnet.errors import DataError
from crysldnet.readers.cif import NOTE_FORMULA
from crysldnet.readers.sources import Settings, open_readers
from crysldnet.readers.structure_files import parse_structure

FORMATS = Path(__file__).parent / "formats"
TOKENS = [
    *(b"nan", b"inf", b"1e400", b"-1", b"0", b"1.0.0", b"?", b".", b"9" * 30, b"", b"Xx", b"H", b"'", b'"', b"\0"),
    *(b"\xff\xfe", b"loop_", b"data_", b"null", b"[]", b"{}", b"true", b";", b"#", b"0.5", b"-x,y,z", b"\n", b" "),
]

Cell = tuple[np.ndarray, np.ndarray, np.ndarray]


def damaged(original: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Give damaged copies: bytes and words changed, lines and stretches lost, doubled or moved, ends cut off."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        raw = original
        for _ in range(int(rng.integers(1, 3))):
            at = int(rng.integers(max(len(raw), 1)))
            words = [match.span() for match in re.finditer(rb"[^\s,:]+", raw[:20_000])]
            lines = raw.split(b"\n")
            line, other = (int(i) for i in rng.integers(len(lines), size=2))
            digits = [match.start() for match in re.finditer(rb"\d", raw)]
            kind = rng.integers(12)
            if kind == 0 and raw:
                raw = raw[:at] + bytes([raw[at] ^ (1 << int(rng.integers(8)))]) + raw[at + 1 :]
            elif kind == 1:
                raw = raw[:at]
            elif kind == 2:
                raw = raw[:at] + raw[at + int(rng.integers(1, 60)) :]
            elif kind == 3:
                raw = b"\n".join([*lines[:line], *lines[line + 1 :]])
            elif kind == 4:
                raw = b"\n".join([*lines[:line], lines[other], *lines[line:]])
            elif kind < 9 and digits:
                at = digits[int(rng.integers(len(digits)))]
                raw = raw[:at] + b"%d" % rng.integers(10) + raw[at + 1 :]
            elif words:
                first, last = words[int(rng.integers(len(words)))]
                raw = raw[:first] + TOKENS[int(rng.integers(len(TOKENS)))] + raw[last:]
        yield raw


def same(one: Cell, other: Cell, atol: float = 2e-3) -> bool:
    """Return whether two crystals have the same atoms and the same distances between them."""
    if sorted(one[1]) != sorted(other[1]):
        return False
    pair = [Structure(Lattice(lattice), numbers, frac) for lattice, numbers, frac in (one, other)]
    if not np.isclose(pair[0].volume, pair[1].volume, rtol=1e-4):
        return False
    return np.allclose(*(np.sort(s.distance_matrix, axis=None) for s in pair), atol=atol)


def cell_of(structure: Structure) -> Cell:
    return structure.lattice.matrix, np.array(structure.atomic_numbers), structure.frac_coords


def read(raw: bytes, path: Path) -> tuple[dict[str, Cell], str]:
    """Return the crystals that an import would keep, by id, and its notes."""
    path.write_bytes(raw)
    cells: dict[str, Cell] = {}
    notes = ""
    for reader in open_readers(path):
        for task in reader.tasks(Settings(1000, None)):
            table, _, _, found, _ = task()
            notes += str(found)
            crystals = crystals_from_table(table)
            for i, material_id in enumerate(table["material_id"].to_pylist()):
                one = crystals.take(np.array([i]))
                cells.setdefault(material_id, (one.lattice[0], one.numbers, one.frac_coords.astype(float)))
    return cells, notes


def silent_and_wrong(
    original: bytes, count: int, seed: int, path: Path, *references: Callable[[bytes], dict[str, Cell]]
) -> tuple[int, list[bytes]]:
    """Return how many damaged inputs still gave crystals, and those that gave one that neither the undamaged input nor
    another library gives, without a note that the file's own formula says otherwise."""
    whole = list(read(original, path)[0].values())
    assert whole
    taken = 0
    wrong = []
    for raw in damaged(original, count, seed):
        try:
            cells, notes = read(raw, path)
        except DataError:
            continue
        taken += bool(cells)
        others: list[dict[str, Cell]] = []
        for material_id, cell in cells.items():
            if NOTE_FORMULA in notes or any(same(cell, other) for other in whole):
                continue
            with warnings.catch_warnings(action="ignore"):
                others = others or [reference(raw) for reference in references]
            if not any(material_id in other and same(cell, other[material_id]) for other in others):
                wrong.append(raw)
                break
    return taken, wrong


def by_pymatgen(raw: bytes) -> dict[str, Cell]:
    try:
        text = raw.decode("utf-8-sig", errors="replace")
        return {"x": cell_of(CifParser.from_str(text, frac_tolerance=0).parse_structures(primitive=False)[0])}
    except Exception:
        return {}


def by_ase(raw: bytes) -> dict[str, Cell]:
    try:
        atoms = next(ase.io.cif.read_cif(io.BytesIO(raw), slice(None)))
        return {"x": (np.array(atoms.cell), atoms.numbers, atoms.get_scaled_positions())}
    except Exception:
        return {}


def cifs() -> list[str]:
    found = [path.read_text() for path in sorted((EMBEDDED / "examples").glob("*.cif"))]
    with warnings.catch_warnings(action="ignore"):
        structures = [CifParser.from_str(text).parse_structures(primitive=False)[0] for text in found]
        found += [str(CifWriter(structure, symprec=0.01)) for structure in structures]
    return [*found, (FORMATS / "cod_1011031.cif").read_text()]


def test_a_damaged_cif_is_refused_or_read_as_others_read_it(tmp_path: Path) -> None:
    wrong, taken = [], 0
    for seed, text in enumerate(cifs()):
        count, found = silent_and_wrong(text.encode(), 100, seed, tmp_path / "x.cif", by_pymatgen, by_ase)
        taken, wrong = taken + count, wrong + found
    assert not wrong, wrong[0].decode(errors="replace")
    assert 300 < taken < 1000


def documents(raw: bytes) -> list[Any]:
    """Return the records of a JSON file or of JSON lines, those lines left out that aren't JSON."""
    try:
        value = json.loads(raw.decode("utf-8-sig"))
        return value["data"] if isinstance(value, dict) else value
    except ValueError:
        found = []
        for line in raw.split(b"\n"):
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found


def by_hand(raw: bytes, make: Callable[[Any], tuple[Any, Structure]]) -> dict[str, Cell]:
    """Return the crystals of JSON records as pymatgen makes them; the first of several with one id."""
    cells: dict[str, Cell] = {}
    for record in documents(raw):
        with contextlib.suppress(Exception):
            material_id, structure = make(record)
            cells.setdefault(str(material_id).strip(), cell_of(structure))
    return cells


def from_pymatgen(record: Any) -> tuple[Any, Structure]:
    return record["material_id"], Structure.from_dict(record["structure"])


def from_jarvis(record: Any) -> tuple[Any, Structure]:
    atoms = record["atoms"]
    cartesian = atoms["cartesian"]
    return record["jid"], Structure(
        atoms["lattice_mat"], atoms["elements"], atoms["coords"], coords_are_cartesian=cartesian
    )


def from_optimade(record: Any) -> tuple[Any, Structure]:
    attributes = record["attributes"]
    symbols = {species["name"]: species["chemical_symbols"][0] for species in attributes["species"]}
    return record["id"], Structure(
        attributes["lattice_vectors"],
        [symbols[name] for name in attributes["species_at_sites"]],
        attributes["cartesian_site_positions"],
        coords_are_cartesian=True,
    )


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("mp_documents.json", from_pymatgen),
        ("mp_documents.jsonl", from_pymatgen),
        ("jarvis_dft_3d.json", from_jarvis),
        ("optimade.json", from_optimade),
    ],
)
def test_damaged_json_is_refused_or_read_as_pymatgen_reads_it(
    tmp_path: Path, name: str, make: Callable[[Any], tuple[Any, Structure]]
) -> None:
    original = (FORMATS / name.replace("jsonl", "json")).read_bytes()
    if name.endswith("jsonl"):
        original = b"".join(json.dumps(record).encode() + b"\n" for record in json.loads(original))
    taken, wrong = silent_and_wrong(original, 200, 1, tmp_path / name, lambda raw: by_hand(raw, make))
    assert not wrong, wrong[0].decode(errors="replace")
    assert 10 < taken < 200


@pytest.mark.parametrize("checksums", [True, False], ids=["checksums", "none"])
def test_damaged_parquet_is_refused_or_read_as_polars_reads_it(tmp_path: Path, checksums: bool) -> None:
    table = pq.read_table(EMBEDDED / "mp_starter.parquet").slice(0, 20).drop_columns(["split"])
    pq.write_table(table, tmp_path / "x.parquet", compression="none", write_page_checksum=checksums)

    def by_polars(raw: bytes) -> dict[str, Cell]:
        try:
            rows = polars.read_parquet(io.BytesIO(raw)).to_dicts()
        except BaseException as error:  # polars panics with an error of its own
            if isinstance(error, KeyboardInterrupt):
                raise
            return {}
        cells = {}
        for row in rows:
            with contextlib.suppress(Exception):
                numbers, frac = np.array(row["atomic_numbers"]), np.reshape(row["frac_coords"], (-1, 3))
                cells[row["material_id"]] = (np.reshape(row["lattice"], (3, 3)), numbers, frac)
        return cells

    taken, wrong = silent_and_wrong(
        (tmp_path / "x.parquet").read_bytes(), 250, 2, tmp_path / "x.parquet", *([] if checksums else [by_polars])
    )
    assert not wrong
    assert 1 < taken < 250


def by_lines(raw: bytes) -> dict[str, Cell]:
    """Read extended XYZ as its definition says: a number, a line with a lattice, as many lines of atoms."""
    cells: dict[str, Cell] = {}
    lines = iter(raw.decode("utf-8", errors="replace").split("\n"))
    number = 0
    with contextlib.suppress(Exception):
        while (first := next(lines, None)) is not None:
            if not first.strip():
                continue
            number += 1
            about, *atoms = (next(lines) for _ in range(int(first) + 1))
            with contextlib.suppress(Exception):
                lattice = np.array(re.search(r'Lattice="([^"]*)"', about)[1].split(), float).reshape(3, 3)  # type: ignore[index]
                name = re.search(r'\bmaterial_id=("[^"]*"|\S+)', about)
                words = [line.split() for line in atoms]
                numbers = np.array([Element(word[0]).Z for word in words])
                places = np.array([word[1:4] for word in words], float)
                frac = places @ np.linalg.inv(lattice)
                cells.setdefault(name[1].strip('"') if name else f"x-{number}", (lattice, numbers, frac))
    return cells


def test_damaged_extended_xyz_is_refused_or_read_as_its_lines_say(tmp_path: Path) -> None:
    original = (FORMATS / "crystals.extxyz").read_bytes()
    taken, wrong = silent_and_wrong(original, 200, 3, tmp_path / "x.extxyz", by_lines)
    assert not wrong, wrong[0].decode(errors="replace")
    assert 50 < taken < 200


def test_a_wrong_crystal_would_be_noticed(tmp_path: Path) -> None:
    """The judge of these tests sees an atom that was moved by a hundredth of a cell, and one of another element."""
    text = cifs()[4]
    with warnings.catch_warnings(action="ignore"):
        lattice, numbers, frac = parse_structure(text, "x.cif")
    assert same((lattice, numbers, frac), by_pymatgen(text.encode())["x"])
    moved = frac + np.array([[0.01, 0, 0]] + [[0, 0, 0]] * (len(frac) - 1))
    assert not same((lattice, numbers, moved), (lattice, numbers, frac))
    assert not same((lattice, numbers + 1, frac), (lattice, numbers, frac))
