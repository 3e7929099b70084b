"""Texts from files become no code in what is written: scripts, commands, pages, tables, drawings, terminals."""

import ast
import csv
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from conftest import drawing
from crysldnet import cli, pretrain
from crysldnet.artifacts import model_file
from crysldnet.config import argument, compose
from crysldnet.console import csv_text, from_spreadsheet, spreadsheet_safe
from crysldnet.data.datasets import EMBEDDED
from crysldnet.html.page import facts, page, table
from crysldnet.signals import RUN_NAME
from crysldnet.tools.matbench import submission
from crysldnet.tools.sweep import load_sweep
from crysldnet.tools.sweep.results import write_results
from crysldnet.tools.sweep.study import Trial
from html_page import Page, assert_self_contained
from tiny import ENCODER, QUIET, pretrain_config, subset

HOSTILE = [
    "=cmd|'/C calc'!A0",
    "a\nimport os; os.system('touch owned')\n#",
    '"""\nopen(\'owned\', \'w\')\n"""',
    "'); open('owned', 'w'); ('",
    "$(touch owned)`touch owned`; touch owned &",
    "</script></title><script>alert(1)</script><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "[red]{0}%s\\N{BULLET}\\",
    "$x$ \\frac{1}{ ${oc.env:HOME} ${args_no_hyphens}",
    "\x1b]0;owned\x07\x1b[31m\x00\r\x85\u2028\u202e",
    "結晶 😀 é",
]
"""Each begins, ends or names something in one of the languages that are written."""
FORMULA = tuple("=+-@\t\r\n＝＋－＠")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e]")
ALL = "=1+1" + "".join(text.replace("\x00", "") for text in HOSTILE)


def markup(text: str) -> set[tuple[str, str]]:
    """Return the tags and the names of attributes that a page has."""
    found = Page(text)
    return {(tag, name) for tag, name, _ in found.attributes}


def is_safe_page(text: str) -> Page:
    """Read a page; nothing in it comes from a text but text."""
    assert not CONTROL.search(text)
    parsed = assert_self_contained(re.sub(r"10\.\d{4}/\S+", "", text))
    assert not {name for _, name in markup(text)} & {"onerror", "onmouseover"}
    assert "<script>alert" not in text
    assert "<img" not in text
    return parsed


def rows_of(file: Path) -> list[list[str]]:
    """Read a CSV; no cell is a formula."""
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.reader(lines))
    assert len({len(row) for row in rows}) == 1
    assert not [cell for row in rows for cell in row if cell[:1] in FORMULA and spreadsheet_safe(cell) != cell]
    return rows


