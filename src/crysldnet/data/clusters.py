"""Clusters of similar crystals, for splits that test on structures unlike the training set."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crysldnet.data.fingerprint import geometries_of
from crysldnet.data.store import CrystalStore
from crysldnet.errors import DataError

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
