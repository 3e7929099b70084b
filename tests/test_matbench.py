"""What ``crysldnet matbench`` promises: official folds and scores, untouched test targets, resumable folds."""

import ast
import contextlib
import gzip
import importlib.util
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from monty.serialization import loadfn

from crysldnet import cli, pretrain
from crysldnet.artifacts.model_file import load_property_model
from crysldnet.config import compose, validate
from crysldnet.data.datasets import EMBEDDED
from crysldnet.data.store import CrystalStore
from crysldnet.errors import ConfigError, CrysldnetError, DataError
from crysldnet.finetune import make_encoder
from crysldnet.signals import RUN_NAME
from crysldnet.tools.report.run_files import matbench_tasks
from crysldnet.training.run_folder import RunFolder
from tiny import pretrain_config

if importlib.util.find_spec("matbench") is None:
    pytest.skip("matbench isn't installed", allow_module_level=True)

from crysldnet.tools import matbench
from crysldnet.tools.matbench import MatbenchConfig, check_settings, folds, submission, tasks
from crysldnet.tools.matbench.settings import make_recipes
from crysldnet.tools.matbench.submission import write_submission

TASK = "matbench_jdft2d"
TINY = [
    "epochs=1",
    "min_steps=0",
    "encoder.width=16",
    "encoder.layers=2",
    "encoder.k=6",
    "encoder.n_distances=8",
    "encoder.n_basis=16",
    "trainer.progress_bar=false",
    "trainer.accelerator=cpu",
]


@pytest.fixture(autouse=True, scope="module")
def _clean_environment() -> Iterator[None]:
    names = (RUN_NAME, tasks.MATMINER_DATA)
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    yield
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(before)


def run(*arguments: str) -> str:
    """Run the command in this process and return what it printed."""
    os.environ.pop(RUN_NAME, None)
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert cli.run(["matbench", *TINY, *arguments]) == 0
    return text.getvalue()


def settings(*arguments: str) -> MatbenchConfig:
    return validate(compose("matbench", [*TINY, *arguments]), MatbenchConfig)


