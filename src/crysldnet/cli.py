"""The command line: ``crysldnet COMMAND [group=name …] [key=value …]``."""

from __future__ import annotations

import ast
import importlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from crysldnet import __version__, signals
from crysldnet.console import did_you_mean, escaped, indented, listed, note
from crysldnet.errors import UNFINISHED, ConfigError, CrysldnetError, Interrupted
from crysldnet.io import DISK_ERRORS, cannot_write
from crysldnet.platforms import is_out_of_memory
from crysldnet.tools.parts import PARTS, parser

if TYPE_CHECKING:
    from crysldnet.config import Composition

COMMANDS = {
    "pretrain": ("crysldnet.pretrain", "PretrainConfig", "pretrain an encoder without labels"),
    "finetune": ("crysldnet.finetune", "FinetuneConfig", "train a property model, pretrained or from scratch"),
    "predict": (
        "crysldnet.inference.predict",
        "PredictConfig",
        "predict properties of crystals in files, tables or stores",
    ),
    "embed": ("crysldnet.inference.embed", "EmbedConfig", "write an encoder's features of crystals or atoms"),
    "explain": ("crysldnet.tools.explain", "ExplainConfig", "attribute predictions to atoms and descriptors"),
    "suggest": ("crysldnet.tools.suggest", "SuggestConfig", "choose the crystals to measure next"),
    "export": ("crysldnet.tools.export", "ExportConfig", "export a finetuned network for torch.export or ONNX"),
    "matbench": ("crysldnet.tools.matbench", "MatbenchConfig", "run Matbench tasks and write a submission folder"),
    "jarvis": (
        "crysldnet.tools.jarvis",
        "JarvisConfig",
        "finetune on JARVIS-DFT and write a leaderboard entry",
    ),
    "sweep": ("crysldnet.tools.sweep", "SweepCommandConfig", "search hyperparameters with a W&B sweep configuration"),
    "report": ("crysldnet.tools.report", "ReportConfig", "write an HTML report on finished runs and compare them"),
}
"""Commands with module, configuration class and help line."""

FLAGGED = {
    "data": ("crysldnet.tools.importer.command", "import, describe, compare and download crystals"),
    "weights": ("crysldnet.tools.hub", "list, download and share pretrained encoders"),
}
"""Commands with flags: module whose ``main`` runs them, and help line."""

RESUMABLE = ("pretrain", "finetune", "matbench", "jarvis", "sweep")
"""Commands that exit as unfinished when stopped by a signal."""

USAGE_ERROR = 2
EXIT_STATUSES = """\
exit status: 0 complete; 1 nothing usable, such as an import that rejected every crystal; 2 wrong input or a full
disk, with the remedy; 75 interrupted, and resume=last continues; 130 Ctrl-C outside of training"""


def usage() -> str:
    """Return the general help."""
    lines = [
        "usage: crysldnet COMMAND [group=name …] [key=value …]",
        "",
        "Pretrain a crystal encoder by latent diffusion and finetune it to predict properties of crystals.",
        "",
        *(f"  {name:<10} {text}" for name, (_, _, text) in COMMANDS.items()),
        *(f"  {name:<10} {text}" for name, (_, text) in FLAGGED.items()),
        f"  {'completion':<10} print a script with which bash, zsh or fish complete these commands",
        "",
        "crysldnet COMMAND --help lists every key with its default; --print-config shows the resulting configuration.",
        "",
        "  crysldnet pretrain",
        "  crysldnet finetune pretrained=runs/pretrain/latest/encoder.safetensors",
        '  crysldnet predict model=runs/finetune/latest files="my_cifs/*.cif"',
        "  crysldnet report runs/finetune/latest",
        "",
        EXIT_STATUSES,
    ]
    return "\n".join(lines)


