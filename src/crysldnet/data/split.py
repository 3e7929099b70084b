"""Train, validation and test split."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crysldnet.data.elements import SYMBOLS, chemical_systems_of, digests, formulas_of, per_text
from crysldnet.data.fingerprint import geometries_of
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError

__all__ = ["SPLITS", "Rows", "Split"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a store is split.

    Attributes:
        by: ``column`` reads the split from a text column. ``official`` is the standard split of a published data set
            for the chosen property. ``random`` samples rows; ``formula`` and ``chemical_system`` keep all crystals of
            one reduced formula, or of one set of elements, on one side, ``leave_cluster_out`` those of one cluster of
            similar structures. ``leave_element_out`` takes all crystals with certain elements as test. ``time`` uses
            the oldest for training and the newest for testing. ``file`` reads the split of an earlier run.
        column: column name for ``by`` ``column`` or ``time``.
        fractions: fractions of train, val and test; for ``leave_element_out`` only the ratio of train to val.
        seed: random seed.
        train_fraction: fraction of the training rows used; smaller fractions are subsets of larger ones.
        elements: element symbols for ``leave_element_out``.
        clusters: number of clusters for ``leave_cluster_out``.
        file: a ``split.json`` for ``by`` ``file``.
    """

    by: Literal[
        "column",
        "official",
        "random",
        "formula",
        "chemical_system",
        "leave_cluster_out",
        "leave_element_out",
        "time",
        "file",
    ] = "column"
    column: str = "split"
    fractions: list[float] = field(default_factory=lambda: [0.8, 0.1, 0.1])
    seed: int = 0
    train_fraction: float = 1.0
    elements: list[str] = field(default_factory=list)
    clusters: int = 50
    file: str | None = None

    def __post_init__(self) -> None:
        if len(self.fractions) != 3 or min(self.fractions) < 0 or abs(sum(self.fractions) - 1.0) > 1e-6:
            raise DataError(f"split.fractions must be three shares that add up to 1, not {self.fractions}")
        if not 0.0 < self.train_fraction <= 1.0:
            raise DataError(f"split.train_fraction must be over 0 and at most 1, not {self.train_fraction}")
        if self.by == "leave_element_out" and not self.elements:
            raise DataError("split.elements: name the elements to leave out, as data.split.elements=[F,Li]")
        if unknown := [symbol for symbol in self.elements if symbol not in SYMBOLS[1:]]:
            raise DataError(f"split.elements: {unknown[0]!r} is not the symbol of an element")
        if self.clusters < 3:
            raise DataError(f"split.clusters must be at least 3, one for each split, not {self.clusters}")
        if self.by == "file" and self.file is None:
            raise DataError("split.file: name the split.json of an earlier run")

    def rows(self, store: CrystalStore, targets: Sequence[str] = ()) -> Rows:
        """Return the rows of each split, in the store's order.

        Args:
            store: the crystals.
            targets: the target properties; the official split depends on them.

        Raises:
            DataError: the store lacks data that the split needs.
        """
        if self.by == "file":
            assert self.file is not None
            rows = read_split_file(self.file, store)
        else:
            labels = self._labels(store, targets)
            rows = {name: np.flatnonzero(labels == name) for name in SPLITS}
        train = rows["train"]
        if self.train_fraction < 1.0:
            keep = max(1, round(self.train_fraction * len(train)))
            rows["train"] = np.sort(np.random.default_rng([self.seed, 1]).permutation(train)[:keep])
        return rows

    def _labels(self, store: CrystalStore, targets: Sequence[str]) -> NDArray:
        if self.by == "column":
            return self._column_labels(store, self.column)
        if self.by == "official":
            return self._published_labels(store, targets)
        places: dict[str, Callable[[CrystalStore], NDArray[np.float64]]] = {
            "random": self._random_places,
            "formula": lambda store: self._hashed_places(formulas_of(store.crystals)),
            "chemical_system": lambda store: self._hashed_places(chemical_systems_of(store.crystals)),
            "leave_cluster_out": self._cluster_places,
            "leave_element_out": self._element_places,
            "time": self._time_places,
        }
        place = places[self.by](store)
        bounds = np.cumsum(self.fractions)[:2]
        labels = np.array(SPLITS, object)[np.searchsorted(bounds, place, side="right").clip(max=2)]
        labels[np.isnan(place)] = None
        return labels

    def _column_labels(self, store: CrystalStore, column: str) -> NDArray:
        if column not in store.column_names:
            raise DataError(
                f"{store.name}: no column {column!r} to split by; "
                "choose data.split.by=formula (or random), or name the column with data.split.column"
            )
        labels = store.texts_of(column)
        strange = set(labels.tolist()) - {*SPLITS, None}
        if strange:
            raise DataError(f"{store.name}: column {column!r} has {strange.pop()!r}; it may hold train, val and test")
        return labels

    def _published_labels(self, store: CrystalStore, targets: Sequence[str]) -> NDArray:
        there = [name for name in store.column_names if name == "split" or name.endswith("_split")]
        columns = [f"{target}_split" for target in targets] or ["split"]
        if "split" in there and not set(columns) <= set(there):
            columns = ["split"]
        if missing := [column for column in columns if column not in there]:
            raise DataError(
                f"{store.name}: it has no published split {missing[0]!r}; available: {', '.join(there) or 'none'}. "
                "Choose another property or data.split.by=formula; pretraining has no property, so it keeps the test "
                "crystals of one out by data.split.by=column and that column in data.split.column"
            )
        labels = [self._column_labels(store, column) for column in columns]
        if any((other != labels[0]).any() for other in labels[1:]):
            raise DataError(
                f"{store.name}: the published splits of {', '.join(targets)} differ; train one model for each property"
            )
        return labels[0]

    def _random_places(self, store: CrystalStore) -> NDArray[np.float64]:
        n = len(store)
        place = np.empty(n)
        place[np.random.default_rng(self.seed).permutation(n)] = (np.arange(n) + 0.5) / n
        return place

    def _hashed_places(self, keys: Sequence[str]) -> NDArray[np.float64]:
        """Return a number between 0 and 1 for each key, determined by key and seed."""

        def places(different: list[str]) -> NDArray[np.float64]:
            return np.frombuffer(digests([f"{self.seed}:{key}" for key in different]), ">u8") / 2.0**64

        return per_text(keys, places)

    def _cluster_places(self, store: CrystalStore) -> NDArray[np.float64]:
        """Arrange whole clusters in random order, each at its center."""
        cluster = clusters_of(store, self.clusters, self.seed)
        sizes = np.bincount(cluster)
        order = np.random.default_rng([self.seed, 2]).permutation(len(sizes))
        middle = np.empty(len(sizes))
        middle[order] = (np.cumsum(sizes[order]) - sizes[order] / 2) / len(store)
        return middle[cluster]

    def _element_places(self, store: CrystalStore) -> NDArray[np.float64]:
        left_out = np.isin(store.crystals.numbers, [SYMBOLS.index(symbol) for symbol in self.elements])
        has = np.bitwise_or.reduceat(left_out, store.crystals.ptr[:-1])
        if not has.any():
            raise DataError(f"{store.name}: no crystal has {' or '.join(self.elements)}; the test split would be empty")
        known = self.fractions[0] + self.fractions[1]
        if known <= 0:
            raise DataError(f"split.fractions: no training rows are left with {self.fractions}")
        others = np.flatnonzero(~has)
        place = np.ones(len(store))
        place[np.random.default_rng(self.seed).permutation(others)] = (
            known * (np.arange(len(others)) + 0.5) / len(others)
        )
        return place

    def _time_places(self, store: CrystalStore) -> NDArray[np.float64]:
        """Sort rows by the column, with equal times together; rows without a time aren't used."""
        if self.column not in store.column_names:
            raise DataError(f"{store.name}: no column {self.column!r} of times; name it with data.split.column")
        times: NDArray
        try:
            times = store.numbers_of(self.column)
            known = np.isfinite(times)
        except DataError:  # dates as text, such as 2021-08-18, sort alphabetically
            times = store.texts_of(self.column)
            known = np.array([time is not None for time in times])
        place = np.full(len(store), np.nan)
        if known.any():
            _, which, counts = np.unique(times[known].astype(times.dtype), return_inverse=True, return_counts=True)
            place[known] = ((np.cumsum(counts) - counts / 2) / known.sum())[which]
        return place


