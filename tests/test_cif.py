"""What a CIF leaves to its reader: symmetry, special positions, settings, and what is refused rather than guessed."""

import csv
import warnings
from pathlib import Path

import gemmi
import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifParser

from crysldnet.data.formats import cif
from crysldnet.data.importer import import_crystals
from crysldnet.data.structure_files import parse_structure
from crysldnet.errors import DataError

CUBIC = (5.4, 5.4, 5.4, 90, 90, 90)
HEXAGONAL = (3.2, 3.2, 5.2, 90, 90, 120)
RHOMBOHEDRAL = (5.4, 5.4, 5.4, 50, 50, 50)


COLUMNS = "label fract_x fract_y fract_z"
MIRROR = "loop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\n-x,y,z"


def text_of(cell: tuple[float, ...], sites: list[str], *symmetry: str, columns: str = COLUMNS) -> str:
    """Write a CIF: cell, lines of symmetry, and sites with these columns."""
    tags = [f"_cell_length_{x}" for x in "abc"] + [f"_cell_angle_{x}" for x in ("alpha", "beta", "gamma")]
    lines = ["data_x", *(f"{tag} {value}" for tag, value in zip(tags, cell, strict=True)), *symmetry, "loop_"]
    return "\n".join([*lines, *(f"_atom_site_{column}" for column in columns.split()), *sites, ""])


def operations(name: str) -> str:
    """Return the operations of a space group's setting as a loop."""
    group = gemmi.find_spacegroup_by_name(name)
    return "\n".join(["loop_", "_symmetry_equiv_pos_as_xyz", *(op.triplet() for op in group.operations())])


def read(text: str, notes: list[str] | None = None) -> Structure:
    lattice, numbers, frac = parse_structure(text, "x.cif", notes=notes)
    return Structure(Lattice(lattice), numbers.tolist(), frac)


def by_pymatgen(text: str) -> Structure:
    with warnings.catch_warnings(action="ignore"):
        return CifParser.from_str(text).parse_structures(primitive=False)[0]


def assert_same(one: Structure, other: Structure, atol: float = 1e-4) -> None:
    assert one.composition == other.composition
    assert one.volume == pytest.approx(other.volume, rel=1e-6)
    np.testing.assert_allclose(
        np.sort(one.distance_matrix, axis=None), np.sort(other.distance_matrix, axis=None), atol=atol
    )


def test_an_atom_given_with_four_digits_is_moved_onto_its_special_position() -> None:
    sites = ["Zn1 0.3333 0.6667 0", "O1 0.3333 0.6667 0.382"]
    notes: list[str] = []
    wurtzite = read(text_of(HEXAGONAL, sites, operations("P 63 m c")), notes)
    assert len(wurtzite) == 4
    thirds = np.sort(wurtzite.frac_coords[:, :2], axis=1)
    np.testing.assert_allclose(thirds, [[1 / 3, 2 / 3]] * 4, atol=1e-12)
    assert notes == []  # by 0.0002 Å, as the digits say
    assert_same(wurtzite, by_pymatgen(text_of(HEXAGONAL, sites, operations("P 63 m c"))))


def test_an_atom_is_moved_far_only_with_a_note_and_a_split_site_is_not_merged(tmp_path: Path) -> None:
    for offset, count, noted in ((0.0005, 1, False), (0.004, 1, True), (0.006, 2, False)):
        notes: list[str] = []
        crystal = read(text_of(CUBIC, [f"Po1 {offset} 0.2 0.3"], MIRROR), notes)
        assert (len(crystal), cif.NOTE_MOVED in notes) == (count, noted)
    (tmp_path / "split.cif").write_text(text_of(CUBIC, ["Po1 0.03 0.2 0.3"], MIRROR))
    report = import_crystals(tmp_path / "split.cif", tmp_path / "s.store")
    assert report.report_path is not None
    with report.report_path.open() as file:
        assert "overlap: they are 0.324 Å apart" in next(csv.DictReader(file))["reason"]
    small = gemmi.make_small_structure_from_block(gemmi.cif.read(str(tmp_path / "split.cif")).sole_block())
    assert len(small.get_all_unit_cell_sites()) == 1  # what would be taken if this were left to gemmi