@dataclass
class Whole:
    """A run of all five folds."""

    folder: Path
    printed: str

    @property
    def submission(self) -> Path:
        return self.folder / "matbench_v0.1_CrysLDNet"

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    def fold(self, number: int) -> dict[str, Any]:
        return json.loads((self.folder / TASK / f"fold_{number}" / "predictions.json").read_text())

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        return self.summary["tasks"][TASK]["scores"]

    def recorded(self) -> Any:
        """Let the official package load the results."""
        return tasks.import_matbench().MatbenchBenchmark.from_dict(results_of(self.submission))


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress((folder / "results.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    root = tmp_path_factory.mktemp("whole")
    printed = run(f"runs={root}", "name=whole")
    return Whole(root / "matbench" / "whole", printed)


@pytest.fixture(scope="module")
def store() -> CrystalStore:
    return CrystalStore.open(EMBEDDED / f"{TASK}.parquet")


def open_task(name: str) -> tuple[Any, tasks.Source]:
    task = tasks.import_matbench().MatbenchTask(name, autoload=False)
    return task, tasks.load_task(task)


@pytest.fixture(scope="module")
def opened() -> tuple[Any, tasks.Source]:
    return open_task(TASK)


def in_memory(opened: tuple[Any, tasks.Source], tmp_path: Path, *arguments: str) -> folds.TaskRun:
    """Return what the folds share, for looking at their data without training."""
    os.environ.pop(RUN_NAME, None)
    config = settings(*arguments)
    encoder, _, _ = make_encoder(config)
    folder = RunFolder(str(tmp_path), "matbench", "looked-at", resume=False)
    return folds.TaskRun(config, make_recipes(config, {}), folder, *opened, encoder, "cpu")


def write_file(folder: Path, change: Callable[[list[float]], None] = lambda _: None) -> Path:
    """Write the task's file as a user would have it, with changed targets."""
    path = folder / f"{TASK}.json.gz"
    tasks.write_embedded(TASK, "exfoliation_en", path)
    content = json.loads(gzip.decompress(path.read_bytes()))
    place = content["columns"].index("exfoliation_en")
    targets = [row[place] for row in content["data"]]
    change(targets)
    for row, value in zip(content["data"], targets, strict=True):
        row[place] = value
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    return path


def rows_of(store: CrystalStore, ids: list[str]) -> list[int]:
    places = {name: row for row, name in enumerate(store.ids.to_pylist())}
    return [places[name] for name in ids]


def test_the_results_are_real_gzip_that_the_official_package_finds_valid(whole: Whole, tmp_path: Path) -> None:
    bench = tasks.import_matbench()
    path = whole.submission / "results.json.gz"
    assert path.read_bytes()[:2] == b"\x1f\x8b"
    with pytest.raises(UnicodeDecodeError):  # why the command doesn't use the package's own reader and writer
        bench.MatbenchBenchmark.from_file(path)
    # The benchmark's repository reads and writes by monty, which takes gzip.
    assert bench.MatbenchBenchmark.from_dict(loadfn(path, cls=None)).is_valid
    plain = tmp_path / "results.json"
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    loaded = bench.MatbenchBenchmark.from_file(plain)
    assert loaded.is_valid
    assert loaded.is_recorded
    assert list(loaded.tasks_map) == [TASK]


def test_the_recorded_scores_are_those_of_the_kept_predictions(whole: Whole, store: CrystalStore) -> None:
    truth = store.numbers_of("exfoliation_energy")
    recorded = whole.recorded().tasks_map[TASK].results
    errors = []
    for fold in range(5):
        kept = whole.fold(fold)
        mae = np.abs(truth[rows_of(store, kept["ids"])] - np.array(kept["predictions"])).mean()
        errors.append(mae)
        assert recorded[f"fold_{fold}"].scores.mae == pytest.approx(mae, rel=1e-12)
        assert whole.scores[f"fold_{fold}"]["mae"] == pytest.approx(mae, rel=1e-12)
        assert list(recorded[f"fold_{fold}"].data.values()) == kept["predictions"]
        assert f"{mae:.4f}" in whole.printed
    assert whole.summary["tasks"][TASK]["mae_mean"] == pytest.approx(np.mean(errors), rel=1e-12)
    assert whole.summary["tasks"][TASK]["mae_std"] == pytest.approx(np.std(errors), rel=1e-12)


def test_every_crystal_is_predicted_once_in_its_official_fold(whole: Whole, store: CrystalStore) -> None:
    official = store.numbers_of("matbench_test_fold")
    seen = []
    for fold in range(5):
        rows = rows_of(store, whole.fold(fold)["ids"])
        assert set(official[rows]) == {fold}
        seen += rows
    assert sorted(seen) == list(range(len(store)))


def test_the_kept_predictions_are_those_of_the_exported_model(whole: Whole, store: CrystalStore) -> None:
    model, _ = load_property_model(whole.folder / TASK / "fold_2")
    kept = whole.fold(2)
    crystals = store.crystals.take(np.array(rows_of(store, kept["ids"])))
    predicted, std = folds.predict([model], crystals)
    assert std is None
    assert predicted == pytest.approx(kept["predictions"], rel=1e-4, abs=1e-3)


def test_targets_are_normalised_by_the_inner_training_rows_alone(whole: Whole, store: CrystalStore) -> None:
    truth = store.numbers_of("exfoliation_energy")
    official = store.numbers_of("matbench_test_fold")
    for fold in range(5):
        ids = tasks.import_matbench().MatbenchTask(TASK, autoload=False).validation[f"fold_{fold}"].train
        outer = np.array(rows_of(store, list(ids)))
        assert fold not in official[outer]
        inner = outer[folds.inner_rows(len(outer), 0.1, seed=0, fold=fold)["train"]]
        model, _ = load_property_model(whole.folder / TASK / f"fold_{fold}")
        assert float(model.mean) == pytest.approx(truth[inner].mean(), rel=1e-6)
        assert float(model.std) == pytest.approx(truth[inner].std(), rel=1e-6)
        assert float(model.mean) != pytest.approx(truth[outer].mean(), rel=1e-6)


def test_inner_validation_is_drawn_from_the_training_part_with_the_seed() -> None:
    rows = folds.inner_rows(509, 0.1, seed=0, fold=0)
    assert len(rows["val"]) == 51
    assert len(rows["test"]) == 0
    assert sorted([*rows["train"], *rows["val"]]) == list(range(509))
    again = folds.inner_rows(509, 0.1, seed=0, fold=0)
    assert again["val"].tolist() == rows["val"].tolist()
    for seed, fold in ((1, 0), (0, 1)):
        assert folds.inner_rows(509, 0.1, seed=seed, fold=fold)["val"].tolist() != rows["val"].tolist()


def test_only_training_crystals_enter_the_data_module(opened: tuple[Any, tasks.Source], tmp_path: Path) -> None:
    shared = in_memory(opened, tmp_path)
    data = folds.fold_data(shared, 1)
    data.setup()
    test_ids = set(shared.task.get_test_data(1, include_target=False).index)
    assert len(data.store) == 636 - len(test_ids)
    assert not test_ids & set(data.store.ids.to_pylist())
    assert len(data.rows["test"]) == 0
    assert data.units == ["meV/atom"]


def test_test_targets_change_the_scores_and_nothing_else(
    whole: Whole, store: CrystalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_test = np.flatnonzero(store.numbers_of("matbench_test_fold") == 0)

    def change(targets: list[float]) -> None:
        for row in in_test:
            targets[row] = -1000.0 - targets[row]

    write_file(tmp_path, change)
    monkeypatch.setenv(tasks.MATMINER_DATA, str(tmp_path))
    printed = run(f"runs={tmp_path}", "name=changed", "folds=[0]")
    folder = tmp_path / "matbench" / "changed"
    kept = json.loads((folder / TASK / "fold_0" / "predictions.json").read_text())
    assert kept["predictions"] == whole.fold(0)["predictions"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["tasks"][TASK]["scores"]["fold_0"]["mae"] > 900 > whole.scores["fold_0"]["mae"]

    assert not summary["valid"]
    assert "INCOMPLETE" in printed
    info = json.loads((folder / "matbench_v0.1_CrysLDNet_incomplete" / "info.json").read_text())
    assert info["notes"].startswith("INCOMPLETE")
    assert not (folder / "comparison.md").exists()
    assert cli.run(["matbench", "validate", str(folder / "matbench_v0.1_CrysLDNet_incomplete")]) == 1


def test_a_training_target_changes_what_is_trained_on(
    opened: tuple[Any, tasks.Source], tmp_path: Path, store: CrystalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_training = int(np.flatnonzero(store.numbers_of("matbench_test_fold") != 0)[0])

    def change(targets: list[float]) -> None:
        targets[in_training] += 1.0

    write_file(tmp_path, change)
    monkeypatch.setenv(tasks.MATMINER_DATA, str(tmp_path))
    changed = open_task(TASK)
    hashes = []
    for number, pair in enumerate((opened, changed)):
        data = folds.fold_data(in_memory(pair, tmp_path / str(number)), 0)
        data.setup()
        hashes.append(data.store.hash)
    assert hashes[0] != hashes[1]


def test_the_official_loader_gives_the_embedded_crystals_back(
    opened: tuple[Any, tasks.Source], store: CrystalStore
) -> None:
    frame = opened[0].df
    assert list(frame.index) == store.ids.to_pylist()
    crystals = tasks.crystals_of(frame["structure"])
    np.testing.assert_array_equal(crystals.numbers, store.crystals.numbers)
    np.testing.assert_array_equal(crystals.ptr, store.crystals.ptr)
    np.testing.assert_array_equal(crystals.frac_coords, store.crystals.frac_coords)
    np.testing.assert_allclose(crystals.lattice, store.crystals.lattice, rtol=1e-12)
    np.testing.assert_array_equal(frame["exfoliation_en"], store.numbers_of("exfoliation_energy"))


def test_embedded_data_are_labelled_as_not_the_official_file(whole: Whole) -> None:
    label = "not the official file"
    assert label in whole.printed
    assert label in json.loads((whole.submission / "info.json").read_text())["notes"]
    assert label in whole.recorded().user_metadata["data"][TASK]
    assert whole.summary["tasks"][TASK]["official_data"] is False


def test_a_file_is_official_if_its_sha256_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_file(tmp_path)
    monkeypatch.setenv(tasks.MATMINER_DATA, str(tmp_path))
    assert open_task(TASK)[1].label == f"not the official file ({TASK}.json.gz)"
    monkeypatch.setitem(tasks.task_metadata(TASK), "hash", tasks.file_hash(path))
    assert open_task(TASK)[1].label == "the official file"
    assert tasks.read_targets(TASK)[1].label == "the official file"
    assert os.environ[tasks.MATMINER_DATA] == str(tmp_path)


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tasks.MATMINER_DATA, raising=False)
    open_task(TASK)
    assert tasks.MATMINER_DATA not in os.environ


def test_a_damaged_file_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_file(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    monkeypatch.setenv(tasks.MATMINER_DATA, str(tmp_path))
    with pytest.raises(DataError, match=f"{TASK}.json.gz: not a readable data set"):
        open_task(TASK)
    with pytest.raises(DataError, match=f"{TASK}.json.gz: not a readable data set"):
        tasks.read_targets(TASK)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("matbench_steels", "compositions without structures"),
        ("matbench_jdft", "did you mean 'matbench_jdft2d'"),
    ],
)
def test_a_task_that_cannot_be_run_is_refused(task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tasks.find_source(task)


def test_missing_data_are_refused_with_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tasks.MATMINER_DATA, str(tmp_path))
    with pytest.raises(DataError, match=r"put matbench_dielectric\.json\.gz \(https.*into a folder.*MATMINER_DATA"):
        tasks.find_source("matbench_dielectric")


@pytest.mark.parametrize(
    ("argument", "key"),
    [
        ("data.targets=[x]", "data.targets"),
        ("data.path=embedded:mp_starter", "data.path"),
        ("folds=[0,5]", "folds"),
        ("folds=[]", "folds"),
        ("validation_fraction=1.0", "validation_fraction"),
        ("algorithm=../elsewhere", "algorithm"),
        ("authors=", "authors"),
        ("tasks=[]", "tasks"),
        ("parallel=0", "parallel"),
        ("recipes=[epochs=1,epochs=1]", "recipes"),
        ("recipes=[seed=1]", "recipes"),
    ],
)
def test_settings_without_meaning_here_are_refused(argument: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_settings(settings(argument))
    assert caught.value.key == key


def test_a_submission_elsewhere_is_not_overwritten(tmp_path: Path) -> None:
    config = settings(f"out={tmp_path}")
    check_settings(config)
    (tmp_path / "matbench_v0.1_CrysLDNet").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        check_settings(config)
    check_settings(replace(config, algorithm="another"))


def test_the_submission_folder_holds_what_the_benchmark_asks_for(whole: Whole) -> None:
    info = json.loads((whole.submission / "info.json").read_text())
    for field in ("authors", "algorithm", "algorithm_long", "bibtex_refs", "requirements", "notes", "command"):
        assert info[field]
    assert info["seed"] == 0
    assert "without pretraining" in info["notes"]
    assert "matbench==0.6" in info["requirements"]["python"]


def test_the_script_runs_the_same_configuration(whole: Whole) -> None:
    tree = ast.parse((whole.submission / "reproduce.py").read_text())
    argv = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    assert argv[:2] == ["crysldnet", "matbench"]
    composed = compose("matbench", argv[2:]).values
    saved = compose("matbench", TINY).values
    assert composed == saved


def test_the_command_is_as_typed_with_task_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["crysldnet", "matbench", "name=x", "epochs=3", "resume=last", "seed=7"])
    line = submission.command_line(compose("matbench", ["epochs=3", "seed=7"]).values)
    assert line == ["crysldnet", "matbench", f'tasks=["{TASK}"]', "epochs=3", "seed=7"]


def test_a_run_that_goes_on_keeps_the_command_it_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = compose("matbench", []).values
    for words in ("name=a epochs=3 ensemble=4 authors=One", "name=a resume=last authors=Two", "name=a resume=last"):
        monkeypatch.setattr("sys.argv", ["crysldnet", "matbench", *words.split()])
        submission.keep_command(tmp_path, values)
    line = json.loads((tmp_path / submission.COMMAND).read_text())
    assert line == ["crysldnet", "matbench", f'tasks=["{TASK}"]', "seed=0", "epochs=3", "ensemble=4", "authors=Two"]


def test_a_name_of_the_leaderboard_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="algorithm=coGN: the leaderboard has an entry of that name"):
        run(f"runs={tmp_path}", "algorithm=coGN")
    assert not (tmp_path / "matbench").exists()


def test_a_run_goes_on_with_the_fold_it_was_stopped_in(whole: Whole, tmp_path: Path) -> None:
    folder = tmp_path / "matbench" / "stopped"
    shutil.copytree(whole.folder, folder)
    for path in (
        "summary.json",
        "matbench_v0.1_CrysLDNet",
        "comparison.md",
        f"{TASK}/fold_3/model.safetensors",
        f"{TASK}/fold_3/predictions.json",
    ):
        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()
    models = {fold: folder / TASK / f"fold_{fold}" / "model.safetensors" for fold in (0, 1, 2, 4)}
    before = {fold: path.stat().st_mtime_ns for fold, path in models.items()}
    with pytest.raises(ConfigError, match="started with seed=0, not 1"):
        run(f"runs={tmp_path}", "name=stopped", "resume=last", "seed=1")
    with pytest.raises(ConfigError, match=r"started with epochs=\d+, not 99"):
        run(f"runs={tmp_path}", "name=stopped", "resume=last", "epochs=99")
    run(f"runs={tmp_path}", "name=stopped", "resume=last", "authors=Somebody")
    assert json.loads((folder / "matbench_v0.1_CrysLDNet/info.json").read_text())["authors"] == "Somebody"
    assert {fold: path.stat().st_mtime_ns for fold, path in models.items()} == before
    finished = Whole(folder, "")
    assert finished.fold(3) == whole.fold(3)
    assert finished.scores == whole.scores


def test_kept_predictions_of_other_data_are_refused(
    whole: Whole, opened: tuple[Any, tasks.Source], tmp_path: Path
) -> None:
    shared = in_memory((opened[0], replace(opened[1], sha256="other")), tmp_path)
    shutil.copytree(whole.folder / TASK / "fold_0", folds.fold_folder(shared.folder.path, TASK, 0))
    with pytest.raises(ConfigError, match="data_sha256 differs"):
        folds.run_fold(shared, 0)


def test_the_notes_count_the_crystals_that_pretraining_saw(opened: tuple[Any, tasks.Source], tmp_path: Path) -> None:
    table = pq.read_table(EMBEDDED / f"{TASK}.parquet").slice(0, 90)
    pq.write_table(table, tmp_path / "seen.parquet")
    arguments = [f"data.path={tmp_path / 'seen.parquet'}", "data.split.by=random", "stage=vae", "stages.vae.epochs=1"]
    everything = "data.split.fractions=[1.0, 0.0, 0.0]"
    config, values = pretrain_config(*arguments, everything, f"runs={tmp_path}", "trainer.accelerator=cpu")
    os.environ.pop(RUN_NAME, None)
    assert pretrain.run(config, values) == 0
    encoder = tmp_path / "pretrain" / "latest"
    pretrained = in_memory(opened, tmp_path / "one", f"pretrained={encoder}")
    assert pretrained.overlap is not None
    assert pretrained.overlap["test_crystals"] == 636
    assert pretrained.overlap["pretraining_crystals"] == pretrained.overlap["ids"] == 90
    assert pretrained.overlap["formulas"] >= pretrained.overlap["similar"] >= 90
    scratch = in_memory(opened, tmp_path / "two")
    assert scratch.overlap is None


def test_a_report_shows_the_scores_of_each_fold(whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert cli.run(["report", str(whole.folder), f"out={out}"]) == 0
    text = out.read_text()
    for fold, scores in matbench_tasks(whole.summary)[TASK]["scores"].items():
        row = re.search(rf"<tr><td>{fold.replace('_', ' ')}</td>(.*?)</tr>", text)
        assert row is not None
        assert re.findall(r">([^<]+)<", row[1]) == [f"{value:.4g}" for value in scores.values()]
    assert f"<h2>Learning curves of {TASK}</h2>" in text


def test_a_submission_on_a_full_disk_is_an_error_that_leaves_no_half_and_is_written_when_there_is_room(
    whole: Whole, disk: tuple[Path, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, fill = disk
    copied = root / "matbench" / "whole"
    ignored = shutil.ignore_patterns("summary.json", whole.submission.name, "checkpoints")
    shutil.copytree(whole.folder, copied, ignore=ignored)
    line = f"runs={root}", "name=whole", "resume=last"

    def fill_and_write(*given: Any, **named: Any) -> Any:
        fill()
        return write_submission(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(matbench, "write_submission", fill_and_write)
        with pytest.raises((CrysldnetError, OSError), match="No space left on device") as caught:
            run(*line)
    assert str(root) in str(caught.value)
    assert not list(copied.rglob("*partial*"))
    assert not (copied / "summary.json").exists()
    assert not list(copied.rglob("results.json.gz"))
    (root / "filler").unlink()
    run(*line)
    assert results_of(copied / whole.submission.name)["tasks"] == results_of(whole.submission)["tasks"]
