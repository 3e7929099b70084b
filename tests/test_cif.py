"""What a CIF leaves to its reader: symmetry, special positions, settings, and what is refused rather than guessed."""

import csv
import time
import warnings
from pathlib import Path

import gemmi
import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifParser

from crysldnet.errors import DataError
from crysldnet.readers import cif, cif_symmetry
from crysldnet.readers.structure_files import parse_structure
from crysldnet.tools.importer.importer import import_crystals

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
        assert (len(crystal), cif_symmetry.NOTE_MOVED in notes) == (count, noted)
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
    "two_lists_of_operations": (
        text_of(CUBIC, ["Na1 .1 .2 .3"], MIRROR, "loop_\n_space_group_symop_operation_xyz\nx,y,z\n-x,-y,-z"),
        "two lists of symmetry operations that differ",
    ),
    "two_names": (
        text_of(CUBIC, TWO, "_space_group_name_H-M_alt 'P m -3 m'\n_symmetry_space_group_name_H-M 'F m -3 m'"),
        "names two space groups, P m -3 m and F m -3 m",
    ),
    "two_numbers": (
        text_of(CUBIC, TWO, "_space_group_IT_number 221\n_symmetry_Int_Tables_number 225"),
        "names two space groups, 221 and 225",
    ),
    "tag_twice": (text_of(CUBIC, TWO, "_cell_length_a 5.5"), "_cell_length_a occurs twice"),
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


ROCK_SALT = (5.64, 5.64, 5.64, 90, 90, 90)
CUO = (4.684, 3.423, 5.129, 90, 99.54, 90)
WITHOUT_CENTRING = "loop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\nx,-y,z+1/2"
TRANSLATIONS = "loop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\nx-1,y,z"


def stated(name: str, *, formula: str = "", units: object = "") -> str:
    """Write what a file states besides its operations."""
    tags = {"_symmetry_space_group_name_H-M": name, "_chemical_formula_sum": formula, "_cell_formula_units_Z": units}
    return "\n".join(f"{tag} '{value}'" for tag, value in tags.items() if value != "")


@pytest.mark.parametrize(
    ("cell", "sites", "name", "operations_listed", "formula"),
    [
        (CUO, ["Cu1 .25 .25 0", "O1 0 .418 .25"], "C 1 c 1", WITHOUT_CENTRING, "Cu O"),
        (ROCK_SALT, TWO, "F m -3 m", TRANSLATIONS, "Na Cl"),
    ],
    ids=["no centring", "identity alone"],
)
def test_operations_that_contradict_the_name_are_refused_or_replaced_with_a_note_where_z_decides(
    cell: tuple[float, ...], sites: list[str], name: str, operations_listed: str, formula: str
) -> None:
    whole = read(text_of(cell, sites, operations(name)))
    notes: list[str] = []
    symmetry = (stated(name, formula=formula, units=4), operations_listed)
    assert_same(read(text_of(cell, sites, *symmetry), notes), whole)
    assert notes == [cif.NOTE_NAMED]
    for formula_too, units in (("", ""), (formula, ""), ("", 4), (formula, 3)):
        with pytest.raises(DataError, match=f"its symmetry operations are of space group P 1 .*names {name}"):
            read(text_of(cell, sites, stated(name, formula=formula_too, units=units), operations_listed))


def test_operations_are_believed_against_the_name_where_z_or_a_second_name_agrees_with_them() -> None:
    notes: list[str] = []
    listed = operations("P m -3 m")
    salt = read(text_of(CUBIC, TWO, stated("F m -3 m", formula="Na Cl", units=1), listed), notes)
    assert (len(salt), notes) == (2, [cif.NOTE_LISTED])
    notes = []
    read(text_of(CUBIC, TWO, stated("P m -3 m"), "_symmetry_Int_Tables_number 222", listed), notes)
    assert notes == [cif.NOTE_LISTED]


def test_atoms_listed_in_full_beside_the_name_of_their_space_group_are_no_contradiction() -> None:
    whole = read(text_of(ROCK_SALT, TWO, operations("F m -3 m")))
    sites = [f"{site.specie.symbol}1 {' '.join(map(str, site.frac_coords))}" for site in whole]
    notes: list[str] = []
    assert_same(read(text_of(ROCK_SALT, sites, stated("F m -3 m"), TRANSLATIONS), notes), whole)
    assert notes == []
    with pytest.raises(DataError, match="names F m -3 m"):  # one atom is missing
        read(text_of(ROCK_SALT, sites[1:], stated("F m -3 m"), TRANSLATIONS))


