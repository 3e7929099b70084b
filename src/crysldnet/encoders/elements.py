"""Element properties as initial features.

Shapes: ``N`` atoms, ``C`` width. A masked atom has the atomic number 0.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crysldnet.descriptors.composition import element_table
from crysldnet.encoders.protocol import Encoder
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.spec import GraphSpec

N_SPECIES = 119
"""Atomic numbers 1 to 118, and 0 for masked."""
N_CGCNN = 92
OXIDATION_SLOTS = 14
N_PUBCHEM = 4 + OXIDATION_SLOTS
MISSING = {"atomic_radius (pm)": 209.46, "electronegativity (Pauling)": 1.18, "ionization_energy (eV)": 8.0}
"""Values that the published code of coGN uses where PubChem has none."""


@cache
def _read(name: str) -> tuple[dict[str, str], ...]:
    with (Path(__file__).parent / "tables" / name).open(newline="") as file:
        return tuple(csv.DictReader(file))


def cgcnn_table() -> NDArray[np.float32]:
    """Return [119, 92] binary features by atomic number, zero for masked; elements above 100 use the row of 100."""
    rows = np.array([[float(bit) for bit in row["features"]] for row in _read("cgcnn_elements.csv")], np.float32)
    beyond = np.repeat(rows[-1:], N_SPECIES - 1 - len(rows), axis=0)
    return np.concatenate([np.zeros((1, N_CGCNN), np.float32), rows, beyond])


def pubchem_table() -> NDArray[np.float32]:
    """Return [119, 18] z-scores of mass, radius, electronegativity and ionization energy, and oxidation states.

    A state s sets slot (s − 7) mod 14, as published; no two states in the table share a slot.
    """
    rows = _read("pubchem_elements.csv")
    columns = []
    for name in ("atomic_mass (u)", *MISSING):
        values = np.array([float(row[name] or MISSING[name]) for row in rows])
        columns.append((values - values.mean()) / values.std(ddof=1))
    states = np.zeros((len(rows), OXIDATION_SLOTS))
    for z, row in enumerate(rows):
        for state in map(int, row["oxidation_states"].split()):
            states[z, (state - 7) % OXIDATION_SLOTS] = 1.0
    table = np.concatenate([np.stack(columns, axis=1), states], axis=1)
    return np.concatenate([np.zeros((1, N_PUBCHEM)), table]).astype(np.float32)


class ElementTable(nn.Linear):
    """W t(Z) + b with the 92 features t of CGCNN, zero for masked atoms."""

    table: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(N_CGCNN, width)
        self.register_buffer("table", torch.from_numpy(cgcnn_table()), persistent=False)

    def forward(self, numbers: Tensor) -> Tensor:
        """Map atomic numbers [N] to [N, C]; the map is applied once per element, not per atom."""
        return super().forward(self.table).index_select(0, numbers)


class OneHotSpecies(nn.Linear):
    """W onehot(Z) + b over 119 species, including the masked one."""

    def __init__(self, width: int) -> None:
        super().__init__(N_SPECIES, width)

    def forward(self, numbers: Tensor) -> Tensor:
        """Map atomic numbers [N] to [N, C]."""
        return nn.functional.embedding(numbers, self.weight.T) + self.bias


class ElementProperties(Encoder):
    """Fixed features: tabulated properties of each atom's element, standardized over the elements.

    It replaces an encoder for models that only read descriptors, so that compositions can still be compared with those
    of the training set.
    """

    table: Tensor
    smooth = True

    def __init__(self) -> None:
        super().__init__()
        table = np.stack(list(element_table().values()), axis=1)[1:]
        table = (table - table.mean(axis=0)) / table.std(axis=0)
        table = np.concatenate([np.zeros((1, table.shape[1])), table]).astype(np.float32)
        self.width, self.graph = table.shape[1], GraphSpec(k=1)
        self.register_buffer("table", torch.from_numpy(table), persistent=False)

    def forward(self, batch: CrystalBatch) -> Tensor:  # type: ignore[override]
        """Return [N, D], zero for masked atoms."""
        return self.table.index_select(0, batch.numbers)
