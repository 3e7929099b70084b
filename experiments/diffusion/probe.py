"""How good are frozen features? Kernel ridge and ridge regression, their settings chosen by leaving one out."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from crysldnet.data.store import CrystalStore
from crysldnet.encoders.protocol import Encoder, features_of_layers
from crysldnet.graphs.batch import make_batch
from crysldnet.models.readout import mean_and_spread

WIDTHS = (0.5, 1.0, 2.0)
"""Of the Gaussian kernel, in units of the median distance."""
RIDGES = np.logspace(-6, 2, 33)
"""Multiples of the mean eigenvalue."""


@torch.inference_mode()
def features(encoder: Encoder, store: CrystalStore, rows: NDArray[np.int64], all_layers: bool = True) -> NDArray:
    """Return mean and spread of every layer over the atoms, or the mean of the last, [n, I] in float32."""
    encoder.eval()
    order = np.argsort(store.crystals.sizes[rows], kind="stable")
    parts = []
    for chosen in np.array_split(order, max(1, -(-len(rows) // 128))):
        batch = make_batch(store.crystals.take(rows[chosen]), encoder.graph)
        layers = features_of_layers(encoder, batch)
        pooled = mean_and_spread(layers if all_layers else layers[-1:], batch.crystal, batch.num_crystals)
        parts.append(pooled.numpy() if all_layers else pooled[:, : encoder.width].numpy())
    found = np.empty((len(rows), parts[0].shape[1]), np.float32)
    found[order] = np.concatenate(parts)
    return found


def _standardized(x: NDArray, train: NDArray[np.int64]) -> NDArray:
    center, scale = x[train].mean(0), x[train].std(0)
    return (x - center) / np.where(scale > 1e-6 * max(scale.max(), 1e-12), scale, 1.0) / np.sqrt(x.shape[1])


def _fit(kernel: NDArray, y: NDArray) -> tuple[float, NDArray]:
    """Return the least mean squared error of leaving one out over all ridges, and the dual weights there."""
    eigenvalues, vectors = np.linalg.eigh(kernel.astype(np.float64))
    eigenvalues = eigenvalues.clip(0.0)
    turned = vectors.T @ y
    best: tuple[float, NDArray] = (np.inf, y)
    for ridge in RIDGES * eigenvalues.mean():
        inverse = 1.0 / (eigenvalues + ridge)
        dual = vectors @ (inverse * turned)
        error = float(np.mean((dual / (vectors**2 @ inverse)) ** 2))
        if error < best[0]:
            best = error, dual
    return best


def errors(x: NDArray, y: NDArray, train: NDArray[np.int64], test: NDArray[np.int64]) -> dict[str, float]:
    """Return the mean absolute test error of kernel ridge and of ridge regression.

    Args:
        x: [n, I] features.
        y: [n] values.
        train, test: which of the n.
    """
    x = _standardized(x, train)
    center = y[train].mean()
    a, b = x[train], x[test]
    inner, across = a @ a.T, b @ a.T
    squared = (np.diag(inner)[:, None] + np.diag(inner)[None] - 2.0 * inner).clip(0.0)
    squared_across = ((b * b).sum(1)[:, None] + np.diag(inner)[None] - 2.0 * across).clip(0.0)
    median = np.median(squared[np.triu_indices(len(train), 1)])
    fits = []
    for width in WIDTHS:
        scale = 2.0 * width**2 * median
        error, dual = _fit(np.exp(-squared / scale), y[train] - center)
        fits.append((error, np.exp(-squared_across / scale) @ dual))
    linear = across @ _fit(inner, y[train] - center)[1]
    kernel = min(fits, key=lambda fit: fit[0])[1]
    return {
        "kernel ridge": float(np.abs(kernel + center - y[test]).mean()),
        "ridge": float(np.abs(linear + center - y[test]).mean()),
    }
