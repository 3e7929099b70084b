"""Configuration: every file composes, every key is known, errors name key, file and mend."""

import itertools
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from crysldnet import build as build_module
from crysldnet.build import TARGET, build, check
from crysldnet.cli import COMMANDS, run
from crysldnet.config import PRESETS, arguments_for, choices, compose, conf_folder, validate
from crysldnet.data.catalog import read_definition
from crysldnet.errors import ConfigError, CrysldnetError
from crysldnet.finetune import FinetuneConfig
from crysldnet.graphs.spec import GraphSpec
from crysldnet.inference.predict import PredictConfig
from crysldnet.pretrain import PretrainConfig, build_model
from crysldnet.tools.matbench.settings import recipe_arguments
from crysldnet.tools.report.run_files import read_run

GROUPS = ["data", "encoder", "objective", "denoiser", "head", "optimizer", "trainer", "strategy", "logger"]


def check_pretrain(*arguments: str) -> PretrainConfig:
    return validate(compose("pretrain", arguments), PretrainConfig)


@pytest.mark.parametrize(("group", "choice"), [(g, c) for g in GROUPS for c in choices(g)])
def test_every_choice_composes_and_is_valid(group, choice):
    command, schema = ("finetune", FinetuneConfig) if group == "head" else ("pretrain", PretrainConfig)
    extra = ["data.path=somewhere.parquet"] if (group, choice) == ("data", "custom") else []
    composition = compose(command, [f"{group}={choice}", *extra])
    assert getattr(validate(composition, schema), group) == composition.values[group]


def test_every_choice_builds(tmp_path):
    parts = {
        "data": {"graph": GraphSpec(k=3)},
        "objective": {"latent_dim": 4},
        "denoiser": {"latent_dim": 4},
        "head": {"width": 8, "outputs": 1},
        "logger": {"folder": tmp_path, "name": "run", "config": {}},
    }
    for group in GROUPS:
        for choice in choices(group):
            command = "finetune" if group == "head" else "pretrain"
            extra = ["data.path=somewhere.parquet"] if choice == "custom" else []
            extra += ["logger.mode=disabled"] if choice == "wandb" else []
            node = compose(command, [f"{group}={choice}", *extra]).values[group]
            if choice == "deepspeed" and find_spec("deepspeed") is None:
                with pytest.raises(ConfigError, match="isn't installed"):
                    build(node, group)
                continue
            assert build(node, group, **parts.get(group, {})) is not None, (group, choice)


@pytest.mark.parametrize("choice", ["pddformer", "pddformer_small"])
@pytest.mark.parametrize("objective", ["denoising", "masked", "published"])
def test_every_pretraining_model_builds(choice, objective):
    model = build_model(
        check_pretrain(f"encoder={choice}", f"objective={objective}", "encoder.layers=2"), with_flow=True
    )
    assert model.flow is not None


def test_the_published_preset_has_the_published_sizes():
    model = build_model(check_pretrain("preset=published"), with_flow=True)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(model.encoder) == 4_332_800
    assert count(model.objective) == 30_583 + 771 + 2_313
    assert count(model.posterior) == 131_072
    assert count(model.flow.denoiser) == 129_903_616
    assert not model.reconstructs
    assert model.encoder.graph.repeat_self_images


@pytest.mark.parametrize("command", PRESETS)
def test_every_preset_is_a_whole_configuration_and_the_help_lists_it(command, capsys):
    assert run([command, "--help"]) == 0
    listed = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("preset"))
    for name in choices(PRESETS[command]):
        composition = compose(command, [f"preset={name}"])
        check(composition.values["encoder"], "encoder")
        check(composition.values["optimizer"], "optimizer")
        assert composition.values["encoder"]["variant"] == "published"
        assert name in listed


def test_a_preset_of_another_command_is_refused():
    for command, words in (("pretrain", "available: published"), ("finetune", "matformer"), ("sweep", "no presets")):
        with pytest.raises(ConfigError, match=words):
            compose(command, ["preset=cogn" if command == "pretrain" else "preset=published"])


