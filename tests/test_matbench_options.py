"""A classification, ensembles, recipes and folds beside each other, on small tasks made of real crystals."""

import ast
import csv
import gzip
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata

import wandb_file
from crysldnet import cli, finetune, pretrain
from crysldnet.artifacts.provenance import refuse_seen_labels
from crysldnet.config import compose
from crysldnet.data.catalog import published
from crysldnet.data.datasets import DATA_VARIABLE
from crysldnet.data.store import CrystalStore
from crysldnet.errors import ConfigError, CrysldnetError, Interrupted
from crysldnet.signals import RUN_NAME
from crysldnet.tools.importer.published import make_store
from crysldnet.training.processes import Job, places, run_jobs
from crysldnet.training.run_folder import owner_of
from tiny import finetune_config, pretrain_config, subset

if importlib.util.find_spec("matbench") is None:
    pytest.skip("matbench isn't installed", allow_module_level=True)

from crysldnet.tools.matbench import benchmark_run, tasks

N = 60
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


@pytest.fixture
def small(starter: CrystalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The band gap tasks of Matbench with 60 crystals, as files where matminer looks for them; their targets."""
    from matbench.metadata import mbv01_metadata, mbv01_validation
    from matminer.utils.io import store_dataframe_as_json
    from pandas import DataFrame
    from pymatgen.core import Structure

    gaps = starter.numbers_of("band_gap")
    sizes = starter.crystals.sizes
    rows = [*np.flatnonzero((gaps == 0) & (sizes < 6))[: N // 2], *np.flatnonzero((gaps > 0) & (sizes < 6))[: N // 2]]
    rows = np.random.default_rng(0).permutation(rows)
    c = starter.crystals.take(rows)
    atoms = [slice(begin, end) for begin, end in zip(c.ptr[:-1], c.ptr[1:], strict=True)]
    structures = [
        Structure(lattice, c.numbers[own].tolist(), c.frac_coords[own].astype(float))
        for lattice, own in zip(c.lattice, atoms, strict=True)
    ]
    targets = {"matbench_mp_gap": gaps[rows].tolist(), "matbench_mp_is_metal": (gaps[rows] == 0).tolist()}
    for name, values in targets.items():
        metadata = mbv01_metadata[name]
        frame = DataFrame({"structure": structures, metadata.target: values})
        store_dataframe_as_json(frame, str(tmp_path / f"{name}.json.gz"), compression="gz", pbar=False)
        monkeypatch.setitem(metadata, "n_samples", N)
        ids = [f"{name.replace('matbench', 'mb').replace('_', '-')}-{i:02d}" for i in range(1, N + 1)]
        parts = {f"fold_{k}": {"test": ids[k::5], "train": [i for i in ids if i not in ids[k::5]]} for k in range(5)}
        monkeypatch.setitem(mbv01_validation.splits, name, type(metadata)(parts))
    monkeypatch.setenv(tasks.MATMINER_DATA, str(tmp_path))
    return targets


def run(root: Path, *arguments: str) -> dict[str, Any]:
    """Run the command in this process and return the summary."""
    os.environ.pop(RUN_NAME, None)
    assert cli.run(["matbench", *TINY, f"runs={root}", "name=a", *arguments]) == 0
    return json.loads((root / "matbench" / "a" / "summary.json").read_text())


def kept(root: Path, task: str, fold: int) -> dict[str, Any]:
    return json.loads((root / "matbench" / "a" / task / f"fold_{fold}" / "predictions.json").read_text())


def results(summary: dict[str, Any], task: str) -> dict[str, Any]:
    content = json.loads(gzip.decompress((Path(summary["submission"]) / "results.json.gz").read_bytes()))
    return content["tasks"][task]["results"]


def area(true: list[bool], scores: list[float]) -> float:
    """Area under the ROC curve, by the rank sum."""
    ranks, positive = rankdata(scores), np.array(true)
    n, m = positive.sum(), (~positive).sum()
    return (ranks[positive].sum() - n * (n + 1) / 2) / (n * m)


def test_a_classification_and_a_regression_make_one_submission(
    small: dict[str, list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run(tmp_path, "tasks=[matbench_mp_is_metal,matbench_mp_gap]", "target_types={gap pbe: non_negative}")
    assert summary["valid"]
    printed = capsys.readouterr().out
    assert "true ROC-AUC" in printed
    assert cli.run(["matbench", "validate", summary["submission"]]) == 0

    true = small["matbench_mp_is_metal"]
    recorded = results(summary, "matbench_mp_is_metal")
    for fold in range(5):
        probabilities = kept(tmp_path, "matbench_mp_is_metal", fold)["predictions"]
        assert list(recorded[f"fold_{fold}"]["data"].values()) == probabilities
        assert all(0 <= p <= 1 for p in probabilities)
        assert len(set(probabilities)) > 2
        fold_true = true[fold::5]
        told = summary["tasks"]["matbench_mp_is_metal"]
        assert told["true_roc_auc"][f"fold_{fold}"] == pytest.approx(area(fold_true, probabilities))
        labels = [float(p > 0.5) for p in probabilities]
        assert told["scores"][f"fold_{fold}"]["rocauc"] == pytest.approx(area(fold_true, labels))
        assert kept(tmp_path, "matbench_mp_gap", fold)["std"] is None
        assert min(kept(tmp_path, "matbench_mp_gap", fold)["predictions"]) >= 0
    comparison = (tmp_path / "matbench" / "a" / "comparison.md").read_text()
    assert comparison.count("**CrysLDNet**") == 2
    assert "area under the ROC curve of the probabilities" in comparison


def test_a_look_at_one_fold_goes_on_with_the_others(small: dict[str, list[Any]], tmp_path: Path) -> None:
    first = run(tmp_path, "tasks=[matbench_mp_gap]", "folds=[3]")
    assert not first["valid"]
    assert "INCOMPLETE" in json.loads((Path(first["submission"]) / "info.json").read_text())["notes"]
    file = tmp_path / "matbench/a/matbench_mp_gap/fold_3/predictions.json"
    before = file.stat().st_mtime_ns
    for words in (["folds=[1]"], ["folds=[1]", "algorithm=Other"]):
        with pytest.raises(ConfigError, match=r"folds: .* has others too; name all, folds=\[1,3\]"):
            run(tmp_path, "tasks=[matbench_mp_gap]", *words, "resume=last")
    summary = run(tmp_path, "tasks=[matbench_mp_gap]", "folds=[0,1,2,3,4]", "resume=last")
    assert summary["valid"]
    assert file.stat().st_mtime_ns == before
    assert "INCOMPLETE" not in json.loads((Path(summary["submission"]) / "info.json").read_text())["notes"]
    assert cli.run(["matbench", "validate", summary["submission"]]) == 0
    assert not Path(first["submission"]).exists()
    config = tmp_path / "matbench/a/config.yaml"
    whole, written = summary, config.stat().st_mtime_ns
    assert run(tmp_path, "tasks=[matbench_mp_gap]", "folds=[3]", "resume=last") == whole, "it has that fold, and more"
    assert config.stat().st_mtime_ns == written
    summary = run(tmp_path, "tasks=[matbench_mp_gap]", "algorithm=Renamed", "resume=last")
    assert summary["valid"]
    assert Path(summary["submission"]).name == "matbench_v0.1_Renamed"


def test_scores_predictions_and_submission_go_to_wandb(small: dict[str, list[Any]], tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    online = ["logger=wandb", "logger.mode=offline"]
    summary = run(tmp_path, "tasks=[matbench_mp_is_metal,matbench_mp_gap]", "folds=[1]", *online)
    __import__("wandb").teardown()  # its process writes the last block of a file when it ends
    (file,) = (tmp_path / "matbench" / "a").glob("wandb/offline-run-*/*.wandb")
    logged = {name: value for row in wandb_file.rows(file) for name, value in row.items()}
    for task, metric in (("matbench_mp_is_metal", "rocauc"), ("matbench_mp_gap", "mae")):
        assert logged[f"{task}/{metric}_mean"] == summary["tasks"][task][f"{metric}_mean"]
        assert f"{task}/predictions/_type" in logged
    assert "matbench_mp_gap/worst/_type" in logged
    config = wandb_file.config(file)
    assert config["target_units"] == {"matbench_mp_is_metal": "", "matbench_mp_gap": "eV"}
    assert config["data_sha256"].keys() == summary["tasks"].keys()
    artifact = wandb_file.artifacts(file)["submission"]
    for name in ("info.json", "reproduce.py", "results.json.gz"):
        content = (Path(summary["submission"]) / name).read_bytes()
        assert artifact["sha256"][name] == hashlib.sha256(content).hexdigest()


def test_a_fold_is_predicted_by_trees_and_kernel_ridge(small: dict[str, list[Any]], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    names = ["matbench_mp_is_metal", "matbench_mp_gap"]
    summary = run(tmp_path, f"tasks=[{','.join(names)}]", "folds=[1]", "recipe=frozen")
    for name in names:
        record = kept(tmp_path, name, 1)
        true = np.array(small[name][1::5], np.float64)
        assert np.abs(np.array(record["predictions"]) - true).mean() < np.abs(true.mean() - true).mean()
        assert record["parameters"]["train_crystals"] == 43
    assert min(kept(tmp_path, names[1], 1)["std"]) >= 0
    assert summary["tasks"]["matbench_mp_gap"]["scores"].keys() == {"fold_1"}


def test_an_ensemble_predicts_the_mean_and_records_its_spread(small: dict[str, list[Any]], tmp_path: Path) -> None:
    from crysldnet.artifacts.model_file import load_property_model
    from crysldnet.tools.matbench import folds

    task = "matbench_mp_gap"
    arguments = [f"tasks={task}", "folds=[1]", "ensemble=2"]
    fold = results(run(tmp_path, *arguments), task)["fold_1"]
    paths = [tmp_path / "matbench" / "a" / task / "fold_1" / f"member_{i}" for i in range(2)]
    loaded = tasks.import_matbench().MatbenchTask(task, autoload=False)
    tasks.load_task(loaded)
    crystals = tasks.crystals_of(loaded.get_test_data(1))
    each = [folds.predict([load_property_model(path)[0]], crystals)[0] for path in paths]
    assert not np.allclose(each[0], each[1])
    assert list(fold["data"].values()) == pytest.approx(np.mean(each, 0), rel=1e-4, abs=1e-5)
    stds = [values["std"] for values in fold["uncertainty"].values()]
    assert stds == pytest.approx(np.std(each, 0), rel=1e-3, abs=1e-5)
    first = next(iter(fold["uncertainty"].values()))
    assert first["ci_upper"] - first["ci_lower"] == pytest.approx(2 * 1.959964 * first["std"], rel=1e-5)


@pytest.mark.parametrize("better", ["epochs=15 head=attention optimizer.lr=0.01", "", "recipe=frozen"])
def test_each_fold_takes_the_recipe_of_the_lowest_error_on_its_validation_part(
    small: dict[str, list[Any]], tmp_path: Path, better: str
) -> None:
    task = "matbench_mp_gap"
    recipes = ["optimizer.lr=1e-9", better]
    summary = run(tmp_path, f"tasks=[{task}]", "folds=[0]", f"recipes={json.dumps(recipes)}")
    parameters = results(summary, task)["fold_0"]["parameters"]
    errors = [parameters[f"validation_error_of_recipe_{i}"] for i in range(2)]
    assert errors[1] < errors[0]
    assert parameters["recipe"] == recipes[1]
    assert parameters["validation_mae"] == errors[1]
    info = json.loads((Path(summary["submission"]) / "info.json").read_text())
    assert recipes[1] in info["notes"]
    tables = better == "recipe=frozen"
    assert ("out of fold" in info["notes"]) == tables
    assert ("kernel ridge" in info["algorithm_long"]) == tables
    assert any(line.startswith("scikit-learn==") for line in info["requirements"]["python"]) == tables
    assert not any("+" in line for line in info["requirements"]["python"])


def test_a_report_shows_the_classes_of_a_task_and_the_curves_of_each_recipe(
    small: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = json.dumps(["optimizer.lr=1e-4", "epochs=3 optimizer.lr=0.01"])
    names = ["matbench_mp_is_metal", "matbench_mp_gap"]
    run(tmp_path, f"tasks=[{','.join(names)}]", "folds=[2]", f"recipes={recipes}")
    with (tmp_path / "matbench" / "a" / names[0] / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    probabilities = kept(tmp_path, names[0], 2)["predictions"]
    assert [row["true"] for row in rows] == ["true" if t else "false" for t in small[names[0]][2::5]]
    assert [row["prediction"] for row in rows] == ["true" if p > 0.5 else "false" for p in probabilities]
    assert [float(row["probability"]) for row in rows] == pytest.approx([max(p, 1 - p) for p in probabilities], 1e-4)
    assert {row["std"] for row in rows} == {""}

    monkeypatch.chdir(tmp_path)
    text = report()
    right = sum(row["true"] == row["prediction"] for row in rows)
    assert f"<b>{right / len(rows):.4g}</b>accuracy" in text
    table = text[text.index("Predicted and true classes") :].split("</figure>")[0]
    pairs = [(row["true"], row["prediction"]) for row in rows]
    counts = [pairs.count(pair) for pair in product(("false", "true"), repeat=2)]
    assert re.findall(r">(\d+)</text>", table) == [str(count) for count in counts]
    assert "summary.json says" not in text
    assert text.count(">fold 2, recipe 0</") == text.count(">fold 2, recipe 1</") > 0
    assert f"{names[0]}: no data set of this package has its structures" in text
    assert "matbench_mp_gap.store isn&#x27;t here; make it with: crysldnet data download matbench_mp_gap" in text
    assert 'class="structure"' not in text

    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    make_store(published()[names[1]], tmp_path, tmp_path / "matbench_mp_gap.store")
    assert report().count('class="structure"') == -(-len(rows) // 10) == 2  # a tenth of the crystals is shown


def report() -> str:
    assert cli.run(["report", "matbench/a"]) == 0
    return Path("report.html").read_text()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("epochz=3", "a recipe may set"),
        ("head=meen", "recipes: 'head=meen': head=meen: no such choice; did you mean 'mean'"),
        ("optimizer.lrr=1", "unknown key"),
        ("data.path=x", "data.path: the task decides that"),
        ("validation_fraction=0.5", "a recipe may set"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_before_anything_is_written(
    recipe: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, f"recipes={json.dumps(['epochs=2', recipe])}")
    assert message in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_target_type_of_no_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'exfoliation_energy' is not a target of the tasks; did you mean 'exfoli"):
        run(tmp_path, "target_types={exfoliation_energy: log}")


@pytest.mark.slow
def test_folds_end_with_a_run_that_is_killed_and_go_on_with_one_that_is_resumed(tmp_path: Path) -> None:
    arguments = ["folds=[3]", "data.max_crystal_atoms=12", "parallel=2"]
    line = ["matbench", *TINY, f"runs={tmp_path}", "name=a", *arguments]
    parent = subprocess.Popen([sys.executable, "-m", "crysldnet", *line])
    fold = tmp_path / "matbench/a/matbench_jdft2d/fold_3"
    while owner_of(fold) is None:
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert run(tmp_path, *arguments, "resume=last")["tasks"]["matbench_jdft2d"]["scores"].keys() == {"fold_3"}
    assert "the process that started this one is gone" in (fold / "log.txt").read_text()


@pytest.mark.distributed
def test_folds_beside_each_other_give_what_one_after_the_other_gives(tmp_path: Path) -> None:
    arguments = ["folds=[3]", "data.max_crystal_atoms=12"]
    beside, after = run(tmp_path / "beside", *arguments, "parallel=2"), run(tmp_path / "after", *arguments)
    a, b = (kept(tmp_path / side, "matbench_jdft2d", 3) for side in ("beside", "after"))
    assert a["predictions"] == pytest.approx(b["predictions"], rel=1e-5)
    assert a["ids"] == b["ids"]
    scores = [summary["tasks"]["matbench_jdft2d"]["scores"]["fold_3"]["mae"] for summary in (beside, after)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_folds_that_fail_are_named_with_their_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = ["sh", "-c", "test $4 = 2 && exit 2; mkdir -p $2/$3/fold_$4; exit 0"]
    monkeypatch.setattr(benchmark_run, "own_command", lambda *words: [*failing, *words])
    with pytest.raises(CrysldnetError, match=r"1 of 2 folds failed: matbench_jdft2d fold 2, see .*log\.txt"):
        run(tmp_path, "folds=[2,4]", "parallel=2")


def test_a_fold_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run exists there"):
        cli.run(["matbench", "fold", str(tmp_path), "matbench_jdft2d", "0"])


def test_a_fold_is_found_from_inside_the_folder_of_runs(
    small: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, "tasks=matbench_mp_gap", "folds=[2]")
    monkeypatch.chdir(tmp_path / "matbench")
    folder = Path("a/matbench_mp_gap/fold_2")
    before = json.loads((folder / "predictions.json").read_text())
    (folder / "predictions.json").unlink()
    Path("a/summary.json").unlink()
    assert cli.run(["matbench", "fold", "a", "matbench_mp_gap", "2"]) == 0
    assert json.loads((folder / "predictions.json").read_text())["predictions"] == before["predictions"]


def test_each_process_has_a_place_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [p["CUDA_VISIBLE_DEVICES"] for p in places(3, "cuda")] == ["4", "6", "4"]
    assert all(p["OMP_NUM_THREADS"] == "1" for p in places(2, "cpu"))


def test_jobs_end_when_the_process_that_started_them_is_told_to(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def stop() -> None:
        while not (log.exists() and log.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    Thread(target=stop).start()
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        run_jobs([Job("a", ["sh", "-c", "echo $$; exec sleep 60"], log)], [{}])
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) == before


def test_jobs_run_as_many_at_a_time_as_there_are_places(tmp_path: Path) -> None:
    meet = f"touch {tmp_path}/$0; while [ ! -e {tmp_path}/$1 ]; do sleep 0.01; done; echo $OMP_NUM_THREADS"
    pairs = [("a", "b"), ("b", "a")]  # each waits for the other: one after the other they would never end
    jobs = [Job(own, ["sh", "-c", meet, own, other], tmp_path / f"{own}.log") for own, other in pairs]
    jobs.append(Job("c", ["sh", "-c", "echo wrong >&2; exit 3"], tmp_path / "c.log"))
    ended = []
    statuses = run_jobs(jobs, places(2, "cpu"), lambda job, status: ended.append((job.name, status)))
    assert statuses == {"a": 0, "b": 0, "c": 3} == dict(ended)
    assert [(tmp_path / f"{name}.log").read_text() for name in "abc"] == ["1\n", "1\n", "wrong\n"]


def test_no_submission_starts_from_labels_of_its_own_formulas() -> None:
    counts = {"test_crystals": 636, "pretraining_crystals": 9, "ids": 0, "formulas": 3, "similar": 1}
    of = ("e", "matbench_jdft2d", "embedded:matbench_jdft2d")
    refuse_seen_labels(*of, None)
    refuse_seen_labels(*of, counts)
    refuse_seen_labels(
        "e", "matbench_jdft2d", "embedded:matbench_jdft2d", {**counts, "formulas": 0, "labels": ["band_gap"]}
    )
    for formulas, says in ((3, "formulas of 3 of the 636 crystals of matbench_jdft2d"), (None, "doesn't say of which")):
        with pytest.raises(ConfigError, match=says):
            refuse_seen_labels(
                "e",
                "matbench_jdft2d",
                "embedded:matbench_jdft2d",
                {**counts, "formulas": formulas, "labels": ["band_gap"]},
            )


def test_a_finetuned_model_is_taken_or_refused_by_the_crystals_it_has_seen(tmp_path: Path) -> None:
    """The same short training on crystals of the task itself, and on others without its formulas."""
    data = {"task": "embedded:matbench_jdft2d", "others": str(subset(tmp_path / "others.parquet", train=40, val=8))}
    target = {"task": "exfoliation_energy", "others": "formation_energy_per_atom"}
    for name, path in data.items():
        config, values = finetune_config(
            f"runs={tmp_path}", f"name={name}", f"data.path={path}", f"data.targets=[{target[name]}]", "epochs=1",
            "data.exclude=[embedded:matbench_jdft2d]" if name == "others" else "data.split.by=formula",
        )  # fmt: skip
        assert finetune.run(config, values) == 0
    arguments = [
        "tasks=[matbench_jdft2d]",
        "folds=[0]",
        "epochs=1",
        "min_steps=0",
        f"runs={tmp_path}",
        "trainer.progress_bar=false",
    ]
    with pytest.raises(ConfigError, match=r"labels \(exfoliation_energy\).* data.exclude=\[embedded:matbench_jd"):
        cli.run(["matbench", f"pretrained={tmp_path / 'finetune/task'}", *arguments, "name=refused"])
    assert cli.run(["matbench", f"pretrained={tmp_path / 'finetune/others'}", *arguments, "name=taken"]) == 0
    notes = json.loads(next((tmp_path / "matbench/taken").rglob("info.json")).read_text())["notes"]
    assert "Then trained on labels (formation_energy_per_atom) of 4" in notes
    script = next((tmp_path / "matbench/taken").rglob("reproduce.py"))
    assert "Its training history is in info.json" in script.read_text()
    (tmp_path / "finetune/others/model.safetensors").write_bytes(b"")
    assert (
        "isn't the file with sha256" in subprocess.run([sys.executable, script], capture_output=True, text=True).stderr
    )
    assert "have 0 by id, 0 by reduced formula" in notes


def test_the_script_names_the_encoder_how_it_was_made_and_refuses_another(
    small: dict[str, list[Any]], tmp_path: Path
) -> None:
    data = subset(tmp_path / "data.parquet", train=24, val=8)
    config, values = pretrain_config(
        f"runs={tmp_path}", "name=p", f"data.path={data}", "stage=vae", "stages.vae.epochs=1"
    )
    assert pretrain.run(config, values) == 0
    encoder = tmp_path / "pretrain/p/encoder.safetensors"
    os.environ.pop(RUN_NAME, None)
    words = [word for word in TINY if not word.startswith("encoder.")]
    line = ["matbench", *words, f"runs={tmp_path}", "name=a", "tasks=matbench_mp_gap", "folds=[0]"]
    assert cli.run([*line, f"pretrained={encoder}"]) == 0
    script = next((tmp_path / "matbench/a").glob("*/reproduce.py"))
    told = {}
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            told[node.targets[0].id] = node.value
    assert ast.literal_eval(told["SHA256"]) == hashlib.sha256(encoder.read_bytes()).hexdigest()
    again = compose("pretrain", ast.literal_eval(told["PRETRAINING"])[2:]).values
    assert again == {**values, "name": None, "runs": "runs"}
    encoder.write_bytes(encoder.read_bytes() + b" ")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "isn't the file with sha256" in done.stderr
    assert "crysldnet pretrain" in done.stderr
