"""Results of predicting and embedding, as arrays and as tables.

Shapes: ``B`` crystals, ``N`` atoms, ``T`` targets, ``C`` classes, ``D`` width of the encoder.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from crysldnet.data.elements import SYMBOLS, formulas_of
from crysldnet.errors import DataError
from crysldnet.models.readout import mean_and_spread
from crysldnet.readers.stream import Chunk, Refused

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Found(ABC):
    """Results for a sequence of crystals, and the rejected ones."""

    PER_CRYSTAL: ClassVar[tuple[str, ...]]
    """Fields that are lists with one entry per crystal."""

    refused: list[Refused] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[Self], refused: list[Refused], notes: tuple[str, ...]) -> Self:
        """Concatenate parts.

        Raises:
            DataError: the list is empty.
        """
        if not parts:
            reason = f": {refused[0].source}: {refused[0].reason}" if refused else ""
            raise DataError(f"no crystal could be used{reason}")
        joined: dict[str, Any] = {}
        for name in (f.name for f in fields(cls)):
            values = [getattr(part, name) for part in parts]
            if isinstance(values[0], np.ndarray):
                joined[name] = np.concatenate(values)
            elif name in cls.PER_CRYSTAL:
                joined[name] = [item for value in values for item in value]
        return replace(parts[0], **joined, refused=refused, notes=notes)

    @abstractmethod
    def table(self) -> pa.Table:
        """Return the results as an Arrow table."""

    def to_dict(self) -> dict[str, list[Any]]:
        """Return the columns of the table as lists, with None for missing values."""
        return self.table().to_pydict()

    def to_pandas(self) -> Any:
        """Return the table as a pandas data frame; requires pandas."""
        return self.table().to_pandas()


@dataclass(frozen=True, kw_only=True)
class Predictions(Found):
    """Predictions for B crystals.

    Attributes:
        ids, sources, formulas: [B] id, file or row, and reduced formula.
        targets, units: [T] names and units.
        classes: [T] class names; None for a regression.
        values: [B, T] in physical units; for classification the index of the most likely class.
        std: [B, T] standard deviations, NaN if the model has none.
        low, high: [B, T] bounds of the conformal interval, NaN if unavailable.
        probabilities: [B, T, C] class probabilities, NaN for regressions; None without classification.
        unseen: [B] elements absent from the training set.
        distance: [B] latent distance from the training set, NaN if unknown.
        flags: [B] out-of-distribution flags ``element``, ``distance`` and ``size``; ``cutoff`` if moving atoms by 0.001
            Å may change the neighbors; ``trained`` if the model was trained or validated on the crystal; ``descriptor``
            if a descriptor is outside the training range.
        refused: rejected crystals with reasons.
        notes: what was normalized on reading, with the count and the first file or row.
    """

    PER_CRYSTAL = ("ids", "sources", "formulas", "unseen", "flags")
    ids: list[str]
    sources: list[str]
    formulas: list[str]
    targets: list[str]
    units: list[str]
    classes: list[list[str] | None]
    values: Floats
    std: Floats
    low: Floats
    high: Floats
    probabilities: Floats | None
    unseen: list[list[str]]
    distance: Floats
    flags: list[list[str]]

    def __len__(self) -> int:
        return len(self.ids)

    def table(self) -> pa.Table:
        """Return a table with one row per crystal and target, grouped by crystal.

        Columns: ``id``, ``source``, ``formula``, ``target``, ``prediction``, ``unit``, ``std``, ``low``, ``high``,
        ``class``, ``probability`` (of that class), ``probabilities`` (JSON), ``unseen_elements``, ``distance``,
        ``flags``.
        """
        per = len(self.targets)

        def repeated(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
            return pa.array([value for value in values for _ in range(per)], kind)

        def numbers(values: Floats) -> pa.Array:
            return pa.array(values.astype(np.float32).reshape(-1), from_pandas=True)

        labels, probability, probabilities = self._classes()
        return pa.table(
            {
                "id": repeated(self.ids, pa.string()),
                "source": repeated(self.sources, pa.string()),
                "formula": repeated(self.formulas, pa.string()),
                "target": pa.array(self.targets * len(self), pa.string()),
                "prediction": numbers(self.values),
                "unit": pa.array(self.units * len(self), pa.string()),
                "std": numbers(self.std),
                "low": numbers(self.low),
                "high": numbers(self.high),
                "class": pa.array(labels, pa.string()),
                "probability": numbers(np.array(probability, np.float64)),
                "probabilities": pa.array(probabilities, pa.string()),
                "unseen_elements": repeated([" ".join(elements) for elements in self.unseen], pa.string()),
                "distance": numbers(np.repeat(self.distance, per)),
                "flags": repeated([" ".join(flags) for flags in self.flags], pa.string()),
            }
        )

    def _classes(self) -> tuple[list[str | None], list[float], list[str | None]]:
        """Return the most likely class, its probability and all probabilities as JSON, per crystal and target."""
        found: list[tuple[str | None, float, str | None]] = []
        for row in range(len(self)):
            for place, names in enumerate(self.classes):
                if names is None or self.probabilities is None:
                    found.append((None, np.nan, None))
                    continue
                shares = self.probabilities[row, place, : len(names)]
                likeliest = int(self.values[row, place])
                text = json.dumps({name: float(f"{p:.6g}") for name, p in zip(names, shares, strict=True)})
                found.append((names[likeliest], float(shares[likeliest]), text))
        labels, probability, probabilities = zip(*found, strict=True)
        return list(labels), list(probability), list(probabilities)


@dataclass(frozen=True, kw_only=True)
class Embeddings(Found):
    """Features of B crystals or of their N atoms.

    Attributes:
        ids, sources, formulas: [B] as in :class:`Predictions`.
        sizes: [B] number of atoms.
        numbers: [N] atomic numbers.
        features: [B, D] means over the atoms, [B, 2 · layers · D] with standard deviations, or [N, D] per atom.
        per: ``crystal`` or ``atom``.
        refused: rejected crystals with reasons.
        notes: what was normalized on reading, with the count and the first file or row.
    """

    PER_CRYSTAL = ("ids", "sources", "formulas")
    ids: list[str]
    sources: list[str]
    formulas: list[str]
    sizes: NDArray[np.int64]
    numbers: NDArray[np.uint8]
    features: NDArray[np.float32]
    per: Literal["crystal", "atom"]

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def of(
        cls, portion: Chunk, features: NDArray[np.float32], per: Literal["crystal", "atom"], *, spread: bool
    ) -> Embeddings:
        """Return the embeddings of a portion from atom features [N, D].

        Args:
            portion: the crystals.
            features: of the atoms.
            per: ``crystal`` for the mean over the atoms, else ``atom``.
            spread: also return the standard deviation over the atoms.
        """
        crystals = portion.crystals
        if per == "crystal":
            atoms, crystal = torch.from_numpy(features).double(), torch.from_numpy(crystals.crystal)
            pooled = mean_and_spread([atoms], crystal, len(crystals))
            features = pooled[:, : None if spread else features.shape[1]].float().numpy()
        return cls(
            ids=portion.ids,
            sources=portion.sources,
            formulas=formulas_of(crystals),
            sizes=crystals.sizes,
            numbers=crystals.numbers,
            features=features,
            per=per,
        )

    def table(self) -> pa.Table:
        """Return a table with one row per crystal or atom.

        Columns: ``id``, ``source``, ``formula``, for atoms ``atom`` (from 0) and ``element``, and ``embedding``, D
        numbers.
        """
        repeats = self.sizes if self.per == "atom" else np.ones(len(self.ids), np.int64)
        columns = {
            name: pa.array(np.repeat(np.array(values, object), repeats), pa.string())
            for name, values in (("id", self.ids), ("source", self.sources), ("formula", self.formulas))
        }
        if self.per == "atom":
            columns["atom"] = pa.array(np.concatenate([np.arange(size) for size in self.sizes]))
            columns["element"] = pa.array([SYMBOLS[z] for z in self.numbers.tolist()], pa.string())
        flat = pa.array(np.ascontiguousarray(self.features).reshape(-1))
        return pa.table({**columns, "embedding": pa.FixedSizeListArray.from_arrays(flat, self.features.shape[1])})
