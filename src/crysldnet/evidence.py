"""Measured results as records, and the tables made from them.

A study or benchmark writes ``results.json``, a list of records, and the table in its README between the marks
``<!-- results -->`` and ``<!-- end of results -->``. Numbers are never typed by hand; a test compares the two.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results -->", "<!-- end of results -->"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured figure.

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


def describe_machine() -> str:
    """Return processor, cores and the versions that matter for speed."""
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
    """Return the commit of a working tree; a star marks uncommitted changes of tracked files."""
    done = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty=*"], capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


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
    """Make the record of one figure measured with several seeds: mean and standard deviation."""
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


def launch(runs: Path, command: str, name: str, *arguments: str) -> dict[str, Any]:
    """Run one command to its end, unless it has been, and return its summary; an interrupted run goes on."""
    summary = runs / command / name / "summary.json"
    if not summary.exists():
        resume = ["resume=last"] if (summary.parent / "config.yaml").exists() else []
        line = [sys.executable, "-m", "crysldnet", command, f"runs={runs}", f"name={name}", *arguments, *resume]
        print(shlex.join(line[1:]), flush=True)
        log = runs / f"{command}-{name}.log"
        with log.open("a") as file:
            done = subprocess.run([*line, "trainer.progress_bar=false"], stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            raise SystemExit(f"{name} failed with status {done.returncode}; see {log}")
    return json.loads(summary.read_text())


def table(records: Sequence[Record]) -> str:
    """Return records as a Markdown table."""
    lines = ["| what | measure | value | spread | seeds | data |", "|---|---|---|---|---|---|"]
    for r in records:
        spread = "" if r.spread is None else f"± {r.spread:.3g}"
        seeds = ", ".join(map(str, r.seeds))
        lines.append(f"| {r.name} | {r.metric} ({r.unit}) | {r.value:.4g} | {spread} | {seeds} | {r.data} |")
    first = records[0]
    lines += ["", f"Commit {first.commit}, {first.date}. {first.machine}."]
    return "\n".join(lines)


def read(path: Path) -> list[Record]:
    """Read ``results.json``."""
    return [Record(**values) for values in json.loads(path.read_text())]


def write(folder: Path, records: Sequence[Record]) -> None:
    """Write ``results.json`` and the table in ``README.md``."""
    (folder / "results.json").write_text(json.dumps([asdict(r) for r in records], indent=1, ensure_ascii=False) + "\n")
    readme = folder / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    readme.write_text(f"{head}{BEGIN}\n{table(records)}\n{END}{rest.split(END)[1]}")
