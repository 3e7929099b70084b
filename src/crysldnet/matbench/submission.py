"""Write a submission folder as Matbench asks for it, and let the official package read it back."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crysldnet import __version__
from crysldnet.errors import DataError
from crysldnet.matbench.folds import Run
from crysldnet.matbench.settings import submission_name
from crysldnet.matbench.tasks import import_matbench
from crysldnet.training.atomic import write_atomically
from crysldnet.training.pretraining_set import describe_overlap
from crysldnet.training.run_folder import code_version

PER_RUN = ("name", "runs", "resume", "out")
"""Keys that say where a run is kept, not what it is."""
ALGORITHM = (
    "CrysLDNet: a crystal graph encoder, pretrained without labels by a variational autoencoder and latent diffusion "
    "where the notes name a pretraining set, then finetuned with a readout and an MLP."
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

import sys

from crysldnet.cli import main

sys.argv = {argv}
main()
'''


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={value if isinstance(value, str) else json.dumps(value)}"


def command_line(values: Mapping[str, Any]) -> list[str]:
    """Return the command that repeats a run: as it was typed, or where it was called from Python, every key."""
    arguments = sys.argv[2:] if sys.argv[1:2] == ["matbench"] else list(_leaves(values))
    said = {a: a.lstrip("-").partition("=")[0] for a in arguments}
    kept = [a for a in arguments if said[a] not in PER_RUN]
    unsaid = [f"{key}={values[key]}" for key in ("task", "seed") if key not in said.values()]
    return ["crysldnet", "matbench", *unsaid, *kept]


def _notes(run: Run) -> str:
    notes = [f"Data: {run.source.label}; sha256 {run.source.sha256}."]
    if not run.complete:
        notes.insert(0, f"INCOMPLETE, not a valid submission: folds {run.folds} of {len(run.task.folds)}.")
    p = run.provenance
    if run.inputs["pretrained_sha256"] is not None:
        notes.append(
            f"Encoder pretrained without labels (stage {p.get('stage')}) on {p.get('train_crystals')} crystals of "
            f"{p.get('data')} (sha256 {p.get('data_sha256')}) by crysldnet {p.get('code_version')}; sha256 of its file "
            f"{run.inputs['pretrained_sha256']}."
        )
        assert run.overlap is not None
        notes.append(describe_overlap(run.overlap))
    else:
        notes.append("Trained from scratch, without pretraining.")
    notes.append(
        f"Best epoch chosen on {run.config.validation_fraction:g} of each fold's training part, drawn with the seed; "
        "targets normalised by the rest of it."
    )
    return " ".join(notes)


def write_submission(run: Run) -> Path:
    """Write ``results.json.gz``, ``info.json`` and a script; return their folder."""
    folder = Path(run.config.out or run.folder.path) / submission_name(run.config)
    folder.mkdir(parents=True, exist_ok=True)
    run.benchmark.add_metadata({"algorithm": run.config.algorithm, "seed": run.config.seed, "data": run.source.label})
    content = json.dumps(run.benchmark.as_dict()).encode()
    (folder / "results.json.gz").write_bytes(gzip.compress(content, mtime=0))
    command = command_line(run.values)
    packages = ("torch", "lightning", "torch-geometric", "pymatgen", "matminer", "matbench")
    info = {
        "authors": run.config.authors,
        "algorithm": run.config.algorithm,
        "algorithm_long": ALGORITHM,
        "bibtex_refs": REFERENCES,
        "notes": _notes(run),
        "requirements": {
            "python": [f"crysldnet=={__version__}", *(f"{p}=={importlib.metadata.version(p)}" for p in packages)]
        },
        "command": shlex.join(command),
        "seed": run.config.seed,
    }
    write_atomically(folder / "info.json", json.dumps(info, indent=1, ensure_ascii=False))
    argv = "[\n" + "".join(f"    {json.dumps(word, ensure_ascii=False)},\n" for word in command) + "]"
    write_atomically(folder / "reproduce.py", SCRIPT.format(version=code_version(), argv=argv))
    return folder


def load_submission(folder: Path) -> Any:
    """Load ``results.json.gz`` with the official package, which checks it; its own reader takes no gzip.

    Raises:
        DataError: it isn't valid.
    """
    try:
        content = json.loads(gzip.decompress((folder / "results.json.gz").read_bytes()))
        benchmark = import_matbench().MatbenchBenchmark.from_dict(content)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a valid submission ({error})") from error
    if not (benchmark.is_recorded and benchmark.is_valid):
        raise DataError(f"{folder}: not a valid submission")
    return benchmark
