"""The README and the pages in docs/ are true: their examples run, their links lead somewhere, their keys exist.

Every example is read from the documents. ``crysldnet`` and ``make`` lines are first composed and validated as they
stand there. Then they are run with tiny settings added, except for those that ``RUN_ELSEWHERE`` names.
"""

import ast
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pyarrow.parquet as pq
import pytest
import yaml

from conftest import drawing
from crysldnet import __version__, cli, plugins
from crysldnet.build import TARGET
from crysldnet.config import PRESETS, choices, compose, conf_folder, validate
from crysldnet.data import datasets
from crysldnet.data.catalog import definition_of
from crysldnet.data.split import Split
from crysldnet.errors import CrysldnetError
from crysldnet.measures import MEASURES
from crysldnet.signals import RUN_NAME
from tiny import DENOISER, ENCODER, QUIET, environment_of_a_shell, subset

ROOT = Path(__file__).parents[1]
CPU = ["trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "data.batch_size=16"]
SHORT = {
    "pretrain": ["stages.vae.epochs=1", "stages.diffusion.epochs=1"],
    "finetune": ["epochs=1", "min_steps=0", "baselines=false"],
}
RUN_ELSEWHERE = {
    "matbench": "test_matbench.py runs all folds",
    "jarvis": "test_jarvis.py runs two properties",
    "sweep": "test_sweep.py runs a sweep",
    "folds=5": "test_cross_validation.py runs three folds",
    "strategy=ddp": "test_strategies.py runs two processes",
    "strategy=fsdp2": "test_strategies.py runs two processes",
    "logger=wandb": "test_wandb.py reads an offline run",
    "logger=[csv,wandb]": "test_wandb.py reads an offline run",
    "trainer.compile=true": "test_speed.py compiles",
    "data=jarvis": "test_published.py fetches, converts and trains",
    "resume=last": "test_cli.py stops a run and resumes it",
}
"""Commands and arguments that are composed and validated here, and where they are run."""
OTHER_ENCODER = ["encoder.width=16", "encoder.layers=2"]
NOT_OURS = {"git", "source", "export", "pip", "wandb"}
"""First words of lines that need a network, or change the reader's shell."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The name of a file that the block is the content of: its first line, as a comment."""
        found = re.match(r"# ([\w.-]+\.(?:py|yaml))\n", self.text)
        return found[1] if found else None

    @property
    def commands(self) -> list[list[str]]:
        """The lines of a bash block, as words."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str) -> list[Block]:
    found, start, lines = [], None, text_of(page).splitlines()
    for number, line in enumerate(lines, 1):
        if line.startswith("```"):
            if start is None:
                start = number
            else:
                language = lines[start - 1].removeprefix("```")
                found.append(Block(language, "\n".join(lines[start : number - 1]) + "\n", start))
                start = None
    assert start is None, f"{page}: a block that isn't closed"
    return found


def links_of(page: str) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)#\s]+)", text_of(page)) if not link.startswith("http")]


PAGES = ["README.md", *dict.fromkeys(link for link in links_of("README.md") if link.startswith("docs/"))]


def section(page: str, title: str) -> str:
    """Return what stands below a heading, up to the next of its level or higher."""
    level = title.split(" ")[0]
    after = text_of(page).split(f"\n{title}\n", 1)[1]
    return re.split(rf"^#{{1,{len(level)}}} ", after, maxsplit=1, flags=re.MULTILINE)[0]


def table_rows(text: str) -> list[list[str]]:
    """Return the cells of all tables, the lines below headers left out."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def quoted(text: str) -> list[str]:
    """Return what stands in backticks, fenced blocks left out."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted keys, without ``_target_``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        elif key != TARGET:
            found[f"{prefix}{key}"] = value
    return found


def schema_of(command: str) -> type:
    module, schema, _ = cli.COMMANDS[command]
    return getattr(__import__(module, fromlist=[schema]), schema)


def expand_make(words: list[str]) -> list[list[str]]:
    """Return the modules that a ``make`` line would run, with their arguments."""
    done = subprocess.run(
        ["make", "-n", *words, "VENV=none", "PYTHON=python"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment_of_a_shell(),
    )
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    return [line[line.index("-m") + 1 :] for line in lines if "-m" in line]


@dataclass
class Reader:
    """Somebody who follows a page, in a folder of their own where src/ is the repository's."""

    folder: Path
    ran: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=dict)

    def follow(self, page: str) -> None:
        for block in blocks_of(page):
            try:
                self._take(block)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{page}, block at line {block.line}: {type(error).__name__}: {error}") from error

    def _take(self, block: Block) -> None:
        if block.file is not None:
            assert block.language in ("python", "yaml")
            Path(block.file).write_text(block.text)
        if block.language == "bash":
            for words in block.commands:
                self.take_line(words)
        elif block.language == "python" and block.file is None:
            exec(compile(block.text, "example", "exec"), self.names)
        elif block.language == "yaml":
            assert isinstance(yaml.safe_load(block.text), dict)
        elif block.language == "console":
            self._expect(block.text)
        else:
            assert block.language in ("python", "text", "csv"), f"a block of {block.language!r}"

    def take_line(self, words: list[str]) -> None:
        first, *rest = words
        if "|" in words:
            place = words.index("|")
            piped = subprocess.run(words[:place], check=True, capture_output=True, text=True).stdout
            assert piped
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "stdin", io.StringIO(piped))
                self.take_line(words[place + 1 :])
        elif first == "crysldnet":
            self.take_command(rest)
        elif first == "make":
            for module, *arguments in expand_make(rest):
                assert module in ("crysldnet", "pytest", "ruff", "mypy")
                if module == "crysldnet":
                    self.take_command(arguments)
        elif rest[:1] == ["-m"]:
            assert first == "python"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", rest[1:])
                with pytest.raises(SystemExit) as ended:
                    runpy.run_module(rest[1], run_name="__main__")
            assert not ended.value.code
        elif first == "python":
            script, *arguments = rest
            assert Path(script).is_file(), f"no block is {script}"
            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
                patch.setattr(sys, "argv", [script, *self._small(arguments)])
                runpy.run_path(script, run_name="__main__")
                raise AssertionError("it has no exit status")
        elif first == "cp":
            subprocess.run(words, check=True)
        else:
            assert first in NOT_OURS, f"{first!r}: neither run nor known"

    def take_command(self, arguments: list[str]) -> None:
        command = arguments[0]
        line = " ".join(arguments)
        if arguments[:2] == ["data", "download"] and arguments[2:] and "--info" not in arguments:
            definition_of(arguments[2])
            self.checked.append(line)
            return
        if tuple(arguments[:2]) in cli.PARTS:
            assert command in RUN_ELSEWHERE
            self.checked.append(line)
            return
        if command == "data" or "--help" in arguments or "--print-config" in arguments:
            assert cli.run(arguments) == 0
            self.ran.append(line)
            return
        arguments = [command, *cli.with_own_data(command, arguments[1:])[0]]
        composition = compose(command, arguments[1:])
        plugins.load(composition.values.get("plugins", ()))
        settings = validate(composition, schema_of(command))
        if RUN_ELSEWHERE.keys() & {*arguments}:
            check_further(command, settings)
            self.checked.append(line)
            return
        os.environ.pop(RUN_NAME, None)
        assert cli.run(self._small(arguments)) == 0
        self.ran.append(line)

    def _small(self, arguments: list[str]) -> list[str]:
        """Add settings that make a run tiny; those that are about the example itself stay."""
        command, *rest = arguments
        if command not in SHORT:
            return arguments
        given = dict(word.split("=", 1) for word in rest if "=" in word)
        preset = given.get("preset")
        encoder = given.get("encoder", preset if preset in choices(PRESETS["finetune"]) else "pddformer")
        tiny = [] if encoder.endswith(".yaml") else ENCODER if encoder.startswith("pddformer") else OTHER_ENCODER
        fresh = given.get("pretrained", "none") == "none"
        added = [*QUIET, *CPU, *SHORT[command], *(tiny if fresh else [])]
        added += (
            [word for word in DENOISER if "stage" not in given or word != "stage=both"] if command == "pretrain" else []
        )
        added += [] if "name" in given else [f"name=example-{len(self.ran)}"]
        return [command, *rest, *added]

    def _expect(self, text: str) -> None:
        for part in text.split("$ ")[1:]:
            line, _, printed = part.partition("\n")
            name, *arguments = shlex.split(line)
            assert name == "crysldnet"
            with pytest.raises(CrysldnetError) as caught:
                cli.run(arguments)
            assert f"error: {caught.value}" == printed.strip()
            self.ran.append(line)