@pytest.mark.parametrize("shift", ["x+1/8,y,z", "x,y+1/4,z-1/8"])
def test_operations_in_a_setting_that_no_table_has_agree_with_the_name(shift: str) -> None:
    move = gemmi.Op(shift)
    moved = [
        (move * op * move.inverse()).wrap().triplet() for op in gemmi.find_spacegroup_by_name("P n m a").operations()
    ]
    notes: list[str] = []
    symmetry = (stated("P b n m"), "\n".join(["loop_", "_symmetry_equiv_pos_as_xyz", *moved]))
    crystal = read(text_of((5.1, 6.2, 7.3, 90, 90, 90), ["Si1 0.137 0.219 0.041"], *symmetry), notes)
    assert (len(crystal), notes) == (8, [])


def test_a_hall_symbol_that_no_table_has_is_read() -> None:
    cell, sites = (5.1, 6.2, 7.3, 90, 100, 90), ["Si1 0.137 0.219 0.041"]
    shifted = read(text_of(cell, sites, "_symmetry_space_group_name_Hall '-P 2yc (x,y,z+1/4)'"))
    assert len(shifted) == 4
    centred = read(text_of(cell, ["Si1 0.137 0.219 0.291"], operations("P 1 2/c 1")))
    assert_same(shifted, centred)


def test_what_a_file_states_of_its_cell_and_its_atoms_do_not_give_is_noted() -> None:
    salt = operations("F m -3 m")
    multiplicity = "label fract_x fract_y fract_z symmetry_multiplicity"
    for text, noted in (
        (text_of(CUBIC, TWO, salt, stated("F m -3 m", formula="Na Cl", units=4)), []),
        (text_of(CUBIC, TWO, salt, stated("F m -3 m", formula="Na4 Cl4", units=4)), []),  # as pymatgen writes it
        (text_of(CUBIC, TWO, salt, stated("F m -3 m", formula="Na Cl", units=2)), [cif.NOTE_UNITS]),
        (
            text_of(CUBIC, TWO, salt, stated("F m -3 m", formula="Na Cl H2", units=2)),
            [cif.NOTE_FORMULA, cif.NOTE_UNITS],
        ),
        (text_of(CUBIC, TWO, salt, "_cell_volume 157.46"), []),
        (text_of(CUBIC, TWO, salt, "_cell_volume 175.46(2)"), [cif.NOTE_VOLUME]),
        (text_of(CUBIC, [f"{site} 4" for site in TWO], salt, columns=multiplicity), []),
        (text_of(CUBIC, [f"{site} 48" for site in TWO], salt, columns=multiplicity), []),  # as SHELX writes it
        (text_of(CUBIC, [f"{site} ?" for site in TWO], salt, columns=multiplicity), []),
        (text_of(CUBIC, [f"{site} 8" for site in TWO], salt, columns=multiplicity), [cif.NOTE_MULTIPLICITY]),
    ):
        notes: list[str] = []
        read(text, notes)
        assert notes == noted, text


def test_a_file_without_symmetry_that_has_fewer_atoms_than_it_states_is_refused() -> None:
    with pytest.raises(DataError, match="states no symmetry, and has other atoms than Z = 4 formula units"):
        read(text_of(CUBIC, TWO, stated("", formula="Na Cl", units=4)))


