"""How the encoder is trained: not at all, layer after layer, at falling rates; how long; and several models as one."""

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from crysldnet import finetune
from crysldnet.artifacts import model_file
from crysldnet.build import build
from crysldnet.config import choices, conf_folder, load_yaml
from crysldnet.data.datasets import open_store
from crysldnet.data.elements import formulas_of
from crysldnet.errors import CheckpointError, Interrupted
from crysldnet.finetune import ensemble, training
from crysldnet.finetune.module import FinetuneModule
from crysldnet.finetune.settings import make_data, make_encoder, make_types
from crysldnet.finetune.training import make_model
from crysldnet.graphs.batch import make_batch
from crysldnet.models.head import PropertyModel
from crysldnet.models.predictor import Prediction, combine
from crysldnet.models.targets import Classes, Hurdle, Number
from crysldnet.signals import RUN_NAME
from crysldnet.training.optimizer import AdamW
from tiny import QUIET, finetune_config, subset


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return subset(tmp_path_factory.mktemp("small") / "data.parquet", train=48, val=16, test=16)


@pytest.fixture
def configure(small, pretrained):
    def of(*arguments):
        return finetune_config(f"pretrained={pretrained}", f"data.path={small}", "data.batch_size=16", *arguments)

    return of


def run(tmp_path, name, config, values):
    assert finetune.run(*finetune_with(tmp_path, name, config, values)) == 0
    folder = tmp_path / "finetune" / name
    return folder, json.loads((folder / "summary.json").read_text())


def finetune_with(tmp_path, name, config, values, **changes):
    changes |= {"runs": str(tmp_path), "name": name}
    return replace(config, **changes), {**values, **changes}


def same(a, b, keys):
    return all(torch.equal(a[k], b[k]) for k in keys)


def weights(folder):
    return model_file.read(folder / "model.safetensors", "property_model")[1]


def encoder_keys(state):
    return [k for k in state if k.startswith("encoder.")]


def test_a_frozen_encoder_stays_as_it_was_and_the_head_learns(tmp_path, configure, pretrained):
    folder, summary = run(tmp_path, "frozen", *configure("mode=frozen", "epochs=30", "optimizer.lr=1e-2"))
    state, exported = weights(folder), model_file.read(pretrained, "encoder")[1]
    assert all(torch.equal(state[f"encoder.{k}"], v) for k, v in exported.items())
    with (folder / "metrics.csv").open() as file:
        curve = [float(row["val/mae"]) for row in csv.DictReader(file) if row["val/mae"]]
    assert summary["val/mae"] == pytest.approx(min(curve), rel=1e-4)
    assert min(curve) < curve[0]
    full, _ = run(tmp_path, "full", *configure("mode=full", "epochs=1"))
    assert not all(torch.equal(weights(full)[f"encoder.{k}"], v) for k, v in exported.items())


def test_cached_features_train_the_same_head_as_the_encoder_itself(tmp_path, configure, monkeypatch):
    config, values = configure("mode=frozen", "epochs=3", "head=attention", "head.dropout=0.1")
    cached, with_cache = run(tmp_path, "cached", config, values)
    monkeypatch.setattr(FinetuneModule, "on_fit_start", lambda _: None)
    plain, without = run(tmp_path, "plain", config, values)
    one, two = weights(cached), weights(plain)
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)
    assert with_cache["test/mae"] == pytest.approx(without["test/mae"], rel=1e-4)
    monkeypatch.setattr(PropertyModel, "freeze_encoder", lambda self: self.encoder.requires_grad_(False))
    noisy, _ = run(tmp_path, "noisy", config, values)  # with dropout in the encoder it is another model
    assert not torch.allclose(weights(noisy)["head.mlp.0.weight"], one["head.mlp.0.weight"], rtol=1e-4, atol=1e-5)


def test_an_epoch_on_cached_features_never_calls_the_encoder(tmp_path, configure, monkeypatch):
    calls = []
    kind = type(make_encoder(configure()[0])[0])
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, batch: calls.append(1) or forward(self, batch))
    run(tmp_path, "once", *configure("mode=frozen", "epochs=1"))
    once = len(calls)
    run(tmp_path, "counted", *configure("mode=frozen", "epochs=5"))
    assert len(calls) == 2 * once
    assert once >= (48 + 16) / 16


