"""Pretraining on real crystals: it learns, it doesn't collapse (and is seen to where it should), it repeats exactly."""

import csv
import json
import math

import pytest
import torch

from crysldnet import pretrain
from crysldnet.artifacts import model_file
from crysldnet.errors import CheckpointError, ConfigError
from crysldnet.graphs.corruption import Corruption
from crysldnet.pretrain import verdict
from tiny import DENOISER, ENCODER, pretrain_config, subset


def run(path, name, *arguments):
    """Run a tiny pretraining; return its folder and summary."""
    config, values = pretrain_config(f"runs={path}", f"name={name}", *arguments)
    assert pretrain.run(config, values) == 0
    folder = path / "pretrain" / name
    return folder, json.loads((folder / "summary.json").read_text())


def train_step_by_step(model, data, steps, lr=3e-3):
    """Train without Lightning, to show that the model needs none."""
    data.setup()
    loader = data.train_dataloader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    done = 0
    while done < steps:
        loader.sampler.set_epoch(done)
        for batch in loader:
            loss = sum(model(batch).terms.values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            if done == steps:
                break
    return model


def measured(model, data, seed=0):
    """Return the means of all measures over the training crystals."""
    torch.manual_seed(seed)
    model.eval()
    totals: dict[str, list[float]] = {}
    with torch.no_grad():
        for batch in data.train_dataloader():
            for name, (total, count) in model(batch).measures.items():
                so_far = totals.setdefault(name, [0.0, 0.0])
                so_far[0] += float(total)
                so_far[1] += float(count)
    return {name: total / count for name, (total, count) in totals.items()}


def test_sixteen_crystals_are_learned_by_heart(tmp_path):
    data_path = subset(tmp_path / "sixteen.parquet", train=16)
    config, _ = pretrain_config(
        f"data.path={data_path}",
        "data.batch_size=16",
        "encoder.dropout=0",
        "encoder.width=64",
        "objective.hidden=64",
        "objective.corruption.resample=false",
    )
    model = pretrain.build_model(config, with_flow=False)
    data = pretrain.make_data(config, model)
    train_step_by_step(model, data, 250, lr=5e-3)
    results = measured(model, data)
    assert results["masked_accuracy"] == 1.0
    assert results["lattice_relative_error"] < 0.02
    assert results["lattice_relative_error"] < 0.6 * results["lattice_relative_error_baseline"]
    assert results["coordinate_error"] < 0.6 * results["coordinate_error_baseline"]


def test_undoing_what_was_done_restores_the_crystal(starter):
    import numpy as np

    from crysldnet.graphs.batch import make_batch
    from crysldnet.graphs.geometry import undo_strain
    from crysldnet.graphs.spec import GraphSpec

    crystals = starter.crystals.take(np.arange(20))
    corrupted, undo = Corruption(displacement=0.2, strain=0.1).apply(crystals, np.random.default_rng(0))
    batch = make_batch(corrupted, GraphSpec(k=4), undo=undo, dtype=torch.float64)
    restored = undo_strain(batch.lattice, batch.undo.strain)
    assert torch.allclose(restored, torch.from_numpy(crystals.lattice), atol=1e-9)
    assert not torch.allclose(batch.lattice, restored, atol=1e-2)


STAGE2 = [
    "stages.vae.epochs=12",
    "stages.diffusion.epochs=25",
    "optimizer.lr=3e-3",
    "stages.diffusion.lr_factor=1.0",
    "optimizer.schedule=constant",
    "data.batch_size=20",
]


@pytest.fixture(scope="module")
def two_hundred(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_hundred")
    return subset(folder / "data.parquet", train=200, val=40)


@pytest.fixture(scope="module")
def first_stage(two_hundred, tmp_path_factory):
    """A first stage on 200 crystals that both kinds of second stage begin with."""
    return run(tmp_path_factory.mktemp("first"), "vae", f"data.path={two_hundred}", "stage=vae", *STAGE2)


def second_stage(path, two_hundred, first, *arguments):
    init = first[0] / "vae" / "pretraining.safetensors"
    _, summary = run(path, "second", f"data.path={two_hundred}", "stage=diffusion", f"init={init}", *STAGE2, *arguments)
    before, after = first[1]["vae"], summary["diffusion"]
    return (
        after["val/features_spread"] / before["val/features_spread"],
        after["val/features_rank"] / before["val/features_rank"],
    )


@pytest.mark.parametrize("target", ["joint", "ema", "frozen"])
def test_the_second_stage_does_not_collapse(tmp_path, two_hundred, first_stage, target):
    spread, rank = second_stage(tmp_path, two_hundred, first_stage, f"diffusion.target={target}")
    assert spread > 0.5
    assert rank > 0.5


def test_without_reconstruction_a_joint_target_collapses(tmp_path, two_hundred, first_stage):
    spread, _ = second_stage(
        tmp_path,
        two_hundred,
        first_stage,
        "diffusion.reconstruction=false",
        "diffusion.latent=features",
        "diffusion.weight=1.0",
    )
    assert spread < 0.1


SHORT = ["stages.vae.epochs=2", "stages.diffusion.epochs=2", "data.batch_size=16"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return subset(tmp_path_factory.mktemp("small") / "data.parquet", train=48, val=16)


def weights(folder):
    return model_file.read(folder / "encoder.safetensors", "encoder")[1]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path, small):
    one, _ = run(tmp_path, "one", f"data.path={small}", *SHORT)
    two, _ = run(tmp_path, "two", f"data.path={small}", *SHORT)
    other, _ = run(tmp_path, "other", f"data.path={small}", "seed=1", *SHORT)
    assert all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(two).values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(other).values(), strict=True))


