"""A model's file that isn't as this program writes it is refused in one sentence that names the file and the key."""

import math
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import crysldnet
from crysldnet import build as build_module
from crysldnet.artifacts import model_file
from crysldnet.artifacts.calibration import Calibration, TargetCalibration
from crysldnet.artifacts.ood import TrainingSet
from crysldnet.data.datasets import open_store
from crysldnet.encoders.protocol import Encoder
from crysldnet.errors import CheckpointError, DataError
from crysldnet.graphs.crystals import Crystals
from crysldnet.models.head import PropertyModel
from crysldnet.models.hybrid import TabularPart
from crysldnet.tabular.kernel import KernelRidge
from crysldnet.tabular.stack import Stack
from crysldnet.tabular.trees import Trees
from crysldnet.training.calibrate import UncertaintyInfo
from encoders import CLASSES, SMALL, WIDTH

ENCODER = {"_target_": "crysldnet.encoders.cgcnn.CGCNN", "width": 8, "layers": 1, "k": 6}
HEAD = {"_target_": "crysldnet.models.head.PropertyHead", "hidden": 8}


@pytest.fixture(scope="module")
def crystals() -> Crystals:
    found = open_store("embedded:mp_starter").crystals
    return found.take(np.argsort(found.sizes, kind="stable")[:6])


@pytest.fixture(scope="module")
def content(crystals: Crystals) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a model's file says, and its tensors."""
    torch.manual_seed(0)
    encoder = build_module.build(ENCODER)
    head = build_module.build(HEAD, width=8, outputs=1)
    model = PropertyModel(encoder=encoder, head=head, targets=["gap"], units=["eV"])
    scores = TargetCalibration.of(np.linspace(-1, 1, 20), None)
    knowledge = UncertaintyInfo(Calibration([scores]), TrainingSet.of(crystals, torch.randn(6, 8)))
    info = model_file.encoder_info(encoder, ENCODER, {})
    info |= {"head": HEAD, "targets": ["gap"], "units": ["eV"], "target_types": [{"type": "number"}]}
    return info, {**model.state_dict(), **knowledge.tensors()}


