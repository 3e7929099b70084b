"""Run a task of the official Matbench benchmark on its own folds and write a submission folder.

Each fold's model chooses its best epoch on a part of the fold's training crystals; the test crystals are read without
their targets, once, when that is done. The official package keeps the folds, records the predictions and scores them.
A finished fold is kept in the run folder, so resume=last goes on with the next one.

The crystals are read from MATMINER_DATA/TASK.json.gz. Without that file matbench_jdft2d and matbench_phonons are
re-encoded from the data inside this package; the result is then labelled "not the official file".
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shlex
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from crysldnet import __version__
from crysldnet.build import build
from crysldnet.data.crystals import Crystals, from_lists
from crysldnet.data.datamodule import EMBEDDED, CrystalDataModule
from crysldnet.data.graph import GraphSpec
from crysldnet.data.sampler import BatchSampler, Budget
from crysldnet.data.schema import table_from_crystals
from crysldnet.data.split import Rows
from crysldnet.data.store import CrystalStore
from crysldnet.errors import ConfigError, DataError
from crysldnet.finetune import FinetuneConfig, Loss, make_encoder, train
from crysldnet.models.head import PropertyModel
from crysldnet.predict import predict_crystals
from crysldnet.report import print_table
from crysldnet.training.checkpoint import load_property_model
from crysldnet.training.run_folder import RunFolder, code_version, write_atomically
from crysldnet.training.trainer import TrainerSettings

BENCHMARK = "matbench_v0.1"
FOLDS = 5
MATMINER_DATA = "MATMINER_DATA"
EMBEDDED_TARGETS = {"matbench_jdft2d": "exfoliation_energy", "matbench_phonons": "last_phdos_peak"}
"""Tasks whose crystals ship with the package, re-encoded, and the column of their target."""
FIXED = "task seed pretrained epochs loss gradient_clip validation_fraction data encoder head optimizer trainer".split()
"""Keys that must be the same in all folds of a run, so also when it is resumed."""
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


@dataclass(frozen=True, kw_only=True)
class MatbenchConfig(FinetuneConfig):
    """Every key of ``conf/matbench.yaml``: those of finetuning, and the benchmark's own."""

    resume: Literal["last"] | None
    loss: Loss
    task: str
    folds: list[int] | None
    validation_fraction: float
    algorithm: str
    authors: str
    out: str | None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def import_matbench() -> Any:
    """Return ``matbench.bench``, imported when first needed: it takes seconds and reads a large file of folds."""
    try:
        from matbench import bench
    except ImportError as error:
        raise ConfigError(
            f"matbench isn't installed ({error}): pip install 'crysldnet[matbench]' && "
            "pip install --no-deps matbench==0.6",
            "task",
        ) from None
    logging.getLogger("matbench").setLevel(logging.ERROR)
    return bench


def task_metadata(task: str) -> Any:
    """Return what Matbench says of a task.

    Raises:
        ConfigError: there is no such task, or it isn't a regression from structures.
    """
    import_matbench()
    from matbench.metadata import mbv01_metadata

    fit = [name for name, m in mbv01_metadata.items() if (m.input_type, m.task_type) == ("structure", "regression")]
    if task in fit:
        return mbv01_metadata[task]
    if task not in list(mbv01_metadata):
        close = get_close_matches(task, list(mbv01_metadata), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(fit)}"
        raise ConfigError(f"task={task}: Matbench has no such task; {hint}", "task")
    reason = (
        "it gives compositions without structures"
        if mbv01_metadata[task].input_type != "structure"
        else "it is a classification, and property models are regressions"
    )
    raise ConfigError(f"task={task} can't be run: {reason}; those that can be are: {', '.join(fit)}", "task")


@dataclass(frozen=True)
class Source:
    """Where a task's crystals came from."""

    name: str
    sha256: str
    official: bool

    @property
    def label(self) -> str:
        """What a reader of the scores must know."""
        return "the official file" if self.official else f"not the official file ({self.name})"


def find_file(task: str) -> Path | None:
    """Return the user's file of a task, where matminer would look for it."""
    from matminer import datasets

    home = os.environ.get(MATMINER_DATA) or Path(datasets.__file__).parent
    file = Path(home).expanduser() / f"{task}.json.gz"
    return file if file.is_file() else None


