"""What ``logger=wandb`` promises, read back from the files of offline runs: the same numbers, meaning, lineage."""

import csv
import hashlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

import wandb_file
from conftest import drawing
from crysldnet import cli
from crysldnet.config import compose
from crysldnet.errors import ConfigError
from crysldnet.signals import RUN_NAME
from crysldnet.training.diagnostics import Diagnostics
from crysldnet.training.loggers import wandb
from crysldnet.training.metrics import ClassificationScores
from crysldnet.training.module import StepModule
from crysldnet.training.wandb_run import prediction_tables, publish, summary_of, unit_of
from tiny import DENOISER, ENCODER, QUIET, subset

if importlib.util.find_spec("wandb") is None:
    pytest.skip("wandb isn't installed", allow_module_level=True)

COMMON = [*QUIET, "trainer.accelerator=cpu", "trainer.log_every_n_steps=2", "data.batch_size=8"]
OFFLINE = ["logger=[csv,wandb]", "logger.mode=offline", "logger.project=tests", "logger.tags=[small]"]
OFFLINE += ["logger.group=offline", "logger.notes=a note"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pretraining of both stages and a finetuning of its encoder."""
    folder = tmp_path_factory.mktemp("wandb")
    data = f"data.path={subset(folder / 'small.parquet', train=32, val=8, test=12)}"
    line = [*COMMON, *OFFLINE, data, f"runs={folder}"]
    with pytest.MonkeyPatch.context() as patch, drawing():
        patch.setenv("WANDB_DATA_DIR", str(folder / "staging"))
        patch.setenv("WANDB_CACHE_DIR", str(folder / "cache"))
        for name in ("WANDB_MODE", RUN_NAME):
            patch.delenv(name, raising=False)
        short = ["stages.vae.epochs=2", "stages.diffusion.epochs=1"]
        assert cli.run(["pretrain", *line, *ENCODER, *DENOISER, *short, "name=p"]) == 0
        os.environ.pop(RUN_NAME)
        assert (
            cli.run(["finetune", *line, f"pretrained={folder / 'pretrain' / 'p'}", "epochs=2", "min_steps=0", "name=f"])
            == 0
        )
        os.environ.pop(RUN_NAME)
        further = [f"pretrained={folder / 'finetune' / 'f'}", "epochs=1", "min_steps=0", "ensemble=2", "name=e"]
        assert cli.run(["finetune", *line, *further]) == 0
        __import__("wandb").teardown()  # its process writes the last block of a file when it ends
    yield folder
    os.environ.pop(RUN_NAME, None)


def file_of(run: Path) -> Path:
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    return file


def values_in_csv(file: Path, prefix: str = "") -> set[tuple[str, int, float]]:
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {(prefix + name, int(row["step"]), float(value)) for row in rows for name, value in row.items() if value} - {
        (f"{prefix}step", int(row["step"]), float(row["step"])) for row in rows
    }


def values_in_wandb(file: Path) -> set[tuple[str, int, float]]:
    rows = [row for row in wandb_file.rows(file) if not any(name.endswith("/_type") for name in row)]
    return {
        (name, row["trainer/global_step"], float(value))
        for row in rows
        for name, value in row.items()
        if not name.startswith(("_", "trainer/")) and isinstance(value, int | float)
    }


def test_csv_and_wandb_have_the_same_numbers(runs: Path) -> None:
    run = runs / "finetune" / "f"
    in_csv = values_in_csv(run / "metrics.csv")
    in_wandb = values_in_wandb(file_of(run))
    compared = {row for row in in_wandb if row[0].startswith(("test_constant", "test_trees"))}  # after the run
    assert in_wandb - compared == in_csv
    summary = json.loads((run / "summary.json").read_text())
    assert {name: value for name, _, value in compared} == {name: summary[name] for name, _, _ in compared}
    assert len(compared) == 2
    assert len({step for name, step, _ in in_csv if name == "train/loss"}) == 4  # 8 steps, every second one
    run = runs / "pretrain" / "p"
    stages = [values_in_csv(run / stage / "metrics.csv", f"{stage}/") for stage in ("vae", "diffusion")]
    assert values_in_wandb(file_of(run)) == stages[0] | stages[1]
    assert any(name == "diffusion/val/features_rank" for name, _, _ in stages[1])


def test_a_number_that_differs_would_be_noticed(runs: Path, tmp_path: Path) -> None:
    run = runs / "finetune" / "f"
    text = (run / "metrics.csv").read_text()
    mae = next(value for name, _, value in values_in_csv(run / "metrics.csv") if name == "val/mae")
    (tmp_path / "metrics.csv").write_text(text.replace(str(mae), str(mae + 1e-6)))
    assert text.count(str(mae))
    assert values_in_wandb(file_of(run)) != values_in_csv(tmp_path / "metrics.csv")


def test_an_ensemble_has_a_run_of_each_member_and_one_of_what_they_say_together(runs: Path) -> None:
    whole = runs / "finetune" / "e"
    summary = json.loads((whole / "summary.json").read_text())
    logged = {name: value for name, _, value in values_in_wandb(file_of(whole))}
    assert logged["test/mae"] == summary["test/mae"]
    artifacts = wandb_file.artifacts(file_of(whole))
    assert set(artifacts) == {"predictions"}
    members = [whole / member / "model.safetensors" for member in ("member_0", "member_1")]
    assert artifacts["predictions"]["made_from"] == {
        "model": [hashlib.sha256(member.read_bytes()).hexdigest() for member in members]
    }
    start = hashlib.sha256((runs / "finetune" / "f" / "model.safetensors").read_bytes()).hexdigest()
    for member in ("member_0", "member_1"):
        assert wandb_file.artifacts(file_of(whole / member))["model"]["made_from"] == {"model": start}


def test_every_metric_keeps_its_best_value_and_has_the_step_as_axis(runs: Path) -> None:
    metrics = {r.metric.name: r.metric for r in wandb_file.records(file_of(runs / "finetune" / "f")) if r.metric.name}
    assert metrics["val/mae"].summary.min
    assert not metrics["val/mae"].summary.max
    assert metrics["val/r2"].summary.max
    assert metrics["train/atoms_per_s"].summary.mean
    assert all(m.step_metric == "trainer/global_step" for name, m in metrics.items() if name != "trainer/global_step")


@pytest.mark.parametrize(
    ("metric", "summary", "unit"),
    [
        ("val/mae", "min", "eV"),
        ("test/rmse/gap", "min", "eV"),
        ("val/r2/gap", "max", ""),
        ("val/accuracy", "max", ""),
        ("vae/val/masked_accuracy", "max", ""),
        ("vae/val/masked_accuracy_baseline", "last", ""),
        ("diffusion/val/coordinate_error", "min", "Å"),
        ("vae/val/lattice_angle_error_baseline", "last", "°"),
        ("val/features_rank", "last", ""),
        ("train/memory_mb", "max", "MiB"),
        ("lr-AdamW", "last", ""),
    ],
)
def test_direction_and_unit_follow_from_the_name(metric: str, summary: str, unit: str) -> None:
    assert summary_of(metric) == summary
    assert unit_of(metric, {"gap": "eV"}) == unit


def test_targets_of_two_units_have_no_common_one() -> None:
    assert unit_of("val/mae", {"gap": "eV", "modulus": "GPa"}) == ""
    assert unit_of("val/mae/modulus", {"gap": "eV", "modulus": "GPa"}) == "GPa"


def test_the_run_says_what_was_run_on_what(runs: Path) -> None:
    file = file_of(runs / "finetune" / "f")
    (run,) = [r.run for r in wandb_file.records(file) if r.HasField("run")]
    assert (run.project, run.run_group, run.notes, list(run.tags)) == ("tests", "offline", "a note", ["small"])
    assert run.display_name == "f"
    kept = wandb_file.config(file)
    summary = json.loads((runs / "finetune" / "f" / "summary.json").read_text())
    assert kept["data_sha256"] == summary["data_sha256"]
    assert kept["code_version"] == summary["code_version"]
    assert kept["optimizer"]["lr"] == 2.0e-3
    assert kept["units"]["val/mae"] == kept["target_units"]["formation_energy_per_atom"] == "eV/atom"


def test_artifacts_tell_what_they_were_made_from(runs: Path) -> None:
    def sha256(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    pretraining = wandb_file.artifacts(file_of(runs / "pretrain" / "p"))
    finetuning = wandb_file.artifacts(file_of(runs / "finetune" / "f"))
    encoder = sha256(runs / "pretrain" / "p" / "encoder.safetensors")
    model = sha256(runs / "finetune" / "f" / "model.safetensors")
    assert pretraining["encoder"]["sha256"] == encoder
    assert finetuning["model"]["made_from"] == {"encoder": encoder}
    assert finetuning["predictions"]["made_from"] == {"model": model}
    assert finetuning["model"]["sha256"] == model
    assert finetuning["model"]["aliases"] == ["f", "latest"]


def test_predictions_and_the_worst_of_them_are_tables_and_parity_is_a_chart(runs: Path) -> None:
    folder = runs / "finetune" / "f"
    tables = {
        path.name.split(".")[0].rpartition("_")[0].rpartition("_")[0]: json.loads(path.read_text())
        for path in folder.glob("wandb/offline-run-*/files/media/table/test/*.json")
    }
    with (folder / "predictions_test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tables["predictions"]["data"] == [list(row.values()) for row in rows]
    errors = [abs(row[4]) for row in tables["worst"]["data"]]
    assert errors == sorted(errors, reverse=True)
    largest = max(rows, key=lambda row: abs(float(row["prediction"]) - float(row["true"])))
    assert tables["worst"]["data"][0][0] == largest["material_id"]
    charts = wandb_file.config(file_of(folder))["_wandb/visualize/test/parity/formation_energy_per_atom"]
    assert charts["panel_config"]["panelDefId"] == "wandb/scatter/v0"
    logged = {name.split("/_type")[0] for row in wandb_file.rows(file_of(folder)) for name in row}
    assert {"plots/curves", "plots/parity_formation_energy_per_atom"} <= logged


def test_the_worst_classes_are_the_wrong_ones_of_which_the_model_was_surest(tmp_path: Path) -> None:
    file = tmp_path / "predictions_test.csv"
    lines = ["a,metal,True,False,,,0.9", "b,metal,True,True,,,0.99", "c,metal,False,True,,,0.95", "d,metal,,True,,,1.0"]
    lines += ["a,gap,0.5,0.1,eV,,", "c,gap,1.5,1.4,eV,,"]
    file.write_text("\n".join(["material_id,target,true,prediction,unit,std,probability", *lines]) + "\n")
    logged = prediction_tables(file)
    assert [row[0] for row in logged["test/worst_classes"].data] == ["c", "a"]
    assert [row[0] for row in logged["test/worst"].data] == ["a", "c"]
    assert "test/parity/gap" in logged
    assert "test/parity/metal" not in logged


def test_disabled_writes_nothing_and_other_ranks_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (logger,) = wandb(folder=tmp_path, name="x", config={}, mode="disabled")
    logger.log_metrics({"val/mae": 1.0}, step=0)
    publish([logger], tmp_path)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    (logger,) = wandb(folder=tmp_path, name="x", config={}, mode="offline")
    publish([logger], tmp_path)
    assert not list(tmp_path.rglob("*.wandb"))


def test_a_run_without_the_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'crysldnet\[wandb\]'"):
        wandb(folder=tmp_path, name="x", config={})


def test_a_run_that_cannot_begin_says_why_and_what_else_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    __import__("wandb").teardown()  # which would remember a key
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(ConfigError, match=r"W&B can't begin a run: .*wandb login.*; logger\.mode=offline needs"):
        wandb(folder=tmp_path, name="run", config={}, mode="online")


def test_a_run_begins_where_the_wandb_process_of_its_parent_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = __import__("wandb")
    library.teardown()
    monkeypatch.setenv("WANDB_SERVICE", f"3-1-unix-{tmp_path}/socket")
    (logger,) = wandb(folder=tmp_path, name="x", config={}, mode="offline")
    logger.log_metrics({"val/mae": 0.5}, 0)
    logger.experiment.finish()
    library.teardown()
    assert "the W&B process that WANDB_SERVICE names is gone; this run starts its own" in capsys.readouterr().err
    assert ("val/mae", 0, 0.5) in values_in_wandb(file_of(tmp_path))


def test_a_list_of_loggers_is_composed_in_its_order() -> None:
    both = compose("finetune", ["logger=[csv,wandb]", "logger.mode=offline"])
    assert both.values["logger"] == compose("finetune", ["logger=wandb", "logger.mode=offline"]).values["logger"]
    with pytest.raises(ConfigError, match="logger=wandbb: no such choice; did you mean 'wandb'"):
        compose("finetune", ["logger=[csv,wandbb]"])


class FakeModule(StepModule):
    """A module that keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.logged: list[tuple[str, float]] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs)

    def log(self, name: str, value: Any, **_how: Any) -> None:  # type: ignore[override]
        self.logged.append((name, float(value)))

    def log_dict(self, values: dict[str, Any], **_how: Any) -> None:
        self.logged += [(name, float(value)) for name, value in values.items()]