def cell_of(group: gemmi.SpaceGroup) -> tuple[float, ...]:
    """Return a cell that a setting fits."""
    system = group.crystal_system_str()
    if system == "monoclinic":
        angles = [90.0, 90.0, 90.0]
        angles["abc".index(group.monoclinic_unique_axis())] = 100.0
        return (5.1, 6.2, 7.3, *angles)
    if system in ("trigonal", "hexagonal"):
        return RHOMBOHEDRAL if group.ext == "R" else (5.1, 5.1, 7.3, 90, 90, 120)
    return {
        "triclinic": (5.1, 6.2, 7.3, 80, 95, 100),
        "orthorhombic": (5.1, 6.2, 7.3, 90, 90, 90),
        "tetragonal": (5.1, 5.1, 7.3, 90, 90, 90),
        "cubic": CUBIC,
    }[system]


def test_the_name_of_every_tabulated_setting_gives_the_atoms_that_its_operations_give() -> None:
    sites = ["Si1 0.137 0.219 0.041", "O1 0 0 0"]
    seen = 0
    for group in gemmi.spacegroup_table():
        cell = cell_of(group)
        listed = read(text_of(cell, sites, operations(group.xhm())))
        assert list(listed.atomic_numbers).count(14) == len(group.operations()), group.xhm()
        try:
            named = read(text_of(cell, sites, f"_symmetry_space_group_name_H-M '{group.xhm()}'"))
        except DataError:  # the name is one of several settings even with its extension
            continue
        seen += 1
        np.testing.assert_allclose(
            np.sort(named.distance_matrix, axis=None), np.sort(listed.distance_matrix, axis=None), atol=1e-9
        )
    assert seen > 540


@pytest.mark.parametrize("name", ["R -3 c", "R -3 m", "R 3 c", "R -3"])
def test_a_rhombohedral_name_is_read_in_the_setting_of_its_cell(name: str) -> None:
    sites = ["Al1 0.352 0.352 0.352"]
    for cell, extension in ((RHOMBOHEDRAL, "R"), (HEXAGONAL, "H")):
        named = read(text_of(cell, sites, f"_symmetry_space_group_name_H-M '{name}'"))
        assert_same(named, by_pymatgen(text_of(cell, sites, operations(f"{name}:{extension}"))))


def test_a_name_or_number_of_several_settings_is_refused_and_one_of_a_single_setting_is_read() -> None:
    diamond = ["C1 0.125 0.125 0.125"]
    with pytest.raises(DataError, match=r"F d -3 m.* 2 settings that fit its cell"):
        read(text_of((3.57, 3.57, 3.57, 90, 90, 90), diamond, "_symmetry_space_group_name_H-M 'F d -3 m'"))
    orthorhombic = (5.1, 6.2, 7.3, 90, 90, 90)
    with pytest.raises(DataError, match="6 settings"):
        read(text_of(orthorhombic, ["C1 0 0 0"], "_symmetry_Int_Tables_number 62"))
    notes: list[str] = []
    salt = read(text_of(CUBIC, ["Na1 0 0 0", "Cl1 .5 .5 .5"], "_symmetry_Int_Tables_number 225"), notes)
    assert (len(salt), notes) == (8, [cif.NOTE_SETTING])
    for stated in ("name_H-M 'F d -3 m:2'", "name_H-M 'F d -3 m :2'", "name_Hall '-F 4vw 2vw 3'"):
        crystal = read(text_of((3.57, 3.57, 3.57, 90, 90, 90), diamond, f"_symmetry_space_group_{stated}"))
        assert len(crystal) == 8, stated
    second = by_pymatgen(text_of((3.57, 3.57, 3.57, 90, 90, 90), diamond, operations("F d -3 m:2")))
    assert_same(crystal, second)


@pytest.mark.parametrize(
    ("name", "full"), [("P2_1/c", "P 1 21/c 1"), ("P21/n", "P 1 21/n 1"), ("Pnma", "P n m a"), ("C 2/m", "C 1 2/m 1")]
)
def test_short_names_are_understood(name: str, full: str) -> None:
    cell = (5.1, 6.2, 7.3, 90, 90 if name == "Pnma" else 100, 90)
    sites = ["Si1 0.137 0.219 0.041"]
    named = read(text_of(cell, sites, f"_symmetry_space_group_name_H-M {name!r}"))
    assert_same(named, read(text_of(cell, sites, operations(full))))


