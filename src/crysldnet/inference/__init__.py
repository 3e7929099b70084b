"""Models that are ready to use: predictions with uncertainty, and embeddings, for crystals of any source.

Shapes: ``B`` crystals, ``N`` atoms, ``T`` targets, ``C`` classes, ``D`` width of the encoder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from crysldnet.data.batch import make_batch
from crysldnet.data.crystals import Crystals
from crysldnet.data.elements import reduced_formula
from crysldnet.data.ledger import Ledger
from crysldnet.data.stream import CrystalStream, Portion, Refused, StreamSettings
from crysldnet.encoders.protocol import Encoder
from crysldnet.errors import DataError, DeviceError
from crysldnet.inference.results import Embeddings, Predictions
from crysldnet.models.head import PropertyModel
from crysldnet.models.target import Classes
from crysldnet.training import checkpoint
from crysldnet.training.calibrate import Knowledge, knowledge_of, together
from crysldnet.training.training_set import catch_features

Device = Literal["auto", "cpu", "gpu"]
OnError = Literal["raise", "report"]
Per = Literal["crystal", "atom"]


def choose_device(device: Device) -> torch.device:
    """Return the device to compute on.

    Raises:
        DataError: there is no such device.
        DeviceError: there is no GPU.
    """
    _one_of(Device, "device", device)
    if device == "gpu" and not torch.cuda.is_available():
        raise DeviceError("device=gpu: this machine has no GPU; use device=cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


class Embedder:
    """An encoder that is ready to use.

    Attributes:
        encoder: on its device, in evaluation mode.
        info: what its file says of it.
        name: of its file or folder.
        width: D.
    """

    def __init__(self, encoder: Encoder, info: dict[str, Any], name: str, device: torch.device) -> None:
        self.encoder, self.info, self.name, self.device = encoder.to(device).eval(), info, name, device
        self.width = encoder.width

    def embed(
        self,
        structures: Any,
        *,
        per: Per = "crystal",
        on_error: OnError = "raise",
        settings: StreamSettings | None = None,
    ) -> Embeddings:
        """Return the encoder's features of atoms, or their mean over each crystal.

        Args:
            structures: as :meth:`Predictor.predict` takes them.
            per: ``crystal`` for [B, D], ``atom`` for [N, D].
            on_error: as there.
            settings: as there.
        """
        parts: list[Embeddings] = []
        account = _Account(on_error)
        stream = CrystalStream(structures, [self.encoder.graph], _own(settings))
        for portion, found in embed_stream(self, stream, per):
            account.take(portion)
            parts += [] if found is None else [found]
        return Embeddings.joined(parts, account.refused, account.notes)


class Predictor(Embedder):
    """A finetuned model, or an ensemble of them, that is ready to use.

    Attributes:
        members: the models; one where it is no ensemble.
        knowledge: what the file says of errors and training set; None for a file of an earlier version.
        targets, units: [T] of what is predicted.
    """

    def __init__(
        self,
        loaded: Sequence[tuple[PropertyModel, dict[str, Any]]],
        knowledge: Knowledge | None,
        name: str,
        device: torch.device,
    ) -> None:
        self.members = [model.to(device).eval() for model, _ in loaded]
        super().__init__(self.members[0].encoder, loaded[0][1], name, device)
        self.knowledge = knowledge
        self.targets, self.units = self.members[0].targets, self.members[0].units

    def predict(
        self,
        structures: Any,
        *,
        interval: float = 0.9,
        on_error: OnError = "raise",
        settings: StreamSettings | None = None,
    ) -> Predictions:
        """Predict.

        Args:
            structures: pymatgen's ``Structure`` or ASE's ``Atoms``, one or many; a :class:`Crystals`; paths of files,
                folders, archives or stores; or anything else that ``crysldnet data import`` reads.
            interval: how often the interval shall hold the true value, between 0 and 1.
            on_error: ``raise`` stops at the first crystal that can't be used, so that the answers are those of all
                structures in their order; ``report`` leaves it out and lists it in ``refused``.
            settings: of reading and batches.

        Raises:
            DataError: there is nothing to predict, or a crystal can't be used.
        """
        parts: list[Predictions] = []
        account = _Account(on_error)
        stream = CrystalStream(structures, [self.encoder.graph], _own(settings))
        for portion, found in predict_stream([self], stream, interval):
            account.take(portion)
            parts += found
        return Predictions.joined(parts, account.refused, account.notes)

    @torch.inference_mode()
    def predict_portion(self, portion: Portion, interval: float) -> Predictions:
        """Predict crystals whose graphs are there."""
        crystals, batch = portion.crystals, portion.batches[self.encoder.graph].to(self.device)
        with catch_features(self.encoder) as caught:
            found = together(self.members, [member.predict(batch) for member in self.members])
            features = caught.of_crystals(batch)
        value = found.value.double().cpu().numpy()
        std = np.full_like(value, np.nan) if found.std is None else found.std.double().cpu().numpy()
        low, high = np.full_like(value, np.nan), np.full_like(value, np.nan)
        if self.knowledge is not None:
            for place in range(len(self.targets)):
                std[:, place], low[:, place], high[:, place] = self._calibrated(
                    self.knowledge, place, value[:, place], std[:, place], interval
                )
        unseen, distance, flags = self._compare(crystals, features)
        return Predictions(
            ids=portion.ids,
            sources=portion.sources,
            formulas=formulas(crystals),
            targets=self.targets,
            units=self.units,
            classes=self.members[0].classes,
            values=value,
            std=std,
            low=low,
            high=high,
            probabilities=None if found.probability is None else found.probability.double().cpu().numpy(),
            unseen=unseen,
            distance=distance,
            flags=flags,
        )

    def _calibrated(
        self, knowledge: Knowledge, place: int, value: NDArray[np.float64], std: NDArray[np.float64], interval: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return standard deviation, lower and upper end of one target, NaN where they aren't known."""
        calibration = knowledge.calibration.targets[place]
        kind = self.members[0].types[place]
        if isinstance(kind, Classes):
            return std, np.full_like(value, np.nan), np.full_like(value, np.nan)
        value.clip(*kind.bounds, out=value)  # in single precision a bound is its neighbour
        low, high = calibration.interval(interval, value, std)
        low, high = low.clip(*kind.bounds), high.clip(*kind.bounds)  # nothing is lost beyond what there can be
        return std if np.isnan(calibration.scale) else calibration.std(std, value), low, high

    def _compare(
        self, crystals: Crystals, features: torch.Tensor
    ) -> tuple[list[list[str]], NDArray[np.float64], list[list[str]]]:
        """Return unseen elements, latent distance and flags of each crystal."""
        if self.knowledge is None:
            return [[] for _ in crystals.sizes], np.full(len(crystals), np.nan), [[] for _ in crystals.sizes]
        training = self.knowledge.training_set
        distance = training.distance(features)
        unseen = [training.unseen(numbers) for numbers in np.split(crystals.numbers, crystals.ptr[1:-1])]
        signs = zip(unseen, distance > training.far, crystals.sizes > int(training.largest), strict=True)
        names = ("element", "distance", "size")
        flags = [[name for name, sign in zip(names, row, strict=True) if sign] for row in signs]
        return unseen, distance, flags


