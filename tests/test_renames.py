"""Keys and values of earlier versions are accepted in files and on the command line; a note names the new one once."""

from pathlib import Path

import pytest
import yaml

from crysldnet import renames
from crysldnet.config import compose
from crysldnet.models.targets import TYPES

CASES = [
    ("pretrain", "model.latent_dim=8", "latent.latent_dim", 8),
    ("pretrain", "model.log_variance=-1.0", "latent.log_variance_init", -1.0),
    ("pretrain", "model.normalise=false", "latent.normalize", False),
    ("pretrain", "stages.vae.gradient_clip=2.0", "stages.vae.gradient_clip_val", 2.0),
    ("pretrain", "stages.diffusion.gradient_clip=null", "stages.diffusion.gradient_clip_val", None),
    ("finetune", "gradient_clip=2.0", "gradient_clip_val", 2.0),
    ("finetune", "trainer.nodes=2", "trainer.num_nodes", 2),
    ("finetune", "trainer.accumulate=3", "trainer.accumulate_grad_batches", 3),
    ("finetune", "trainer.log_every=4", "trainer.log_every_n_steps", 4),
    ("finetune", "trainer.average_last=0.3", "trainer.swa_fraction", 0.3),
    ("finetune", "trainer.time_limit_minutes=5.5", "trainer.max_time", 5.5),
    ("finetune", "trainer.max_bad_steps=5", "trainer.max_nonfinite_steps", 5),
    ("finetune", "optimizer.final=0.1", "optimizer.min_lr_ratio", 0.1),
    ("finetune", "element_references=[a]", "atomic_references", ["a"]),
    ("finetune", "mode=gradual", "mode", "gradual_unfreezing"),
    ("finetune", "encoder.variant=clean", "encoder.variant", "corrected"),
    ("finetune", "data.split.by=cluster", "data.split.by", "leave_cluster_out"),
    ("finetune", "target_types={a: two_part, b: [0, 1]}", "target_types", {"a": "hurdle", "b": [0, 1]}),
    ("matbench", "target_types.a=number", "target_types.a", "regression"),
]


def at(values: dict, key: str) -> object:
    for part in key.split("."):
        values = values[part]
    return values


@pytest.fixture(autouse=True)
def _nothing_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renames, "_noted", set())


@pytest.mark.parametrize(("command", "argument", "key", "value"), CASES)
def test_an_old_name_is_accepted_on_the_command_line(command, argument, key, value, capsys):
    composition = compose(command, [argument])
    assert at(composition.values, key) == value
    assert compose(command, [argument]).values == composition.values
    said = capsys.readouterr().err
    assert said.count("is called") == 1
    assert "the old name still works" in said
    old = argument.partition("=")[0]
    if old != key:
        assert old.split(".")[0] in said
        with pytest.raises(KeyError):
            at(composition.values, old)


@pytest.mark.parametrize(("command", "argument", "key", "value"), [case for case in CASES if case[0] != "matbench"])
def test_an_old_name_is_accepted_in_files(tmp_path: Path, command, argument, key, value):
    name, _, text = argument.partition("=")
    content = yaml.safe_load(text)
    for part in reversed(name.split(".")):
        content = {part: content}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(content))
    assert at(compose(command, [f"preset={tmp_path / 'old.yaml'}"]).values, key) == value


def test_the_strategy_for_one_device_has_its_new_name():
    assert compose("finetune", ["strategy=single"]).values == compose("finetune", ["strategy=auto"]).values


def test_new_names_exist():
    values = {command: compose(command).values for command in ("pretrain", "finetune")}
    for new in renames.KEYS.values():
        found = []
        for of_command in values.values():
            try:
                found.append(at(of_command, new.rstrip(".")))
            except KeyError:
                continue
        assert found, new
    assert set(renames.TARGET_TYPES.values()) <= TYPES.keys()


def test_a_model_of_predict_is_no_latent_space():
    assert compose("predict", ["model=runs/a", "files=b"]).values["model"] == "runs/a"