def test_numbers_have_uncertainties_quotes_and_signs() -> None:
    cell = ("5.40(2)", "'5.4'", "+5.4", "90.0(1)", "90", "9.0e1")
    crystal = read(text_of(cell, ["Po1 0.25(3) -.5 +0.125"], "_symmetry_Int_Tables_number 1"))  # type: ignore[arg-type]
    np.testing.assert_allclose(crystal.frac_coords, [[0.25, 0.5, 0.125]])
    assert crystal.volume == pytest.approx(5.4**3)


def test_tags_may_be_in_any_case_and_with_dots() -> None:
    text = text_of(CUBIC, ["Na1 0 0 0", "Cl1 .5 .5 .5"], operations("F m -3 m"))
    assert_same(read(text.replace("_atom_site_", "_atom_site.").replace("_cell_", "_CELL.")), read(text))


def test_the_lattice_has_a_along_x_and_b_in_the_plane_of_x_and_y() -> None:
    lattice = read(text_of((5.1, 6.2, 7.3, 80, 95, 100), ["C1 0 0 0"])).lattice
    assert lattice.parameters == pytest.approx((5.1, 6.2, 7.3, 80, 95, 100))
    assert lattice.matrix[0, 1:] == pytest.approx([0, 0], abs=1e-12)
    assert lattice.matrix[1, 2] == pytest.approx(0, abs=1e-12)
    assert np.linalg.det(lattice.matrix) > 0


TWO = ["Na1 0 0 0", "Cl1 .5 .5 .5"]
REFUSED = {
    "tag_twice": (text_of(CUBIC, TWO, "_cell_length_a 5.5"), "_cell_length_a stands there twice"),
    "empty_operations": (text_of(CUBIC, TWO, "loop_\n_symmetry_equiv_pos_as_xyz"), "operations is empty"),
    "no_identity": (text_of(CUBIC, TWO, "loop_\n_symmetry_equiv_pos_as_xyz\n-x+1/2,y,z"), "don't form a group"),
    "half_a_group": (
        text_of(CUBIC, ["Na1 .5 .5 0"], "loop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\ny,z,x"),
        "don't form a group",
    ),
    "nonsense": (text_of(CUBIC, TWO, "loop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\nx,y,w"), "isn't understood"),
    "reciprocal": (text_of(CUBIC, TWO, "loop_\n_symmetry_equiv_pos_as_xyz\nh,k,l"), "isn't understood"),
    "magnetic": (
        text_of(CUBIC, TWO, "loop_\n_space_group_symop_magn_operation.xyz\nx,y,z,+1\n-x,-y,-z,-1"),
        "isn't understood",
    ),
    "modulated": (text_of(CUBIC, TWO, "_cell_modulation_dimension 1"), "isn't understood"),
    "name_against_number": (
        text_of(CUBIC, TWO, "_symmetry_space_group_name_H-M 'F m -3 m'\n_symmetry_Int_Tables_number 227"),
        "isn't understood",
    ),
    "listed_in_full": (
        text_of(CUBIC, ["Na1 0 0 0", "Na2 0 .5 .5", "Na3 .5 0 .5", "Na4 .5 .5 0"], operations("F m -3 m")),
        "stand at the same place.*listed in full",
    ),
    "dummy": (
        text_of(CUBIC, ["Na1 0 0 0 d", "Cl1 .5 .5 .5 dum"], columns="label fract_x fract_y fract_z calc_flag"),
        "site Cl1 is a dummy atom",
    ),
    "assembly": (
        text_of(CUBIC, ["Na1 0 0 0 A"], columns="label fract_x fract_y fract_z disorder_assembly"),
        "is disordered",
    ),
    "nameless": (text_of(CUBIC, ["0 0 0"], columns="fract_x fract_y fract_z"), "names no elements"),
    "no_z": (text_of(CUBIC, ["Na1 0 0"], columns="label fract_x fract_y"), "fract_x, _y and _z"),
    "far": (text_of(CUBIC, ["Na1 5000.5 0 0"]), "cells away from the origin"),
    "text": (text_of(CUBIC, ["Na1 1/3 0 0"]), "coordinate '1/3'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_only_be_guessed_is_refused(name: str) -> None:
    text, pattern = REFUSED[name]
    with pytest.raises(DataError, match=pattern):
        read(text)
