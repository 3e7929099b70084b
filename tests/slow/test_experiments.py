"""Studies of ``experiments/`` at a small size, each from its data to its table; ``make test-slow`` runs this."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from crysldnet import cli
from crysldnet.data.elements import reduced_formula
from experiments import evidence
from tiny import DENOISER, repeatable, subset

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FROM_ROOT = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
SMALL = ["data.batch_size=16", "trainer.accelerator=cpu"]


@pytest.fixture
def encoder(tmp_path):
    """A small encoder's configuration."""
    values = yaml.safe_load((ROOT / "conf" / "encoder" / "pddformer_small.yaml").read_text())
    values |= {"width": 32, "layers": 2, "k": 8, "n_distances": 12, "n_basis": 32}
    (tmp_path / "encoder.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "encoder.yaml"


def run(study: str, folder: Path, *arguments: str) -> dict[tuple[str, str], evidence.Record]:
    """Run a study to its end, and once more, which trains nothing; return its records by name and measure."""
    line = [sys.executable, "-m", f"experiments.{study}.run", f"data={folder}", f"runs={folder / 'runs'}"]
    for turn in (1, 2):
        done = subprocess.run(
            [*line, f"out={folder / 'out'}", *arguments], capture_output=True, text=True, cwd=folder, env=FROM_ROOT
        )
        assert done.returncode == 0, done.stderr
        assert ("crysldnet" in done.stdout) == (turn == 1)
    return {(r.name, r.metric): r for r in evidence.read(folder / "out" / "results.json")}


def summary(folder: Path, name: str) -> dict:
    return json.loads((folder / "runs" / "finetune" / name / "summary.json").read_text())


def listed(*settings: str) -> str:
    return json.dumps([*SMALL, *settings])


def test_sparse_labels(tmp_path, encoder):
    for split in ("train", "val", "test"):
        subset(tmp_path / f"mp_cgcnn_{split}.parquet", **{"train": 0, split: 60})
    found = run(
        "sparse_labels",
        tmp_path,
        f"encoder={encoder}",
        "seeds=[3]",
        "shares=[0.25,1.0]",
        "sizes={train: 40, val: 16, test: 16}",
        "unlabelled=48",
        f"pretraining={listed(*DENOISER, 'stages.vae.epochs=1', 'stages.diffusion.epochs=1')}",
        f"finetuning={listed('epochs=2', 'min_steps=0')}",
    )
    arms = ("scratch", "autoencoder", "autoencoder and latent diffusion")
    targets = ("formation_energy_per_atom", "band_gap")
    assert set(found) == {
        (f"{arm}, {share} of the labels", f"test MAE of {target}")
        for arm in arms
        for share in ("25%", "100%")
        for target in targets
    }
    assert all(r.seeds == [3] and np.isfinite(r.value) for r in found.values())
    for arm in arms:
        few, all_of_them = (summary(tmp_path, f"{arm.replace(' ', '_')}-{share}-seed3") for share in ("0.25", "1"))
        assert (few["train_crystals"], all_of_them["train_crystals"]) == (10, 40)
        assert found[f"{arm}, 25% of the labels", "test MAE of band_gap"].value == few["test/mae/band_gap"]
    assert (tmp_path / "out" / "labels.png").stat().st_size > 10_000


def test_dft_correction(tmp_path, encoder):
    table = pq.read_table(subset(tmp_path / "all.parquet", train=150))
    energy = table["formation_energy_per_atom"].to_numpy()
    first, second = table.slice(0, 90), table.slice(60)  # 30 crystals are in both
    pq.write_table(first.drop_columns(["split"]), tmp_path / "mp_cgcnn_train.parquet")
    noise = np.random.default_rng(0).uniform(-0.02, 0.02, 90)
    measured = np.where(np.arange(90) < 5, np.nan, energy[60:] + 0.1 + noise)
    measured = second.append_column("measured", pa.array(measured))
    pq.write_table(measured, tmp_path / "expt_formation_kingsbury.parquet")
    found = run(
        "dft_correction",
        tmp_path,
        f"encoder={encoder}",
        "seeds=[0,1]",
        "shares=[0.5]",
        "measured.target=measured",
        "measured.dft=formation_energy_per_atom",
        f"dft_training={listed('epochs=2', 'min_steps=0')}",
        f"networks={listed('epochs=2', 'min_steps=0')}",
    )
    assert len(found) == 10
    metric = "test MAE, 50% to learn from"
    assert found["DFT as it is", metric].value == pytest.approx(0.1, abs=0.01)
    assert found["DFT, linear correction of each element", metric].value < 0.05, "a constant is easy to learn"
    assert all(np.isfinite(r.value) and r.spread is not None for r in found.values())

    def formulas(file: str) -> dict[str, set[str]]:
        rows = pq.read_table(tmp_path / "runs" / "data" / file)
        names = [reduced_formula(np.array(z)) for z in rows["atomic_numbers"].to_pylist()]
        splits = rows["split"].to_pylist()
        return {split: {n for n, s in zip(names, splits, strict=True) if s == split} for split in set(splits)}

    parts = formulas("measured_0.5_0.parquet")
    assert pq.read_metadata(tmp_path / "runs" / "data" / "measured_0.5_0.parquet").num_rows == 85
    assert set(parts) == {"train", "val", "test"}
    assert not parts["test"] & (parts["train"] | parts["val"])
    assert not parts["train"] & parts["val"]
    learned = set().union(*formulas("dft.parquet").values())
    assert learned
    assert not learned & set().union(*parts.values())
    assert found["structure alone, from scratch", metric].value == pytest.approx(
        np.mean([summary(tmp_path, f"way0-0.5-seed{seed}")["test/mae"] for seed in (0, 1)])
    )


def test_finetune_recipe_keeps_what_was_measured_at_other_sizes(tmp_path, encoder):
    data = subset(tmp_path / "mp_cgcnn_train.parquet", train=200)
    given = [f"data.path={data}", f"encoder={encoder}", *SMALL, "stage=vae", "stages.vae.epochs=1"]
    evidence.launch(tmp_path / "before", "pretrain", "tiny", *given)
    pretrained = tmp_path / "before" / "pretrain" / "tiny" / "encoder.safetensors"
    common = [f"pretrained={pretrained}", "seeds=[0,1]", "inner=8", "second=8", "epochs=2", "batch_size=16"]
    grid = ["budgets=[0,6]", "rates=[1e-3]"]
    first = run("finetune_recipe", tmp_path, *common, *grid, "sizes=[16]")
    few, many = "MAE, 16 labels", "MAE, 96 labels"
    plain, repeated = "at least 0 steps, lr 0.001", "at least 6 steps, lr 0.001"
    assert set(first) == {(name, metric) for name in (plain, repeated) for metric in (few, "over the lowest")}
    for name, steps in (("16-1x-lr0_001-0", 2), ("16-3x-lr0_001-0", 6)):
        rows = repeatable(tmp_path / "runs" / "finetune" / name / "metrics.csv")
        assert max(int(row["step"]) for row in rows) in (steps, steps - 1)
    both = run("finetune_recipe", tmp_path, *common, *grid, "sizes=[96]")
    assert {key: r.value for key, r in first.items() if key[1] == few} == {
        key: r.value for key, r in both.items() if key[1] == few
    }
    assert both[plain, many].value == both[repeated, many].value, "12 steps are more than 6 already"
    best = min(both[plain, few].value, both[repeated, few].value)
    for name in (plain, repeated):
        assert both[name, "over the lowest"].value == pytest.approx((both[name, few].value / best) ** 0.5)


def test_matbench(tmp_path, encoder):
    for split, count in (("train", 80), ("val", 16), ("test", 16)):
        subset(tmp_path / f"mp_cgcnn_{split}.parquet", **{"train": 0, split: count})
    found = run(
        "matbench",
        tmp_path,
        f"encoder={encoder}",
        "arms=[scratch,pretrained]",
        "recipes=[head=mean]",
        "members=2",
        f"pretraining={listed(*DENOISER, 'stages.vae.epochs=1', 'stages.diffusion.epochs=1')}",
        f"finetuning={listed('epochs=1', 'min_steps=0', 'data.batch_size=64')}",
    )
    tasks, arms = ("matbench_jdft2d", "matbench_phonons"), ("scratch", "pretrained")
    assert {name for name, metric in found if metric == "MAE"} == {f"{task}, {arm}" for task in tasks for arm in arms}
    kept = json.loads((tmp_path / "out" / "arms.json").read_text())
    for arm in arms:
        for task in tasks:
            folds = kept[arm]["scores"][task]
            assert len(folds) == 5
            assert found[f"{task}, {arm}", "MAE"].value == pytest.approx(np.mean([f["mae"] for f in folds.values()]))
        (submission,) = (tmp_path / "runs" / "matbench" / arm).glob("matbench_v0.1_*")
        assert cli.run(["matbench", "validate", str(submission)]) == 0
    assert (tmp_path / "out" / "leaderboard.png").stat().st_size > 10_000


def test_wrong_settings_of_a_study_end_it_before_anything_is_written(tmp_path):
    line = [sys.executable, "-m", "experiments.sparse_labels.run"]
    for arguments, message in (
        ([], "data: it has no default"),
        (["data=x", "share=[1.0]"], "did you mean 'shares'?"),
        (["data=x", "seeds=many"], "seeds='many'"),
    ):
        done = subprocess.run([*line, *arguments], capture_output=True, text=True, cwd=tmp_path, env=FROM_ROOT)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_runs_of_other_settings_are_not_taken_for_those_of_a_study(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    values = yaml.safe_load((ROOT / "experiments" / "finetune_recipe" / "config.yaml").read_text())
    (runs / "study.yaml").write_text(yaml.safe_dump(values | {"data": "x", "file": "x/mp_cgcnn_train.parquet"}))
    line = [sys.executable, "-m", "experiments.finetune_recipe.run", "data=x", f"runs={runs}"]
    done = subprocess.run(
        [*line, "sizes=[7]", "max_atoms=5"], capture_output=True, text=True, cwd=tmp_path, env=FROM_ROOT
    )
    assert done.returncode == 2
    assert "max_atoms: the runs in" in done.stderr
    assert "were made with 20" in done.stderr
    assert [path.name for path in runs.iterdir()] == ["study.yaml"]