def test_both_stages_in_one_command_equal_one_after_the_other(tmp_path, small):
    both, _ = run(tmp_path, "both", f"data.path={small}", *SHORT)
    first, _ = run(tmp_path, "first", f"data.path={small}", "stage=vae", *SHORT)
    init = first / "vae" / "pretraining.safetensors"
    second, _ = run(tmp_path, "second", f"data.path={small}", "stage=diffusion", f"init={init}", *SHORT)
    assert all(torch.equal(a, b) for a, b in zip(weights(both).values(), weights(second).values(), strict=True))


def curve(file):
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["val/loss"]]
    return [(row["epoch"], row["step"], round(float(row["val/loss"]), 6)) for row in rows]


def test_a_run_stopped_between_epochs_resumes_to_the_same_weights(tmp_path, small, monkeypatch):
    whole, _ = run(tmp_path, "whole", f"data.path={small}", *SHORT)

    class Power(Exception):
        pass

    original = pretrain.PretrainModule.on_validation_epoch_end

    def fail_in_second_epoch(module):
        original(module)
        if module.current_epoch == 1:
            raise Power

    monkeypatch.setattr(pretrain.PretrainModule, "on_validation_epoch_end", fail_in_second_epoch)
    with pytest.raises(Power):
        run(tmp_path, "cut", f"data.path={small}", *SHORT)
    monkeypatch.setattr(pretrain.PretrainModule, "on_validation_epoch_end", original)
    resumed, _ = run(tmp_path, "cut", f"data.path={small}", "resume=last", *SHORT)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values(), strict=True))
    assert curve(resumed / "vae" / "metrics.csv") == curve(whole / "vae" / "metrics.csv")


def test_a_run_stopped_between_stages_resumes_with_the_second(tmp_path, small, monkeypatch):
    whole, expected = run(tmp_path, "whole", f"data.path={small}", *SHORT)
    original = pretrain._run_stage

    def only_the_first(config, values, stage, *rest):
        if stage == "diffusion":
            raise KeyboardInterrupt
        return original(config, values, stage, *rest)

    monkeypatch.setattr(pretrain, "_run_stage", only_the_first)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "cut", f"data.path={small}", *SHORT)
    monkeypatch.setattr(pretrain, "_run_stage", original)
    resumed, summary = run(tmp_path, "cut", f"data.path={small}", "resume=last", *SHORT)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values(), strict=True))
    assert summary["vae"] == expected["vae"]


def test_what_is_logged_each_epoch(tmp_path, small):
    folder, summary = run(tmp_path, "logged", f"data.path={small}", *SHORT)
    for stage in ("vae", "diffusion"):
        with (folder / stage / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["val/loss"]]
        assert len(rows) == 2
        wanted = {"loss/species", "loss/displacement", "loss/strain", "loss/kl", "masked_accuracy"}
        wanted |= {"masked_accuracy_baseline", "lattice_length_error", "lattice_angle_error", "coordinate_error"}
        wanted |= {"features_spread", "features_rank", "latent_spread", "latent_rank"}
        wanted |= {"loss/diffusion"} if stage == "diffusion" else set()
        for name in wanted:
            assert all(math.isfinite(float(row[f"val/{name}"])) for row in rows), name
        baselines = [row["val/coordinate_error_baseline"] for row in rows]
        assert len(set(baselines)) == 1, "validation must be corrupted the same way every epoch"
        assert summary[stage]["val/loss"] == pytest.approx(float(rows[-1]["val/loss"]), rel=1e-4)