def test_every_yaml_lies_where_a_test_reads_it():
    known = {*GROUPS, "preset", "published", "sweep"}
    assert {p.name for p in conf_folder().iterdir() if p.is_dir()} == known
    assert {p.stem for p in conf_folder().glob("*.yaml")} == set(COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_teaches_every_key(command, capsys):
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    for line in (conf_folder() / f"{command}.yaml").read_text().splitlines():
        key = line.split(":")[0].strip()
        if key and not key.startswith("#") and key != "defaults":
            assert key in text
    assert "usage: crysldnet" in text


def test_printed_config_is_the_resolved_one(capsys):
    assert run(["pretrain", "--print-config", "encoder=pddformer", "latent.latent_dim=8"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["encoder"]["width"] == 256
    assert printed["latent"]["latent_dim"] == 8


def test_overrides_win_over_presets_and_presets_over_groups():
    assert check_pretrain("preset=published").optimizer["lr"] == 1e-3
    assert check_pretrain("preset=published", "optimizer.lr=0.5").optimizer["lr"] == 0.5
    assert check_pretrain("optimizer.lr=0.5", "preset=published").optimizer["lr"] == 0.5
    assert check_pretrain("preset=published", "encoder=pddformer_small").encoder["width"] == 64


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("enocder=pddformer", ["enocder", "encoder"]),
        ("encoder=pddfromer", ["pddformer", "available"]),
        ("encoder.widht=3", ["encoder.widht", "width", "on the command line"]),
        ("encoder.width=wide", ["encoder.width", "integer"]),
        ("encoder.width=3.5", ["encoder.width", "integer"]),
        ("latent.latent_dimm=8", ["latent.latent_dimm", "latent_dim"]),
        ("stages.vae.epoch=3", ["stages.vae.epoch", "epochs"]),
        ("stage=all", ["stage", "'vae', 'diffusion' or 'both'"]),
        ("data=custom", ["data.path", "custom.yaml"]),
        ("data.split.by=luck", ["data.split.by", "'formula'"]),
        ("objective.corruption.mask_fraction=2.0", ["objective.corruption", "0 to 1"]),
        ("seed=null", ["seed", "integer"]),
        ("seed=-1", ["seed", "0 or more"]),
        ("stages.vae.epochs=-1", ["stages.vae", "at least 1"]),
        ("objective=null", ["objective", "denoising"]),
        ("encoder.graph=1", ["encoder.graph", "unknown"]),
        ("data.seed=1", ["data.seed", "unknown"]),
        ("nonsense", ["nonsense", "key=value"]),
        ("encoder.width=[1", ["encoder.width"]),
        ("encoder._target_=os.system", ["os.system", "not on the list"]),
        ("encoder._target_=torch.load", ["torch.load", "not on the list"]),
        ("preset=publishd", ["published"]),
        ("encoder.width=${oops}", ["oops"]),
    ],
)
def test_a_wrong_argument_is_refused_with_key_and_mend(argument, says):
    with pytest.raises(ConfigError) as caught:
        build_model(check_pretrain(argument), with_flow=True)
    for word in says:
        assert word in str(caught.value)


def test_a_wrong_key_in_a_file_is_refused_with_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text((conf_folder() / "encoder" / "pddformer.yaml").read_text() + "\nlayerz: 3\n")
    with pytest.raises(ConfigError) as caught:
        check_pretrain(f"encoder={file}")
    assert str(file) in str(caught.value)
    assert "layers" in str(caught.value)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [1\n", "\x00\x01"])
def test_a_file_that_is_no_mapping_is_refused_with_its_name(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        check_pretrain(f"encoder={file}")


def test_yaml_cannot_name_a_python_object(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"!!python/object/apply:os.system ['touch {tmp_path}/owned']\n")
    with pytest.raises(ConfigError):
        check_pretrain(f"encoder={file}")
    assert not (tmp_path / "owned").exists()


def test_only_listed_classes_are_built():
    with pytest.raises(ConfigError, match="not on the list"):
        build({TARGET: "subprocess.run", "args": ["true"]})
    assert all(name.startswith("crysldnet.") for name in build_module.ALLOWED)


def test_an_encoder_of_ones_own_can_be_allowed(monkeypatch):
    monkeypatch.setattr(build_module, "ALLOWED", set(build_module.ALLOWED))
    name = "torch.optim.swa_utils.AveragedModel"
    with pytest.raises(ConfigError):
        build({TARGET: name})
    build_module.ALLOWED.add("crysldnet.graphs.spec.GraphSpec")
    assert build({TARGET: "crysldnet.graphs.spec.GraphSpec", "k": 7}).k == 7


def test_conf_is_found_beside_the_source():
    assert (conf_folder() / "pretrain.yaml").is_file()
    assert Path(conf_folder()).is_absolute()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("pretrain", []),
        ("pretrain", ["preset=published", "encoder.k=9"]),
        (
            "pretrain",
            ["encoder=cgcnn", "denoiser=dit_small", "strategy=ddp", "trainer.devices=2", "stages.vae.epochs=3"],
        ),
        ("pretrain", ["encoder=neighbor_attention", "data.path={train: a.parquet, val: b.parquet}", "init=null"]),
        ("finetune", ["preset=cogn", "target_types={band_gap: [0, null]}", "data.targets=[band_gap]", "logger=wandb"]),
        ("finetune", ["data=jdft2d", "head=attention", "mode=frozen", "pretrained='null'", "optimizer.lr=1e-5"]),
        ("matbench", ["tasks=[matbench_jdft2d]", "recipes=['epochs=3 head=mean', '']", "authors='A. Person'"]),
    ],
)
def test_a_configuration_is_composed_again_from_its_arguments(command: str, words: list[str]) -> None:
    values = compose(command, words).values
    arguments = arguments_for(command, values)
    assert arguments is not None
    assert compose(command, arguments).values == values
    assert len(arguments) < 30
    assert arguments_for(command, {**values, "unknown": 3}) is None


@pytest.mark.parametrize("text", ["${oc.env:CRYSLDNET_SECRET}", "a ${seed} ${oc.env:CRYSLDNET_SECRET, x}", "${now:}"])
def test_a_file_from_elsewhere_cannot_use_a_resolver_and_the_refusal_names_the_key(tmp_path, monkeypatch, text):
    monkeypatch.setenv("CRYSLDNET_SECRET", "read")
    data, preset = tmp_path / "data.yaml", tmp_path / "preset.yaml"
    data.write_text((conf_folder() / "data" / "starter.yaml").read_text() + f"name: '{text}'\n")
    preset.write_text(f"optimizer:\n  betas: [0.9, '{text}']\n")
    for file, key in ((data, "data.name"), (preset, "optimizer.betas")):
        with pytest.raises(ConfigError, match=rf"{file}: {key}: .* isn't resolved in a file; .* give {key}=") as caught:
            compose("finetune", [f"{file.stem}={file}"])
        assert caught.value.key == key
    with pytest.raises(ConfigError, match=r"recipes: .* write what it stands for"):
        recipe_arguments(f"'optimizer.lr={text}'")
    words = ["runs/a", f"runs/{text}"]
    assert compose("report", words).values["runs"] == words


TOO_MUCH = [
    "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi")),
    "a: &a [*a]",
    "a: " + "[" * 3000,
    "a: " + "9" * 5000,
    *("a: !!float x", "a: !!bool x", "a: !!timestamp x", "a: !!set {b}", "a: !!python/name:os.system"),
]