def write_embedded(task: str, target: str, path: Path) -> Source:
    """Write the package's own crystals of a task as the file that matminer reads."""
    import pandas
    from matminer.utils.io import store_dataframe_as_json
    from pymatgen.core import Structure

    parquet = EMBEDDED / f"{task}.parquet"
    store = CrystalStore.open(parquet)
    c = store.crystals
    atoms = [slice(begin, end) for begin, end in zip(c.ptr[:-1], c.ptr[1:], strict=True)]
    frame = pandas.DataFrame(
        {
            "structure": [
                Structure(lattice, c.numbers[own].tolist(), c.frac_coords[own].astype(np.float64))
                for lattice, own in zip(c.lattice, atoms, strict=True)
            ],
            target: store.numbers_of(EMBEDDED_TARGETS[task]),
        }
    )
    store_dataframe_as_json(frame, str(path), compression="gz", pbar=False)
    return Source(f"embedded:{task}, re-encoded", _sha256(parquet), official=False)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def open_benchmark(name: str) -> tuple[Any, Source]:
    """Return a ``MatbenchBenchmark`` of one task, loaded by the official package, and where its crystals came from.

    Raises:
        ConfigError: the task can't be run.
        DataError: its file is missing or damaged.
    """
    metadata = task_metadata(name)
    file = find_file(name)
    if file is None and name not in EMBEDDED_TARGETS:
        raise DataError(
            f"task={name}: its crystals aren't here; put {name}.json.gz ({metadata.url}) into a folder and name that "
            f"folder in the environment variable {MATMINER_DATA}. Without a file there are: "
            f"{', '.join(EMBEDDED_TARGETS)}"
        )
    benchmark = import_matbench().MatbenchBenchmark(autoload=False, subset=[name])
    task = benchmark.tasks_map[name]
    with tempfile.TemporaryDirectory() as temporary:
        if file is None:
            source = write_embedded(name, metadata.target, Path(temporary) / f"{name}.json.gz")
        else:
            sha256 = _sha256(file)
            source = Source(file.name, sha256, official=sha256 == metadata.hash)
        with _environment(MATMINER_DATA, temporary if file is None else str(file.parent)):
            try:
                task.load()
            except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{file}: not a readable data set of Matbench ({error})") from error
    if len(task.df) != metadata.n_samples:
        raise DataError(f"{file}: it has {len(task.df)} crystals, {name} has {metadata.n_samples}")
    return benchmark, source


def crystals_of(structures: Any) -> Crystals:
    """Convert a pandas series of pymatgen structures."""
    for name, structure in structures.items():
        if not structure.is_ordered:
            raise DataError(f"{name}: an atom site is shared by several species or partly empty")
    return from_lists(
        [structure.lattice.matrix for structure in structures],
        [np.array(structure.atomic_numbers, np.uint8) for structure in structures],
        [structure.frac_coords for structure in structures],
    )


def inner_rows(n: int, fraction: float, seed: int, fold: int) -> Rows:
    """Draw a fold's validation rows from its n training crystals; there are no test rows."""
    order = np.random.default_rng([seed, fold]).permutation(n)
    count = round(fraction * n)
    return {"train": np.sort(order[count:]), "val": np.sort(order[:count]), "test": np.empty(0, np.int64)}


@dataclass(frozen=True)
class Run:
    """What all folds of a run share."""

    config: MatbenchConfig
    values: dict[str, Any]
    folder: RunFolder
    benchmark: Any
    source: Source
    graph: GraphSpec
    provenance: dict[str, Any]
    """Of the pretrained encoder; empty where there is none."""
    device: str

    @property
    def task(self) -> Any:
        """The ``MatbenchTask``."""
        return self.benchmark.tasks_map[self.config.task]

    @property
    def folds(self) -> list[int]:
        """The folds to run."""
        return list(self.task.folds) if self.config.folds is None else self.config.folds

    @property
    def complete(self) -> bool:
        """Whether they are all."""
        return len(self.folds) == len(self.task.folds)

    @property
    def inputs(self) -> dict[str, str | None]:
        """Hashes of the files that decide the result besides the settings."""
        path = None if self.config.pretrained in (None, "none") else Path(str(self.config.pretrained))
        if path is not None and path.is_dir():
            path = path / "encoder.safetensors"
        return {"data_sha256": self.source.sha256, "pretrained_sha256": None if path is None else _sha256(path)}