def changed(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    """Return what changes a value of the file, or of one of its parts, or leaves it out."""

    def change(info: dict[str, Any], _: dict[str, Tensor]) -> None:
        first, _, last = key.partition("/")
        place = info if not last else info.setdefault(first, {**info[first]})
        if last:
            info[first] = place = {**info[first]}
        if value is None:
            del place[last or first]
        else:
            place[last or first] = value

    return change


def tensors(pattern: str, function: Callable[[Tensor], Tensor | None]) -> Callable[[dict, dict[str, Tensor]], None]:
    """Return what changes the tensors whose names begin so, or leaves them out."""

    def change(_: dict[str, Any], state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.startswith(pattern)]:
            new = function(state.pop(name))
            if new is not None:
                state[name] = new

    return change


ODD = {
    "nan weights": (tensors("head", lambda t: t * torch.nan), r"head\.\S+ isn't finite"),
    "integers": (tensors("encoder", lambda t: t.to(torch.int8)), "is torch.int8, the model needs torch.float32"),
    "complex": (tensors("head", lambda t: t.to(torch.complex64)), "is torch.complex64, the model needs"),
    "width": (changed("encoder/width", 1_000_000), r"has shape \[\d+\], the model needs \[\d+\]"),
    "no width": (changed("encoder/width", -5), "can't be built: encoder: .*negative dimension -5"),
    "layers": (changed("encoder/layers", 10_000_000), "more parameters than the file's"),
    "k": (changed("encoder/k", 1_000_000), "k=1000000 isn't between 0 and 1000"),
    "a function": (changed("encoder", {"_target_": "os.system"}), "'os.system' is not on the list"),
    "a data module": (
        changed("encoder", {"_target_": "crysldnet.data.datamodule.CrystalDataModule", "path": "x"}),
        r"encoder\._target_: 'crysldnet\.data\.datamodule\.CrystalDataModule' is no Module",
    ),
    "a strategy": (changed("encoder", {"_target_": "crysldnet.training.strategies.ddp"}), "is no Module"),
    "a head as encoder": (changed("encoder", HEAD), "can't be built"),
    "an encoder as head": (changed("head", ENCODER), r"head\._target_: .* is no PropertyHead"),
    "targets as text": (
        changed("targets", "x"),
        "what it says of 'targets' can't be used: input should be a valid list",
    ),
    "no targets": (changed("targets", None), "'targets' can't be used: field required"),
    "empty targets": (changed("targets", []), "'targets' can't be used"),
    "no units": (changed("units", None), "'units' can't be used: field required"),
    "two units": (changed("units", ["eV", "K"]), "1 targets, 2 units and 1 target_types"),
    "types as lists": (changed("target_types", [[1]]), "'target_types.0' can't be used"),
    "no types": (changed("target_types", []), "1 targets, 1 units and 0 target_types"),
    "unknown type": (
        changed("target_types", [{"type": "colour"}]),
        r"target_types\.0: no kind of target 'colour'",
    ),
    "unknown key of a type": (changed("target_types", [{"type": "number", "foo": 1}]), r"target_types\.0: .*'foo'"),
    "no list of classes": (changed("target_types", [{"type": "classes", "labels": "abc"}]), "no list of different"),
    "a class twice": (
        changed("target_types", [{"type": "classes", "labels": ["a", "a"]}]),
        r"target_types\.0: .*labels",
    ),
    "a target twice": (
        lambda info, _: info.update(targets=["a", "a"], units=["", ""], target_types=info["target_types"] * 2),
        "a name stands twice among its targets",
    ),
    "many classes": (
        changed("target_types", [{"type": "classes", "labels": [str(i) for i in range(10**5)]}]),
        r"the model needs \[100000",
    ),
    "no graph": (changed("graph", None), "'graph' can't be used: field required"),
    "a list as graph": (changed("graph", [1]), "'graph' can't be used"),
    "version true": (changed("format_version", True), "its format version is True"),
    "version -3": (changed("format_version", -3), "its format version is -3"),
    "no spread": (tensors("std", torch.zeros_like), "std, which scales its predictions, isn't positive"),
    "few elements": (
        tensors("training_set.elements", lambda t: t[:3]),
        r"training_set\.elements can't be used .*\[3\]",
    ),
    "elements as shares": (tensors("training_set.elements", Tensor.float), r"training_set\.elements can't be used"),
    "features": (tensors("training_set.features", lambda t: t[:, :3]), r"training_set\.scale can't be used"),
    "features of another encoder": (
        tensors("training_set", lambda t: t[..., :4] if t.shape and t.shape[-1] == 8 else t),
        "are of another model",
    ),
    "no scale": (tensors("training_set.scale", lambda _: None), r"training_set isn't complete \(scale\)"),
    "no training set": (tensors("training_set", lambda _: None), "training_set isn't complete"),
    "spread": (tensors("calibration.spread", lambda t: t[:, :2]), r"calibration\.spread must be \[targets, 4\]"),
    "no scores": (tensors("calibration.scores", lambda _: None), r"other targets than its spread \(scores\.0\)"),
    "negative scores": (tensors("calibration.scores", lambda t: -1 - t), r"calibration\.scores\.0 can't be used"),
    "nan scores": (tensors("calibration.scores", lambda t: t * torch.nan), r"calibration\.scores\.0 can't be used"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_refused_in_words_that_name_it_and_the_key(
    name: str, content: tuple[dict[str, Any], dict[str, Tensor]], tmp_path: Path
) -> None:
    info, state = {**content[0]}, {**content[1]}
    change, pattern = ODD[name]
    change(info, state)
    path = tmp_path / "odd.safetensors"
    model_file.write(path, "property_model", state, info)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=pattern) as caught:
        crysldnet.load(path, device="cpu")
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


TREES = Trees(
    roots=np.array([0], np.int32),
    feature=np.array([0, -1, -1], np.int32),
    threshold=np.zeros(3),
    left=np.array([1, 0, 0], np.int32),
    right=np.array([2, 0, 0], np.int32),
    value=np.ones((3, 1)),
    base=np.zeros(1),
)
ODD_PARTS: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], Any], str]] = {
    "nan": (lambda state, _: state.update({"0.kernel.dual": state["0.kernel.dual"] * torch.nan}), "0.kernel.dual"),
    "whole numbers": (lambda state, _: state.update({"0.trees.value": state["0.trees.value"].int()}), "0.trees.value"),
    "shares": (lambda state, _: state.update({"0.trees.left": state["0.trees.left"].double()}), "0.trees.left"),
    "a cycle": (lambda state, _: state.update({"0.trees.left": state["0.trees.left"] * 0}), "0.trees"),
    "a square": (lambda state, _: state.update({"0.trees.roots": state["0.trees.roots"][None]}), "0.trees"),
    "gone": (lambda state, _: state.pop("0.kernel.points"), "0.kernel"),
    "a column less": (lambda _, plain: plain["descriptors"].pop(), "0.kernel"),
    "text": (lambda _, plain: plain["targets"][0]["models"]["kernel"].update(ridge="x"), "0.kernel.ridge"),
    "no weight": (lambda _, plain: plain["targets"][0]["weights"].pop("trees"), "0.weights"),
    "nan weight": (lambda _, plain: plain["targets"][0]["weights"].update(trees=math.nan), "0.weights"),
    "no mapping": (lambda _, plain: plain.update(targets=[3]), "tabular members are damaged"),
    "unknown": (lambda _, plain: plain["targets"][0]["models"]["trees"].update(kind="os.system"), "0.trees"),
}