@pytest.mark.parametrize("text", TOO_MUCH, ids=["aliases", "itself", "deep", "long", *"fbtsp"])
def test_yaml_that_is_made_to_fail_is_refused_in_a_sentence_wherever_it_is_read(tmp_path, text):
    pytest.importorskip("optuna")
    from crysldnet.tools.sweep import load_sweep

    file = tmp_path / "config.yaml"
    file.write_text(text)
    (tmp_path / "summary.json").write_text("{}")
    start = time.process_time()
    for read in (
        lambda: compose("finetune", [f"preset={file}"]),
        lambda: compose("finetune", [f"encoder={file}"]),
        lambda: compose("finetune", ["resume=last"], file),
        lambda: read_run(tmp_path),
        lambda: load_sweep(str(file)),
        lambda: read_definition(file),
    ):
        with pytest.raises(CrysldnetError):
            read()
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "text", ["9" * 5000, "!!float x", "!!bool x", "!!timestamp x", "[" * 3000, "&a [*a]", "{<<: 1}"]
)
def test_what_is_no_yaml_on_the_command_line_is_text(text):
    assert compose("finetune", [f"name={text}"]).values["name"] == text


def test_names_that_are_not_utf8_are_files_to_read_and_nothing_that_is_saved():
    name = "caf\udce9.cif"
    assert compose("predict", [f"files={name}"]).values["files"] == name
    assert compose("predict", [name, "b.cif"]).values["files"] == [name, "b.cif"]
    with pytest.raises(ConfigError, match=r"runs=caf\\udce9\.cif: not UTF-8; rename"):
        compose("finetune", [f"runs={name}"])


