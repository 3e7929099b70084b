"""A folder of crystals and a table of values, named as they are, make a run."""

import csv
import json
import re
import time
import zipfile
from pathlib import Path

import pytest
import yaml

import crysldnet
from crysldnet import cli
from crysldnet.data.datasets import EMBEDDED, open_store
from crysldnet.data.targets import column_called
from crysldnet.errors import ConfigError, CrysldnetError, DataError
from crysldnet.inference.command import Account, named_files
from crysldnet.readers import table_cells
from crysldnet.tools.importer.importer import import_crystals
from crysldnet.tools.importer.own_data import with_own_data
from tiny import ENCODER, QUIET

EXAMPLES = EMBEDDED / "examples"
IDS = sorted(path.stem for path in EXAMPLES.glob("*.cif"))
SHORT = [*ENCODER, *QUIET, "pretrained=none", "epochs=1", "min_steps=0", "baselines=false", "data.batch_size=2"]
VALUES = {name: -1.5 + 0.25 * i for i, name in enumerate(IDS)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Crystals in cifs/, and a table as a German Excel exports it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifs").mkdir()
    for path in EXAMPLES.glob("*.cif"):
        (tmp_path / "cifs" / path.name).write_bytes(path.read_bytes())
    lines = [
        "Probe;Bildungsenergie (eV/atom)",
        *(f"{name};{value:.2f}".replace(".", ",") for name, value in VALUES.items()),
    ]
    (tmp_path / "werte.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return tmp_path


def table(path: Path, *columns: str) -> Path:
    rows = [[name, *(f"{value + i:.2f}" for i in range(len(columns) - 1))] for name, value in VALUES.items()]
    path.write_text("\n".join(",".join(row) for row in [columns, *rows]) + "\n")
    return path


def test_a_folder_and_a_table_make_a_model_a_page_and_predictions(folder, capsys):
    assert cli.run(["finetune", "cifs/", "werte.csv", *SHORT, "data.split.fractions=[0.6,0.2,0.2]"]) == 0
    said = capsys.readouterr().err
    assert "6 crystals kept in runs/imported/cifs-" in said
    assert "columns were taken for that of the ids, because they hold ids of crystals: 1 (Probe)" in said
    assert "Bildungsenergie: 6 values in eV/atom, -1.5 to -0.25" in said
    run = folder / "runs/finetune/latest"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert "Bildungsenergie" in (run / "report.html").read_text()
    with (run / "predictions_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["material_id"]: float(row["true"]) for row in rows}.items() <= VALUES.items()
    assert {row["unit"] for row in rows} == {"eV/atom"}


def test_the_function_takes_the_same_files(folder):
    settings = dict(word.split("=", 1) for word in SHORT)
    run = crysldnet.finetune(
        **{key.replace(".", "__"): yaml.safe_load(value) for key, value in settings.items()},
        data="cifs",
        data__table="werte.csv",
        data__split={"fractions": [0.6, 0.2, 0.2]},
    )
    assert run.folder.parent == Path("runs/finetune")
    assert run.metrics["test/mae"] > 0.0
    assert (run.folder / "report.html").exists()


def test_the_same_files_are_imported_once_and_other_ones_anew(folder, capsys):
    first, own = with_own_data("finetune", ["cifs", "werte.csv", "seed=1"])
    assert own
    assert first[0] == "data=custom"
    assert first[2:] == ["seed=1", "data.targets=['Bildungsenergie']"]
    again, _ = with_own_data("finetune", ["data=cifs/", "data.table=werte.csv", "seed=1"])
    assert again == first
    assert "was imported before" in capsys.readouterr().err
    (folder / "werte.csv").write_text((folder / "werte.csv").read_text().replace("-1,50", "-1,60"))
    changed, _ = with_own_data("finetune", ["cifs", "werte.csv", "seed=1"])
    assert changed[1] != first[1]
    store = open_store(changed[1].removeprefix("data.path="))
    assert store.numbers_of("Bildungsenergie").min() == -1.6


def test_a_store_may_stand_where_the_name_of_a_data_set_is_expected(folder):
    import_crystals("cifs", "my.store", targets="werte.csv", progress=False)
    assert cli.run(["pretrain", "data=my.store", "--print-config"]) == 0
    arguments, own = with_own_data("finetune", ["data=my.store"])
    assert arguments == ["data=my.store"]
    assert not own
    with pytest.raises(ConfigError, match=r"data\.targets: it has no default"):
        cli.run(["finetune", "data=my.store", "--print-config"])
    assert cli.run(["finetune", "data=my.store", "data.targets=bildungsenergie", "--print-config"]) == 0
    with pytest.raises(ConfigError, match="already imported"):
        with_own_data("finetune", ["my.store", "werte.csv"])


def test_several_columns_are_listed_and_none_is_guessed(folder):
    table(folder / "two.csv", "id", "gap (eV)", "energy")
    with pytest.raises(
        ConfigError, match=r"several columns of numbers; .*\"data.targets=gap\"\. They are: gap, energy"
    ):
        with_own_data("finetune", ["cifs", "two.csv"])
    arguments, _ = with_own_data("finetune", ["cifs", "two.csv", "data.targets=Gap (eV)"])
    assert "data.targets=Gap (eV)" in arguments
    with pytest.raises(ConfigError, match=r"no column of numbers to predict; name the table"):
        with_own_data("finetune", ["cifs"])
    arguments, _ = with_own_data("pretrain", ["cifs"])
    assert len(arguments) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cif/", "werte.csv"], "cif/: no such file or folder"),
        (["cifs", "werta.csv"], "werta.csv: no such file"),
        (["data.table=werte.csv"], "name its crystals too, as data=FOLDER"),
        (["cifs", "a.csv", "b.csv"], "name one folder or file of crystals, and one table"),
    ],
)
def test_what_is_not_there_is_said(folder, words, says):
    with pytest.raises(CrysldnetError, match=says):
        with_own_data("finetune", words)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("title", ["Material ID", "MATERIAL-ID", "Id", "File name", "Probe", "mp"])
def test_the_column_of_ids_is_found_by_its_name_in_any_spelling_or_by_what_it_holds(folder, title):
    table(folder / "t.csv", title, "gap (eV)")
    report = import_crystals("cifs", "t.store", targets="t.csv", progress=False)
    values = dict(zip(IDS, open_store("t.store").numbers_of("gap"), strict=True))
    assert values == pytest.approx(VALUES)
    assert any("hold ids of crystals" in note for note in report.notes) == (title in ("Probe", "mp"))


def test_a_column_that_is_called_id_and_holds_none_gives_way_to_one_that_does(folder):
    rows = [f"{i},{name},{value}" for i, (name, value) in enumerate(VALUES.items())]
    (folder / "t.csv").write_text("\n".join(["id,crystal,gap", *rows]))
    import_crystals("cifs", "t.store", targets="t.csv", progress=False)
    assert open_store("t.store").numbers_of("gap").tolist() == list(VALUES.values())


def test_an_id_column_may_be_named_in_another_case_and_a_wrong_one_is_answered(folder):
    table(folder / "t.csv", "Probe", "gap")
    import_crystals("cifs", "t.store", targets="t.csv", id_column="probe", progress=False)
    with pytest.raises(DataError, match=r"no column 'Prob' for the ids; did you mean 'Probe'\?"):
        import_crystals("cifs", "u.store", targets="t.csv", id_column="Prob", progress=False)


def test_targets_may_be_typed_as_their_headers_stand(folder):
    table(folder / "t.csv", "id", "Bulk modulus K (GPa)", "bulk-modulus", "x_y")
    import_crystals("cifs", "t.store", targets="t.csv", progress=False)
    store = open_store("t.store")
    for title in ("Bulk modulus K (GPa)", "Bulk modulus K", "bulk_modulus_k", "BULK MODULUS K [GPa]"):
        assert column_called(store, title) == "Bulk modulus K"
    assert column_called(store, "bulk modulus") == "bulk-modulus"
    assert column_called(store, "X Y") == "x_y"
    assert column_called(store, "modulus") == "modulus"
    with pytest.raises(DataError, match=r"'Bulk modulus K \(eV\)' doesn't exist; 'Bulk modulus K' is in GPa"):
        column_called(store, "Bulk modulus K (eV)")


def test_an_excel_table_is_read_and_its_other_sheets_are_named(folder):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(["Material", "gap (eV)", "Ordnung", "Datum"])
    for i, (name, value) in enumerate(VALUES.items()):
        sheet.append([f"{name}.cif", value, 1.0 + i, f"{value:.2f}".replace(".", ",")])
    book.create_sheet("notes").append(["checked"])
    book.save("t.xlsx")
    report = import_crystals("cifs", "t.store", targets="t.xlsx", progress=False)
    store = open_store("t.store")
    assert store.numbers_of("gap").tolist() == list(VALUES.values())
    assert store.units == {"gap": "eV"}
    assert store.numbers_of("Ordnung").tolist() == [1, 2, 3, 4, 5, 6]
    assert store.numbers_of("Datum").tolist() == list(VALUES.values())
    assert any("further sheets of the table aren't read: 1 (notes)" in note for note in report.notes)


def test_a_workbook_costs_what_it_holds_and_not_what_it_claims(folder, monkeypatch):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["Material", "gap (eV)"], *VALUES.items()):
        book.active.append(row)
    book.save("small.xlsx")
    last = b'<row r="100000"><c r="A100000" t="n"><v>7</v></c></row></sheetData>'
    with zipfile.ZipFile("small.xlsx") as small, zipfile.ZipFile("t.xlsx", "w") as large:
        for name in small.namelist():
            part = re.sub(rb'<dimension ref="[^"]*"', b'<dimension ref="A1:XFD1048576"', small.read(name))
            large.writestr(name, part.replace(b"</sheetData>", last))
    start = time.process_time()
    report = import_crystals("cifs", "t.store", targets="t.xlsx", progress=False)
    assert time.process_time() - start < 5
    assert open_store("t.store").numbers_of("gap").tolist() == list(VALUES.values())
    assert report.unused == ("1 of 7 rows of t.xlsx could not be used, first '7' in t.xlsx line 100000",)
    monkeypatch.setattr(table_cells, "LARGEST", 1000)
    (folder / "t.csv").write_text("id,gap\n" + "\n" * 1000)
    for name in ("t.xlsx", "t.csv"):
        with pytest.raises(DataError, match=rf"{name}: over .* MiB; import crystals with their properties as JSON"):
            import_crystals("cifs", "u.store", targets=name, progress=False)


