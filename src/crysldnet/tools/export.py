"""Export a finetuned network as a program of torch.export or ONNX, which runs without this package.

Its inputs are the tensors of a batch of graphs, of any number of crystals. The program is compared with the model on a
hundred crystals before it is written. Networks on the package's own encoder (neighbor_attention), or on your own that
is ``exportable``, can be exported.

  crysldnet export model=runs/finetune/latest out=model.pt2
  crysldnet export model=runs/finetune/latest out=model.onnx
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from crysldnet.artifacts import model_file
from crysldnet.console import note
from crysldnet.data.datasets import open_store
from crysldnet.errors import CheckpointError, ConfigError
from crysldnet.graphs.batch import CrystalBatch, make_batch
from crysldnet.graphs.crystals import Crystals
from crysldnet.graphs.spec import GraphSpec
from crysldnet.io import replacing
from crysldnet.models.head import PropertyModel

INPUTS = {
    "numbers": {0: "atoms"},
    "crystal": {0: "atoms"},
    "sizes": {0: "crystals"},
    "edge_index": {1: "edges"},
    "edge_vec": {0: "edges"},
    "cut": {0: "atoms"},
    "slots": {0: "rows"},
    "slot_atom": {0: "rows"},
}
"""Fields of a batch that the program takes if the graph has them, with the dimensions whose sizes vary."""
CHECKED = 100
"""Crystals on which the program is compared with the model."""
TOLERANCE = 1e-5
"""Largest difference, relative to the standard deviation of the training targets or, if larger, the prediction."""
SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
ABOUT = "crysldnet.json"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Every key of ``conf/export.yaml``."""

    model: str
    out: str | None
    format: Literal["torch", "onnx"] | None
    plugins: list[str] = field(default_factory=list)