@pytest.mark.parametrize("name", ODD_PARTS)
def test_odd_tabular_members_are_refused_when_they_are_read(name: str) -> None:
    kernel = KernelRidge(np.zeros(2), np.ones(2), np.ones(2), np.eye(2), np.ones((2, 1)), np.zeros(1), 0.1)
    stack = Stack({"trees": TREES, "kernel": kernel}, {"trees": 0.5, "kernel": 0.5})
    state, plain = TabularPart(("a", "b"), None, [stack]).to_file()
    assert TabularPart.from_file(state, plain).stacks[0].predict(np.zeros((1, 2))).keys() == {"trees", "kernel"}
    change, part = ODD_PARTS[name]
    change(state, plain)
    with pytest.raises(DataError, match=re.escape(part)):
        TabularPart.from_file(state, plain)


def test_the_file_that_these_are_made_of_is_read_and_other_precisions_too(
    content: tuple[dict[str, Any], dict[str, Tensor]], crystals: Crystals, tmp_path: Path
) -> None:
    info, state = content
    for name, kind in (("a", torch.float32), ("b", torch.float64), ("c", torch.float16)):
        cast = {key: t.to(kind) if t.is_floating_point() else t for key, t in state.items()}
        model_file.write(tmp_path / name, "property_model", cast, info)
        found = crysldnet.load(tmp_path / name, device="cpu").predict(crystals)
        assert np.isfinite(found.values).all()


def test_metadata_that_nest_too_deeply_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x", metadata={"crysldnet": "[" * 100_000, "sha256": "{}"})
    assert model_file.kind_of(tmp_path / "x") is None
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        crysldnet.load(tmp_path / "x", device="cpu")


def test_weights_that_overflow_are_said_where_they_predict_no_number(
    content: tuple[dict[str, Any], dict[str, Tensor]], crystals: Crystals, tmp_path: Path
) -> None:
    info, state = content
    huge = {key: t * 1e37 if key.startswith("head") else t for key, t in state.items()}
    model_file.write(tmp_path / "x", "property_model", {**huge, "std": torch.full((1,), 1e38)}, info)
    with pytest.raises(CheckpointError, match="x: what it predicts of row 1 isn't a number"):
        crysldnet.load(tmp_path / "x", device="cpu").predict(crystals)


class Measured(Encoder):
    """An encoder whose constructor needs a number, so that it can't be planned without memory."""

    def __init__(self, *, width: int = 8) -> None:
        super().__init__()
        self.width, self.graph = width, build_module.build(ENCODER).graph
        self.species = nn.Embedding(119, width)
        self.largest = float(torch.linspace(0, 1, 5).max())


def test_an_encoder_whose_constructor_needs_numbers_is_loaded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{__name__}.Measured"
    monkeypatch.setattr(build_module, "ALLOWED", {*build_module.ALLOWED, name})
    encoder = Measured()
    info = model_file.encoder_info(encoder, {"_target_": name, "width": 8}, {})
    model_file.write(tmp_path / "x", "encoder", encoder.state_dict(), info)
    loaded, _ = model_file.load_encoder(tmp_path / "x")
    assert torch.equal(loaded.state_dict()["species.weight"], encoder.species.weight)


@pytest.mark.parametrize("name", CLASSES)
def test_every_encoder_can_be_planned_without_memory(name: str) -> None:
    with torch.device("meta"):
        planned = CLASSES[name](**{"width": WIDTH, **SMALL[name]})
    assert {tensor.device.type for tensor in planned.parameters()} == {"meta"}


@pytest.mark.parametrize("text", ["[]", '{"members": 3}', '{"members": [3]}', '{"members": null}'])
def test_a_summary_whose_members_are_no_names_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"summary\.json: it doesn't list its members as names of folders"):
        crysldnet.load(tmp_path, device="cpu")
