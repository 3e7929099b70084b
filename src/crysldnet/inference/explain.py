"""Explanations of the predictions of a loaded model, crystal by crystal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from crysldnet.data.elements import formulas_of
from crysldnet.graphs.batch import make_batch
from crysldnet.graphs.crystals import Crystals
from crysldnet.inference.command import Refusals
from crysldnet.inference.descriptors import beside, columns_needed
from crysldnet.inference.predictor import Predictor, check_for
from crysldnet.models.explanation import Explanation, explain
from crysldnet.readers.stream import Chunk, CrystalStream, StreamSettings


class Explained(NamedTuple):
    """A crystal and the explanation of its prediction."""

    id: str
    source: str
    formula: str
    crystal: Crystals
    found: Explanation

    @property
    def elements(self) -> dict[str, float]:
        """Contributions of the atoms summed by element, largest first."""
        return self.found.by_element(self.crystal.numbers)


def explain_portion(model: Predictor, portion: Chunk, place: int, label: int | None = None) -> Explained:
    """Explain the prediction of one target, or the probability of a class, for the only crystal of a portion."""
    batch = portion.batches[model.encoder.graph]
    if (needed := model.members[0].descriptors) is not None:
        batch = replace(batch, descriptors=torch.from_numpy(beside(portion, needed.names)).float())
    mean = None
    if model.knowledge is not None:
        training = model.knowledge.training_set
        mean = (training.features * training.scale).mean(dim=0)
    found = explain(model.members, batch, place, mean, label)
    return Explained(portion.ids[0], portion.sources[0], formulas_of(portion.crystals)[0], portion.crystals, found)


def explain_crystal(
    model: Predictor,
    crystal: Crystals,
    id_: str,
    place: int,
    columns: Mapping[str, NDArray[np.float64]],
    label: int | None = None,
) -> Explained:
    """Explain the prediction of one target for a crystal.

    Args:
        model: from :func:`crysldnet.load`.
        crystal: one crystal.
        id_: its id.
        place: index of the target.
        columns: [1] values of the model's descriptors by name.
        label: index of the class whose probability is explained; by default the predicted one.

    Raises:
        DataError: the target is a hurdle, or the model can't be explained.
    """
    graph = model.encoder.graph
    portion = Chunk([id_], [id_], crystal, {graph: make_batch(crystal, graph)}, [], columns=columns)
    return explain_portion(model, portion, place, label)


def explain_crystals(model: Predictor, structures: Any, target: str | None = None) -> list[Explained]:
    """Explain the predictions of one target for crystals.

    Args:
        model: from :func:`crysldnet.load`.
        structures: as in :meth:`Predictor.predict`, with the columns of the model's descriptors.
        target: target name; required if the model has several.

    Raises:
        ConfigError: the target is missing or unknown.
        DataError: a crystal is invalid, or the target is a hurdle.
    """
    place, account = model.place_of(target), Refusals("raise")
    found = []
    for portion in stream_of(model, structures, {}, 1000):
        account.take(portion)
        found += [explain_portion(model, portion, place)] if portion.ids else []
    return found


def stream_of(
    model: Predictor, structures: Any, given: Mapping[str, NDArray[np.float64]], max_atoms: int
) -> CrystalStream:
    """Stream crystals one by one with what the model needs.

    Args:
        model: the predictor.
        structures: as in :meth:`Predictor.predict`.
        given: descriptors that aren't read from columns.
        max_atoms: larger crystals are rejected.
    """
    columns = columns_needed([model.members[0].descriptors], given)
    settings = StreamSettings(batch_size=1, max_atoms=max_atoms)
    return CrystalStream(structures, [model.encoder.graph], settings, columns, check_for([model]))