def test_a_file_from_elsewhere_cannot_name_a_plugin(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("plugins: [evil]\n")
    with pytest.raises(ConfigError, match=rf"{preset}: plugins run code; give them on the command line"):
        compose("finetune", [f"preset={preset}"])


def test_the_command_line_can_use_a_resolver(monkeypatch):
    monkeypatch.setenv("CRYSLDNET_FOLDER", "/scratch")
    assert compose("finetune", ["runs=${oc.env:CRYSLDNET_FOLDER}/runs"]).values["runs"] == "/scratch/runs"


@pytest.mark.parametrize(
    ("command", "argument", "meant"),
    [
        ("finetune", "lr=1e-3", r"lr: unknown key; did you mean optimizer\.lr\?"),
        ("finetune", "batch_size=8", r"did you mean data\.batch_size\?"),
        ("pretrain", "device=cpu", r"did you mean trainer\.accelerator\?"),
        (
            "pretrain",
            "epochs=3",
            r"did you mean stages\.vae\.epochs or stages\.diffusion\.epochs\?|stages\.diffusion\.epochs or",
        ),
        ("predict", "file=a.cif", "file: unknown key; did you mean 'files'"),
        ("finetune", "optimizer.lrr=1", "did you mean 'lr'"),
    ],
)
def test_a_key_without_its_group_is_found(command, argument, meant):
    schema = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "predict": PredictConfig}[command]
    with pytest.raises(ConfigError, match=meant):
        validate(compose(command, [argument, *(["model=a"] if command == "predict" else [])]), schema)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--seed", "3"], "seed", 3),
        (["--seed=3"], "seed", 3),
        (["--data.batch-size", "8"], "data.batch_size", 8),
        (["data.targets=band_gap"], "data.targets", ["band_gap"]),
        (["data.targets=a,b"], "data.targets", ["a", "b"]),
        (["data.targets=Bulk modulus K (GPa)"], "data.targets", ["Bulk modulus K (GPa)"]),
        (["data.targets=E (GPa, DFT), b"], "data.targets", ["E (GPa, DFT)", "b"]),
        (["data.targets=['a,b']"], "data.targets", ["a,b"]),
        (["--target_types.e-mod", "log"], "target_types.e-mod", "log"),
        (["plugins=mine"], "plugins", ["mine"]),
    ],
)
def test_keys_and_lists_are_read_as_users_write_them(words, key, value):
    values = compose("finetune", words).values
    for part in key.split("."):
        values = values[part]
    assert values == value


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        ("finetune", ["epochs", "3"], "'epochs': write epochs=3"),
        ("finetune", ["epochs"], "'epochs': expected group=name or key=value; write epochs=…"),
        ("finetune", ["epoch"], "write epochs=…"),
        ("finetune", ["--epochs"], "--epochs: it needs a value; write epochs=…"),
        ("finetune", ["--epochs", "seed=3"], "--epochs: it needs a value; write epochs=…"),
        ("finetune", ["seed", "=", "3"], "'seed': leave out the spaces around ="),
        ("finetune", ["seed", "=3"], "'seed': leave out the spaces around ="),
        ("predict", ["-m", "runs/x"], "-m: there are no flags of one letter; model=… or max_atoms=…"),
        ("predict", ["model"], "'model': expected group=name or key=value; write model=…"),
        ("predict", ["crystals"], "'crystals': no such file or folder, and not key=value"),
    ],
)
def test_a_word_that_is_no_setting_is_answered_with_the_right_form(command, words, says):
    with pytest.raises(ConfigError) as caught:
        compose(command, words)
    assert says in str(caught.value)


def test_files_may_be_plain_words():
    values = compose("predict", ["model=m", "a.cif", "b/*.cif", "--out", "p.csv"]).values
    assert values["files"] == ["a.cif", "b/*.cif"]
    assert values["out"] == "p.csv"


