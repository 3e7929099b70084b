"""Every encoder, small enough for a test."""

from __future__ import annotations

import numpy as np
import torch

from conftest import Cell, put_together
from crysldnet.encoders.cartnet import CartNet
from crysldnet.encoders.cgcnn import CGCNN
from crysldnet.encoders.cogn import CoGN
from crysldnet.encoders.ecomformer import EComFormer
from crysldnet.encoders.icomformer import IComFormer
from crysldnet.encoders.matformer import Matformer
from crysldnet.encoders.neighbor_attention import NeighborAttention
from crysldnet.encoders.pddformer import PDDFormer
from crysldnet.encoders.potnet import PotNet
from crysldnet.encoders.protocol import Encoder
from crysldnet.graphs.batch import CrystalBatch, make_batch

WIDTH = 16
CLASSES: dict[str, type[Encoder]] = {
    "cartnet": CartNet,
    "cgcnn": CGCNN,
    "cogn": CoGN,
    "ecomformer": EComFormer,
    "icomformer": IComFormer,
    "matformer": Matformer,
    "neighbor_attention": NeighborAttention,
    "pddformer": PDDFormer,
    "potnet": PotNet,
}
SMALL: dict[str, dict[str, object]] = {
    "cartnet": {"layers": 2, "n_basis": 16},
    "cgcnn": {"layers": 2},
    "cogn": {"layers": 2},
    "ecomformer": {"layers": 2, "scalars": 8, "vectors": 3, "n_basis": 32},
    "icomformer": {"layers": 2, "n_basis": 32},
    "matformer": {"layers": 2, "heads": 2, "n_basis": 32},
    "neighbor_attention": {"layers": 2, "messages": 16, "heads": 2, "channels": 4},
    "pddformer": {"layers": 3, "n_distances": 20, "n_basis": 64},
    "potnet": {"layers": 2, "n_basis": 32, "n_potential_basis": 16},
}
PUBLISHED = [name for name in CLASSES if name != "neighbor_attention"]


def small(name: str, **settings: object) -> Encoder:
    """A small encoder with fresh weights, the same each time."""
    torch.manual_seed(0)
    return CLASSES[name](width=WIDTH, **SMALL[name], **settings)


def batch_of(cells: list[Cell], encoder: Encoder, dtype: torch.dtype = torch.float64) -> CrystalBatch:
    return make_batch(put_together(cells), encoder.graph, dtype=dtype)


def settled(encoder: Encoder, cells: list[Cell]) -> Encoder:
    """Take batch statistics from real crystals, then evaluate, in double precision."""
    encoder, batch = encoder.double().train(), batch_of(cells, encoder)
    with torch.no_grad():
        for _ in range(20):
            encoder(batch)
    return encoder.eval()


@torch.no_grad()
def features(cells: list[Cell], encoder: Encoder) -> torch.Tensor:
    return encoder(batch_of(cells, encoder))


def every_crystal_differs(one: torch.Tensor, other: torch.Tensor, cells: list[Cell], far: float = 1e-3) -> bool:
    ends = np.cumsum([len(c.numbers) for c in cells])[:-1].tolist()
    return all(d.abs().max() > far for d in torch.tensor_split(one - other, ends))