def check_further(command: str, settings: Any) -> None:
    """Check what the types can't say of a command that isn't run here."""
    if command == "matbench":
        from crysldnet.tools.matbench.settings import check_settings

        check_settings(settings)
    if command == "sweep" and find_spec("optuna") is not None:
        from crysldnet.tools.sweep import check_parameters, load_sweep

        check_parameters(load_sweep(settings.sweep), shlex.split(settings.args))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sets inside the package, with a few crystals each."""
    folder = tmp_path_factory.mktemp("embedded")
    subset(folder / "mp_starter.parquet", train=48, val=12, test=12)
    for name in ("matbench_jdft2d", "matbench_phonons"):
        pq.write_table(pq.read_table(datasets.EMBEDDED / f"{name}.parquet").slice(0, 60), folder / f"{name}.parquet")
    return folder


def in_folder(folder: Path, embedded: Path, patch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("src", "conf"):
        (folder / name).symlink_to(ROOT / name)
    patch.chdir(folder)
    patch.syspath_prepend(str(folder))
    patch.setattr(datasets, "EMBEDDED", embedded)
    patch.setattr(plugins, "LOADED", set(plugins.LOADED))
    patch.setenv(plugins.VARIABLE, "")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, embedded: Path) -> Path:
    """The runs that every page but the README may expect: one pretraining, one finetuning."""
    folder = tmp_path_factory.mktemp("started")
    with pytest.MonkeyPatch.context() as patch:
        in_folder(folder, embedded, patch)
        reader = Reader(folder)
        reader.take_command(["pretrain", "name=begun"])
        reader.take_command(["finetune", "pretrained=runs/pretrain/begun/encoder.safetensors", "name=begun"])
    return folder / "runs"


@pytest.fixture
def reader(tmp_path: Path, embedded: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    in_folder(tmp_path / "folder", embedded, monkeypatch)
    yield Reader(tmp_path / "folder")
    os.environ.pop(RUN_NAME, None)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make isn't installed")


@needs_make
def test_the_readme_works_from_top_to_bottom_in_an_empty_folder(reader: Reader) -> None:
    with drawing():
        reader.follow("README.md")
    commands = {line.split()[0] for line in reader.ran}
    assert {"pretrain", "finetune", "predict", "data"} <= commands
    assert {line.split()[0] for line in reader.checked} >= {"matbench", "sweep"}
    assert (reader.folder / "my_predictions.csv").read_text().count("\n") == 7


@needs_make
@pytest.mark.parametrize("page", PAGES[1:])
def test_the_examples_of_a_page_work(page: str, reader: Reader, started: Path) -> None:
    shutil.copytree(started, reader.folder / "runs", symlinks=True)
    reader.follow(page)


def test_an_example_that_does_not_work_is_noticed(reader: Reader) -> None:
    with pytest.raises(CrysldnetError, match="widht"):
        reader.take_line(["crysldnet", "matbench", "encoder.widht=3"])
    with pytest.raises(AssertionError, match="neither run nor known"):
        reader.take_line(["crysldnett", "pretrain"])


@needs_make
def test_make_expands_to_the_command_that_it_names() -> None:
    assert expand_make(["pretrain", "GPUS=2"]) == [
        ["crysldnet", "pretrain", "trainer.devices=2", "trainer.num_nodes=1", "strategy=ddp"]
    ]
    assert [words[0] for words in expand_make(["lint"])] == ["ruff", "ruff"]


def test_every_page_can_be_reached_and_every_link_leads_somewhere() -> None:
    assert {ROOT / page for page in PAGES[1:]} == set((ROOT / "docs").glob("*.md"))
    for page in PAGES:
        for link in links_of(page):
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"


def documented(title: str) -> tuple[list[str], dict[str, list[str]]]:
    """Return the header of a table of keys, and each key's cells."""
    header, *rows = table_rows(section("docs/configuration.md", title))
    return header, {quoted(row[0])[0]: row[1:] for row in rows}