def _run_command(name: str, arguments: Sequence[str]) -> int:
    from crysldnet.config import (
        compose,
        help_text,
        pin_files,
        refuse_changed,
        refuse_missing,
        refuse_unknown,
        refuse_unused,
        to_yaml,
        validate,
    )

    module_name, schema_name, _ = COMMANDS[name]
    if "--help" in arguments or "-h" in arguments:
        print(help_text(name, _docstring(module_name)), EXIT_STATUSES, sep="\n\n")
        return 0
    show = "--print-config" in arguments
    _load_plugins(arguments)  # the user's files may have a format that one of them reads
    arguments, own = with_own_data(name, [a for a in arguments if a != "--print-config"])
    composition = compose(name, arguments)
    refuse_unknown(name, composition)
    if not composition.groups:
        refuse_missing(composition)
    if composition.groups and composition.values.get("resume") == "last":
        from crysldnet.training.run_folder import find_run, is_complete

        earlier = find_run(composition.values["runs"], name, composition.values["name"])
        if earlier is not None:
            saved = earlier / "config.yaml"
            composition = compose(name, arguments, saved)
            changed = refuse_changed(name, composition, saved, complete=is_complete(earlier))
            if is_complete(earlier) and not (name == "matbench" and _has_more_to_do(earlier, composition, changed)):
                note(f"{earlier}: this run is complete")
                return 0
    refuse_unused(composition)
    composition = pin_files(composition)
    module = importlib.import_module(module_name)
    settings = validate(composition, getattr(module, schema_name))
    if show:
        print(escaped(to_yaml(composition.values)), end="")
        return 0
    _quieten_libraries()
    with _naming(composition.values.get("runs")):
        if not composition.groups:
            return module.run(settings, composition.values)
        status = module.run(settings, composition.values, composition.choices)
    if own and status == 0 and name == "finetune" and not signals.started_by_the_first():
        _write_page(composition.values)
    return status


def _load_plugins(arguments: Sequence[str]) -> list[str]:
    """Load the plugins named in arguments, of the parent process and of installed packages; return these arguments."""
    from crysldnet import plugins

    words = [word for word in arguments if word.lstrip("-").startswith("plugins=")]
    lists = (word.partition("=")[2].strip("[]").split(",") for word in words)
    plugins.load(name.strip("'\" ") for names in lists for name in names if name.strip("'\" "))
    return words


def _docstring(module: str) -> str:
    """Return the docstring of a module without importing it or its package, which takes seconds."""
    place = Path(__file__).parent.joinpath(*module.split(".")[1:])
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").strip()


@contextmanager
def _naming(folder: object) -> Iterator[None]:
    """Name the runs folder if a disk is full and the system doesn't report the file."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRORS and error.filename is None and isinstance(folder, str):
            error.filename = folder
        raise


def with_own_data(command: str, arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Return the arguments of a training run with a store in place of the user's files, and whether there were any."""
    from crysldnet.config.values import TRAINS

    named = any(word.lstrip("-").startswith("data") for word in arguments)
    if command not in TRAINS or not (named or any("=" not in word and word[:2] != "--" for word in arguments)):
        return list(arguments), False
    return importlib.import_module("crysldnet.tools.importer.own_data").with_own_data(command, arguments)


def _write_page(values: dict[str, Any]) -> None:
    """Write a report about a finished run to its folder."""
    folder = Path(values["runs"]) / "finetune" / os.environ[signals.RUN_NAME].partition(":")[2]
    run(["report", str(folder), f"out={folder / 'report.html'}"])


def _has_more_to_do(run: Path, composition: Composition, changed: set[str]) -> bool:
    """Return whether a complete run of Matbench lacks requested folds, or whether submission metadata changed.

    Raises:
        ConfigError: existing folds would be lost.
    """
    from crysldnet.tools.matbench.settings import FOLDS

    summary = json.loads((run / "summary.json").read_text())
    has = {fold for fold in range(FOLDS) for task in summary["tasks"].values() if f"fold_{fold}" in task["scores"]}
    wanted = set(composition.values["folds"] or range(FOLDS))
    if wanted <= has and not changed & {"algorithm", "authors", "out"}:
        return False
    if not has <= wanted:
        named = ",".join(map(str, sorted(has | wanted)))
        raise ConfigError(f"folds: the run in {run} has others too; name all, folds=[{named}]", "folds")
    return True


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit status; user errors are raised."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(usage())
        return 0
    command, *rest = arguments
    if command in ("--version", "version"):
        print(__version__)
        return 0
    if command == "completion":
        print(_completion(*rest[:1] or ("",)))
        return 0
    if command in FLAGGED:
        named = _load_plugins(rest)
        return importlib.import_module(FLAGGED[command][0]).main([word for word in rest if word not in named])
    if command not in COMMANDS:
        known = [*COMMANDS, *FLAGGED, "completion"]
        raise CrysldnetError(f"no command {command!r}; {did_you_mean(command, known, f'available: {listed(known)}')}")
    if (part := _part_of(command, rest)) is not None:
        return _run_part(command, part, rest[1:])
    return _run_command(command, rest)