def fold_folder(run: Run, fold: int) -> Path:
    """Return where a fold's model and predictions are kept."""
    return run.folder.path / f"fold_{fold}"


def fold_data(run: Run, fold: int) -> CrystalDataModule:
    """Return the data of a fold's training: its training part alone, split for validation."""
    structures, targets = run.task.get_train_and_val_data(fold)
    metadata = run.task.metadata
    table = table_from_crystals(
        crystals_of(structures),
        list(structures.index),
        {metadata.target: targets.to_numpy(np.float64)},
        {metadata.target: metadata.unit},
        {"dataset": run.config.task, "source": run.source.label},
    )
    store = CrystalStore.from_table(table, f"training part of fold {fold} of {run.config.task}")
    rows = inner_rows(len(store), run.config.validation_fraction, run.config.seed, fold)
    node = {**run.config.data, "targets": [metadata.target]}
    return build(node, "data", graph=run.graph, seed=run.config.seed, store=store, rows=rows)


def predict(model: PropertyModel, crystals: Crystals, batch_size: int, max_atoms: int | None) -> NDArray[np.float64]:
    """Return [B] predictions in physical units."""
    sizes = crystals.sizes
    atoms = None if max_atoms is None else max(max_atoms, int(sizes.max()))
    predicted = np.empty(len(crystals))
    for rows, *_ in BatchSampler(
        np.arange(len(crystals)), sizes, None, Budget(crystals=batch_size, atoms=atoms), shuffle=False
    ):
        predicted[rows] = predict_crystals(model, crystals.take(rows))[:, 0]
    return predicted


def run_fold(run: Run, fold: int) -> None:
    """Train on a fold and keep its predictions, unless they are there already."""
    folder = fold_folder(run, fold)
    if (folder / "predictions.json").exists():
        _read_fold(run, fold)
        return
    loggers = build(
        run.config.logger, "logger", folder=folder, name=f"{run.folder.name}-fold_{fold}", config=run.values
    )
    result = train(run.config, run.values, folder, data=fold_data(run, fold), loggers=loggers)
    for logger in loggers:  # else the next fold would be logged into this one
        getattr(logger.experiment, "finish", lambda: None)()
    parameters = {
        "train_crystals": len(result.data.rows["train"]),
        "validation_crystals": len(result.data.rows["val"]),
        **{name.replace("val/", "validation_"): v for name, v in result.metrics.items() if name == "val/mae"},
    }
    _predict_fold(run, fold, parameters)


@rank_zero_only
def _predict_fold(run: Run, fold: int, parameters: dict[str, Any]) -> None:
    model, _ = load_property_model(fold_folder(run, fold))
    structures = run.task.get_test_data(fold, include_target=False)
    data = run.config.data
    predicted = predict(
        model.to(run.device), crystals_of(structures), data.get("batch_size", 64), data.get("max_atoms")
    )
    if not np.isfinite(predicted).all():
        raise DataError(f"fold {fold}: {int((~np.isfinite(predicted)).sum())} predictions are not finite")
    record = {
        "fold": fold,
        **run.inputs,
        "parameters": parameters,
        "ids": list(structures.index),
        "predictions": predicted.tolist(),
    }
    write_atomically(fold_folder(run, fold) / "predictions.json", json.dumps(record))


def _read_fold(run: Run, fold: int) -> dict[str, Any]:
    path = fold_folder(run, fold) / "predictions.json"
    record = json.loads(path.read_text())
    for key, value in run.inputs.items():
        if record[key] != value:
            raise ConfigError(
                f"{path}: made with other files ({key} differs); finish the run with those, or choose another name"
            )
    return record


def _scores(run: Run) -> dict[int, dict[str, float]]:
    """Let the official package record and score every fold."""
    for fold in run.folds:
        record = _read_fold(run, fold)
        if record["ids"] != list(run.task.get_test_data(fold, include_target=False).index):
            raise DataError(f"fold {fold}: the kept predictions are of other crystals")
        predictions = np.array(record["predictions"], np.float64)
        run.task.record(fold, predictions, params=record["parameters"])
    return {fold: dict(run.task.results[run.task.folds_map[fold]].scores) for fold in run.folds}


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
    else:
        notes.append("Trained from scratch, without pretraining.")
    notes.append(
        f"Best epoch chosen on {run.config.validation_fraction:g} of each fold's training part, drawn with the seed; "
        "targets normalised by the rest of it."
    )
    return " ".join(notes)


