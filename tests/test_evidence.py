"""Every table of results is the one its results.json gives."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import evidence

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(p.parent for base in ("experiments", "benchmarks") for p in (ROOT / base).rglob("results.json"))


def test_there_are_results():
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_table_in_the_readme_is_made_from_the_results(folder):
    records = evidence.read(folder / "results.json")
    text = (folder / "README.md").read_text()
    assert evidence.render(text, records) == text
    assert evidence.BLOCK.search(text)
    assert evidence.render(text, records[1:]) != text


def test_the_table_on_the_page_of_encoders_is_made_from_the_results():
    text = (ROOT / "docs" / "encoders.md").read_text()
    assert evidence.render(text, evidence.read(ROOT / "experiments" / "jumps" / "results.json")) == text


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_record_says_how_it_was_measured(folder):
    for record in evidence.read(folder / "results.json"):
        assert record.command.startswith(("python -m ", "make ", "crysldnet "))
        module = record.command.split()[2].replace(".", "/") + ".py"
        assert (ROOT / module).exists() or not record.command.startswith("python")
        assert len(record.commit) >= 7
        assert "*" not in record.commit, "measured with uncommitted changes"
        assert record.machine
        assert record.date


def test_a_changed_number_is_noticed(tmp_path):
    record = evidence.summarise(
        [1.0, 2.0], name="a", metric="b", unit="c", seeds=[0, 1], data="d", command="python e", commit="abcdefg"
    )
    (tmp_path / "README.md").write_text("before\n<!-- results -->\n<!-- end of results -->\nafter\n")
    evidence.write(tmp_path, [record])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| 1.5 | ± 0.707 | 0, 1 |" in text
    changed = json.loads((tmp_path / "results.json").read_text())
    changed[0]["value"] = 1.4
    (tmp_path / "results.json").write_text(json.dumps(changed))
    assert evidence.render(text, evidence.read(tmp_path / "results.json")) != text


def test_commands_that_share_a_folder_keep_each_others_records_and_tables(tmp_path):
    (tmp_path / "README.md").write_text(
        "<!-- results by name of python one.py -->\n<!-- end of results -->\n"
        "<!-- results of python two.py -->\n<!-- end of results -->\n"
    )
    for command, value in (("python one.py", 1.0), ("python two.py", 2.0), ("python one.py", 3.0)):
        record = evidence.summarise(
            [value], name="a", metric="speed", unit="1/s", seeds=[], data="d", command=command, commit="abcdefg"
        )
        evidence.write(tmp_path, [record, replace(record, metric="memory", unit="MB", value=10 * value)])
    assert [r.value for r in evidence.read(tmp_path / "results.json")] == [2.0, 20.0, 3.0, 30.0]
    one, two = (tmp_path / "README.md").read_text().split("<!-- results of")
    assert "| | speed (1/s) | memory (MB) |" in one
    assert "| a | 3 | 30 |" in one
    assert "| a | memory (MB) | 20 |" in two