@pytest.mark.parametrize("objective", ["masked", "published"])
def test_other_objectives_train(tmp_path, small, objective):
    _, summary = run(tmp_path, "other", f"data.path={small}", f"objective={objective}", *SHORT)
    assert math.isfinite(summary["diffusion"]["val/loss/diffusion"])
    assert ("val/loss/strain" in summary["vae"]) is False
    assert ("val/lattice_length_error" in summary["vae"]) is (objective == "published")


def test_the_published_recipe_trains_both_stages(tmp_path, small):
    arguments = [*ENCODER, *DENOISER, "latent.latent_dim=32", "data.batch_size=16"]
    arguments += ["stages.vae.epochs=1", "stages.diffusion.epochs=1"]
    folder, summary = run(tmp_path, "published", "preset=published", f"data.path={small}", *arguments)
    assert set(summary["diffusion"]) >= {"val/loss/diffusion", "val/features_spread"}
    assert "val/loss/species" not in summary["diffusion"]
    assert model_file.load_encoder(folder / "encoder.safetensors")[0].graph.repeat_self_images


def test_resuming_what_is_complete_or_absent_is_refused(tmp_path, small):
    run(tmp_path, "done", f"data.path={small}", "stage=vae", "stages.vae.epochs=1")
    for arguments, says in (
        (["name=done"], "complete"),
        (["name=done", "resume=last"], "complete"),
        (["name=nothing", "resume=last"], "no run to resume"),
        (["name=null", "resume=last"], "complete"),
    ):
        config, values = pretrain_config(f"runs={tmp_path}", f"data.path={small}", *arguments)
        with pytest.raises(ConfigError, match=says):
            pretrain.run(config, values)


def test_a_wrong_start_leaves_no_folder(tmp_path, small):
    for arguments, error in (
        (["data.path=nowhere.parquet"], "nowhere"),
        (["trainer.devices=2"], "strategy"),
        (["stage=diffusion"], "init"),
        (["strategy=fsdp"], "GPU"),
    ):
        config, values = pretrain_config(f"runs={tmp_path}", f"data.path={small}", *arguments)
        with pytest.raises(Exception, match=error):
            pretrain.run(config, values)
    assert not (tmp_path / "pretrain").exists()


def test_a_collapse_is_reported_as_one():
    stage = {"val/features_spread": 1.0, "val/features_rank": 10.0}
    assert verdict({"vae": stage, "diffusion": dict(stage)})["collapsed"] is False
    assert verdict({"vae": stage, "diffusion": {**stage, "val/features_spread": 0.1}})["collapsed"] is True
    assert verdict({"vae": stage, "diffusion": {**stage, "val/features_rank": 4.0}})["collapsed"] is True
    assert verdict({"vae": stage})["collapsed"] is None


def test_a_seed_may_be_a_date(tmp_path, small):
    run(tmp_path, "dated", f"data.path={small}", "stage=vae", "stages.vae.epochs=1", "seed=20261123")


def test_a_first_stage_on_another_graph_is_refused(tmp_path, small):
    folder, _ = run(tmp_path, "first", f"data.path={small}", "stage=vae", "stages.vae.epochs=1")
    init = folder / "vae" / "pretraining.safetensors"
    with pytest.raises(CheckpointError, match="k=8"):
        run(tmp_path, "second", f"data.path={small}", "stage=diffusion", f"init={init}", "encoder.k=9")


def test_a_first_stage_of_another_size_is_refused(tmp_path, small):
    folder, _ = run(tmp_path, "first", f"data.path={small}", "stage=vae", "stages.vae.epochs=1")
    init = folder / "vae" / "pretraining.safetensors"
    with pytest.raises(CheckpointError, match="needs"):
        run(tmp_path, "second", f"data.path={small}", "stage=diffusion", f"init={init}", "latent.latent_dim=8")
