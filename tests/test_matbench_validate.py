"""What ``crysldnet matbench validate`` promises: it finds what Matbench's own check would refuse, and false scores."""

import gzip
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crysldnet import cli
from crysldnet.errors import DataError

if importlib.util.find_spec("matbench") is None:
    pytest.skip("matbench isn't installed", allow_module_level=True)

from crysldnet.tools.matbench import tasks, validation
from crysldnet.tools.matbench.scores import (
    TaskScores,
    comparison,
    load_leaderboard,
    official_scores,
    place_of,
    ranking,
)

TASK = "matbench_jdft2d"
NAME = "matbench_v0.1_Mean"
INFO = {
    "authors": "A. Person",
    "algorithm": "Mean",
    "algorithm_long": "Predicts the mean of the training part.",
    "bibtex_refs": ["@misc{none}"],
    "notes": "",
    "requirements": {"python": ["matbench==0.6"]},
}
Results = dict[str, Any]


def write_results(folder: Path, results: Results) -> None:
    (folder / "results.json.gz").write_bytes(gzip.compress(json.dumps(results).encode()))


def read_results(folder: Path) -> Results:
    return json.loads(gzip.decompress((folder / "results.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid submission: of each fold the mean of its training targets, recorded by the official package."""
    folder = tmp_path_factory.mktemp("made") / NAME
    folder.mkdir()
    benchmark = tasks.import_matbench().MatbenchBenchmark(autoload=False, subset=[TASK])
    task = benchmark.tasks_map[TASK]
    tasks.load_task(task)
    for fold in task.folds:
        mean = float(task.get_train_and_val_data(fold)[1].mean())
        n = len(task.get_test_data(fold))
        task.record(fold, np.full(n, mean), std=np.full(n, 60.0), params={"mean": mean})
    write_results(folder, benchmark.as_dict())
    (folder / "info.json").write_text(json.dumps(INFO))
    (folder / "mean.py").write_text('"""Predict the mean."""\n')
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / NAME))


def signed(results: Results) -> Results:
    """Give changed results the hash that belongs to them, as one would who wants to deceive."""
    from matbench.util import hash_dictionary

    key = next(k for k in results if "hash" in k)
    rest = {k: v for k, v in results.items() if k != key}
    return {**rest, key: hash_dictionary(rest)}


def fold_of(results: Results, number: int) -> dict[str, Any]:
    return results["tasks"][TASK]["results"][f"fold_{number}"]


def found(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, see it fail, and return what it said."""
    assert cli.run(["matbench", "validate", str(folder)]) == 1
    printed = capsys.readouterr()
    assert "NOT VALID" in printed.out
    return printed.err


def test_results_that_are_larger_than_any_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "MOST_RESULTS", 1000)
    (tmp_path / "results.json.gz").write_bytes(gzip.compress(b" " * 1001))
    with pytest.raises(DataError, match=r"results\.json\.gz is damaged \(over 0 MB when unpacked"):
        validation._read_results(tmp_path / "results.json.gz")


def test_a_good_submission_passes_with_a_table(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["matbench", "validate", str(made)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    stated = [fold_of(read_results(made), i)["scores"]["mae"] for i in range(5)]
    assert f"{np.mean(stated):.4f} ± {np.std(stated):.4f}" in printed.out
    assert "re-encoded" in printed.out
    assert "best entry" in printed.out


def test_the_mean_scores_as_the_entry_of_the_leaderboard_that_predicts_it(made: Path) -> None:
    scores = validation.check_submission(made).scores[0]
    entries = {name: (mean, std) for name, mean, std in load_leaderboard()["tasks"][TASK]["entries"]}
    assert (round(scores.mean(), 4), round(scores.std(), 4)) == entries["Dummy"]


def _change(edit: Callable[[Results], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        results = read_results(folder)
        edit(results)
        write_results(folder, signed(results))

    return change


def _swap_between_folds(results: Results) -> None:
    a, b = fold_of(results, 0)["data"], fold_of(results, 1)["data"]
    first, second = next(iter(a)), next(iter(b))
    a[second], b[first] = b.pop(second), a.pop(first)


def _first(results: Results, value: object) -> None:
    data = fold_of(results, 0)["data"]
    data[next(iter(data))] = value


def _edit_info(**changes: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "info.json").write_text(json.dumps({**INFO, **changes}))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a score": (
        _change(lambda r: fold_of(r, 2)["scores"].update(mae=1.0)),
        "matbench_jdft2d, fold_2: it states mae 1, and its predictions give",
    ),
    "a prediction": (_change(lambda r: _first(r, 0.0)), "fold_0: it states mae"),
    "a missing fold": (
        _change(lambda r: r["tasks"][TASK]["results"].pop("fold_3")),
        "fold_3: it has no predictions; all folds must be recorded",
    ),
    "ids of another fold": (
        _change(_swap_between_folds),
        "fold_0: 1 of its test crystals have no prediction (mb-jdft2d-",
    ),
    "NaN": (_change(lambda r: _first(r, float("nan"))), "fold_0: the prediction for mb-jdft2d-"),
    "a whole number": (_change(lambda r: _first(r, 60)), "is 60, not float"),
    "an uncertainty of NaN": (
        _change(lambda r: next(iter(fold_of(r, 1)["uncertainty"].values())).update(std=float("nan"))),
        "fold_1: the uncertainty of mb-jdft2d-",
    ),
    "no parameters": (_change(lambda r: fold_of(r, 0).pop("parameters")), "fold_0: parameters is missing"),
    "a surplus key": (_change(lambda r: fold_of(r, 0).update(more=1)), "fold_0: more doesn't belong there"),
    "an unknown task": (
        _change(lambda r: r["tasks"].update(matbench_jdft=r["tasks"][TASK])),
        "Matbench has no task 'matbench_jdft'",
    ),
    "a wrong benchmark": (
        _change(lambda r: r["tasks"][TASK].update(benchmark_name="matbench_v0.2")),
        "the official package refuses the results: Tasks",
    ),
    "no hash": (
        lambda f: write_results(f, {k: v for k, v in read_results(f).items() if "hash" not in k}),
        "the official package refuses the results: Required keys",
    ),
    "another hash": (
        lambda f: write_results(f, {**read_results(f), "user_metadata": {"changed": True}}),
        "the official package refuses the results: Hash of dictionary",
    ),
    "plain JSON": (
        lambda f: (f / "results.json.gz").write_text(json.dumps(read_results(f))),
        "results.json.gz isn't gzip but plain JSON, as matbench 0.6 writes it; compress it",
    ),
    "cut off": (
        lambda f: (f / "results.json.gz").write_bytes((f / "results.json.gz").read_bytes()[:900]),
        "results.json.gz is damaged",
    ),
    "nested": (
        lambda f: (f / "results.json.gz").write_bytes(gzip.compress(b"[" * 100_000)),
        "results.json.gz is damaged (maximum recursion depth",
    ),
    "info that is nested": (lambda f: (f / "info.json").write_text("[" * 100_000), "info.json isn't JSON"),
    "no results": (lambda f: (f / "results.json.gz").unlink(), "results.json.gz is missing"),
    "no info": (lambda f: (f / "info.json").unlink(), "info.json is missing"),
    "info that isn't JSON": (lambda f: (f / "info.json").write_text("authors: me"), "info.json isn't JSON"),
    "no authors": (_edit_info(authors=""), "info.json: authors is missing or empty"),
    "no requirements": (_edit_info(requirements={}), "info.json: requirements is missing or empty"),
    "no notes": (
        lambda f: (f / "info.json").write_text(json.dumps({k: v for k, v in INFO.items() if k != "notes"})),
        "info.json: notes is missing",
    ),
    "a name that is taken": (_edit_info(algorithm="coGN"), "the leaderboard has an algorithm 'coGN' already"),
    "a name that is none": (_edit_info(algorithm=["Mean"]), "algorithm must be a name, not ['Mean']"),
    "a link to nothing": (lambda f: (f / "more.py").symlink_to(f / "nowhere"), "more.py is a link to nothing"),
    "no script": (lambda f: (f / "mean.py").unlink(), "neither a .py nor an .ipynb file"),
    "a large file": (lambda f: (f / "model.bin").write_bytes(bytes(10_000_001)), "model.bin has 10.0 MB"),
    "notebook checkpoints": (lambda f: (f / ".ipynb_checkpoints").mkdir(), ".ipynb_checkpoints must not be in it"),
    "another folder's name": (lambda f: f.rename(f.parent / "mean"), "the folder's name must be matbench_v0.1_"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_submission_is_found_out(what: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = CHANGES[what]
    change(copy)
    assert message in found(copy if copy.exists() else copy.parent / "mean", capsys)


def test_a_swap_inside_a_fold_that_the_official_package_cannot_see_is_found(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, (true, _) = read_results(copy), tasks.read_targets(TASK)
    fold = fold_of(results, 0)
    first, second, *_ = ids = list(fold["data"])
    fold["data"] |= {first: 0.0, second: 130.0}
    fold["scores"] = official_scores(TASK, [true[i] for i in ids], list(fold["data"].values()))
    write_results(copy, signed(results))
    assert cli.run(["matbench", "validate", str(copy)]) == 0
    fold["data"] |= {first: 130.0, second: 0.0}
    write_results(copy, signed(results))
    assert tasks.import_matbench().MatbenchBenchmark.from_dict(read_results(copy)).is_valid
    assert "fold_0: it states" in found(copy, capsys)


def test_targets_that_are_not_here_are_said_to_be_missing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = read_results(copy)
    entry = results["tasks"].pop(TASK)
    results["tasks"]["matbench_dielectric"] = {**entry, "dataset_name": "matbench_dielectric"}
    write_results(copy, signed(results))
    assert "matbench_dielectric: its crystals aren't here; put matbench_dielectric.json.gz" in found(copy, capsys)


def scores(mean: float, task: str = TASK) -> TaskScores:
    metric = "rocauc" if task == "matbench_mp_is_metal" else "mae"
    areas = dict.fromkeys(range(5), 0.99) if metric == "rocauc" else {}
    return TaskScores(task, {i: {metric: mean} for i in range(5)}, areas, "a test")


@pytest.mark.parametrize(
    ("task", "mean", "rank", "of"),
    [
        (TASK, 30.0, 1, 17),
        (TASK, 33.1918, 2, 17),
        (TASK, 36.5, 4, 17),
        ("matbench_phonons", 28.8, 2, 17),
        ("matbench_mp_is_metal", 0.96, 1, 14),
        ("matbench_mp_is_metal", 0.92, 2, 14),
    ],
)
def test_a_submission_is_ranked_among_the_entries(task: str, mean: float, rank: int, of: int) -> None:
    places = ranking("Ours", scores(mean, task))
    assert len(places) == of
    assert next(p for p in places if p.own).rank == rank
    assert place_of("Ours", scores(mean, task)).startswith(f"{rank} of {of}; best entry ")


def test_the_leaderboard_holds_the_values_of_january_2024() -> None:
    board = load_leaderboard()
    assert board["state"] == "January 2024"
    first = {task: entry["entries"][0][:2] for task, entry in board["tasks"].items()}
    assert first == {
        "matbench_dielectric": ["MODNet (v0.1.12)", 0.2711],
        "matbench_jdft2d": ["MODNet (v0.1.12)", 33.1918],
        "matbench_log_gvrh": ["coNGN", 0.0670],
        "matbench_log_kvrh": ["coNGN", 0.0491],
        "matbench_mp_e_form": ["coGN", 0.0170],
        "matbench_mp_gap": ["coGN", 0.1559],
        "matbench_mp_is_metal": ["CGCNN v2019", 0.9520],
        "matbench_perovskites": ["coGN", 0.0269],
        "matbench_phonons": ["MegNet (kgcnn v2.1.0)", 28.7606],
    }
    assert set(first) == {name for name, m in tasks.all_metadata().items() if m.input_type == "structure"}
    for name, task in board["tasks"].items():
        means = [mean for _, mean, _ in task["entries"]]
        assert means == sorted(means, reverse=task["metric"] == "rocauc")
        if task["metric"] == "mae":  # the entry that predicts the mean errs by the mean absolute deviation
            dummy = dict(entry[:2] for entry in task["entries"])["Dummy"]
            assert dummy == pytest.approx(tasks.task_metadata(name).mad, rel=0.01)


def test_the_comparison_shows_the_submission_in_its_place_and_the_true_area() -> None:
    text = comparison("Ours", [scores(30.0), scores(0.96, "matbench_mp_is_metal")])
    lines = text.splitlines()
    place = lines.index("| **1** | **Ours** | **30.0000** | **0.0000** |")
    assert lines[place + 1] == "| 2 | MODNet (v0.1.12) | 33.1918 | 7.3428 |"
    assert "area under the ROC curve of the probabilities themselves is 0.9900" in text
    assert "936176db" in text
