"""Forms of latent diffusion: each sends its gradient where it should, can learn by heart, and starts where it says."""

import math

import numpy as np
import pytest
import torch

from crysldnet import pretrain
from crysldnet.artifacts import model_file
from crysldnet.errors import ConfigError
from crysldnet.graphs.corruption import Corruption
from crysldnet.models.dit import DiT
from crysldnet.models.flow import LatentFlow
from crysldnet.models.latent import Latent, Posterior
from crysldnet.pretrain import verdict
from test_pretrain import SHORT, run
from tiny import pretrain_config, subset

ATTENTION = ["encoder=neighbor_attention_small"]
TINY = ["encoder.width=32", "encoder.layers=2", "encoder.k=8", "encoder.slots=9", "encoder.heads=4"]
DIFFUSION_FORMS = {
    "joint": ["diffusion.target=joint"],
    "joint, target only": ["diffusion.target=joint_target_only"],
    "ema": ["diffusion.target=ema"],
    "clean teacher": ["diffusion.target=clean"],
    "told of the atoms": ["diffusion.target=clean", "diffusion.condition=atoms"],
    "given the crystal": ["diffusion.target=clean", "diffusion.condition=crystal"],
    "no noise": ["diffusion.target=clean", "diffusion.condition=atoms", "diffusion.noise=false"],
    "frozen, with a skip": [
        "diffusion.target=frozen",
        "diffusion.condition=crystal",
        "diffusion.skip=true",
        "diffusion.times=logit_normal",
    ],
}
OTHER_FORMS = {
    "agreement": ["diffusion.weight=0", "latent.agreement_weight=1.0"],
    "covariance": ["diffusion.weight=0", "latent.covariance_weight=1.0"],
    "self-conditioned": ["diffusion.weight=0", "objective.condition=crystal", "objective.condition_share=1.0"],
}


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory):
    return subset(tmp_path_factory.mktemp("sixteen") / "data.parquet", train=16, val=16)


def parts_of(data_path, *arguments):
    """A fresh model of both stages on 16 crystals, and their batch."""
    config, _ = pretrain_config(
        f"data.path={data_path}", "data.batch_size=16", *arguments, tiny_encoder=[*ATTENTION, *TINY]
    )
    model = pretrain.build_model(config, with_flow=True)
    model.start_teacher()
    data = pretrain.make_data(config, model)
    data.setup()
    return model, next(iter(data.train_dataloader()))


def reached_by(model, loss):
    """Return the parts of the model that a loss has a gradient in: the first part of each parameter's name."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n.split(".")[0] for (n, _), g in zip(named, gradients, strict=True) if g is not None and bool(g.any())}


def trained_a_little(model, batch, steps=3):
    """Leave the start, where zeros of the last layers block gradients."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model(batch).terms.values()).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("joint", {"encoder", "posterior", "flow"}),
        ("joint, target only", {"encoder", "posterior", "flow"}),
        ("ema", {"encoder", "posterior", "flow"}),
        ("clean teacher", {"encoder", "posterior", "flow"}),
        ("told of the atoms", {"encoder", "flow"}),
        ("given the crystal", {"encoder", "flow"}),
        ("no noise", {"encoder", "flow"}),
        ("frozen, with a skip", {"encoder", "flow"}),
    ],
)
def test_the_diffusion_loss_reaches_these_parts_and_no_others(sixteen, form, wanted):
    model, batch = parts_of(sixteen, *DIFFUSION_FORMS[form])
    trained_a_little(model, batch)
    assert reached_by(model, model(batch).terms["diffusion"]) == wanted
    assert reached_by(model, model(batch).terms["species"]) == {"encoder", "posterior", "objective"}


@pytest.mark.parametrize(
    ("form", "term", "wanted"),
    [
        ("agreement", "agreement", {"encoder", "posterior"}),
        ("covariance", "covariance", {"encoder", "posterior"}),
        ("self-conditioned", "species", {"encoder", "posterior", "objective", "condition"}),
    ],
)
def test_other_forms_reach_these_parts_without_a_denoiser(sixteen, form, term, wanted):
    model, batch = parts_of(sixteen, *OTHER_FORMS[form])
    assert model.flow is None
    trained_a_little(model, batch)
    assert reached_by(model, model(batch).terms[term]) == wanted