def test_gradual_training_opens_the_head_first_and_the_encoder_from_its_end(tmp_path, configure, monkeypatch):
    config, values = configure("mode=gradual_unfreezing", "epochs=10")
    seen = []

    def note(self):
        if self.trainer.is_last_batch:
            moving = {n for n, p in self.named_parameters() if p.grad is not None}
            seen.append((self.trainer.current_epoch, {self.model.depth_of(n.removeprefix("model.")) for n in moving}))

    monkeypatch.setattr(FinetuneModule, "on_before_optimizer_step", lambda self, _: note(self))
    trainings = []
    monkeypatch.setattr(
        FinetuneModule,
        "on_train_batch_end",
        lambda self, *_: trainings.append({m.training for m in self.model.encoder.modules()}),
    )
    run(tmp_path, "gradual", config, values)
    depths = [depth for _, depth in seen]
    assert depths[0] == {0}
    assert depths[5:] == [{0, 1, 2, 3}] * 5
    assert all(a <= b for a, b in pairwise(depths))
    assert depths[2] == {0, 1}
    assert trainings[0] == {False}
    assert trainings[-1] == {True}


def test_gradual_training_begins_with_the_exported_encoder(tmp_path, configure, pretrained):
    folder, _ = run(tmp_path, "gradual", *configure("mode=gradual_unfreezing", "epochs=1"))
    state, exported = weights(folder), model_file.read(pretrained, "encoder")[1]
    assert all(torch.equal(state[f"encoder.{k}"], v) for k, v in exported.items())


def rates(model, decay, schedule="onecycle"):
    made = AdamW(lr=1.0, schedule=schedule).build(model, 10, lambda name: decay ** model.depth_of(name))
    found = {}
    for group in made["optimizer"].param_groups:
        for parameter in group["params"]:
            found[id(parameter)] = group.get("max_lr", group["initial_lr"])
    return {name: found[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "linear"])
def test_layer_decay_slows_each_layer_by_its_distance_from_the_head(configure, schedule):
    config, _ = configure()
    encoder, _, _ = make_encoder(config)
    data = make_data(config, encoder)
    model = make_model(config, encoder, data, make_types(config, data))
    of = rates(model, 0.5, schedule)
    assert of["head.mlp.0.weight"] == 1.0
    assert {v for k, v in of.items() if k.startswith("encoder.convs.1")} == {0.5}
    assert {v for k, v in of.items() if k.startswith("encoder.convs.0")} == {0.25}
    assert {v for k, v in of.items() if k.startswith(("encoder.species", "encoder.edge"))} == {0.125}
    assert set(rates(model, 1.0).values()) == {1.0}


def test_a_schedule_goes_up_and_then_down_to_its_end():
    def course(**settings):
        made = AdamW(lr=2.0, min_lr_ratio=0.1, **settings).build(torch.nn.Linear(2, 2), 10)
        rates = []
        for _ in range(12):
            rates.append(made["optimizer"].param_groups[0]["lr"])
            made["optimizer"].step()
            made["lr_scheduler"]["scheduler"].step()
        return rates

    linear = course(schedule="linear", warmup=0.2)
    assert linear[:3] == [1.0, 2.0, 2.0]
    assert np.diff(linear[2:11]) == pytest.approx(-1.8 / 8)
    assert linear[10:] == pytest.approx([0.2, 0.2])
    cosine = course(schedule="cosine", warmup=0.2)
    assert cosine[6] == pytest.approx(1.1)
    assert cosine[10:] == pytest.approx([0.2, 0.2])
    assert course(schedule="linear", warmup=0.0)[:2] == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize("name", choices("encoder"))
def test_every_encoder_says_which_layer_a_parameter_belongs_to(name):
    node = dict(load_yaml(conf_folder() / "encoder" / f"{name}.yaml"))
    with torch.device("meta") if name not in ("cogn",) else torch.device("cpu"):
        encoder = build(node | ({"width": 32} if "width" in node else {}), "encoder")
    layers = {encoder.layer_of(n) for n, _ in encoder.named_parameters()}
    assert layers == set(range(encoder.n_layers + 1))
    assert encoder.n_layers == node["layers"]


