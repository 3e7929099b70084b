"""A run goes on with the command that began it: what is composed for it again is what it was started with."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crysldnet.config import (
    PRESETS,
    Composition,
    argument,
    choices,
    compose,
    load_yaml,
    pin_files,
    read_saved,
    refuse_changed,
    to_yaml,
)
from crysldnet.config.files import conf_folder
from crysldnet.errors import ConfigError
from crysldnet.training.run_folder import RunFolder, check_name, find_run

GROUPS = {command: list(load_yaml(conf_folder() / f"{command}.yaml").defaults) for command in PRESETS}
GIVEN = {"custom": ["data.path=some.store", "data.targets=[e]"]}
"""What a choice needs besides."""


def save(folder: Path, composition: Composition) -> Path:
    """Write the configuration as a run does that begins."""
    path = folder / "config.yaml"
    path.write_text(to_yaml({"defaults": composition.choices, **composition.values}))
    return path


@cache
def everything(command: str) -> list[list[str]]:
    """Arguments: every preset and every choice alone, and a preset with every choice of the groups that it changes.

    Of the other groups one choice comes with a preset: neither sees anything of the other.
    """
    every = {group: [[f"{group}={name}", *GIVEN.get(name, [])] for name in choices(group)] for group in GROUPS[command]}
    found = [[], *(choice for group in every.values() for choice in group)]
    for preset in choices(PRESETS[command]):
        file = load_yaml(conf_folder() / PRESETS[command] / f"{preset}.yaml")
        changed = {*file, *(file.get("defaults") or {})}
        chosen = [
            choice for group, several in every.items() for choice in (several if group in changed else several[-1:])
        ]
        found += [[f"preset={preset}", *choice] for choice in [[], *chosen]]
    return found


@pytest.mark.parametrize("command", PRESETS)
def test_the_same_arguments_with_resume_compose_what_a_run_was_begun_with(command, tmp_path):
    assert len(everything(command)) > 50
    for arguments in everything(command):
        arguments = [*arguments, "seed=3", "optimizer.lr=0.5", "trainer.max_time=7"]
        begun = compose(command, arguments)
        saved = save(tmp_path, begun)
        again = compose(command, [*arguments, "resume=last"], saved)
        assert again.values == {**begun.values, "resume": "last"}, arguments
        assert again.choices == begun.choices
        assert refuse_changed(command, again, saved, complete=False) == {"resume"}
        assert compose(command, ["resume=last"], saved).values == again.values


@pytest.mark.parametrize("command", PRESETS)
def test_runs_that_kept_no_choices_are_resumed_with_the_same_arguments_too(command, tmp_path):
    for arguments in everything(command):
        values = compose(command, arguments).values
        (tmp_path / "config.yaml").write_text(to_yaml(values))
        assert compose(command, [*arguments, "resume=last"], tmp_path / "config.yaml").values == {
            **values,
            "resume": "last",
        }


def test_a_group_named_again_keeps_the_values_given_when_the_run_was_begun(tmp_path):
    begun = compose("finetune", ["preset=matformer", "data=jdft2d", "data.batch_size=7", "encoder.layers=2"])
    again = compose("finetune", ["data=jdft2d", "encoder=matformer", "resume=last"], save(tmp_path, begun))
    assert again.values == {**begun.values, "resume": "last"}


@pytest.mark.parametrize(
    ("begun", "again", "says"),
    [
        (["data=jdft2d"], ["data=starter"], "data.path: the run"),
        (["preset=matformer"], ["preset=cogn"], "preset=cogn: the run in .* was started with preset=matformer"),
        ([], ["preset=cogn"], "was started with no preset"),
        ([], ["trainer.precision=bf16-mixed"], "trainer.precision"),
        ([], ["trainer.ema_decay=0.9"], "trainer.ema_decay"),
        ([], ["trainer.swa_fraction=0.25"], "trainer.swa_fraction"),
        ([], ["optimizer.lr=0.1"], "optimizer.lr"),
        ([], ["data.batch_size=16"], "data.batch_size"),
        ([], ["seed=1"], "seed"),
        ([], ["pretrained=other.safetensors"], "pretrained: the run"),
    ],
)
def test_what_changes_a_result_is_refused_and_named(tmp_path, begun, again, says):
    saved = save(tmp_path, compose("finetune", begun))
    with pytest.raises(ConfigError, match=says):
        refuse_changed("finetune", compose("finetune", [*again, "resume=last"], saved), saved, complete=False)


def test_stages_may_become_longer_and_nothing_else_of_them_may_change(tmp_path, capsys):
    saved = save(tmp_path, compose("pretrain", []))
    refuse_changed("pretrain", compose("pretrain", ["stages.vae.epochs=50"], saved), saved, complete=False)
    assert "stages.vae.epochs is 50 from here on, and was 25" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"stages\.vae\.lr_factor"):
        refuse_changed("pretrain", compose("pretrain", ["stages.vae.lr_factor=0.5"], saved), saved, complete=False)


@pytest.mark.parametrize(
    "argument_",
    [
        "data.num_workers=3",
        "trainer.progress_bar=false",
        "trainer.log_every_n_steps=3",
        "trainer.max_time=9",
        "trainer.checkpoint_every_steps=5",
        "trainer.keep_checkpoints=1",
        "logger=wandb",
        "logger.notes=hm",
        "runs=elsewhere",
    ],
)
def test_what_cannot_change_a_result_may_change_and_is_not_mentioned(tmp_path, argument_, capsys):
    for command in PRESETS:
        saved = save(tmp_path, compose(command, ["logger=wandb"]))
        refuse_changed(command, compose(command, [argument_, "resume=last"], saved), saved, complete=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("argument_", ["trainer.devices=2", "strategy=ddp", "trainer.compile=true"])
def test_how_a_run_is_executed_may_change_and_is_said(tmp_path, argument_, capsys):
    saved = save(tmp_path, compose("finetune", []))
    refuse_changed("finetune", compose("finetune", [argument_, "resume=last"], saved), saved, complete=False)
    assert "from here on, and was" in capsys.readouterr().err


def test_a_file_named_through_a_link_is_pinned_when_the_run_begins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / "pretrain" / name).mkdir(parents=True)
        (tmp_path / "pretrain" / name / "encoder.safetensors").touch()
    latest = tmp_path / "pretrain" / "latest"
    latest.symlink_to("a")
    named = "pretrained=pretrain/latest/encoder.safetensors"
    begun = pin_files(compose("finetune", [named]))
    assert begun.values["pretrained"] == "pretrain/a/encoder.safetensors"
    saved = save(tmp_path, begun)
    latest.unlink()
    latest.symlink_to("b")
    again = pin_files(compose("finetune", [named, "resume=last"], saved))
    assert again.values["pretrained"] == "pretrain/a/encoder.safetensors"
    assert again.choices == begun.choices
    refuse_changed("finetune", again, saved, complete=False)


TRICKY = [
    *("1e5", "1e-5", "1_000", "0x10", "0o7", "010", "1:30", ".5", "5.", "+1", "-", "~", "null", "Null", "None", "NaN"),
    *(".nan", ".inf", "-.Inf", "yes", "No", "on", "OFF", "true", "False", "y", "2024-01-01", "2024-01-01T10:00:00Z"),
    *("", " ", " a", "a ", "a: b", "a #b", "#a", "- a", "[a]", "{a: 1}", "[", "*.cif", "&a", "!!int 3", "%", "@", "`"),
    *("a\nb", "a\n", "\t", "\x7f", "\x85", "\u2028", "\ufeff", "é", "结", "\U0001f600", "'", '"', "\\", "\\n", "$HOME"),
    *("${oc.env:HOME}", "\\${x}", "\\\\${", "$(touch x)", "a,b", "=", "<b>", "Sodium (Na)", "=1+1", "--x", "x=y"),
]
TEXTS = st.sampled_from(TRICKY) | st.text(max_size=12).filter(lambda text: text != "???")
SCALARS = TEXTS | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3), max_leaves=6)


def survives(value, folder):
    path = save(folder, Composition({"key": value, "resume": None}, {}, {}))
    assert read_saved(path)[0]["key"] == value
    assert compose("pretrain", ["resume=last"], path).values["key"] == value
    assert compose("pretrain", [argument("key", value)]).values["key"] == value


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(value=VALUES)
def test_a_value_survives_the_configuration_file_and_the_command_line(tmp_path_factory, value):
    survives(value, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("text", TRICKY)
def test_a_text_survives_alone_in_a_list_and_as_a_name(text, tmp_path):
    for value in (text, [text], {text: [text]}):
        survives(value, tmp_path)


@pytest.mark.parametrize("name", ["", " ", ".", "..", "latest", "a/b", "/a", "a\\b", ".hidden", "a\nb", "\x1b[31m", 5])
def test_a_name_that_no_folder_of_a_run_can_have_is_refused(name, tmp_path):
    for refuse in (
        lambda: check_name(name),
        lambda: find_run(str(tmp_path), "pretrain", name),
        lambda: RunFolder(str(tmp_path), "pretrain", name, resume=False),
    ):
        with pytest.raises(ConfigError, match="name="):
            refuse()
    assert list(tmp_path.iterdir()) == []
