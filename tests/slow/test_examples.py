"""Examples that the ordinary tests of the documents only compose, run to their end; ``make test-slow`` runs this.

What is left out needs a network or an account. Each command is a process of its own, as a reader has it.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from crysldnet.data.datasets import EMBEDDED
from crysldnet.signals import RUN_NAME
from test_docs import CPU, ROOT, SHORT, Block, Reader, needs_make
from tiny import DENOISER, ENCODER, QUIET, subset

pytestmark = pytest.mark.slow

ELSEWHERE = {
    "backend=wandb": "needs an account",
    "data=jarvis": "needs a network",
    "trainer.compile=true": "test_compiled.py compiles",
    "resume=last": "goes on with what was stopped; test_cli.py stops a run",
}
LONG = {"logger=wandb", "logger=[csv,wandb]", "strategy=ddp", "strategy=fsdp2"}


@dataclass
class Patient(Reader):
    """A reader who runs what takes long, and of the rest only what it needs."""

    refused: list[str] = field(default_factory=list)

    def _take(self, block: Block) -> None:
        if block.language != "console" and (block.language != "python" or "split_text" in block.text):
            super()._take(block)

    def take_command(self, arguments: list[str]) -> None:
        arguments = [word.replace("epochs=80", "epochs=2") for word in arguments]  # inside a recipe, which wins
        command, *rest = arguments
        if ELSEWHERE.keys() & {*rest}:
            return
        if command == "matbench":
            self._run([*arguments, *([] if rest[:1] == ["validate"] else self._of_matbench(rest))], self._missing(rest))
        elif command == "sweep":
            self._run(self._of_sweep(arguments))
        elif LONG & {*rest}:
            self._run([*self._small(arguments), f"data.path={self.folder / 'small.parquet'}"])

    def _run(self, arguments: list[str], missing: bool = False) -> None:
        environment = {key: value for key, value in os.environ.items() if key != RUN_NAME}
        line = [sys.executable, "-m", "crysldnet", *arguments]
        done = subprocess.run(line, capture_output=True, text=True, cwd=self.folder, env=environment)
        assert done.returncode == (2 if missing else 0), (
            f"{' '.join(arguments)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
        (self.refused if missing else self.ran).append(" ".join(arguments))

    def _of_matbench(self, rest: list[str]) -> list[str]:
        fresh = not any(word.startswith("pretrained=") for word in rest)
        short = [*SHORT["finetune"], "data.batch_size=64", f"name=example-{len(self.ran)}"]
        return [*QUIET, "trainer.accelerator=cpu", *short, *(ENCODER if fresh else [])]

    def _missing(self, rest: list[str]) -> bool:
        """Return whether a task's crystals have to be fetched first."""
        tasks = next((word.partition("=")[2] for word in rest if word.startswith("tasks=")), "")
        return any(not (EMBEDDED / f"{task}.parquet").exists() for task in tasks.strip("[]").split(",") if task)

    def _of_sweep(self, arguments: list[str]) -> list[str]:
        given = dict(word.split("=", 1) for word in arguments[1:])
        tiny = [*ENCODER, *QUIET, *CPU]
        if given["sweep"] == "pretrain":
            tiny += [*DENOISER, *SHORT["pretrain"]]
        if given["sweep"] == "matbench":  # it chooses epochs and the size of batches, on crystals of its own
            tiny = [word for word in tiny if not word.startswith("data.batch_size=")] + ["data.max_crystal_atoms=4"]
        else:
            tiny += [f"data.path={self.folder / 'small.parquet'}"]
        args = " ".join([given.get("args", ""), *tiny])
        return ["sweep", *(f"{key}={value}" for key, value in given.items()), f"args={args}", "count=2"]


@needs_make
@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{name}.md" for name in "cluster matbench pretrain sweep wandb".split())]
)
def test_what_takes_long_on_a_page_works(page, tmp_path, monkeypatch):
    for name in ("src", "conf"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RUN_NAME, raising=False)
    subset(tmp_path / "small.parquet", train=48, val=12, test=12)
    reader = Patient(tmp_path)
    data = f"data.path={tmp_path / 'small.parquet'}"
    reader._run(["pretrain", *QUIET, *CPU, *ENCODER, *DENOISER, *SHORT["pretrain"], data, "name=begun"])
    before = len(reader.ran)
    reader.follow(page)
    assert len(reader.ran) > before
    for file in tmp_path.glob("runs/*/*/summary.json"):
        assert json.loads(file.read_text())["status"] == "complete"
    if page == "docs/matbench.md":
        assert len(reader.refused) == 2
        assert {path.name for path in tmp_path.glob("**/matbench_v0.1_*")} == {
            "matbench_v0.1_CrysLDNet",
            "matbench_v0.1_CrysLDNet_incomplete",
            "matbench_v0.1_MyEncoder",
        }