def test_a_joint_gradient_flows_through_both_sides_or_the_target_alone():
    torch.manual_seed(0)
    crystal, sizes = torch.tensor([0, 0, 1]), torch.tensor([2, 1])

    class Halve(torch.nn.Module):
        def forward(self, z, t, valid):
            return 0.5 * z

    gradients = {}
    for target in ("joint", "joint_target_only"):
        flow = LatentFlow(denoiser=Halve(), latent_dim=4, target=target)
        z = torch.ones(3, 4, requires_grad=True)
        torch.manual_seed(1)
        seen = z.detach() if target == "joint_target_only" else z
        flow(seen, z, crystal, sizes, 2).loss.backward()
        gradients[target] = z.grad
    # dL/dz is 2 w (z − D)(1 − t/2) through both sides, and 2 w (z − D) through the target: a factor within (½, 1).
    ratio = gradients["joint"] / gradients["joint_target_only"]
    assert bool(((ratio > 0.5) & (ratio < 1.0)).all())


def test_a_self_conditioned_gradient_comes_from_the_clean_crystal(sixteen):
    model, batch = parts_of(sixteen, *OTHER_FORMS["self-conditioned"])
    trained_a_little(model, batch)
    batch.clean.edge_vec.requires_grad_(True)
    model(batch).terms["species"].backward()
    assert bool(batch.clean.edge_vec.grad.any())


def test_the_clean_batch_holds_the_same_atoms_in_the_same_order(sixteen):
    _, batch = parts_of(sixteen, *DIFFUSION_FORMS["clean teacher"])
    assert torch.equal(batch.clean.numbers, batch.undo.numbers)
    assert torch.equal(batch.clean.crystal, batch.crystal)
    assert bool((batch.numbers == 0).any())
    assert not torch.allclose(batch.clean.lattice, batch.lattice)
    assert batch.to("cpu").double().clean.lattice.dtype == torch.float64
    assert parts_of(sixteen, *DIFFUSION_FORMS["ema"])[1].clean is None


