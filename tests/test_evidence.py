"""Every table of results is the one its results.json gives."""

import json
from pathlib import Path

import pytest

from crysldnet import evidence

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(p.parent for base in ("experiments", "benchmarks") for p in (ROOT / base).rglob("results.json"))


def test_there_are_results():
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_table_in_the_readme_is_made_from_the_results(folder):
    records = evidence.read(folder / "results.json")
    text = (folder / "README.md").read_text()
    assert text.split(evidence.BEGIN)[1].split(evidence.END)[0].strip() == evidence.table(records)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_record_says_how_it_was_measured(folder):
    for record in evidence.read(folder / "results.json"):
        assert record.command.startswith(("python ", "make ", "crysldnet "))
        assert (ROOT / record.command.split()[1]).exists() or record.command.startswith(("make", "crysldnet"))
        assert len(record.commit) >= 7
        assert "*" not in record.commit, "measured with uncommitted changes"
        assert record.machine
        assert record.date


def test_a_changed_number_is_noticed(tmp_path):
    record = evidence.summarise(
        [1.0, 2.0], name="a", metric="b", unit="c", seeds=[0, 1], data="d", command="python e", commit="abcdefg"
    )
    (tmp_path / "README.md").write_text(f"before\n{evidence.BEGIN}\n{evidence.END}\nafter\n")
    evidence.write(tmp_path, [record])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| 1.5 | ± 0.707 | 0, 1 |" in text
    changed = json.loads((tmp_path / "results.json").read_text())
    changed[0]["value"] = 1.4
    (tmp_path / "results.json").write_text(json.dumps(changed))
    assert evidence.table(evidence.read(tmp_path / "results.json")) not in text