def test_the_gradient_norm_is_that_of_all_parameters_and_throughput_counts_all_steps() -> None:
    module, callback = FakeModule(), Diagnostics()
    optimizer = torch.optim.SGD(module.parameters())
    trainer: Any = SimpleNamespace(
        global_step=0, log_every_n_steps=3, world_size=1, strategy=None, num_training_batches=100
    )
    module._trainer = trainer
    batch: Any = SimpleNamespace(num_atoms=50, num_crystals=10)
    callback.on_train_epoch_start(trainer, module)  # type: ignore[arg-type]
    for step in range(7):
        module.zero_grad()
        (module(torch.full((4, 3), step + 1.0)).sum()).backward()
        callback.on_before_optimizer_step(trainer, module, optimizer)  # type: ignore[arg-type]
        module.configure_gradient_clipping(optimizer)
        trainer.global_step = step + 1
        module.step_losses = {"train/loss": torch.tensor(float(step))}
        callback.on_train_batch_end(trainer, module, None, batch, step)  # type: ignore[arg-type]
    names = [name for name, _ in module.logged]
    rates = ["train/atoms_per_s", "train/crystals_per_s", "train/memory_mb"]
    assert names == ["train/grad_norm", "train/loss", *rates] * 2
    values = dict(module.logged)
    assert values["train/loss"] == pytest.approx(4.0)  # steps 3 to 5
    assert values["train/grad_norm"] == pytest.approx((2 * 3 * 24.0**2 + 2 * 4.0**2) ** 0.5)  # step 5: inputs of 6
    assert values["train/atoms_per_s"] == pytest.approx(5 * values["train/crystals_per_s"])
    assert values["train/memory_mb"] > 50