def submission_name(config: MatbenchConfig) -> str:
    """Return the name of the submission folder, which says so where folds are missing."""
    complete = config.folds is None or len(config.folds) == FOLDS
    return f"{BENCHMARK}_{config.algorithm}{'' if complete else '_incomplete'}"


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


def check_settings(config: MatbenchConfig) -> None:
    """Check what the types can't say.

    Raises:
        ConfigError: a key is out of range, or has no meaning here.
    """
    for key in ("path", "targets", "split"):
        if key in config.data:
            raise ConfigError(f"data.{key}: the task decides that", f"data.{key}")
    if not 0 <= config.validation_fraction < 1:
        raise ConfigError(
            f"validation_fraction={config.validation_fraction}: from 0 to less than 1", "validation_fraction"
        )
    if config.folds is not None and (
        not config.folds or len(set(config.folds)) < len(config.folds) or not set(config.folds) <= set(range(FOLDS))
    ):
        raise ConfigError(f"folds={config.folds}: name some of 0, 1, 2, 3, 4, each once", "folds")
    if not re.fullmatch(r"[\w.+-]+", config.algorithm):
        raise ConfigError(f"algorithm={config.algorithm!r}: letters, digits and . _ + - make a folder", "algorithm")
    if config.out is not None and config.resume is None and (Path(config.out) / submission_name(config)).exists():
        raise ConfigError(
            f"{Path(config.out) / submission_name(config)} exists already; choose another algorithm or out", "out"
        )


def _check_resumed(folder: RunFolder, values: Mapping[str, Any]) -> None:
    path = folder.path / "config.yaml"
    before = yaml.safe_load(path.read_text()) if path.exists() else values
    for key in FIXED:
        if before.get(key) != values[key]:
            raise ConfigError(
                f"{folder.path} was begun with {key}={before.get(key)}, not {values[key]}: all folds of a run are "
                "trained alike; resume it as it was, or choose another name",
                key,
            )


def run(config: MatbenchConfig, values: dict[str, Any]) -> int:
    """Run the task; return the exit status.

    Args:
        config: the settings.
        values: the same as plain values, to be saved with everything that the run writes.
    """
    settings: TrainerSettings = build(config.trainer, "trainer")
    settings.check(build(config.strategy, "strategy"))
    check_settings(config)
    encoder, _, provenance = make_encoder(config)
    benchmark, source = open_benchmark(config.task)
    folder = RunFolder(config.runs, "matbench", config.name, resume=config.resume is not None)
    _check_resumed(folder, values)
    folder.save_config(values)
    device = "cuda" if settings.resolve_accelerator() == "gpu" else "cpu"
    whole = Run(config, values, folder, benchmark, source, encoder.graph, provenance, device)
    for fold in whole.folds:
        run_fold(whole, fold)
    _finish(whole)
    return 0


@rank_zero_only
def _finish(run: Run) -> None:
    scores = _scores(run)
    submission = write_submission(run)
    if run.complete:
        load_submission(submission)
    metadata = run.task.metadata
    mae = np.array([s["mae"] for s in scores.values()])
    run.folder.finish(
        {
            "command": "matbench",
            "task": run.config.task,
            "seed": run.config.seed,
            "pretrained": run.config.pretrained,
            **run.inputs,
            "official_data": run.source.official,
            "valid": run.complete,
            "unit": metadata.unit,
            "mae_mean": float(mae.mean()),
            "mae_std": float(mae.std()),
            "scores": {f"fold_{fold}": s for fold, s in scores.items()},
            "submission": str(submission),
        }
    )
    rows = [[f"fold {fold}", f"{s['mae']:.4f}", f"{s['rmse']:.4f}"] for fold, s in scores.items()]
    rmse = np.array([s["rmse"] for s in scores.values()])
    rows.append(["mean ± std", *(f"{e.mean():.4f} ± {e.std():.4f}" for e in (mae, rmse))])
    rows.append(["MAD of the targets", f"{metadata.mad:.4f}", ""])
    print_table(run.config.task, ["", f"MAE ({metadata.unit})", f"RMSE ({metadata.unit})"], rows)
    state = "valid" if run.complete else f"INCOMPLETE, folds {run.folds} of {len(run.task.folds)}"
    print_table("", ["", ""], [["submission", str(submission)], ["state", state], ["data", run.source.label]])