@pytest.mark.parametrize(
    ("labels", "formula", "elements"),
    [
        (["CO1", "O1"], "Co O", "Co O"),
        (["CO1", "O1"], "C O", "C O"),
        (["CO1", "O1"], "CO O", "Co O"),
        (["CO1", "C1", "O1"], "C O Co", "Co C O"),
        (["HO1", "C1", "O1"], "C2 H2 O2", "H C O"),
        (["NB1", "O1"], "O2 Nb", "Nb O"),
        (["CS1", "CL1"], "Cs Cl", "Cs Cl"),
        (["CS1", "CL1"], "CS CL", "Cs Cl"),
        (["CA1", "C1", "O1"], "C2 H4 O Na", "C C O"),  # other atoms are missing
        (["Co1", "O1"], "C O", "Co O"),  # not in capitals: nothing to decide, and noted
        (["SiA", "O1"], "O2 Si", "Si O"),
    ],
)
def test_a_label_in_capitals_is_decided_by_the_formula(labels: list[str], formula: str, elements: str) -> None:
    sites = [f"{label} {place} {place} 0" for label, place in zip(labels, ("0", ".25", ".5"), strict=False)]
    crystal = read(text_of(CUBIC, sites, f"_chemical_formula_sum '{formula}'"))
    assert [site.specie.symbol for site in crystal] == elements.split()


@pytest.mark.parametrize("formula", ["?", "C O Co", "Na O", "(Co,Ni)O"])
def test_a_label_in_capitals_that_the_formula_does_not_decide_is_refused(formula: str) -> None:
    sites = ["CO1 0 0 0", "CO2 .25 .25 0", "O1 .5 .5 0"]
    with pytest.raises(DataError, match="site CO1 is Co or C, and the formula doesn't tell which"):
        read(text_of(CUBIC, sites, f"_chemical_formula_sum '{formula}'"))


def test_the_elements_that_a_file_lists_decide_labels_where_it_has_no_formula() -> None:
    crystal = read(text_of(CUBIC, ["CO1 0 0 0", "O1 .5 .5 0"], "loop_\n_atom_type_symbol\nCo2+\nO2-"))
    assert [site.specie.symbol for site in crystal] == ["Co", "O"]


def test_a_name_and_operations_may_stand_there_twice_where_they_agree() -> None:
    again = "loop_\n_space_group_symop_operation_xyz\n-X,Y,Z\nX+1,Y,Z"
    assert_same(read(text_of(CUBIC, TWO, MIRROR, again)), read(text_of(CUBIC, TWO, MIRROR)))
    names = "_space_group_name_H-M_alt 'P m -3 m'\n_symmetry_space_group_name_H-M Pm-3m"
    assert_same(read(text_of(CUBIC, TWO, names)), read(text_of(CUBIC, TWO, "_symmetry_Int_Tables_number 221")))


def test_only_a_tag_that_decides_on_the_crystal_must_not_stand_there_twice() -> None:
    salt = operations("F m -3 m")
    for twice in ("_chemical_formula_sum 'Na Cl'\n_chemical_formula_sum ''", "_journal_year 1920\n_journal_year 1921"):
        assert len(read(text_of(CUBIC, TWO, twice, salt))) == 8
    assert len(read(text_of(CUBIC, TWO, "_cell_length_a 5.4", salt))) == 8  # the same value
    for tag in ("_cell_length_a 5.41", "_symmetry_Int_Tables_number 225\n_symmetry_Int_Tables_number 227"):
        with pytest.raises(DataError, match="occurs twice"):
            read(text_of(CUBIC, TWO, tag, salt))


def test_more_operations_than_any_space_group_are_refused_at_once_and_those_of_a_supercell_read() -> None:
    def loop(triplets: list[str]) -> str:
        return "\n".join(["loop_", "_symmetry_equiv_pos_as_xyz", *triplets])

    steps = range(24)
    many = [f"x+{i}/24,y+{j}/24,z+{k}/24" for i in steps for j in steps for k in steps]
    start = time.process_time()
    with pytest.raises(DataError, match="13824 symmetry operations, more than any space group"):
        read(text_of(CUBIC, ["Po1 0 0 0"], loop(many)))
    halves = [gemmi.Op(f"x+{i}/2,y+{j}/2,z+{k}/2") for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    half = gemmi.Op("x/2,y/2,z/2")
    group = [half * op * half.inverse() for op in gemmi.find_spacegroup_by_name("P m -3 m").operations()]
    supercell = [(shift * op).wrap().triplet() for op in group for shift in halves]
    notes: list[str] = []
    crystal = read(text_of((6.8, 6.8, 6.8, 90, 90, 90), ["Po1 0 0 0"], stated("P m -3 m"), loop(supercell)), notes)
    assert (len(crystal), notes) == (8, [])
    assert time.process_time() - start < 2