def test_a_table_of_more_columns_than_an_import_takes_is_refused(folder):
    (folder / "t.csv").write_text("id" + "".join(f",p{i}" for i in range(100_000)) + "\nx\n")
    start = time.process_time()
    with pytest.raises(DataError, match=r"t\.csv: it has 100,000 columns; an import takes 10,000 properties"):
        import_crystals("cifs", "t.store", targets="t.csv", progress=False)
    assert time.process_time() - start < 5


def test_spreadsheets_that_are_not_read_are_named_as_what_they_are(folder, monkeypatch):
    (folder / "t.csv").write_bytes(b"PK\x03\x04\x14\x00\xff\xff")
    (folder / "t.ods").write_bytes(b"PK\x03\x04")
    (folder / "t.xlsx").write_bytes(b"PK\x03\x04 no workbook")
    with pytest.raises(DataError, match=r"t\.csv: an Excel or OpenDocument file, or a zip archive, whatever its name"):
        import_crystals("cifs", "t.store", targets="t.csv", progress=False)
    with pytest.raises(DataError, match=r"t\.ods: an OpenDocument spreadsheet, which isn't read; save it as \.xlsx or"):
        import_crystals("cifs", "t.store", targets="t.ods", progress=False)
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    with pytest.raises(
        DataError, match=r"t\.xlsx: an Excel file, which needs openpyxl: pip install 'crysldnet\[excel\]'"
    ):
        import_crystals("cifs", "t.store", targets="t.xlsx", progress=False)
    monkeypatch.undo()
    pytest.importorskip("openpyxl")
    with pytest.raises(DataError, match=r"not a readable Excel file"):
        import_crystals(EXAMPLES, folder / "t.store", targets=folder / "t.xlsx", progress=False)


def test_files_between_commas_are_several(folder):
    two = [f"cifs/{name}.cif" for name in IDS[:2]]
    account = Account("-", "predicted")
    assert named_files(",".join(two), account) == two
    assert named_files(", ".join(two), account) == two
    assert named_files(f"{two[0]},nowhere.cif", account) == f"{two[0]},nowhere.cif"
    odd = folder / "a,b.cif"
    odd.write_bytes((EXAMPLES / f"{IDS[0]}.cif").read_bytes())
    assert named_files(str(odd), account) == str(odd)
