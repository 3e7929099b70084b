"""Heads that read every layer: what they read, how it is standardized, and that nothing else moves."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from conftest import PEROVSKITE, ROCKSALT, TRICLINIC, put_together, supercell
from crysldnet import finetune
from crysldnet.artifacts import model_file
from crysldnet.encoders.protocol import Encoder, features_of_layers
from crysldnet.finetune.module import read_batches, standardize
from crysldnet.graphs.batch import make_batch
from crysldnet.inference import load
from crysldnet.models.head import PropertyHead, PropertyModel
from crysldnet.models.readout import mean_and_spread
from encoders import CLASSES, batch_of, settled, small
from tiny import finetune_config

CELLS = [ROCKSALT, PEROVSKITE, TRICLINIC]


@pytest.mark.parametrize("name", list(CLASSES))
@torch.no_grad()
def test_every_encoder_shows_its_input_and_each_layer_the_output_last(name):
    encoder = settled(small(name), CELLS)
    batch = batch_of(CELLS, encoder)
    layers = features_of_layers(encoder, batch)
    assert len(layers) == encoder.depth == encoder.n_layers + 1
    assert {tuple(layer.shape) for layer in layers} == {(len(batch.numbers), encoder.width)}
    assert torch.equal(layers[-1], encoder(batch))
    assert all(not torch.allclose(a, b) for a, b in pairwise(layers))


def test_an_encoder_with_a_forward_of_its_own_has_one_layer_to_read():
    class Plain(Encoder):
        width, graph = 2, small("cgcnn").graph

        def forward(self, batch):
            return torch.stack([batch.numbers, batch.numbers], dim=1).double()

    encoder = Plain()
    batch = batch_of(CELLS, encoder)
    assert encoder.depth == 1
    assert torch.equal(features_of_layers(encoder, batch)[0], encoder(batch))


def test_mean_and_spread_are_those_of_numpy_and_have_gradients_for_single_atoms():
    rng = np.random.default_rng(0)
    layers = [torch.from_numpy(rng.normal(size=(6, 3))).requires_grad_() for _ in range(2)]
    crystal = torch.tensor([0, 0, 0, 1, 1, 2])
    found = mean_and_spread(layers, crystal, 3)
    whole = torch.cat(layers, dim=1).detach().numpy()
    for b, rows in enumerate(([0, 1, 2], [3, 4], [5])):
        expected = np.concatenate([whole[rows].mean(0), whole[rows].std(0)])
        assert np.allclose(found[b].detach().numpy(), expected, atol=2e-3)
    found.sum().backward()
    assert all(bool(layer.grad.isfinite().all()) for layer in layers)


@pytest.mark.parametrize(("readout", "factor"), [("mean", 1.0), ("attention", 1.0), ("atoms", 1.0), ("sum", 2.0)])
@torch.no_grad()
def test_what_is_read_of_all_layers_does_not_depend_on_the_cell(readout, factor):
    encoder = settled(small("neighbor_attention"), CELLS)
    torch.manual_seed(1)
    head = PropertyHead(width=encoder.width, depth=encoder.depth, outputs=1, readout=readout, layers_read="all")
    model = PropertyModel(encoder=encoder, head=head.double(), targets=["a"], units=[""]).double().eval()
    model.mean.fill_(3.0)
    one = model(make_batch(put_together(CELLS), encoder.graph, dtype=torch.float64))
    doubled = put_together([supercell(c, (2, 1, 1)) for c in CELLS])
    two = model(make_batch(doubled, encoder.graph, dtype=torch.float64))
    assert one.std() > 1e-3
    torch.testing.assert_close(two, factor * one, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def labelled(shared):
    return shared / "data.parquet"


def finetuned(folder, labelled, *arguments):
    given = [f"data.path={labelled}", f"runs={folder}", "epochs=2", "data.batch_size=16", "head.layers_read=all"]
    config, values = finetune_config(*given, "data.targets=[formation_energy_per_atom]", *arguments)
    assert finetune.run(config, values) == 0
    return folder / "finetune" / config.name


@pytest.mark.parametrize("mode", ["full", "frozen", "gradual_unfreezing"])
def test_every_mode_standardizes_by_the_training_split_alone(tmp_path, labelled, pretrained, mode):
    folder = finetuned(tmp_path, labelled, "name=a", f"mode={mode}", f"pretrained={pretrained}")
    model, info = model_file.load_property_model(folder / "model.safetensors")
    assert info["head"]["layers_read"] == "all"
    assert float(model.head.standardized) == 1.0
    config, _ = finetune_config(f"data.path={labelled}", "data.targets=[formation_energy_per_atom]")
    encoder, _ = model_file.load_encoder(pretrained)  # as it was when the head was standardized
    data = finetune.settings.make_data(config, encoder)
    model.encoder = encoder.eval()
    read = torch.cat(list(read_batches(model, data, data.rows["train"], torch.device("cpu"))))
    torch.testing.assert_close(model.head.center, read.mean(0), rtol=1e-4, atol=1e-4)
    others = torch.cat(list(read_batches(model, data, data.rows["val"], torch.device("cpu"))))
    assert not torch.allclose(model.head.center, torch.cat([read, others]).mean(0), rtol=1e-4, atol=1e-4)


def test_a_file_predicts_as_the_model_did(tmp_path, labelled, pretrained):
    folder = finetuned(tmp_path, labelled, "name=a", "mode=frozen", f"pretrained={pretrained}")
    lines = (folder / "predictions_test.csv").read_text().splitlines()
    header = lines[0].split(",")
    ids = [line.split(",")[header.index("material_id")] for line in lines[1:]]
    written = [float(line.split(",")[header.index("prediction")]) for line in lines[1:]]
    found = load(folder).predict(f"{labelled}")
    of_id = dict(zip(found.ids, found.values[:, 0], strict=True))
    assert written == pytest.approx([of_id[name] for name in ids], rel=1e-3, abs=1e-4)


def test_a_run_that_reads_all_layers_resumes_to_the_same_weights(tmp_path, labelled, pretrained, monkeypatch):
    given = ["data.batch_size=16", f"pretrained={pretrained}"]
    whole = finetuned(tmp_path, labelled, "name=whole", *given)
    module = finetune.module.FinetuneModule
    original = module.on_validation_epoch_end

    class Power(Exception):
        pass

    def fail(self):
        original(self)
        raise Power

    monkeypatch.setattr(module, "on_validation_epoch_end", fail)
    with pytest.raises(Power):
        finetuned(tmp_path, labelled, "name=cut", *given)
    monkeypatch.setattr(module, "on_validation_epoch_end", original)
    cut = finetuned(tmp_path, labelled, "name=cut", "resume=last", *given)
    one, two = (model_file.load_property_model(f / "model.safetensors")[0].state_dict() for f in (whole, cut))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_fresh_encoder_is_standardized_by_its_batches_and_its_statistics_stay(labelled):
    config, _ = finetune_config(
        f"data.path={labelled}", "data.targets=[formation_energy_per_atom]", "head.layers_read=all"
    )
    encoder, _, _ = finetune.settings.make_encoder(config)
    data = finetune.settings.make_data(config, encoder)
    head = PropertyHead(width=encoder.width, depth=encoder.depth, outputs=1, layers_read="all")
    model = PropertyModel(encoder=encoder, head=head, targets=["a"], units=[""]).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    standardize(model, data, torch.device("cpu"), fresh=True)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert encoder.training
    center = head.center.clone()
    head.standardized.zero_()
    standardize(model, data, torch.device("cpu"), fresh=False)
    assert not torch.allclose(center, head.center, rtol=1e-2), "running statistics of no data differ from a batch's"


def test_averages_of_the_weights_keep_the_standardization(tmp_path, labelled, pretrained):
    for name in ("trainer.ema_decay=0.9", "trainer.swa_fraction=0.5"):
        folder = finetuned(tmp_path, labelled, f"name={name}", f"pretrained={pretrained}", name)
        model, _ = model_file.load_property_model(folder / "model.safetensors")
        assert float(model.head.standardized) == 1.0
        assert bool((model.head.scale > 0).all())
        assert float(model.head.center.abs().max()) > 0
        assert json.loads((folder / "summary.json").read_text())["status"] == "complete"