def test_an_unknown_key_is_reported_before_a_missing_one():
    with pytest.raises(ConfigError, match=r"bogus: unknown key"):
        validate(compose("predict", ["bogus=1"]), PredictConfig)
    with pytest.raises(ConfigError, match=r"data\.batch_sise: unknown key"):
        validate(compose("pretrain", ["data=custom", "data.batch_sise=1"]), PretrainConfig)
    with pytest.raises(ConfigError, match=r"data\.path: it has no default; give it as data\.path=VALUE"):
        validate(compose("pretrain", ["data=custom"]), PretrainConfig)


def test_a_list_is_asked_for_with_its_form():
    with pytest.raises(ConfigError, match=r"data\.split\.fractions=0\.8: give a list, as data\.split\.fractions=\[…\]"):
        validate(compose("pretrain", ["data.split.fractions=0.8"]), PretrainConfig)


def test_a_value_of_no_plain_type_is_refused_by_its_key():
    with pytest.raises(ConfigError, match=r"seed=!!timestamp 2024-01-01"):
        compose("pretrain", ["seed=!!timestamp 2024-01-01"])


@pytest.mark.parametrize("command", ["pretrain", "finetune", "matbench"])
@pytest.mark.parametrize("more", [["encoder=cgcnn"], ["seed.deeper=2"], ["data.targets[0]=x"], ["name=${oc.env:HOME}"]])
def test_what_needs_no_resolver_is_composed_as_omegaconf_does(command, more, monkeypatch):
    words = ["seed=3", "a.b={c: [1, x], d: null}", "name=1e-3", "runs=[1, {a: -}]", "new.x.y=.5", "data.targets=[y]"]
    quickly = compose(command, [*words, *more])
    monkeypatch.setattr(sys.modules["crysldnet.config.compose"], "changed_plainly", lambda *_: None)
    slowly = compose(command, [*words, *more])
    assert quickly == slowly
    assert repr(quickly.values) == repr(slowly.values)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        *(([command, "--help"], f"usage: crysldnet {command}") for command in ("finetune", "matbench", "export")),
        *((["data", *words, "--help"], "usage: crysldnet data") for words in ([], ["import"], ["audit"])),
        *(([command, "validate", "-h"], "usage: crysldnet") for command in ("matbench", "jarvis")),
        (["matbench", "fold", "--help"], "usage: crysldnet matbench fold"),
        (["jarvis", "property", "--help"], "usage: crysldnet jarvis property"),
        (["finetune", "lr=1e-3"], "lr: unknown key; did you mean optimizer.lr?"),
        (["predict", "fils=a.cif"], "fils: unknown key; did you mean 'files'?"),
        (["predict", "a.cif"], "model: it has no default"),
        (["finetune", "--print-confg"], "--print-confg: no such option; did you mean --print-config?"),
        (["predict", "--hepl", "model=a"], "--hepl: no such option; did you mean --help?"),
        (["finetune", "--epochs"], "--epochs: it needs a value; write epochs=…"),
        (["finetune", "preset=finetun"], "preset=finetun: no such choice; available: cartnet, "),
        (["finetune", "preset=potnt"], "preset=potnt: no such choice; did you mean 'potnet'? available: "),
        (["jarvis", "validat"], "jarvis validat: no such command; did you mean crysldnet jarvis validate?"),
        (["matbench", "validat", "folder"], "matbench validat: no such command; did you mean crysldnet matbench va"),
        (["matbench", "folds"], "'folds': expected group=name or key=value; write folds=…"),
        (["fintune"], "no command 'fintune'; did you mean 'finetune'?"),
        (["clone"], "no command 'clone'; available: pretrain, finetune, "),
    ],
)
def test_help_and_wrong_words_are_answered_without_importing_torch(arguments: list[str], said: str) -> None:
    program = (
        "import sys; from crysldnet.cli import run; from crysldnet.errors import CrysldnetError\n"
        "try:\n    run(sys.argv[1:])\n"
        "except CrysldnetError as error:\n    print(error)\nexcept SystemExit as error:\n    assert error.code == 0\n"
        "print({'torch', 'numba', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "set()"
    assert lines[0].startswith(said)


def test_the_help_shows_groups_only_where_there_are_some(capsys):
    for command in COMMANDS:
        run([command, "--help"])
        text = capsys.readouterr().out
        assert ("[group=name …]" in text.splitlines()[0]) == ("\ngroups (group=name;" in text), command
