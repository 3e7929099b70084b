"""Targets learned per area, volume or formula unit: what is learned, and that predictions come back as they stand."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import crysldnet
from conftest import PEROVSKITE, ROCKSALT, ROCKSALT_CUBE, TRICLINIC, cell, put_together
from crysldnet import finetune
from crysldnet.data.datasets import EMBEDDED
from crysldnet.errors import ConfigError, DataError
from crysldnet.graphs.batch import make_batch
from crysldnet.graphs.spec import GraphSpec
from crysldnet.inference.explain import explain_crystals
from crysldnet.models.head import PropertyHead, PropertyModel
from crysldnet.models.per import factors_of
from crysldnet.models.targets import Log, Number
from tiny import finetune_config

SHEET = cell([[3, 0, 0], [1.5, 3, 0], [0, 0, 20]], [6, 7, 7], [[0, 0, 0.5], [0.5, 0, 0.52], [0, 0.5, 0.48]])
"""An area of 9 Å²."""
SLABS = ["data=jdft2d", "data.targets=[exfoliation_energy]", "data.batch_size=16", "trainer.accelerator=cpu"]


def factor(per: str, unit: str, *cells) -> list[float]:
    return factors_of({"y": per}, ["x", "y"], ["eV", unit], put_together(cells))[:, 1].tolist()


def test_values_are_divided_by_what_the_cell_has() -> None:
    assert factor("area", "meV/atom", SHEET) == pytest.approx([3 / 9])
    assert factor("area", "meV", SHEET) == pytest.approx([1 / 9])
    volume = 5.64**3
    assert factor("volume", "eV/atom", ROCKSALT, ROCKSALT_CUBE) == pytest.approx([8 / volume] * 2, rel=1e-6)
    assert factor("formula_unit", "eV/atom", ROCKSALT, ROCKSALT_CUBE, PEROVSKITE) == [2, 2, 5]
    assert factor("formula_unit", "eV", ROCKSALT_CUBE, TRICLINIC) == [0.25, 1]
    other = factors_of({"y": "volume"}, ["x", "y"], ["eV/atom", "eV/atom"], put_together([ROCKSALT]))
    assert other[0, 0] == 1
    with pytest.raises(DataError, match=r"ClNa has no gap of over 5 Å.*no slab"):
        factor("area", "eV/atom", SHEET, ROCKSALT)


@pytest.mark.parametrize("kind", [Number("gaussian"), Log("gaussian")])
def test_a_model_learns_scaled_values_and_predicts_them_as_they_stand(kind) -> None:
    class Nothing(torch.nn.Module):
        n_layers = 0

        def forward(self, batch):
            return torch.zeros(batch.num_atoms, 4)

    crystals = put_together([ROCKSALT, ROCKSALT_CUBE, PEROVSKITE])
    head = PropertyHead(width=4, outputs=2, layers=0)
    torch.nn.init.zeros_(head.mlp[-1].weight)
    torch.nn.init.zeros_(head.mlp[-1].bias)
    model = PropertyModel(
        encoder=Nothing(), head=head, targets=["y"], units=["eV/atom"], types=[kind], per={"y": "formula_unit"}
    )
    values = np.array([[1.0], [3.0], [2.0]])
    model.fit_normalisation(values, crystals.sizes, crystals)
    learned = np.array([2.0, 6.0, 10.0])
    line = np.log(learned) if isinstance(kind, Log) else learned
    assert model.mean.item() == pytest.approx(line.mean())
    assert model.std.item() == pytest.approx(line.std())
    assert model.error_scale.item() == pytest.approx(line.std() / 3)
    batch = make_batch(crystals, GraphSpec(k=4), targets=values)
    with torch.no_grad():
        predicted = model.predict(batch)
    center = np.exp(line.mean()) if isinstance(kind, Log) else line.mean()
    np.testing.assert_allclose(predicted.value[:, 0].numpy(), center / np.array([2, 2, 5]), rtol=1e-5)
    assert predicted.std is not None
    std = center * line.std() if isinstance(kind, Log) else line.std()
    np.testing.assert_allclose(predicted.std[:, 0].numpy(), std / np.array([2, 2, 5]), rtol=1e-5)
    losses, _ = model.losses(batch, "gaussian")
    off = (line - line.mean()) / line.std()
    np.testing.assert_allclose(losses[:, 0].detach().numpy(), off**2 / 2 + np.log(2 * np.pi) / 2, rtol=1e-4)


@pytest.mark.parametrize("recipe", ["network", "frozen", "hybrid"])
def test_a_run_predicts_exfoliation_energies_per_atom_and_refuses_bulk(tmp_path: Path, recipe: str) -> None:
    few = tmp_path / "few.parquet"
    pq.write_table(pq.read_table(EMBEDDED / "matbench_jdft2d.parquet").slice(0, 60), few)
    words = [f"runs={tmp_path}", f"data.path={few}", *SLABS, "epochs=1", "target_per={exfoliation_energy: area}"]
    words += [f"recipe={recipe}", "networks=2", "min_steps=2"]
    config, values = finetune_config(*words, "name=a")
    assert finetune.run(config, values) == 0
    run = tmp_path / "finetune" / "a"
    assert json.loads((run / "summary.json").read_text())["test/mae"] > 0
    model = crysldnet.load(run, device="cpu")
    assert model.info["target_per"] == {"exfoliation_energy": "area"}
    found = model.predict(few)
    with (run / "predictions_test.csv").open() as file:
        rows = [line.split(",") for line in file.read().splitlines()[1:]]
    by_id = dict(zip(found.ids, found.values[:, 0], strict=True))
    for row in rows:
        assert by_id[row[0]] == pytest.approx(float(row[3]), rel=1e-4, abs=1e-4)
    (one,) = explain_crystals(model, put_together([SHEET]))
    assert one.found.total == pytest.approx(model.predict(put_together([SHEET])).values[0, 0], rel=1e-2)
    with pytest.raises(DataError, match="so it has no area"):
        model.predict(put_together([SHEET, ROCKSALT]))
    both = model.predict(put_together([ROCKSALT, SHEET]), on_error="report")
    assert len(both) == len(both.refused) == 1
    assert "so it has no area" in both.refused[0].reason


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["target_per={band_gap: area}", "data.targets=[band_gap]"], DataError, "so it has no area"),
        (["target_per={gap: volume}"], ConfigError, "target_per: 'gap' is not among data.targets"),
        (["target_per={formation_energy_per_atom: volume}", "head=sum"], ConfigError, "with head=sum"),
    ],
)
def test_what_can_not_be_learned_so_is_refused(words: list[str], error: type, message: str, tmp_path: Path) -> None:
    config, values = finetune_config(f"runs={tmp_path}", "trainer.accelerator=cpu", *words)
    with pytest.raises(error, match=message):
        finetune.run(config, values)