class Program(nn.Module):
    """Predict from the tensors of a batch.

    Args:
        model: a network on the package's own encoder.
    """

    def __init__(self, model: PropertyModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        numbers: Tensor,
        crystal: Tensor,
        sizes: Tensor,
        edge_index: Tensor,
        edge_vec: Tensor,
        cut: Tensor,
        slots: Tensor | None = None,
        slot_atom: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return ``value`` [B, T] in physical units, and ``std`` and ``probability`` if the model has them.

        The arguments are those of :class:`crysldnet.graphs.batch.CrystalBatch`.
        """
        unused = edge_vec.new_zeros(0)
        batch = CrystalBatch(
            lattice=unused,
            numbers=numbers,
            positions=unused,
            crystal=crystal,
            sizes=sizes,
            edge_index=edge_index,
            edge_vec=edge_vec,
            distances=unused,
            cut=cut,
            rows=unused,
            largest=0,
            slots=slots,
            slot_atom=slot_atom,
        )
        found = self.model.predict(batch)
        return {name: value for name, value in found._asdict().items() if value is not None}


def inputs(crystals: Crystals, graph: GraphSpec) -> dict[str, Tensor]:
    """Return the inputs of an exported program for crystals; ``graph`` is that of the model's encoder."""
    batch = make_batch(crystals, graph)
    return {name: field for name in INPUTS if (field := getattr(batch, name)) is not None}


def refusal(models: list[Any]) -> str | None:
    """Return why models can't be exported; None if they can."""
    model = models[0]
    if len(models) > 1:
        return "it is an ensemble; export a member by its own model.safetensors"
    if not isinstance(model, PropertyModel):
        return "it has trees and kernel ridge, which aren't networks; finetune with recipe=network"
    if not model.encoder.exportable:
        kind = type(model.encoder).__name__
        return f"its encoder is {kind}, and only that of encoder=neighbor_attention was written for torch.export"
    if model.per:
        name, per = next(iter(model.per.items()))
        return f"it learns {name} per {per}, which is computed outside of torch"
    if model.descriptors is not None:
        return "it reads descriptors, which are computed outside of torch"
    return None


def make_program(model: PropertyModel, crystals: Crystals) -> torch.export.ExportedProgram:
    """Return a model as a program for any number of crystals, atoms, edges and rows."""
    dimensions = {name: torch.export.Dim(name) for places in INPUTS.values() for name in places.values()}
    program = Program(model.eval().requires_grad_(False))
    with torch.no_grad():
        given = inputs(crystals, model.encoder.graph)
        shapes = {name: {d: dimensions[of] for d, of in INPUTS[name].items()} for name in given}
        return torch.export.export(program, (), kwargs=given, dynamic_shapes=shapes)


class OnnxSession:
    """An ONNX file, run by onnxruntime on the CPU with the inputs of the program."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])

    def __call__(self, **given: Tensor) -> dict[str, Tensor]:
        """Return what the program computes, by name."""
        names = [output.name for output in self._session.get_outputs()]
        wanted = {node.name for node in self._session.get_inputs()}
        found = self._session.run(names, {name: value.numpy() for name, value in given.items() if name in wanted})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


def write_torch(program: torch.export.ExportedProgram, said: str, file: Path) -> Callable[..., dict[str, Tensor]]:
    """Write a program and what it says of itself for torch; return the program as read back."""
    with file.open("wb") as out:
        torch.export.save(program, out, extra_files={ABOUT: said})
    with file.open("rb") as written:
        return torch.export.load(written).module()


def write_onnx(program: torch.export.ExportedProgram, said: str, file: Path) -> Callable[..., dict[str, Tensor]]:
    """Write a program and what it says of itself as ONNX; return the program as read back."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    outputs = list(program.module()(**program.example_inputs[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx = torch.onnx.export(program, dynamo=True, output_names=outputs, verbose=False)
    assert onnx is not None
    onnx.model.metadata_props[ABOUT] = said
    onnx.save(file)
    return OnnxSession(file)


WRITERS = {"torch": write_torch, "onnx": write_onnx}


def difference(program: Callable[..., dict[str, Tensor]], model: PropertyModel, crystals: Crystals) -> float:
    """Return the largest difference between a program and its model.

    It is relative to the standard deviation of the training targets, or to the prediction if that is larger, because
    sums over many atoms are rounded in proportion to themselves.
    """
    batch = make_batch(crystals, model.encoder.graph)
    with torch.no_grad():
        found, expected = program(**inputs(crystals, model.encoder.graph)), model.eval().predict(batch)._asdict()
    scale = model.error_scale.clamp_min(1e-12)
    worst = 0.0
    for name, values in found.items():
        within = 1.0 if name == "probability" else torch.maximum(scale, expected[name].abs())
        far = (values - expected[name]).abs() / within
        worst = max(worst, float(far.nan_to_num().max()))
        if not torch.equal(values.isnan(), expected[name].isnan()):
            return float("inf")
    return worst


def about(model: PropertyModel, info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a program says of itself, in its extra file or metadata ``crysldnet.json``."""
    return {
        "inputs": [name for name in INPUTS if model.encoder.graph.slots or not name.startswith("slot")],
        "targets": model.targets,
        "units": model.units,
        "classes": model.classes,
        "graph": info["graph"],
        "provenance": info["provenance"],
    }


def output(config: ExportConfig) -> tuple[str, Path]:
    """Return the format and the file of the output.

    Raises:
        ConfigError: they don't fit, or a package is missing.
    """
    out = Path(config.out or f"model{SUFFIXES[config.format or 'torch']}")
    fitting = [name for name, suffix in SUFFIXES.items() if suffix == out.suffix and config.format in (None, name)]
    if not fitting:
        wanted = SUFFIXES.get(config.format or "", ".pt2 (torch.export) or .onnx")
        raise ConfigError(f"out={config.out}: the name of the program must end in {wanted}", "out")
    for package in ("onnxscript", "onnxruntime") if fitting[0] == "onnx" else ():
        if find_spec(package) is None:
            raise ConfigError(f"format=onnx needs the {package} package: pip install 'crysldnet[onnx]'", "format")
    return fitting[0], out


def run(config: ExportConfig, _values: dict[str, Any]) -> int:
    """Write the program; return the exit status.

    Raises:
        ConfigError: the model can't be exported, or the output has another suffix.
        CheckpointError: there is no model, or the program predicts something else.
    """
    kind, out = output(config)
    loaded = model_file.load_property_models(config.model)
    if reason := refusal([model for model, _ in loaded]):
        raise ConfigError(f"{config.model}: it can't be exported: {reason}", "model")
    model, info = loaded[0]
    assert isinstance(model, PropertyModel)
    crystals = open_store("embedded:mp_starter").crystals
    checked = min(CHECKED, len(crystals.lattice))
    program = make_program(model, crystals.take(np.arange(8)))
    with replacing(out) as partial:
        read = WRITERS[kind](program, json.dumps(about(model, info)), partial)
        far = max(difference(read, model, crystals.take(np.arange(count))) for count in (1, checked))
        if not far <= TOLERANCE:
            raise CheckpointError(
                f"{config.model}: the program differs from the model by {far:.2g} of a standard deviation or of the "
                "prediction"
            )
    within = f"{far:.2g} of a standard deviation or of the prediction"
    note(f"written: {out}; on {checked} crystals it differs from the model by {within} at most")
    return 0
