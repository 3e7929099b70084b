"""``logger=tensorboard``: event files hold what ``metrics.csv`` holds."""

import csv
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from crysldnet import finetune, pretrain
from crysldnet.errors import ConfigError
from crysldnet.signals import RUN_NAME
from crysldnet.training import loggers
from crysldnet.training.loggers import TensorBoardRun
from tiny import finetune_config, pretrain_config, subset

needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard isn't installed")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def logged(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {name for row in rows for name in row} - {"step"}
    return {name: [(int(r["step"]), float(r[name])) for r in rows if r.get(name)] for name in names}


@needs_tensorboard
def test_event_files_hold_what_the_csv_holds(tmp_path: Path) -> None:
    given = [f"runs={tmp_path}", "name=a", f"data.path={subset(tmp_path / 'd.parquet', train=24, val=8, test=8)}"]
    given += ["logger=tensorboard", "trainer.log_every_n_steps=1"]
    assert pretrain.run(*pretrain_config(*given, "stages.vae.epochs=1", "stages.diffusion.epochs=1")) == 0
    os.environ.pop(RUN_NAME, None)
    assert finetune.run(*finetune_config(*given, "epochs=2")) == 0
    for events, metrics in (
        ("pretrain/a/tensorboard/vae", "pretrain/a/vae/metrics.csv"),
        ("pretrain/a/tensorboard/diffusion", "pretrain/a/diffusion/metrics.csv"),
        ("finetune/a/tensorboard", "finetune/a/metrics.csv"),
    ):
        found, expected = scalars(tmp_path / events), logged(tmp_path / metrics)
        assert {"train/loss", "epoch"} <= set(found)
        assert set(expected) <= set(found)
        for name, values in expected.items():
            assert [step for step, _ in found[name]][: len(values)] == [step for step, _ in values], name
            assert [value for _, value in found[name]][: len(values)] == pytest.approx(
                [v for _, v in values], nan_ok=True
            )
    assert not list(tmp_path.rglob("hparams.yaml"))


@needs_tensorboard
def test_a_resumed_run_hides_what_was_logged_beyond_the_checkpoint(tmp_path: Path) -> None:
    first, second = TensorBoardRun(tmp_path), TensorBoardRun(tmp_path)
    for step in range(6):
        first.log_metrics({"train/loss": float(step)}, step)
    second.log_metrics({"train/loss": 30.0}, 3)
    assert scalars(tmp_path / "tensorboard")["train/loss"] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'crysldnet\[tensorboard\]'"):
        loggers.tensorboard(folder=tmp_path, name="a", config={})