@pytest.fixture(scope="module")
def crystals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Crystals whose ids, columns, classes, unit and metadata are hostile, in the current folder."""
    folder = tmp_path_factory.mktemp("hostile")
    whole = pq.read_table(subset(folder / "data.parquet", train=24, val=8, test=12))
    ids = [f"{HOSTILE[i % len(HOSTILE)]}{i}".replace("\x00", "") for i in range(len(whole))]
    energies = pa.field(ALL, pa.float64(), metadata={b"units": b"<b>$eV$</b>\n=1"})
    whole = whole.set_column(0, "material_id", pa.array(ids))
    whole = whole.append_column(energies, whole["formation_energy_per_atom"].cast(pa.float64()))
    whole = whole.append_column(f"kind {ALL}", pa.array([f"{ALL}{i % 2}" for i in range(len(whole))]))
    about = {name: ALL.encode() for name in (b"dataset", b"licence", b"citation", b"source", b"description")}
    pq.write_table(whole.replace_schema_metadata({**whole.schema.metadata, **about}), folder / "data.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv(RUN_NAME, raising=False)
        yield folder
        assert not list(folder.rglob("owned"))


def run(capsys: pytest.CaptureFixture[str], *line: str) -> None:
    """Run a command; what it prints steers no terminal."""
    assert cli.run(line) == 0
    printed = "".join(capsys.readouterr())
    assert not CONTROL.search(printed)
    assert not re.search("^(error|import os)", printed, re.MULTILINE)


def test_data_commands_write_texts_as_texts(crystals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with drawing():
        run(capsys, "data", "describe", "data.parquet", "--html", "d.html", "--png", "d.png")
    assert ALL[:20] in "".join(is_safe_page(Path("d.html").read_text()).texts)
    run(capsys, "data", "audit", "--train", "data.parquet", "--test", "data.parquet", "--out", "audit.csv")
    assert len(rows_of(Path("audit.csv"))) > 44
    run(capsys, "data", "import", "data.parquet", "--out", "made.store")
    for command in ("describe", "show"):
        run(capsys, "data", command, "made.store")
    run(capsys, "data", "dedupe", "data.parquet", "--out", "few.parquet", "--against", "data.parquet@val")
    assert len(rows_of(Path("few.parquet.removed.csv"))) == 9


def test_a_printed_configuration_steers_no_terminal_and_is_read_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ALL.replace("${", "{")
    assert cli.run(["finetune", argument("logger.notes", text), "logger=wandb", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert not CONTROL.search(printed)
    assert yaml.safe_load(printed)["logger"]["notes"] == text


def test_a_model_of_hostile_targets_is_trained_drawn_reported_and_used(
    crystals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = argument("data.targets", [ALL, f"kind {ALL}"])
    short = ["trainer.accelerator=cpu", "data.batch_size=16", "epochs=1", "min_steps=0"]
    with drawing():
        run(capsys, "finetune", *ENCODER, *QUIET, *short, "data.path=data.parquet", targets, "name=a")
    folder = Path("runs/finetune/a")
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["targets"] == [ALL, f"kind {ALL}"]
    assert len(list((folder / "plots").glob("parity_*.png"))) == 1
    tested = rows_of(folder / "predictions_test.csv")
    assert {from_spreadsheet(row[1]) for row in tested[1:]} == {ALL, f"kind {ALL}"}
    rows_of(folder / "metrics.csv")
    run(capsys, "report", str(folder), "resamples=100", "images=true")
    text = Path("report.html").read_text()
    is_safe_page(text)
    assert "No structures" not in text
    os.environ.pop(RUN_NAME, None)
    run(capsys, "predict", "model=runs/finetune/a", "files=data.parquet", "out=p.csv")
    assert len(rows_of(Path("p.csv"))) == 89
    run(capsys, "embed", "model=runs/finetune/a", "files=data.parquet", "out=e.csv")
    rows_of(Path("e.csv"))


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_refused_and_noted_of_a_file_is_one_line_of_a_terminal_and_a_cell_of_a_table(
    crystals: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text.replace("\x00", "")
    monkeypatch.chdir(tmp_path)
    name = f"\nerror: {text}".replace("/", "∕")[:80]
    Path("cifs").mkdir()
    Path(f"cifs/{name}.cif").write_text(text)
    good = (EMBEDDED / "examples").glob("*.cif")
    Path(f"cifs/{name}2.cif").write_text(next(good).read_text().replace("'x, y, z'", f"'{text.splitlines()[0]}'"))
    Path("cifs/ok.cif").write_text(next(good).read_text())
    with Path("t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", text], ["ok", "1"], [name, text], [f"{name}3", f"2{text}"]])
    run(capsys, "data", "import", "cifs", "--targets", "t.csv", "--out", "x.parquet")
    rows_of(Path("x.parquet.rejects.csv"))
    model = f"model={crystals}/runs/finetune/a"
    for command in ("predict", "embed", "suggest", "explain"):
        target = argument("target", ALL) if command in ("suggest", "explain") else "workers=1"
        run(capsys, command, model, "files=cifs", f"out={command}.csv", target)
        rows_of(Path(f"{command}.csv"))
    rows_of(Path("predict.csv.refused.csv"))
    run(capsys, "explain", model, "files=cifs", "out=e.html", argument("target", ALL))
    is_safe_page(Path("e.html").read_text())


def test_what_is_said_of_a_run_in_its_own_files_is_text_in_a_report(
    crystals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("runs/finetune/a")
    summary = json.loads((folder / "summary.json").read_text())
    intervals = {"crystals": 8, f"coverage_{ALL}": 0.5}
    summary |= {"code_version": ALL, "seed": ALL, "pretrained": ALL, "calibration": {ALL: intervals}}
    (folder / "summary.json").write_text(json.dumps(summary))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"encoder": {"_target_": f"x.{ALL}", ALL: ALL}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run(capsys, "report", str(folder), "resamples=100")
    assert "calibration crystals, none of which" in Path("report.html").read_text()
    is_safe_page(Path("report.html").read_text())


@pytest.fixture(scope="module")
def encoder(crystals: Path) -> Path:
    """An encoder as it is pretrained."""
    config, values = pretrain_config("name=p", "data.path=data.parquet", "stage=vae", "stages.vae.epochs=1")
    assert pretrain.run(config, values) == 0
    os.environ.pop(RUN_NAME, None)
    return crystals / "runs/pretrain/p/encoder.safetensors"


def share(file: Path, change: Any) -> tuple[Path, dict[str, Any]]:
    """Write an encoder again, as someone else may, with another provenance; it passes every check."""
    with safe_open(file, "pt") as opened:
        info = json.loads(opened.metadata()["crysldnet"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(info["provenance"])
    text = json.dumps(info)
    digests = {name: model_file._digest(t) for name, t in tensors.items()}
    digests["metadata"] = hashlib.sha256(text.encode()).hexdigest()
    changed = file.with_name("shared'\"$(touch owned)\n.safetensors")
    changed.write_bytes(save(tensors, metadata={"crysldnet": text, "sha256": json.dumps(digests)}))
    return changed, model_file.load_encoder(changed)[1]


def everywhere(value: Any, text: str) -> Any:
    """Put a text into every text of a value, and beside every key of a mapping."""
    if isinstance(value, dict):
        return {key: everywhere(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [everywhere(item, text) for item in value]
    return text if isinstance(value, str) or value is None else value


@pytest.mark.parametrize("text", [*HOSTILE, ALL])
def test_the_script_of_a_submission_holds_texts_of_an_encoder_as_values_alone(
    encoder: Path, text: str, tmp_path: Path
) -> None:
    def change(provenance: dict[str, Any]) -> None:
        data = provenance["config"]["data"]
        provenance |= {"code_version": text, "data": text, "data_sha256": text, "stage": text}
        data |= {"path": text, "exclude": [text]}
        provenance["config"] |= {"name": text, "runs": text}

    file, info = share(encoder, change)
    begun: Any = SimpleNamespace(config=SimpleNamespace(pretrained=str(file)), provenance=info["provenance"])
    part = submission._encoder(begun, "0" * 64)
    command = ["crysldnet", "matbench", argument("algorithm", text), f"pretrained={file}"]
    imports, argv = "import hashlib, shlex, sys\nfrom pathlib import Path", submission._list(command)
    script = submission.SCRIPT.format(version="1", imports=imports, argv=argv, encoder=part)
    body = ast.parse(script).body
    kinds = "Expr Import ImportFrom ImportFrom Assign Assign Assign If Assign Expr"
    assert " ".join(type(node).__name__ for node in body) == kinds
    values = {ast.unparse(node.targets[0]): node.value for node in body if isinstance(node, ast.Assign)}
    assert ast.literal_eval(values["sys.argv"]) == command
    assert ast.unparse(values["ENCODER"]) == f"Path({str(file)!r})"
    words = ast.literal_eval(values["PRETRAINING"])
    assert compose("pretrain", words[2:]).values["data"]["path"] == text
    assert shlex.split(shlex.join(words)) == words
    (tmp_path / "reproduce.py").write_text(script.replace(str(file), "gone"))
    done = subprocess.run([sys.executable, "reproduce.py"], cwd=tmp_path, capture_output=True, text=True)
    assert "isn't there, or isn't the file with sha256" in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "reproduce.py"]


@pytest.mark.parametrize("text", HOSTILE)
def test_values_of_a_sweep_reach_its_runs_and_pages_as_values(text: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    command = ["${env}", "python", "-m", "crysldnet", "finetune", "${args_no_hyphens}"]
    described = {"method": "grid", "metric": {"name": text}, "command": command, "program": text, "name": text}
    parameters = {"data.path": {"values": [text.replace("${", "{")]}}
    file.write_text(yaml.safe_dump({**described, "parameters": parameters}))
    swept = load_sweep(str(file))
    (drawn,) = swept.parameters["data.path"].all_drawn()
    value = swept.parameters["data.path"].used(drawn)
    line = swept.line({"data.path": value}, [])
    assert compose("finetune", line).values["data"]["path"] == value == text.replace("${", "{")
    trials = [Trial("run_001", {"data.path": value}, "finished", 0.5, 1.0, (0.5,))]
    write_results(tmp_path, swept, trials)
    assert rows_of(tmp_path / "results.csv")[1][4] == spreadsheet_safe(value)
    is_safe_page(re.sub("<script>.*</script>", "", (tmp_path / "sweep.html").read_text(), flags=re.DOTALL))


@pytest.mark.parametrize("text", [*HOSTILE, "'=1", "''+1", "-1.5", "'-1.5", "'", "-", "\n=1", "＝1+1", "－1", "－1.5"])
def test_a_cell_is_no_formula_and_is_read_as_it_was(text: str) -> None:
    cell = str(spreadsheet_safe(text))
    assert cell[:1] not in FORMULA or float(text) == -1.5
    assert from_spreadsheet(cell) == text


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_no_cell_becomes_a_formula_where_a_spreadsheet_has_another_separator(separator: str) -> None:
    for text in ("a;=1+1", "a\t=1+1", 'a";=1+1;"', "a,=1+1"):
        rows = list(csv.reader(csv_text([["x", text, 1.5]]).splitlines(), delimiter=separator))
        assert not [cell for row in rows for cell in row if cell.startswith("=")]


@settings(max_examples=500, deadline=None, database=None, derandomize=True)
@given(text=st.text("'=+-@;\t\r\n1e.a＝", max_size=9))
def test_every_text_survives_a_cell(text: str) -> None:
    cell = str(spreadsheet_safe(text))
    assert from_spreadsheet(cell) == text
    assert not re.search(r"[;\t\r\n][=+\-@＝]", cell)


@pytest.mark.parametrize("text", HOSTILE)
def test_parts_of_a_page_hold_texts_as_texts(text: str) -> None:
    made = page(text, [facts([(text, text)]), table([text], [[text]], attributes=[{"data-run": text}])])
    plain = page("", [facts([("", "")]), table([""], [[""]], attributes=[{"data-run": ""}])])
    assert markup(made) == markup(plain)