def test_wandb_itself_reads_the_run(runs: Path) -> None:
    """``wandb sync`` has to find runs that can be uploaded later."""
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run"],
        cwd=runs / "finetune" / "f",
        capture_output=True,
        text=True,
    )
    assert file_of(runs / "finetune" / "f").name in done.stdout + done.stderr


def panels_of(spec: Any) -> Iterator[dict[str, Any]]:
    """Every mapping inside a layout that names metrics."""
    if isinstance(spec, dict):
        if "metrics" in spec:
            yield spec
        for value in spec.values():
            yield from panels_of(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from panels_of(value)


def test_the_dashboard_shows_metrics_that_runs_log(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb_workspaces")
    from crysldnet.tools import dashboard

    assert dashboard.main(["somebody", "tests", "--print"]) == 0
    pretraining, finetuning = json.loads(capsys.readouterr().out)
    assert {pretraining["entity"], finetuning["entity"]} == {"somebody"}
    scores = ClassificationScores(2)
    scores.update(torch.tensor([[0.2, 0.8], [0.7, 0.3]]), torch.tensor([1.0, 0.0]))
    of_classes = {f"val/{name}/is_metal" for name in scores.compute()}
    of_spread = {"val/nll"}  # with loss=laplace
    for layout, run in ((pretraining, "pretrain/p"), (finetuning, "finetune/f")):
        shown = {metric for panel in panels_of(layout) for metric in panel["metrics"] or []}
        logged = {name for name, _, _ in values_in_wandb(file_of(runs / run))}
        assert len(shown) > 3
        assert shown <= logged
        patterns = [panel["metric_regex"] for panel in panels_of(layout) if panel.get("metric_regex")]
        assert len(patterns) == (8 if layout is finetuning else 0)
        for pattern in patterns:
            assert any(re.search(pattern, name) for name in logged | of_classes | of_spread), pattern
        assert {name for name in logged if name in ("val/mae", "val/rmse", "val/r2")} == {
            name for name in logged if any(re.search(pattern, name) for pattern in patterns)
        }
