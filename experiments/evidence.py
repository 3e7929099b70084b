"""Measured results as records, and the tables made from them.

A study or benchmark writes ``results.json``, a list of records, and the tables in its README, each between the marks
``<!-- results -->`` and ``<!-- end of results -->``. The first may be ``<!-- results of COMMAND -->`` where several
commands share a folder, and ``<!-- results by name … -->`` for a table with a row a name and a column a measure.
Numbers are never typed by hand; a test compares tables and records.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from crysldnet.config import compose, load_yaml, to_yaml, validate
from crysldnet.errors import ConfigError
from crysldnet.io import write_atomically

T = TypeVar("T")

BLOCK = re.compile(
    r"(?P<begin><!-- results(?P<by_name> by name)?(?: of (?P<command>[^\n]+?))? -->\n)"
    r".*?(?P<end><!-- end of results -->)",
    re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured value.

    Attributes:
        name: what was measured.
        metric: in which measure.
        value: the mean over seeds or the median over rounds.
        unit: of value and spread.
        spread: standard deviation over seeds, or half the interquartile range over rounds; None where measured once.
        seeds: of the runs, empty for a timing.
        data: the data set and its size.
        command: that made it.
        commit: of the code.
        machine: processor, cores, versions.
        date: of the measurement.
    """

    name: str
    metric: str
    value: float
    unit: str
    spread: float | None
    seeds: list[int]
    data: str
    command: str
    commit: str
    machine: str
    date: str


def settings(schema: type[T], folder: Path, description: str, may_change: Collection[str]) -> T:
    """Return a study's settings: its ``config.yaml``, overridden by key=value arguments.

    ``--help`` prints the description and the file. An unknown key or a wrong value ends the program with status 2, and
    so does a folder of runs that were made with other settings: they would be taken for these.

    Args:
        schema: a dataclass of the settings; one is ``runs``, the folder of the runs.
        folder: of the study.
        description: what the study asks.
        may_change: settings that runs in the same folder may have otherwise, such as those that their names tell.
    """
    file = folder / "config.yaml"
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{description.strip()}\n\n{file.read_text()}", end="")
        raise SystemExit(0)
    try:
        composition = compose(file, sys.argv[1:])
        made = validate(composition, schema)
        _keep(Path(composition.values["runs"]), {k: v for k, v in composition.values.items() if k not in may_change})
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return made


def _keep(runs: Path, values: dict[str, Any]) -> None:
    file = runs / "study.yaml"
    before = load_yaml(file) if file.exists() else values
    for key, value in values.items():
        if before.get(key) != value:
            raise ConfigError(
                f"{key}: the runs in {runs} were made with {before.get(key)}; choose another folder, runs=…"
            )
    runs.mkdir(parents=True, exist_ok=True)
    write_atomically(file, to_yaml(values))


def describe_machine() -> str:
    """Return the processor, its cores, and the versions that affect speed."""
    import numba
    import torch

    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        match = re.search(r"model name\s*:\s*(.+)", information.read_text())
        processor = match.group(1).strip() if match else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numba {numba.__version__}"
    return f"{processor}, {cores} cores{device}; {versions}"


def current_commit(folder: Path) -> str:
    """Return the commit of a working tree; a star marks uncommitted changes of tracked files.

    Changed results, documents and figures don't count: one measurement after the other writes them.
    """
    written = [f":(top,exclude)*{name}" for name in ("results.json", ".md", ".png", ".csv")]
    git = ["git", "-C", str(folder)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":(top)", *written], capture_output=True)
    return (commit + ("*" if changed.returncode == 1 else "")) or "unknown"


def summarise(
    values: Sequence[float],
    *,
    name: str,
    metric: str,
    unit: str,
    seeds: Sequence[int],
    data: str,
    command: str,
    commit: str,
) -> Record:
    """Make a record of a value over several seeds: mean and standard deviation."""
    return Record(
        name=name,
        metric=metric,
        value=statistics.mean(values),
        unit=unit,
        spread=statistics.stdev(values) if len(values) > 1 else None,
        seeds=list(seeds),
        data=data,
        command=command,
        commit=commit,
        machine=describe_machine(),
        date=date.today().isoformat(),
    )