SPLITS = ("train", "val", "test")
Rows = dict[str, NDArray[np.int64]]
FORMAT_VERSION = 1


def _digest(ids: Mapping[str, list[str]]) -> str:
    return hashlib.sha256(json.dumps([ids[name] for name in SPLITS]).encode()).hexdigest()


def split_text(store: CrystalStore, rows: Rows, rule: Mapping[str, Any]) -> str:
    """Return the content of a split file.

    Args:
        store: the crystals.
        rows: rows of each split.
        rule: how the split was made, as plain values.
    """
    ids = {name: store.ids_at(rows[name]) for name in SPLITS}
    content = {
        "format_version": FORMAT_VERSION,
        "rule": dict(rule),
        "store": store.metadata.get("dataset", store.name),
        "store_sha256": store.hash,
        "counts": {name: len(ids[name]) for name in SPLITS},
        "sha256": _digest(ids),
        **ids,
    }
    return json.dumps(content, indent=None, separators=(", ", ": "))


def read_split_file(path: str | os.PathLike[str], store: CrystalStore) -> Rows:
    """Read a split file and find its crystals.

    Raises:
        DataError: it is missing, damaged, of a newer format or of another store, or the store lacks one of its
            crystals.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        ids = {name: [str(id_) for id_ in content[name]] for name in SPLITS}
        version, digest, of_store = content["format_version"], content["sha256"], content["store_sha256"]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a run saves its split as split.json") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not a split file ({type(error).__name__}: {error})") from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: its format version is {version}, this version reads {FORMAT_VERSION}; upgrade crysldnet"
        )
    if digest != _digest(ids):
        raise DataError(f"{path}: its ids were changed after it was written (sha256 differs)")
    if of_store is not None and of_store != store.hash:
        raise DataError(
            f"{path}: it was made for other data than {store.name} (sha256 of the store differs); to use it all the "
            "same, put null in place of its store_sha256"
        )
    where = {id_: row for row, id_ in enumerate(store.ids.to_pylist())}
    for name in SPLITS:
        missing = [id_ for id_ in ids[name] if id_ not in where]
        if missing:
            raise DataError(f"{path}: {len(missing)} crystals of {name} aren't in {store.name} ({missing[0]}, …)")
    return {name: np.array(sorted(where[id_] for id_ in ids[name]), np.int64) for name in SPLITS}


_ELEMENTS = 119
_CHUNK = 4096


def features_of(store: CrystalStore) -> NDArray[np.float32]:
    """Return [B, 119 + 13] element fractions and the standardized geometry fingerprint."""
    shares = []
    for start in range(0, len(store), _CHUNK):
        crystals = store.crystals.take(np.arange(start, min(start + _CHUNK, len(store))))
        flat = np.bincount(crystals.crystal * _ELEMENTS + crystals.numbers, minlength=len(crystals) * _ELEMENTS)
        shares.append(flat.reshape(len(crystals), _ELEMENTS) / crystals.sizes[:, None])
    shape = geometries_of(store.crystals, np.arange(len(store))).astype(np.float32)
    spread = shape.std(axis=0)
    shape = (shape - shape.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    # the geometry counts about as much as the composition: its columns are scaled to a total variance of one
    return np.concatenate([np.concatenate(shares), shape / np.sqrt(shape.shape[1])], axis=1).astype(np.float32)


def clusters_of(store: CrystalStore, count: int, seed: int) -> NDArray[np.int64]:
    """Return [B] the cluster of each crystal, by mini-batch k-means on :func:`features_of`.

    Raises:
        DataError: scikit-learn isn't installed, or there are fewer crystals than clusters.
    """
    try:
        from sklearn.cluster import MiniBatchKMeans
        from threadpoolctl import threadpool_limits  # comes with scikit-learn
    except ImportError as error:
        raise DataError(
            f"clusters need scikit-learn, which isn't installed ({error}): pip install scikit-learn"
        ) from None
    if len(store) < count:
        raise DataError(f"{store.name}: {len(store)} crystals can't make {count} clusters; lower data.split.clusters")
    model = MiniBatchKMeans(count, random_state=seed, n_init=3, batch_size=2048)
    with threadpool_limits(1):  # sum in a fixed order, regardless of the number of cores
        labels = model.fit_predict(features_of(store))
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)