def _part_of(command: str, words: Sequence[str]) -> str | None:
    """Return the second word of a two-word command, such as matbench validate; None for others.

    Raises:
        CrysldnetError: the word is only similar to one.
    """
    parts = [second for first, second in PARTS if first == command]
    word = words[0] if words else ""
    if word in parts or not (meant := get_close_matches(word, parts, n=1)):
        return word if word in parts else None
    from crysldnet.config.compose import keys_of

    if word in keys_of(command):
        return None
    raise CrysldnetError(f"{command} {word}: no such command; did you mean crysldnet {command} {meant[0]}?")


def _run_part(command: str, part: str, words: Sequence[str]) -> int:
    """Run a two-word command; its arguments are read before its modules are imported, which takes seconds."""
    arguments = parser(command, part).parse_args(list(words))
    _load_plugins(())
    _quieten_libraries()
    return importlib.import_module(PARTS[command, part].module).main(arguments)


def _completion(shell: str) -> str:
    """Return the completion script for a shell."""
    from crysldnet.config.help import Command, actions_of, script, words_of

    script(shell, {})  # rejects other shells before modules are imported
    found = {}
    for name, (module, schema, text) in COMMANDS.items():
        found[name] = Command(text, words_of(name, getattr(importlib.import_module(module), schema)))
    for name, (module, text) in FLAGGED.items():
        found[name] = Command(text, actions=actions_of(importlib.import_module(module).parser()))
    found["completion"] = Command("print a script for a shell", ["bash", "zsh", "fish"])
    return script(shell, found)


def _quieten_libraries() -> None:
    """Hide Lightning notices that users can't act on; its warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.strategies.launchers").setLevel(logging.INFO)  # names a rank that exited
    for message in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",
        ".*exists and is not empty.*",
        ".*smaller than the logging interval.*",
        ".*Total length of `list` across ranks is zero.*",
        ".*dataloader is not resumable.*",  # the sampler resumes where the run stopped
        r".*module\(s\) in eval mode.*",  # a frozen or not yet trained encoder
        ".*sync_dist.*",  # torchmetrics already sums metrics over ranks
    ):
        warnings.filterwarnings("ignore", message)


def _leave_pandas_out() -> None:
    """Keep pyarrow from importing pandas, which takes longer than predicting some files; other imports still work."""
    import pyarrow

    if "pandas" not in sys.modules:
        with warnings.catch_warnings(action="ignore"):
            sys.modules["pandas"] = SimpleNamespace(__version__="0")  # type: ignore[assignment]
            pyarrow.array([])  # looks for pandas only once, and ignores a version that is too old
            del sys.modules["pandas"]


def main() -> None:
    """Run ``sys.argv``; print user errors without a traceback, and exit with the right status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may not be UTF-8, nor the terminal
    try:
        if len(sys.argv) > 1 and sys.argv[1] in RESUMABLE and sys.argv[2:3] != ["validate"]:
            signals.install_handlers()
            signals.end_with_the_first()
            signals.end_with_the_parent()
        if sys.argv[1:2] in (["predict"], ["embed"]) and not {"--help", "-h"} & set(sys.argv):
            _leave_pandas_out()
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except (Interrupted, signals.Stopped) as error:
        signals.ignore()
        signals.end_children()
        if signals.started_by_the_first():
            status = 0  # the first process reports the result of all; Lightning kills it if another fails
        else:
            print(indented(f"unfinished: {error}"), file=sys.stderr)
            status = UNFINISHED
    except CrysldnetError as error:
        print(indented(f"error: {error}"), file=sys.stderr)
        status = USAGE_ERROR
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader of our output exited, as in `crysldnet … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        hint = "lower batch_size or batch_atoms (of a training data.batch_size or data.max_atoms)"
        print(f"error: out of memory; {hint}", file=sys.stderr)
        status = USAGE_ERROR
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(indented(f"error: {cannot_write(error.filename or 'a file or the output', error)}"), file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = USAGE_ERROR
    sys.exit(status)