def timed(
    values: Sequence[float], *, name: str, metric: str, unit: str, data: str, command: str, commit: str
) -> Record:
    """Make a record of a value over several rounds: median and half the interquartile range."""
    quarters = statistics.quantiles(values, n=4) if len(values) > 1 else None
    record = summarise(
        [statistics.median(values)],
        name=name,
        metric=metric,
        unit=unit,
        seeds=[],
        data=data,
        command=command,
        commit=commit,
    )
    return record if quarters is None else replace(record, spread=(quarters[2] - quarters[0]) / 2)


def launch(runs: Path, command: str, name: str, *arguments: str) -> dict[str, Any]:
    """Run a command unless it has finished, and return its summary; resume an interrupted run."""
    summary = runs / command / name / "summary.json"
    if not summary.exists():
        resume = ["resume=last"] if (summary.parent / "config.yaml").exists() else []
        line = [sys.executable, "-m", "crysldnet", command, f"runs={runs}", f"name={name}", *arguments, *resume]
        print(shlex.join(line[1:]), flush=True)
        runs.mkdir(parents=True, exist_ok=True)
        log = runs / f"{command}-{name}.log"
        with log.open("a") as file:
            done = subprocess.run([*line, "trainer.progress_bar=false"], stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            raise SystemExit(f"{name} failed with status {done.returncode}; see {log}")
    return json.loads(summary.read_text())


def table(records: Sequence[Record]) -> str:
    """Return records as a Markdown table, one row per record."""
    lines = ["| what | measure | value | spread | seeds | data |", "|---|---|---|---|---|---|"]
    for r in records:
        spread = "" if r.spread is None else f"± {r.spread:.3g}"
        seeds = ", ".join(map(str, r.seeds))
        lines.append(f"| {r.name} | {r.metric} ({r.unit}) | {r.value:.4g} | {spread} | {seeds} | {r.data} |")
    return "\n".join([*lines, "", _source(records)])


def table_by_name(records: Sequence[Record]) -> str:
    """Return records as a Markdown table, one row per name and one column per measure."""
    measures = list(dict.fromkeys((r.metric, r.unit) for r in records))
    cells = {(r.name, r.metric, r.unit): _cell(r) for r in records}
    lines = [
        "| | " + " | ".join(f"{metric} ({unit})" if unit else metric for metric, unit in measures) + " |",
        "|---" * (len(measures) + 1) + "|",
    ]
    for name in dict.fromkeys(r.name for r in records):
        lines.append(f"| {name} | " + " | ".join(cells.get((name, *measure), "") for measure in measures) + " |")
    data = "; ".join(dict.fromkeys(r.data for r in records))
    seeds = sorted({seed for r in records for seed in r.seeds})
    of_seeds = f" Seeds {', '.join(map(str, seeds))}." if seeds else ""
    return "\n".join([*lines, "", f"{data}.{of_seeds} {_source(records)}"])


def _cell(record: Record) -> str:
    value = f"{record.value:,.0f}" if record.value >= 10_000 else f"{record.value:.4g}"
    return value if record.spread is None else f"{value} ± {record.spread:.2g}"


def _source(records: Sequence[Record]) -> str:
    """Return the distinct commits, dates and machines of records."""
    commits, dates, machines = (
        ", ".join(dict.fromkeys(getattr(r, field) for r in records)) for field in ("commit", "date", "machine")
    )
    return f"Commit {commits}, {dates}. {machines}."


def read(path: Path) -> list[Record]:
    """Read ``results.json``."""
    return [Record(**values) for values in json.loads(path.read_text())]


def render(text: str, records: Sequence[Record]) -> str:
    """Return a README's text with its tables regenerated from the records."""

    def block(match: re.Match[str]) -> str:
        command = match["command"]
        chosen = [r for r in records if command is None or r.command.startswith(command)]
        made = (table_by_name if match["by_name"] else table)(chosen) if chosen else "Not measured yet."
        return f"{match['begin']}{made}\n{match['end']}"

    return BLOCK.sub(block, text)


def _program(record: Record) -> list[str]:
    """Return the command, such as ``python``, a script and its options, without settings."""
    return [word for word in record.command.split() if "=" not in word]


def write(folder: Path, records: Sequence[Record]) -> None:
    """Write ``results.json`` and any tables in ``README.md``; keep other programs' records."""
    file, programs = folder / "results.json", [_program(r) for r in records]
    others = [r for r in read(file) if _program(r) not in programs] if file.exists() else []
    everything = [*others, *records]
    file.write_text(json.dumps([asdict(r) for r in everything], indent=1, ensure_ascii=False) + "\n")
    readme = folder / "README.md"
    if readme.exists():
        readme.write_text(render(readme.read_text(), everything))
