"""Write a submission folder in Matbench's format."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from crysldnet import __version__
from crysldnet.artifacts.provenance import describe_overlap, encoder_file
from crysldnet.artifacts.weights import named_encoders
from crysldnet.config import argument, arguments_for
from crysldnet.errors import ConfigError
from crysldnet.io import whole_file, write_atomically
from crysldnet.tools.matbench.benchmark_run import BenchmarkRun
from crysldnet.tools.matbench.scores import TaskScores
from crysldnet.tools.matbench.settings import submission_name
from crysldnet.tools.matbench.tasks import Source
from crysldnet.training.run_folder import code_version

RESULTS, INFO = "results.json.gz", "info.json"
PER_RUN = ("name", "runs", "resume", "out", "parallel")
"""Keys that set where a run is stored, not what it is."""
COMMAND = "command.json"
"""File name in the run folder."""
ENCODED = "a crystal graph encoder, pretrained without labels where the notes name a pretraining set"
NETWORK = f"CrysLDNet: {ENCODED}, then finetuned with a readout and an MLP."
TABLES = (
    "CrysLDNet: trees and kernel ridge regression on descriptors of composition and geometry and on frozen features of "
    f"{ENCODED}, combined with out-of-fold weights."
)
REFERENCES = [
    "@misc{mukherjee2026crysldnet, title={Latent Diffusion Pretraining for Crystal Property Prediction}, "
    "author={Mukherjee and Das and Basuchowdhuri and Goyal and Ganguly}, year={2026}, eprint={2606.00776}, "
    "archivePrefix={arXiv}}",
    "@article{Dunn2020, author={Dunn, Alexander and Wang, Qi and Ganose, Alex and Dopp, Daniel and Jain, Anubhav}, "
    "title={Benchmarking materials property prediction methods: the Matbench test set and Automatminer reference "
    "algorithm}, journal={npj Computational Materials}, year={2020}, volume={6}, number={1}, pages={138}, "
    "doi={10.1038/s41524-020-00406-3}}",
]
SCRIPT = '''"""Repeat the run that is recorded in results.json.gz, with crysldnet {version} and matbench 0.6."""

{imports}

from crysldnet.cli import main
{encoder}
sys.argv = {argv}
main()
'''
ENCODER = """
# Every fold starts from this file.{made}
ENCODER = {file}
SHA256 = "{sha256}"
if not ENCODER.is_file() or hashlib.sha256(ENCODER.read_bytes()).hexdigest() != SHA256:
    sys.exit(f"{{ENCODER}} isn't there, or isn't the file with sha256 {{SHA256}}. Put that there{remedy})
"""
MADE = """ It was pretrained by crysldnet {version!r} with what is written here.
PRETRAINING = {words}"""
REMEDY = """, or the encoder.safetensors that this "
        "makes, and its sha256 here; on a CPU its weights are the same:\\n\\n  " + shlex.join(PRETRAINING)"""


def command_line(values: Mapping[str, Any], earlier: Sequence[str] = ()) -> list[str]:
    """Return the command that repeats a run: as typed, or the equivalent of a call from Python.

    Args:
        values: the configuration as plain values.
        earlier: original command of a resumed run, because ``resume=last`` alone doesn't define it.
    """
    typed = sys.argv[2:] if sys.argv[1:2] == ["matbench"] else arguments_for("matbench", values)
    if typed is None:
        typed = [argument(key, value) for key, value in values.items()]
    said = {a: a.lstrip("-").partition("=")[0] for a in [*earlier[2:], *typed]}
    now = {said[a] for a in typed}
    arguments = [*(a for a in earlier[2:] if said[a] not in now), *typed]
    kept = [a for a in arguments if said[a] not in PER_RUN]
    unsaid = [argument(key, values[key]) for key in ("tasks", "seed") if key not in said.values()]
    return ["crysldnet", "matbench", *unsaid, *kept]


@rank_zero_only
def keep_command(folder: Path, values: Mapping[str, Any]) -> None:
    """Save the command of a new or resumed run in its folder."""
    path = folder / COMMAND
    earlier = json.loads(path.read_text()) if path.exists() else ()
    write_atomically(path, json.dumps(command_line(values, earlier)))


@dataclass(frozen=True)
class TaskResult:
    """Results of a task in a submission."""

    scores: TaskScores
    source: Source
    inputs: dict[str, str | None]
    """Hashes of the files that determine the result."""
    overlap: dict[str, Any] | None
    """Overlap of the task's crystals with the pretraining set."""


def _notes(begun: BenchmarkRun, told: Mapping[str, TaskResult]) -> str:
    config, p = begun.config, begun.provenance
    notes = [f"Data of {name}: {t.source.label}; sha256 {t.source.sha256}." for name, t in told.items()]
    if not config.complete:
        notes.insert(0, f"INCOMPLETE, not a valid submission: folds {config.folds} alone.")
    sha256 = next(iter(told.values())).inputs["pretrained_sha256"]
    if sha256 is not None:
        if "stage" in p:
            notes.append(
                f"Encoder pretrained without labels (stage {p['stage']}) on {p.get('train_crystals')} crystals of "
                f"{p.get('data')} (sha256 {p.get('data_sha256')}) by crysldnet {p.get('code_version')}."
            )
        notes += [
            f"Then trained on labels ({', '.join(learned['targets'])}) of {learned['train_crystals']} crystals (sha256 "
            f"{learned['data_sha256']}) by crysldnet {learned['code_version']}."
            for learned in p.get("labels", [])
        ]
        notes.append(f"Every fold starts from the file with sha256 {sha256}.")
        notes += [f"{name}: {describe_overlap(t.overlap)}" for name, t in told.items() if t.overlap is not None]
    else:
        notes.append("Trained from scratch, without pretraining.")
    kinds = _kinds(begun)
    if kinds != {"frozen"} and (config.ensemble == 1 or config.ensemble_by == "seeds" or config.recipes):
        notes.append(
            f"{'Best epoch' if config.ensemble == 1 or config.ensemble_by == 'seeds' else 'Recipe'} chosen on "
            f"{config.validation_fraction:g} of each fold's training part, drawn with the seed; targets normalized by "
            "the rest of it."
        )
    if kinds & {"frozen", "hybrid"}:
        notes.append(
            "Models on tables learned all of each fold's training part; their errors and weights are out of fold, "
            "grouped by formula."
        )
    if config.recipes:
        recipes = "; ".join(config.recipes)
        notes.append(f"Each fold took the one of {len(config.recipes)} recipes with the lowest such error: {recipes}.")
    if config.ensemble > 1:
        by = "that differ by seed"
        if config.ensemble_by == "folds":
            by = f"that each choose their epoch on another {config.ensemble}th of the training part's formulas"
        notes.append(f"Predictions are the means of {config.ensemble} models {by}; std is their spread.")
    return " ".join(notes)


def _kinds(begun: BenchmarkRun) -> set[str]:
    """Return the values of ``recipe`` among the recipes of a run."""
    return {recipe.config.recipe for recipe in begun.recipes}


def write_submission(begun: BenchmarkRun, told: Mapping[str, TaskResult]) -> Path:
    """Write ``results.json.gz``, ``info.json`` and a script; return their folder.

    Args:
        begun: the run with all folds recorded.
        told: results of each task.
    """
    config = begun.config
    folder = Path(config.out or begun.folder.path) / submission_name(config)
    folder.mkdir(parents=True, exist_ok=True)
    if config.out is None and config.complete:  # replaces output from only some folds
        shutil.rmtree(folder.with_name(f"{folder.name}_incomplete"), ignore_errors=True)
    data = {name: t.source.label for name, t in told.items()}
    begun.benchmark.add_metadata({"algorithm": config.algorithm, "seed": config.seed, "data": data})
    content = json.dumps(begun.benchmark.as_dict()).encode()
    with whole_file(folder / RESULTS) as file:
        file.write(gzip.compress(content, mtime=0))  # the package itself writes no gzip
    command = json.loads((begun.folder.path / COMMAND).read_text())
    packages = ["torch", "lightning", "torch-geometric", "pymatgen", "matminer", "matbench"]
    kinds = _kinds(begun)
    if kinds & {"frozen", "hybrid"}:
        packages.append("scikit-learn")
    versions = [f"{p}=={importlib.metadata.version(p).partition('+')[0]}" for p in packages]  # no builds, such as +cpu
    described = [
        text for text, used in ((NETWORK, {"network", "hybrid"}), (TABLES, {"frozen", "hybrid"})) if kinds & used
    ]
    info = {
        "authors": config.authors,
        "algorithm": config.algorithm,
        "algorithm_long": " ".join(described),
        "bibtex_refs": REFERENCES,
        "notes": _notes(begun, told),
        "requirements": {"python": [f"crysldnet=={__version__}", *versions]},
        "command": shlex.join(command),
        "seed": config.seed,
    }
    write_atomically(folder / INFO, json.dumps(info, indent=1, ensure_ascii=False))
    encoder = _encoder(begun, next(iter(told.values())).inputs["pretrained_sha256"])
    imports = "import hashlib\nimport shlex\nimport sys\nfrom pathlib import Path" if encoder else "import sys"
    if "ENCODER = find(" in encoder:
        imports += "\n\nfrom crysldnet.artifacts.weights import find"
    script = SCRIPT.format(version=code_version(), imports=imports, argv=_list(command), encoder=encoder)
    write_atomically(folder / "reproduce.py", script)
    return folder


def _encoder(begun: BenchmarkRun, sha256: str | None) -> str:
    """Return the script's part about the initial file; empty without one.

    The original command is included if the file is a pretrained encoder from a version with the same keys.
    """
    file, provenance = encoder_file(begun.config.pretrained), begun.provenance
    if file is None:
        return ""
    made, remedy = " Its training history is in info.json.", ', and try again."'
    words = None
    if "config" in provenance and not provenance.get("labels"):
        with suppress(ConfigError):  # from a version with other keys
            words = arguments_for("pretrain", provenance["config"], without=PER_RUN)
    if words is not None:
        text = _list(["crysldnet", "pretrain", *words])
        made, remedy = MADE.format(version=provenance.get("code_version"), words=text), REMEDY
    name = str(begun.config.pretrained)
    place = f"find({name!r})" if file == named_encoders().get(name) else f"Path({str(file)!r})"
    return ENCODER.format(file=place, sha256=sha256, made=made, remedy=remedy)


def _list(words: Sequence[str]) -> str:
    """Return words as a Python list."""
    return "[\n" + "".join(f"    {word!r},\n" for word in words) + "]"