def tables_of(text: str) -> list[list[list[str]]]:
    """Return each table's rows, its header first."""
    return [table_rows(part) for part in re.split(r"\n\s*\n", text) if part.lstrip().startswith("|")]


def value_of(cell: str) -> Any:
    return yaml.safe_load(quoted(cell)[0])


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_key_of_a_command_is_documented_with_its_default(command: str) -> None:
    values = yaml.safe_load((conf_folder() / f"{command}.yaml").read_text())
    groups = values.pop("defaults", {})
    _, rows = documented(f"### {command}")
    assert {key: value_of(cells[0]) for key, cells in rows.items()} == flat(values)
    text = section("docs/configuration.md", f"### {command}")
    assert all(group in text for group in groups)


GROUPS = sorted(
    p.name for p in conf_folder().iterdir() if p.is_dir() and p.name not in ("preset", "published", "sweep")
)


@pytest.mark.parametrize("group", GROUPS)
def test_every_key_of_a_group_is_documented_with_its_values(group: str) -> None:
    files = {name: yaml.safe_load((conf_folder() / group / f"{name}.yaml").read_text()) for name in choices(group)}
    text = section("docs/configuration.md", f"### {group}")
    for name, values in files.items():
        assert f"`{group}={name}`" in text
        assert f"`{values[TARGET]}`" in text
    if not any(flat(values) for values in files.values()):
        return
    said: dict[str, dict[str, Any]] = {}
    for header, *rows in tables_of(text):
        if header[0] == "choice":  # a row for each choice
            for name, *cells in rows:
                keys = [quoted(title)[0] for title in header[1:]]
                said[quoted(name)[0]] = {k: value_of(c) for k, c in zip(keys, cells, strict=True) if c}
        elif header[1] != "value":  # a column for each choice
            for place, name in enumerate(header[1:-1], 1):
                said[name] = {quoted(row[0])[0]: value_of(row[place]) for row in rows if row[place]}
    assert said == {name: flat(values, f"{group}.") for name, values in files.items()}


