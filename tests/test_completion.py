"""Command lines are completed in bash, zsh and fish, by the shells themselves."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from crysldnet import cli
from crysldnet.config import choices
from crysldnet.config.help import SHELLS
from crysldnet.errors import CrysldnetError

ASK = {
    "bash": """\
source "$1"
COMP_LINE=$2 COMP_POINT=${#2}
compopt() { :; }
_crysldnet
printf '%s\\n' "${COMPREPLY[@]}"
""",
    "fish": "source $argv[1]; complete -C $argv[2]",
    # What zsh's completion system offers is printed in its place.
    "zsh": """\
compdef() { }; compset() { }; _files() { }
compadd() { while [[ $1 == -S || $1 == -- ]]; do [[ $1 == -S ]] && shift; shift; done; print -rl -- $@ }
_describe() { print -rl -- ${described%%:*} }
source $1
words=(${(z)2}); [[ $2 == *' ' ]] && words+=('')
CURRENT=${#words}
_crysldnet | grep -- "^${words[CURRENT]}"
""",
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("completion")
    found = {}
    for shell in SHELLS:
        found[shell] = folder / f"crysldnet.{shell}"
        found[shell].write_text(cli._completion(shell))
    return found


def completed(shell: str, script: Path, line: str) -> list[str]:
    """Return what a shell offers behind a line that ends where the cursor is."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} isn't installed")
    flags = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["-N"]}[shell]
    name = [] if shell == "fish" else [shell]
    words = [shell, *flags, "-c", ASK[shell], *name, str(script), line]
    (script.parent / "empty").mkdir(exist_ok=True)  # fish offers files too
    done = subprocess.run(words, capture_output=True, text=True, cwd=script.parent / "empty")
    assert (done.returncode, done.stderr) == (0, "")
    return [offered.split("\t")[0] for offered in done.stdout.splitlines() if offered]


@pytest.mark.parametrize("shell", SHELLS)
def test_commands_groups_keys_and_values_are_completed(shell: str, scripts: dict[str, Path]) -> None:
    def offered(line: str) -> list[str]:
        return completed(shell, scripts[shell], line)

    assert {*cli.COMMANDS, *cli.FLAGGED, "completion"} == set(offered("crysldnet "))
    assert set(offered("crysldnet fine")) == {"finetune"}
    behind = "" if shell == "bash" else "encoder="  # bash counts the = as the end of a word
    assert sorted(offered("crysldnet pretrain encoder=")) == [f"{behind}{name}" for name in choices("encoder")]
    assert offered("crysldnet pretrain encoder=cgcnn optimizer.l") == ["optimizer.lr="]
    assert {word.rpartition("=")[2] for word in offered("crysldnet finetune recipe=")} >= {"frozen", "hybrid", "auto"}
    assert {word.rpartition("=")[2] for word in offered("crysldnet finetune preset=ma")} == {"matformer"}
    assert {word.rpartition("=")[2] for word in offered("crysldnet pretrain trainer.progress_bar=")} == {
        "true",
        "false",
    }
    assert "import" in offered("crysldnet data ")
    assert offered("crysldnet data import cifs --tar") == ["--targets"]
    assert "encoder=cgcnn" not in offered("crysldnet report ")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_has_no_syntax_error_and_says_where_it_goes(shell: str, scripts: dict[str, Path]) -> None:
    text = scripts[shell].read_text()
    assert re.search(rf"^#   crysldnet completion {shell} > ~/", text, re.MULTILINE)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} isn't installed")
    done = subprocess.run([shell, "-n", str(scripts[shell])], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_shell_is_refused() -> None:
    with pytest.raises(CrysldnetError, match="the shells are bash, zsh, fish, not 'tcsh'"):
        cli.run(["completion", "tcsh"])
