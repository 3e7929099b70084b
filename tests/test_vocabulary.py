"""Names and phrases that were replaced don't come back into code, configuration or documents."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GONE = [
    r"\baverage_last\b",
    r"\bbad_steps\b",
    r"\belement_references\b",
    r"\btwo_part\b",
    r"\boptimizer\.final\b",
    r"\btrainer\.(nodes|accumulate|log_every)\b",
    r"\bgradient_clip\b",
    r"\bmode=gradual\b",
    r"\bstrategy=single\b",
    r"\bencoder\.variant=clean\b",
    r"\bsplit\.by=(published|element|cluster)\b",
    r"\bmodel\.(latent_dim|kl_weight|log_variance|normalise)\b",
    r"\b(SaveAndStop|RankWatch|Begun|Told|Knowledge|Budget|Ledger|Portion|Undo)\b",
    r"\b(heed|heeds|heeded|heed_again|was_told_lately|DEAF_S)\b",
    r"nobody comes",
    r"which JSON has",
    r"what there can be",
    r"tells of itself",
    r"in place of what isn't",
    r"was read otherwise than",
    r"what there is place for",
    r"as coordinates there aren't",
    r'"""Say (whether|in words)\b',
    r"\b(was|were) begun\b",
    r"\bis said\b",
    r"bring (it|that file|them) back",
    r"as the field does",
    r"\bneighbour",
    r"whole or not there",
    r"\bso it is\.",
    r"\btold of\b",
    r"of like size",
    r"a crystal that can't be used",
    r"is there already",
    r"\bgo(es)? on with\b",
    r"stands there",
    r"where there is none",
    r"what came of",
    r"nor known",
    r"that a person reads",
    r"was learned from",
    r"what an import did",
    r"as :(meth|func):`[^`]*` takes",
]
"""Regular expressions; an old key may stand in ``renames.py``, the change log and the tests of old names alone."""
ALLOWED = ("src/crysldnet/renames.py", "CHANGELOG.md", "tests/", "experiments/", "benchmarks/")


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.splitlines() or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if ".venv" not in p.parts]
    kinds = (".py", ".md", ".yaml", ".sh", "Makefile")
    return {
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in names
        if name.endswith(kinds) and not name.startswith(ALLOWED) and (ROOT / name).is_file()
    }


@pytest.mark.parametrize("phrase", GONE)
def test_what_was_replaced_does_not_come_back(texts: dict[str, str], phrase: str) -> None:
    assert len(texts) > 200
    found = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()}"
        for name, text in texts.items()
        for match in re.finditer(phrase, text)
    ]
    assert found == []