@pytest.mark.parametrize("form", ["joint", "told of the atoms", "given the crystal", "no noise", "self-conditioned"])
def test_every_form_learns_sixteen_crystals_by_heart(sixteen, form):
    diffuses = form in DIFFUSION_FORMS
    arguments = [*DIFFUSION_FORMS[form], "diffusion.weight=1.0"] if diffuses else OTHER_FORMS[form]
    model, batch = parts_of(sixteen, *arguments)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=8e-3)
    for _ in range(80):
        output = model(batch)
        optimizer.zero_grad()
        sum(output.terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.update_teacher()
    measures = {name: float(total / count) for name, (total, count) in output.measures.items()}
    assert measures["masked_accuracy"] > 0.9
    if diffuses:
        with torch.no_grad():
            found = [model(batch).measures for _ in range(20)]
        error, guess = (sum(float(m[k][0]) for m in found) for k in ("diffusion_error", "diffusion_error_baseline"))
        assert error < 0.8 * guess


def test_with_a_skip_the_denoiser_starts_at_the_gaussian_guess():
    torch.manual_seed(0)
    sizes = torch.full((500,), 3)
    z, crystal = torch.randn(1500, 4), torch.repeat_interleave(torch.arange(500), sizes)
    errors = {}
    for skip in (False, True):
        flow = LatentFlow(denoiser=DiT(latent_dim=4, width=16, layers=1, heads=2), latent_dim=4, skip=skip)
        found = flow(z, z, crystal, sizes, 3).measures
        errors[skip] = float(found["diffusion_error"][0] / found["diffusion_error_baseline"][0])
    assert errors[True] == pytest.approx(1.0)
    assert errors[False] > 5.0


def test_times_lie_in_the_middle_where_they_are_logit_normal():
    torch.manual_seed(0)
    flow = LatentFlow(denoiser=torch.nn.Identity(), latent_dim=1, times="logit_normal")
    times = flow._draw_times(torch.zeros(1), 4000)
    assert float(((times > 0.25) & (times < 0.75)).float().mean()) > 0.65, "uniform ones would be there half the time"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["diffusion.condition=atoms"], "teacher"),
        (["diffusion.noise=false"], "condition"),
        (["latent.noise=0"], "noise"),
        (["stages.diffusion.hold_encoder_epochs=5"], "hold_encoder_epochs"),
        (["objective.corruption.displacement=[0.2,0.1]"], "displacement"),
        (["objective.corruption.strain=[0.0,0.1]"], "over 0"),
        (["objective.corruption.clean_fraction=1.0"], "clean_fraction"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(arguments, says):
    def build_it():
        pretrain.build_model(pretrain_config(*arguments)[0], with_flow=True)

    with pytest.raises(ConfigError, match=says):
        build_it()


# The corruption

RANGES = Corruption(mask_fraction=[0.0, 0.5], displacement=[0.01, 0.25], strain=[0.005, 0.08], clean_fraction=0.2)


def test_a_fifth_of_the_crystals_stay_clean_and_masks_are_drawn_down_to_none(starter):
    some = starter.crystals.take(np.flatnonzero(starter.crystals.sizes >= 4)[:1500])
    corrupted, undo = RANGES.apply(some, np.random.default_rng(0))
    clean = undo.levels[:, 0] == 0
    assert 0.17 < clean.mean() < 0.23
    share = np.bincount(some.crystal, undo.masked) / some.sizes
    assert not share[clean].any()
    assert np.abs(share[~clean].mean() - 0.25) < 0.02
    assert (share[~clean] <= 0.5 + 1 / some.sizes[~clean]).all()
    of_atoms = clean[some.crystal]
    assert np.array_equal(corrupted.frac_coords[of_atoms], some.frac_coords[of_atoms])
    assert np.array_equal(corrupted.lattice[clean], some.lattice[clean])


def test_levels_are_log_uniform_and_the_loss_sees_small_ones_as_well(starter):
    some = starter.crystals.take(np.flatnonzero(starter.crystals.sizes >= 4)[:1500])
    _, undo = RANGES.apply(some, np.random.default_rng(0))
    level, kept = undo.levels[:, 0], undo.levels[:, 0] > 0
    assert np.median(level[kept]) == pytest.approx(math.sqrt(0.01 * 0.25), rel=0.1)
    squared = np.bincount(some.crystal, (undo.displacement**2).sum(1)) / some.sizes
    small = kept & (level < 0.075)
    assert squared[small].sum() / squared.sum() < 0.1, "in an absolute loss they hardly count"
    relative = squared[kept] / level[kept] ** 2
    assert 0.4 < relative[small[kept]].sum() / relative.sum() < 0.8


def test_a_number_gives_the_corruption_it_always_gave(starter):
    some = starter.crystals.take(np.arange(30))
    corrupted, undo = Corruption(displacement=0.2, strain=0.08).apply(some, np.random.default_rng(7))
    rng = np.random.default_rng(7)
    rng.random(len(some.numbers))
    strength = rng.random(30)
    moved = rng.standard_normal((len(some.numbers), 3)) * (0.2 * strength[some.crystal])[:, None]
    drift = np.stack([np.bincount(some.crystal, moved[:, axis], 30) for axis in range(3)], axis=1)
    moved -= (drift / some.sizes[:, None])[some.crystal]
    expected = some.frac_coords + np.einsum("ni,nij->nj", moved, np.linalg.inv(some.lattice)[some.crystal])
    assert np.array_equal(corrupted.frac_coords, expected)
    assert np.array_equal(undo.levels[:, 0], 0.2 * strength)


# The latent


def test_the_penalties_measure_what_they_say():
    torch.manual_seed(0)
    crystal = torch.arange(100).repeat_interleave(3)
    independent = torch.randn(300, 4)
    same = torch.randn(300, 1).expand(-1, 4).contiguous()
    together = torch.randn(100, 4).repeat_interleave(3, 0)
    posterior = Posterior(width=8, latent_dim=4, covariance_weight=1.0, agreement_weight=1.0)

    def of(mean):
        terms = posterior.penalties(Latent(mean, mean, mean), crystal, 100)
        return float(terms["covariance"]), float(terms["agreement"])

    assert of(independent)[0] < 0.1
    assert of(same)[0] == pytest.approx(3.0, rel=0.3)
    assert of(independent)[1] == pytest.approx(2 / 3, rel=0.2)
    assert of(together)[1] == pytest.approx(0.0, abs=1e-6)


def test_a_fixed_posterior_noise_is_the_same_for_all_atoms_and_stays():
    torch.manual_seed(0)
    posterior = Posterior(width=8, latent_dim=4, noise=0.3)
    latent = posterior(torch.randn(5000, 8) * 10)
    assert float((latent.sample - latent.mean).std()) == pytest.approx(0.3, rel=0.05)
    assert bool((latent.log_variance == 2 * math.log(0.3)).all())


# The second stage


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return subset(tmp_path_factory.mktemp("small") / "data.parquet", train=48, val=16)


def module_of(data_path, *arguments):
    config, _ = pretrain_config(f"data.path={data_path}", "data.batch_size=16", *arguments)
    return config, pretrain.build_model(config, with_flow=True)


def test_the_denoiser_has_a_learning_rate_and_a_clip_of_its_own(small):
    from dataclasses import replace

    from crysldnet.build import build

    config, model = module_of(small, "stages.diffusion.denoiser_lr_factor=1.0", "stages.diffusion.clip_apart=true")
    pace = config.stages.diffusion
    optimizer = build(config.optimizer, "optimizer")
    optimizer = replace(optimizer, lr=optimizer.lr * pace.lr_factor)
    groups = optimizer.parameter_groups(model, lambda n: pace.denoiser_lr if n.startswith("flow.") else 1.0)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    rates = {name.split(".")[0]: rate[id(p)] for name, p in model.named_parameters()}
    assert rates["flow"] == pytest.approx(config.optimizer["lr"])
    assert rates["encoder"] == rates["objective"] == pytest.approx(0.1 * config.optimizer["lr"])


def test_the_encoder_is_held_while_the_denoiser_learns(tmp_path, small, monkeypatch):
    weights = []
    original = pretrain.PretrainModule.on_validation_epoch_end

    def note(module):
        original(module)
        weights.append({k: v.clone() for k, v in module.model.named_parameters()})

    monkeypatch.setattr(pretrain.PretrainModule, "on_validation_epoch_end", note)
    first, _ = run(tmp_path, "first", f"data.path={small}", "stage=vae", *SHORT)
    weights.clear()
    init = first / "vae" / "pretraining.safetensors"
    held = "stages.diffusion.hold_encoder_epochs=1"
    run(tmp_path, "second", f"data.path={small}", "stage=diffusion", f"init={init}", held, *SHORT)
    begin = model_file.read(init, "pretraining")[1]
    one, two = weights
    assert all(torch.equal(one[k], begin[k]) for k in one if not k.startswith("flow."))
    assert not torch.equal(one["flow.denoiser.output.weight"], torch.zeros_like(one["flow.denoiser.output.weight"]))
    assert not all(torch.equal(two[k], begin[k]) for k in two if k.startswith("encoder."))


def test_clipped_apart_a_large_gradient_of_the_denoiser_leaves_the_others_alone(small):
    _, model = module_of(small)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    norms = {}
    for apart in (False, True):
        module = pretrain.PretrainModule(model=model, optimizer=None, clip_apart=apart)
        module._trainer = torch.nn.Module()
        module._trainer.strategy = "auto"
        module.clip_gradients = lambda _, v, __: torch.nn.utils.clip_grad_norm_(model.parameters(), v)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.full_like(parameter, 100.0 if name.startswith("flow.") else 1e-4)
        module.configure_gradient_clipping(optimizer, 1.0, "norm")
        others = [p.grad for n, p in model.named_parameters() if not n.startswith("flow.")]
        norms[apart] = float(others[0].flatten()[0])
    assert norms[True] == pytest.approx(1e-4)
    assert norms[False] < 1e-6


def test_the_second_stage_draws_new_corruptions_when_asked(small):
    from crysldnet.pretrain.settings import stage_seed

    seen = {}
    for new in ("false", "true"):
        config, model = module_of(small, f"stages.diffusion.new_draws={new}")
        for stage in ("vae", "diffusion"):
            data = pretrain.make_data(config, model, stage_seed(config, stage))
            data.setup()
            seen[new, stage] = next(iter(data.train_dataloader()))
    assert torch.equal(seen["false", "vae"].positions, seen["false", "diffusion"].positions)
    assert not torch.equal(seen["true", "vae"].rows, seen["true", "diffusion"].rows)
    assert torch.equal(seen["true", "vae"].positions, seen["false", "vae"].positions)


def test_validation_draws_the_same_times_and_noise_every_epoch(tmp_path, small):
    import csv

    still = ["stages.diffusion.lr_factor=1e-12", "latent.normalize=false", "name=still", f"runs={tmp_path}"]
    encoder = [*ATTENTION, *TINY]  # without statistics of batches, which would move
    assert pretrain.run(*pretrain_config(f"data.path={small}", *SHORT, *still, tiny_encoder=encoder)) == 0
    with (tmp_path / "pretrain" / "still" / "diffusion" / "metrics.csv").open() as file:
        errors = [float(row["val/diffusion_error"]) for row in csv.DictReader(file) if row["val/diffusion_error"]]
    assert len(errors) == 2
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


REPAIRED = [
    "objective.corruption.mask_fraction=[0.0,0.5]",
    "objective.corruption.clean_fraction=0.2",
    "objective.corruption.displacement=[0.01,0.25]",
    "stages.diffusion.denoiser_lr_factor=1.0",
    "stages.diffusion.clip_apart=true",
    "stages.diffusion.new_draws=true",
    "diffusion.skip=true",
    "diffusion.target=clean",
    "diffusion.condition=crystal",
    "objective.condition=crystal",
]


def test_a_repaired_run_repeats_and_resumes_to_the_same_weights(tmp_path, small, monkeypatch):
    whole, summary = run(tmp_path, "whole", f"data.path={small}", *SHORT, *REPAIRED)
    original = pretrain.PretrainModule.on_validation_epoch_end
    calls = []

    class Power(Exception):
        pass

    def fail_in_third(module):
        original(module)
        calls.append(1)
        if len(calls) == 3:
            raise Power

    monkeypatch.setattr(pretrain.PretrainModule, "on_validation_epoch_end", fail_in_third)
    with pytest.raises(Power):
        run(tmp_path, "cut", f"data.path={small}", *SHORT, *REPAIRED)
    monkeypatch.setattr(pretrain.PretrainModule, "on_validation_epoch_end", original)
    resumed, _ = run(tmp_path, "cut", f"data.path={small}", "resume=last", *SHORT, *REPAIRED)
    one, two = (model_file.read(f / "encoder.safetensors", "encoder")[1] for f in (whole, resumed))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert "val/masked_accuracy_conditioned" in summary["diffusion"]
    assert summary["verdict"]["sentences"]


def test_the_verdict_says_in_words_what_was_learned_and_what_failed():
    stage = {
        "val/masked_accuracy": 0.8,
        "val/masked_accuracy_baseline": 0.3,
        "val/displacement_squared_error": 0.99,
        "val/displacement_squared_error_baseline": 1.0,
        "val/features_spread": 1.0,
        "val/features_rank": 30.0,
    }
    good = verdict({"vae": {**stage, "val/displacement_squared_error": 0.5}})
    assert good["failed"] is False
    assert good["sentences"][0] == "species: learned, 0.800 against 0.300 (most common species)"
    bad = verdict({"vae": stage, "diffusion": {**stage, "val/features_rank": 3.0}})
    assert bad["failed"] is True
    assert "displacements: not learned, 0.990 against 1.000 (as corrupted)" in bad["sentences"]
    assert "encoder output: its effective rank fell from 30 to 3 in the second stage" in bad["sentences"]
