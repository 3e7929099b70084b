"""Print the lines of each package as a table, beside those of another commit: python docs/sizes.py COMMIT."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "src/crysldnet"


def sizes(commit: str) -> tuple[Counter[str], Counter[str]]:
    """Return the lines and the files of each package at a commit."""
    git = ["git", "-C", str(ROOT)]
    names = subprocess.run([*git, "ls-tree", "-r", "--name-only", commit, PACKAGE], capture_output=True, text=True)
    lines: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for name in names.stdout.split():
        if name.endswith(".py"):
            text = subprocess.run([*git, "show", f"{commit}:{name}"], capture_output=True, text=True).stdout
            parts = name.removeprefix(f"{PACKAGE}/").split("/")
            package = parts[0] if len(parts) > 1 else "modules"
            lines[package] += text.count("\n")
            files[package] += 1
    return lines, files


def main(before: str) -> None:
    """Print the table."""
    (old, old_files), (new, new_files) = sizes(before), sizes("HEAD")
    print(f"| package | {before} | | now | |\n|---|---|---|---|---|\n| | lines | files | lines | files |")  # noqa: T201
    for package in sorted({*old, *new}):
        print(f"| {package} | {old[package]:,} | {old_files[package]} | {new[package]:,} | {new_files[package]} |")  # noqa: T201
    totals = [old.total(), old_files.total(), new.total(), new_files.total()]
    print("| all | " + " | ".join(f"{total:,}" for total in totals) + " |")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "39506cf")