def test_an_epoch_of_few_crystals_is_repeated_until_there_are_enough_steps(tmp_path, configure):
    config, values = configure("epochs=4", "min_steps=30")  # 3 steps an epoch: 12, so each is gone through 3 times
    assert config.passes(3) == 3
    assert config.passes(10) == 1
    folder, _ = run(tmp_path, "long", config, values)
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/mae"]]
    assert [int(row["step"]) for row in rows[:4]] == [8, 17, 26, 35]


def test_training_stops_early_and_is_complete(tmp_path, configure):
    config, values = configure("epochs=40", "patience=2", "optimizer.lr=1e-30")
    folder, summary = run(tmp_path, "early", config, values)
    assert summary["status"] == "complete"
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 2
    again, _ = run(tmp_path, "patient", *configure("epochs=4", "patience=9", "optimizer.lr=1e-30"))
    assert torch.load(again / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 3


def test_the_average_of_the_last_steps_is_what_is_exported(tmp_path, configure, monkeypatch):
    kept = []
    monkeypatch.setattr(
        FinetuneModule,
        "on_before_zero_grad",
        lambda self, _: kept.append(self.model.head.mlp[0].weight.detach().clone()),
    )
    config, values = configure("epochs=4", "trainer.swa_fraction=0.5", "optimizer.schedule=constant")
    folder, _ = run(tmp_path, "averaged", config, values)
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    average = state["state_dict"]["model.head.mlp.0.weight"]
    after_step = [*kept[1:], state["current_model_state"]["model.head.mlp.0.weight"]]
    assert len(after_step) == 12
    torch.testing.assert_close(average, torch.stack(after_step[6:]).mean(0), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(average, after_step[-1], rtol=1e-4, atol=1e-6)


def test_a_member_that_is_stopped_before_its_calibration_is_finished_on_resume(tmp_path, configure, monkeypatch):
    def stopped(*_args, **_kwargs):
        raise Interrupted("here")

    line = configure("ensemble=2", "epochs=1")
    with monkeypatch.context() as patch:
        patch.setattr(training, "calibrate", stopped)
        with pytest.raises(Interrupted):
            run(tmp_path, "cut", *line)
    member = tmp_path / "finetune" / "cut" / "member_0"
    assert not (member / "model.safetensors").exists(), "under its name a file is whole"
    run(tmp_path, "cut", *configure("ensemble=2", "epochs=1", "resume=last"))
    assert model_file.read_extra(member / "model.safetensors", "property_model", "calibration.")
    assert not list(member.glob("uncalibrated*"))


def test_an_ensemble_of_seeds_predicts_the_mean_and_spread_of_its_members(tmp_path, configure, capfd):
    folder, summary = run(tmp_path, "seeds", *configure("ensemble=3", "epochs=1"))
    told = capfd.readouterr().err
    assert all(f"member {i} of 3: val/mae" in told for i in (1, 2, 3))
    assert summary["members"] == ["member_0", "member_1", "member_2"]
    with pytest.raises(CheckpointError, match=r"an ensemble of 3 models; name one, as .*member_0"):
        run(tmp_path, "next", *configure(f"pretrained={folder}"))
    loaded = model_file.load_property_models(folder)
    assert len(loaded) == 3
    assert len({float(model.head.mlp[0].weight[0, 0].detach()) for model, _ in loaded}) == 3
    config, _ = configure()
    data = make_data(config, loaded[0][0].encoder)
    rows = data.rows["test"]
    batch = make_batch(data.store.crystals.take(rows), data.graph)
    with torch.inference_mode():
        each = np.stack([model(batch).numpy()[:, 0] for model, _ in loaded])
    with (folder / "predictions_test.csv").open() as file:
        written = {row["material_id"]: row for row in csv.DictReader(file)}
    for place, material_id in enumerate(data.store.ids_at(rows)):
        assert float(written[material_id]["prediction"]) == pytest.approx(each[:, place].mean(), rel=1e-3, abs=1e-4)
        assert float(written[material_id]["std"]) == pytest.approx(each[:, place].std(), rel=1e-2, abs=1e-4)
    true = data.target_values[rows, 0]
    assert summary["test/mae"] == pytest.approx(np.abs(each.mean(0) - true).mean(), rel=1e-4)
    alone = np.abs(each - true).mean(axis=1)
    assert summary["test_members/mae"] == pytest.approx(alone.mean(), rel=1e-4)
    assert summary["test/mae"] <= summary["test_members/mae"] + 1e-6
    with pytest.raises(CheckpointError, match="an ensemble of 3 models"):
        model_file.load_property_model(folder)
    assert len(model_file.load_property_models(folder / "member_1")) == 1


def test_folds_validate_on_every_crystal_once_and_never_touch_the_test_split(tmp_path, configure, small):
    folder, _ = run(tmp_path, "folds", *configure("ensemble=3", "ensemble_by=folds", "epochs=1"))
    parts = [json.loads((folder / f"member_{i}" / "split.json").read_text()) for i in range(3)]
    whole = json.loads((folder / "split.json").read_text())
    validated = [i for part in parts for i in part["val"]]
    assert sorted(validated) == sorted(whole["train"] + whole["val"])
    for part in parts:
        assert part["test"] == whole["test"]
        assert not set(part["train"]) & set(part["val"])
    table = pq.read_table(small)
    formula = dict(zip(table["material_id"].to_pylist(), formulas_of(crystals_of(small)), strict=True))
    for part in parts:
        assert not {formula[i] for i in part["train"]} & {formula[i] for i in part["val"]}


def crystals_of(path):
    return open_store(str(path)).crystals


def test_an_ensemble_that_was_stopped_goes_on_with_the_next_member(tmp_path, configure, monkeypatch):
    config, values = configure("ensemble=3", "epochs=1")
    whole, _ = run(tmp_path, "whole", config, values)
    train, trained = ensemble.train, []

    def stopping(own, *arguments, **more):
        if len(trained) == 2:
            raise Interrupted("stopped")
        trained.append(own.seed)
        return train(own, *arguments, **more)

    monkeypatch.setattr(ensemble, "train", stopping)
    with pytest.raises(Interrupted):
        finetune.run(*finetune_with(tmp_path, "stopped", config, values))
    assert not (tmp_path / "finetune" / "stopped" / "summary.json").exists()
    first = (tmp_path / "finetune" / "stopped" / "member_0" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(ensemble, "train", train)
    assert finetune.run(*finetune_with(tmp_path, "stopped", config, values, resume="last")) == 0
    folder = tmp_path / "finetune" / "stopped"
    assert (folder / "member_0" / "model.safetensors").stat().st_mtime_ns == first
    for i in range(3):
        one, two = weights(whole / f"member_{i}"), weights(folder / f"member_{i}")
        assert same(one, two, one)


def test_combined_predictions_have_the_variance_of_the_mixture():
    rng = np.random.default_rng(0)
    value, std = np.array([[1.0], [2.0]]), np.array([[0.3], [0.5]])
    members = [Prediction(torch.tensor(v)[None], torch.tensor(s)[None], None) for v, s in zip(value, std, strict=True)]
    draws = rng.normal(value[:, 0], std[:, 0], (200_000, 2)).ravel()
    found = combine(members, [Number()])
    assert float(found.value) == pytest.approx(1.5)
    assert float(found.std) == pytest.approx(draws.std(), rel=0.01)


def test_combined_classes_are_the_likeliest_of_the_mean_probability():
    probability = [[[[0.9, 0.1, 0.0]]], [[[0.4, 0.6, 0.0]]], [[[0.4, 0.6, 0.0]]]]
    value = [[[0.0]], [[1.0]], [[1.0]]]
    found = combine(
        [Prediction(torch.tensor(v), None, torch.tensor(p)) for v, p in zip(value, probability, strict=True)],
        [Classes(["a", "b", "c"])],
    )
    assert float(found.value) == 0.0  # two of three say 1, but less surely
    assert torch.isnan(found.std).all()


def test_combined_numbers_of_two_parts_are_zero_where_most_members_say_so():
    values = [[0.0, 1.0], [0.0, 1.0], [1.5, 4.0]], [[0.0, 0.0], [1.2, 3.0], [1.5, 3.0]]
    found = [
        combine([Prediction(torch.tensor([v]), None, None) for v in value], [Hurdle(), Number()]) for value in values
    ]
    torch.testing.assert_close(found[0].value, torch.tensor([[0.0, 2.0]]))
    torch.testing.assert_close(found[1].value, torch.tensor([[1.35, 2.0]]))


def test_ensembles_of_neighbouring_seeds_have_no_member_in_common():
    seeds = [ensemble.member_seed(seed, i) for seed in range(20) for i in range(10)]
    assert len(set(seeds)) == 200
    assert [ensemble.member_seed(seed, 0) for seed in range(3)] == [0, 1, 2]
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_frozen_epoch_on_hundreds_of_crystals_takes_well_under_a_second(tmp_path, pretrained):
    path = subset(tmp_path / "data.parquet", train=400, val=50, max_atoms=20)
    config, values = finetune_config(f"pretrained={pretrained}", f"data.path={path}", "mode=frozen", "epochs=12")
    began = []

    class Timed(FinetuneModule):
        def on_train_epoch_start(self):
            began.append(time.process_time())
            super().on_train_epoch_start()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "FinetuneModule", Timed)
        finetune.train(config, values, tmp_path / "run")
    assert np.median(np.diff(began)) < 0.5


@pytest.mark.distributed
def test_two_processes_train_a_frozen_model_and_score_all_of_its_classes(tmp_path, small, pretrained):
    """DDP with a frozen encoder, numbers and classes: one run, and the figures of all crystals together."""
    table = pq.read_table(small)
    table = table.append_column("is_metal", pa.array(table["band_gap"].to_numpy() == 0))
    pq.write_table(table, tmp_path / "data.parquet")
    arguments = [f"data.path={tmp_path}/data.parquet", "data.targets=[is_metal,band_gap]", f"pretrained={pretrained}"]
    arguments += [
        "mode=frozen",
        "epochs=2",
        "min_steps=0",
        "data.batch_size=16",
        "trainer.devices=2",
        "strategy=ddp",
        *QUIET,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "crysldnet", "finetune", "name=two", "trainer.accelerator=cpu", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != RUN_NAME},
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "finetune" / "two"
    summary = json.loads((folder / "summary.json").read_text())
    with (folder / "predictions_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 16
    right = [row["true"] == row["prediction"] for row in rows if row["target"] == "is_metal"]
    assert summary["test/accuracy/is_metal"] == pytest.approx(np.mean(right))
    gaps = [abs(float(row["true"]) - float(row["prediction"])) for row in rows if row["target"] == "band_gap"]
    assert summary["test/mae/band_gap"] == pytest.approx(np.mean(gaps), rel=1e-3)
    state, exported = weights(folder), model_file.read(pretrained, "encoder")[1]
    assert all(torch.equal(state[f"encoder.{k}"], v) for k, v in exported.items())


@pytest.mark.parametrize("mode", ["frozen", "gradual_unfreezing"])
def test_a_stopped_run_of_every_mode_resumes_to_the_same_weights(tmp_path, configure, monkeypatch, mode):
    config, values = configure(
        f"mode={mode}", "epochs=4", *(["layer_decay=0.5"] if mode == "gradual_unfreezing" else [])
    )
    whole, _ = run(tmp_path, "whole", config, values)
    start = FinetuneModule.on_train_epoch_start

    def stop(self):
        if self.trainer.current_epoch == 2:
            raise KeyboardInterrupt
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneModule, "on_train_epoch_start", stop)
        with pytest.raises(Interrupted):
            finetune.run(*finetune_with(tmp_path, "stopped", config, values))
    assert finetune.run(*finetune_with(tmp_path, "stopped", config, values, resume="last")) == 0
    one, two = weights(whole), weights(tmp_path / "finetune" / "stopped")
    assert same(one, two, one)