def test_every_key_of_a_split_is_documented_and_those_that_no_file_sets_with_their_defaults() -> None:
    split = asdict(Split())
    text = section("docs/configuration.md", "### data")
    assert all(f"`data.split.{key}`" in text for key in split)
    table = next(table for table in tables_of(text) if table[0][1] == "value")
    for key, value, _ in table[1:]:
        assert split[quoted(key)[0].removeprefix("data.split.")] == value_of(value)
    ways = set(get_args(get_type_hints(Split)["by"]))
    table = tables_of(section("docs/data.md", "## Splits"))[0]
    assert ways == {quoted(row[0])[0] for row in table[1:]}


@pytest.mark.parametrize(("folder", "name"), [(f, name) for f in sorted({*PRESETS.values()}) for name in choices(f)])
def test_every_key_of_a_preset_is_documented(folder: str, name: str) -> None:
    values = yaml.safe_load((conf_folder() / folder / f"{name}.yaml").read_text())
    header, rows = documented(f"### Presets of {folder.partition('/')[2]}")
    place = header.index(name) - 1
    said = {key: value_of(cells[place]) for key, cells in rows.items() if cells[place]}
    assert said == values.pop("defaults") | flat(values)


@pytest.mark.parametrize("name", choices("sweep"))
def test_every_key_of_a_sweep_is_documented(name: str) -> None:
    said = {key for row in table_rows(text_of("docs/sweep.md")) for key in quoted(row[0])}
    assert set(yaml.safe_load((conf_folder() / "sweep" / f"{name}.yaml").read_text())) <= said


def test_the_published_preset_has_every_switch_of_the_method_page() -> None:
    published, default = compose("pretrain", ["preset=published"]), compose("pretrain")
    _, *rows = table_rows(section("docs/method.md", "## Differences from the published code"))
    assert len(rows) > 10
    for switch in (quoted(row[-1])[0] for row in rows):
        key, value = switch.split("=")
        if key in published.groups:
            assert published.groups[key] == value
        else:
            assert flat(published.values)[key] == yaml.safe_load(value), switch
        validate(compose("pretrain", [switch]), schema_of("pretrain"))
        assert key == "diffusion.target" or published.values != default.values


def test_every_module_has_its_place_on_the_architecture_page() -> None:
    said = {name for row in table_rows(section("docs/architecture.md", "## Layers")) for name in quoted(row[0])}
    package = ROOT / "src" / "crysldnet"
    modules = {p.stem for p in package.glob("*.py")} | {p.parent.name for p in package.glob("*/__init__.py")}
    assert said == modules - {"__init__"}


def string_constants(pattern: str) -> list[str]:
    files = (ROOT / "src" / "crysldnet").glob(pattern)
    trees = (ast.walk(ast.parse(path.read_text())) for path in files)
    return [node.value for tree in trees for node in tree if isinstance(node, ast.Constant) and type(node.value) is str]


@pytest.mark.parametrize(
    ("page", "title", "column", "code"),
    [
        ("docs/data.md", "## Rejected input", -1, "*/**/*.py"),
        ("docs/checkpoints.md", "## Rejected files", -1, "artifacts/*.py"),
    ],
)
def test_every_message_that_a_page_quotes_is_in_the_code(page: str, title: str, column: int, code: str) -> None:
    constants = string_constants(code)
    _, *rows = table_rows(section(page, title))
    messages = [message for row in rows for message in quoted(row[column])]
    assert len(messages) > 7
    for message in messages:
        assert any(message in text for text in constants), message


def test_every_measure_that_pretraining_prints_is_on_its_page() -> None:
    _, *rows = table_rows(section("docs/pretrain.md", "## What it prints"))
    shown = [measure for measure in MEASURES.values() if measure.shown]
    assert [row[0].strip("`") for row in rows] == [measure.heading for measure in shown]
    assert [bool(row[2].strip()) for row in rows] == [bool(measure.baseline) for measure in shown]