def formulas(crystals: Crystals) -> list[str]:
    """Return the reduced formula of each crystal."""
    return [reduced_formula(numbers) for numbers in np.split(crystals.numbers, crystals.ptr[1:-1])]


def predict_stream(
    models: Sequence[Predictor], stream: CrystalStream, interval: float
) -> Iterator[tuple[Portion, list[Predictions]]]:
    """Predict with several models while the crystals are read, each crystal once.

    Returns:
        Portions, and for each what every model says of it: nothing where it has no crystal that can be used.

    Raises:
        DataError: ``interval`` isn't between 0 and 1.
    """
    if not 0.0 < interval < 1.0:
        raise DataError(f"interval must be between 0 and 1, not {interval}")
    for portion in stream:
        yield portion, [model.predict_portion(portion, interval) for model in models if portion.ids]


def embed_stream(model: Embedder, stream: CrystalStream, per: Per) -> Iterator[tuple[Portion, Embeddings | None]]:
    """Embed crystals while they are read; None for a portion without a crystal that can be used.

    Raises:
        DataError: ``per`` is neither.
    """
    _one_of(Per, "per", per)
    for portion in stream:
        if not portion.ids:
            yield portion, None
            continue
        with torch.inference_mode():
            features = model.encoder(portion.batches[model.encoder.graph].to(model.device))
        yield portion, Embeddings.of(portion, features.float().cpu().numpy(), per)


@torch.inference_mode()
def predict_crystals(model: PropertyModel, crystals: Crystals) -> NDArray[np.float64]:
    """Return predictions [B, T] of one model in physical units, all crystals in one batch."""
    batch = make_batch(crystals, model.encoder.graph).to(next(model.parameters()).device)
    return model(batch).double().cpu().numpy()


def load(path: str | os.PathLike[str], *, device: Device = "auto") -> Predictor:
    """Load a finetuned model, or an ensemble.

    Args:
        path: the folder of a finetuning run, or a ``model.safetensors``.
        device: ``auto`` takes a GPU where there is one.

    Raises:
        CheckpointError: there is none, or it is damaged.
        DeviceError: there is no GPU.
    """
    chosen = choose_device(device)
    path = Path(path)
    return Predictor(checkpoint.load_property_models(path), knowledge_of(path), str(path), chosen)


def load_encoder(path: str | os.PathLike[str], *, device: Device = "auto") -> Embedder:
    """Load an encoder: a pretrained one, or that of a finetuned model.

    Args:
        path: the folder of a run, an ``encoder.safetensors`` or a ``model.safetensors``.
        device: as :func:`load` takes it.

    Raises:
        CheckpointError: there is none, or it is damaged.
        DeviceError: there is no GPU.
    """
    chosen = choose_device(device)
    path = Path(path)
    if path.is_dir() and (path / "encoder.safetensors").exists():
        path = path / "encoder.safetensors"
    if path.is_dir() or checkpoint.kind_of(path) == "property_model":
        return load(path, device=device)
    encoder, info = checkpoint.load_encoder(path)
    return Embedder(encoder, info, str(path), chosen)


def _own(settings: StreamSettings | None) -> StreamSettings:
    return StreamSettings() if settings is None else settings


def _one_of(words: Any, name: str, word: str) -> None:
    if word not in get_args(words):
        raise DataError(f"{name} must be one of {', '.join(get_args(words))}, not {word!r}")


class _Account:
    """What was refused, where that is allowed, and what was read otherwise than it stood there."""

    def __init__(self, on_error: OnError) -> None:
        _one_of(OnError, "on_error", on_error)
        self._raise = on_error == "raise"
        self._ledger = Ledger(strict=False)
        self.refused: list[Refused] = []

    def take(self, portion: Portion) -> None:
        """Take the account of a portion.

        Raises:
            DataError: something was refused, and that isn't allowed.
        """
        if portion.refused and self._raise:
            raise DataError(f"{portion.refused[0].source}: {portion.refused[0].reason}")
        self.refused += portion.refused
        for text, place in portion.notes:
            self._ledger.note(text, place)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was read otherwise than it stood there."""
        return self._ledger.notes
