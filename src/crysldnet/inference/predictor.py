"""Predictors and embedders: models on a device, applied to crystals from any source.

Shapes: ``B`` crystals, ``N`` atoms, ``T`` targets, ``C`` classes, ``D`` width of the encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from crysldnet.artifacts.ood import catch_features
from crysldnet.console import listed
from crysldnet.data.elements import formulas_of
from crysldnet.data.fingerprint import known
from crysldnet.data.units import same_unit
from crysldnet.encoders.protocol import Encoder, features_of_layers
from crysldnet.errors import CheckpointError, ConfigError, DataError
from crysldnet.graphs.crystals import Crystals
from crysldnet.inference.command import OnError, Refusals
from crysldnet.inference.descriptors import beside, columns_needed, given_descriptors, with_descriptors
from crysldnet.inference.results import Embeddings, Predictions
from crysldnet.models.per import bulk_of, no_area
from crysldnet.models.predictor import TargetModel, predict_batch
from crysldnet.readers.stream import Check, Chunk, CrystalStream, StreamSettings
from crysldnet.training.calibrate import UncertaintyInfo

Per = Literal["crystal", "atom"]
LayersRead = Literal["all", "last"]


class Embedder:
    """A ready-to-use encoder.

    Attributes:
        encoder: the module, on its device and in evaluation mode.
        info: metadata of its file.
        name: its file or folder.
        width: feature width D.
    """

    def __init__(self, encoder: Encoder, info: dict[str, Any], name: str, device: torch.device) -> None:
        self.encoder, self.info, self.name, self.device = encoder.to(device).eval(), info, name, device
        self.width = encoder.width

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, width={self.width})"

    def embed(
        self,
        structures: Any,
        *,
        per: Per = "crystal",
        layers_read: LayersRead = "all",
        on_error: OnError = "raise",
        settings: StreamSettings | None = None,
    ) -> Embeddings:
        """Return encoder features of atoms or pooled over crystals.

        Args:
            structures: as in :meth:`Predictor.predict`.
            per: ``crystal`` for one row per crystal, ``atom`` for one row per atom.
            layers_read: ``all`` returns the concatenated features of all layers, for crystals their mean and standard
                deviation over the atoms, [B, 2 · layers · D]; ``last`` the encoder output, for crystals its mean, [B,
                D].
            on_error: as in :meth:`Predictor.predict`.
            settings: as in :meth:`Predictor.predict`.
        """
        parts: list[Embeddings] = []
        account = Refusals(on_error)
        stream = CrystalStream(structures, [self.encoder.graph], settings or StreamSettings())
        for portion, found in embed_stream(self, stream, per, layers_read):
            account.take(portion)
            parts += [] if found is None else [found]
        return Embeddings.joined(parts, account.refused, account.notes)


class Predictor(Embedder):
    """A ready-to-use finetuned model or ensemble.

    Attributes:
        members: the models; one if not an ensemble.
        knowledge: stored calibration and training set statistics; None for files of earlier versions.
        labelled: sorted packed fingerprints of training and validation crystals; None if not recorded.
        targets, units: [T] names and units of the targets.
    """

    def __init__(
        self,
        loaded: Sequence[tuple[TargetModel, dict[str, Any]]],
        knowledge: UncertaintyInfo | None,
        name: str,
        device: torch.device,
        labelled: NDArray[np.uint64] | None = None,
    ) -> None:
        self.labelled = labelled
        self.members = [model.to(device).eval() for model, _ in loaded]
        super().__init__(self.members[0].encoder, loaded[0][1], name, device)
        self.knowledge = knowledge
        self.targets, self.units = self.members[0].targets, self.members[0].units

    def __repr__(self) -> str:
        named = [f"{name} ({unit})" if unit else name for name, unit in zip(self.targets, self.units, strict=True)]
        models = f", {len(self.members)} models" if len(self.members) > 1 else ""
        return f"{type(self).__name__}({self.name!r}, {listed(named)}{models})"

    def predict(
        self,
        structures: Any,
        *,
        interval: float = 0.9,
        descriptors: Any = None,
        on_error: OnError = "raise",
        settings: StreamSettings | None = None,
    ) -> Predictions:
        """Predict properties.

        Args:
            structures: pymatgen ``Structure`` or ASE ``Atoms`` objects, one or many; a :class:`Crystals`; paths of
                files, folders, archives or stores; or anything else that ``crysldnet data import`` reads.
            interval: coverage of the interval, between 0 and 1.
            descriptors: for a model with descriptors: a data frame or mapping from name to B values, or to one for all;
                or an array [B, K]. Missing ones are read from columns of the input.
            on_error: ``raise`` stops at the first invalid crystal, so that results match the input order; ``report``
                skips it and lists it in ``refused``.
            settings: for reading and batching.

        Raises:
            DataError: there is nothing to predict, or a crystal is invalid.
        """
        parts: list[Predictions] = []
        account = Refusals(on_error)
        given = given_descriptors(descriptors, self.descriptors)
        columns = columns_needed([self.members[0].descriptors], given)
        stream = CrystalStream(
            structures, [self.encoder.graph], settings or StreamSettings(), columns, check_for([self])
        )
        for portion, found in predict_stream([self], with_descriptors(stream, given), interval):
            account.take(portion)
            parts += found
        return Predictions.joined(parts, account.refused, (*account.notes, *self.other_units(stream)))

    @property
    def descriptors(self) -> list[str]:
        """Names of the K descriptors that the model needs for each crystal; usually none."""
        own = self.members[0].descriptors
        return [] if own is None else own.names

    def place_of(self, target: str | None) -> int:
        """Return the index of a target; a single target needs no name.

        Raises:
            ConfigError: the name is missing or unknown.
        """
        name = target or self.targets[0]
        if name not in self.targets or (target is None and len(self.targets) > 1):
            raise ConfigError(f"target: choose one of {', '.join(self.targets)}", "target")
        return self.targets.index(name)

    def other_units(self, stream: CrystalStream) -> list[str]:
        """Return a note on each target that the input has in a unit different from the prediction's, and on each
        descriptor whose unit the input doesn't state."""
        units = zip(self.targets, self.units, strict=True)
        return [
            f"{name} is predicted in {unit or 'no unit'} but the input has it in {stream.units[name]}"
            for name, unit in units
            if name in stream.units and not same_unit(unit, stream.units[name])
        ] + stream.unstated()

    @torch.inference_mode()
    def predict_portion(self, portion: Chunk, interval: float) -> Predictions:
        """Predict crystals with their graphs and descriptor columns."""
        crystals, batch = portion.crystals, portion.batches[self.encoder.graph]
        beyond = None
        if (needed := self.members[0].descriptors) is not None:
            values = torch.from_numpy(beside(portion, needed.names)).float()
            beyond = needed.beyond_training(values.to(self.device)).cpu().numpy()
            batch = replace(batch, descriptors=values)
        batch = batch.to(self.device)
        with catch_features(self.encoder) as caught:
            found = predict_batch(self.members, batch)
            features = caught.of_crystals(batch)
        value = found.value.cpu().double().numpy()
        if np.isnan(value).any():
            row = int(np.flatnonzero(np.isnan(value).any(axis=1))[0])
            raise CheckpointError(f"{self.name}: what it predicts of {portion.sources[row]} isn't a number")
        std = np.full_like(value, np.nan) if found.std is None else found.std.cpu().double().numpy()
        low, high = np.full_like(value, np.nan), np.full_like(value, np.nan)
        if self.knowledge is not None:
            for place in range(len(self.targets)):
                std[:, place], low[:, place], high[:, place] = self._calibrated(
                    self.knowledge, place, value[:, place], std[:, place], interval
                )
        names = formulas_of(crystals)
        unseen, distance, flags = self._compare(crystals, features)
        for b in [] if beyond is None else np.flatnonzero(beyond):
            flags[b].append("descriptor")
        if self.labelled is not None:
            for b in np.flatnonzero(known(crystals, portion.ids, names, self.labelled)):
                flags[b].append("trained")
        return Predictions(
            ids=portion.ids,
            sources=portion.sources,
            formulas=names,
            targets=self.targets,
            units=self.units,
            classes=self.members[0].classes,
            values=value,
            std=std,
            low=low,
            high=high,
            probabilities=None if found.probability is None else found.probability.cpu().double().numpy(),
            unseen=unseen,
            distance=distance,
            flags=flags,
        )

    def _calibrated(
        self,
        knowledge: UncertaintyInfo,
        place: int,
        value: NDArray[np.float64],
        std: NDArray[np.float64],
        interval: float,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return standard deviation and interval bounds of one target, NaN if unknown."""
        calibration = knowledge.calibration.targets[place]
        kind = self.members[0].types[place]
        if kind.classes is not None:
            return std, np.full_like(value, np.nan), np.full_like(value, np.nan)
        value.clip(*kind.bounds, out=value)  # in single precision a bound rounds to its neighbor
        low, high = calibration.interval(interval, value, std)
        low, high = low.clip(*kind.bounds), high.clip(*kind.bounds)  # values outside the bounds are impossible
        return std if np.isnan(calibration.scale) else calibration.std(std, value), low, high

    def _compare(
        self, crystals: Crystals, features: torch.Tensor
    ) -> tuple[list[list[str]], NDArray[np.float64], list[list[str]]]:
        """Return unseen elements, latent distance and flags of each crystal."""
        graph = self.encoder.graph
        signs = {} if self.encoder.smooth else {"cutoff": graph.near_cut(crystals)}
        unseen: list[list[str]] = [[] for _ in crystals.sizes]
        distance = np.full(len(crystals), np.nan)
        if self.knowledge is not None:
            training = self.knowledge.training_set
            distance = training.distance(features)
            unseen = [training.unseen(numbers) for numbers in np.split(crystals.numbers, crystals.ptr[1:-1])]
            signs["element"] = np.array([bool(elements) for elements in unseen])
            signs["distance"] = distance > training.far
            signs["size"] = crystals.sizes > int(training.largest)
        flags = [[name for name, sign in signs.items() if sign[b]] for b in range(len(crystals))]
        return unseen, distance, flags


def check_for(models: Sequence[Predictor]) -> Check | None:
    """Return a check that rejects crystals that one of the models can't predict, those without an area; None if not
    needed.
    """
    per = [getattr(member, "per", {}) for model in models for member in model.members]
    if not any("area" in own.values() for own in per):
        return None
    return lambda crystals, ids: {row: no_area(ids[row]) for row in np.flatnonzero(bulk_of(crystals)).tolist()}


def predict_stream(
    models: Sequence[Predictor], stream: Iterable[Chunk], interval: float
) -> Iterator[tuple[Chunk, list[Predictions]]]:
    """Predict with several models while reading, so that each crystal is read once.

    Args:
        models: the predictors.
        stream: provides the graphs and descriptor columns that the models need.
        interval: coverage of the interval, between 0 and 1.

    Returns:
        Portions, each with the predictions of every model, none if the portion has no valid crystal.

    Raises:
        DataError: ``interval`` isn't between 0 and 1.
    """
    if not 0.0 < interval < 1.0:
        raise DataError(f"interval must be between 0 and 1, not {interval}")
    for portion in stream:
        yield portion, [model.predict_portion(portion, interval) for model in models if portion.ids]


def embed_stream(
    model: Embedder, stream: CrystalStream, per: Per, layers_read: LayersRead
) -> Iterator[tuple[Chunk, Embeddings | None]]:
    """Embed crystals while reading; None for a portion without a valid crystal.

    Raises:
        DataError: ``per`` or ``layers_read`` is invalid.
    """
    one_of(Per, "per", per)
    one_of(LayersRead, "layers_read", layers_read)
    every = layers_read == "all"
    for portion in stream:
        if not portion.ids:
            yield portion, None
            continue
        with torch.inference_mode():
            batch = portion.batches[model.encoder.graph].to(model.device)
            layers = features_of_layers(model.encoder, batch) if every else [model.encoder(batch)]
        features = torch.cat(layers, dim=-1).float().cpu().numpy()
        yield portion, Embeddings.of(portion, features, per, spread=every)


def one_of(words: Any, name: str, word: str) -> None:
    if word not in get_args(words):
        raise DataError(f"{name} must be one of {', '.join(get_args(words))}, not {word!r}")