def test_files_metrics_and_summary_of_a_run_are_on_its_page(started: Path) -> None:
    text = text_of("docs/run_folder.md")
    names = set(quoted(text))
    summary_fields = {name for row in table_rows(section("docs/run_folder.md", "## summary.json")) for name in row}
    for run in (started / "pretrain" / "begun", started / "finetune" / "begun"):
        for file in (path for path in run.rglob("*") if path.is_file()):
            name = re.sub(r"(parity|reliability)_\w+\.png", r"\1_TARGET.png", file.relative_to(run).as_posix())
            assert name in names, name
        for file in run.rglob("metrics.csv"):
            columns = file.read_text().split("\n", 1)[0].split(",")
            assert {c for c in columns if not c.startswith("lr-")} <= names
        fields = {key for key in json.loads((run / "summary.json").read_text()) if "/" not in key}
        assert fields <= set(quoted(" ".join(summary_fields)))


def test_what_exported_files_say_of_themselves_is_on_their_page(started: Path) -> None:
    from crysldnet.artifacts import model_file

    names = set(quoted(section("docs/checkpoints.md", "## Metadata")))
    encoder, _ = model_file.read(started / "pretrain" / "begun" / "encoder.safetensors", "encoder")
    model, state = model_file.read(started / "finetune" / "begun" / "model.safetensors", "property_model")
    assert {*encoder, *model, *encoder["graph"], *encoder["provenance"]} <= names
    assert {key for key in state if not key.startswith(("encoder.", "head."))} <= names


def test_the_files_of_a_store_are_on_the_data_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = ROOT / "src" / "crysldnet" / "data" / "embedded" / "examples"
    assert cli.run(["data", "import", str(examples), "--out", str(tmp_path / "a.store")]) == 0
    said = {name for row in table_rows(section("docs/data.md", "## The store")) for name in quoted(row[0])}
    assert said == {p.name for p in (tmp_path / "a.store").iterdir()}


@pytest.mark.parametrize(
    ("command", "title", "at_least"),
    [
        ("import", "## Import", 9),
        ("describe", "## Describe", 3),
        ("dedupe", "## Duplicates and leakage", 4),
        ("audit", "## Duplicates and leakage", 5),
        ("download", "## Published data sets", 2),
    ],
)
def test_the_options_of_a_data_command_are_on_the_data_page(
    command: str, title: str, at_least: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.run(["data", command, "--help"])
    options = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE)) - {"--overwrite"}
    assert len(options) >= at_least - 1
    assert all(option in section("docs/data.md", title) for option in options)


def test_the_fields_of_a_split_file_are_on_the_data_page(started: Path) -> None:
    said = set(quoted(" ".join(row[0] for row in table_rows(section("docs/data.md", "## Splits")))))
    for run in ("pretrain", "finetune"):
        assert set(json.loads((started / run / "begun" / "split.json").read_text())) <= said


def test_every_test_that_the_page_on_reliability_names_exists() -> None:
    named = 0
    for cell in (row[-1] for row in table_rows(text_of("docs/reliability.md"))):
        source = ""
        for file, name in re.findall(r"`(?:(tests/[\w/]+\.py)(?:::)?)?(test_\w+)?`", cell):
            source = text_of(file) if file else source
            assert not name or f"\ndef {name}(" in source, (file, name)
            named += bool(name)
    assert named > 30


def test_every_file_that_states_the_version_states_the_same() -> None:
    for file in ("pyproject.toml", "CITATION.cff", "packaging/meta.yaml", "docs/comparison.md", "CHANGELOG.md"):
        pattern = r"(?m)(?:^version(?: =|:)|set version =|CrysLDNet|^##) \"?(\d+\.\d+\.\d+)"
        found = re.findall(pattern, text_of(file))
        assert found[:1] == [__version__], (file, found)


def test_the_citation_file_has_what_its_format_asks_for() -> None:
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "type"} <= set(citation)
    assert citation["version"] == __version__
    assert citation["license"] == "MIT"
    assert text_of("LICENSE").startswith("MIT License")
    works = [citation["preferred-citation"], *citation.get("references", [])]
    for work in works:
        assert {"type", "title", "authors", "year"} <= set(work)
        for author in work["authors"]:
            assert {"family-names", "given-names"} == set(author)
    assert [author["family-names"] for author in works[0]["authors"]] == [
        *["Mukherjee", "Das", "Basuchowdhuri", "Goyal", "Ganguly"]
    ]
    for work in works:
        assert work["title"].rstrip(".") in " ".join(text_of("README.md").split())
