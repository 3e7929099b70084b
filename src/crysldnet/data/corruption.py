"""What a denoising objective does to a crystal before it becomes a graph: species masked, atoms moved, cell strained.

Shapes: ``B`` crystals, ``N`` atoms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crysldnet.data.crystals import Crystals

MASKED = 0
"""The atomic number that a masked atom shows."""


class Undo(NamedTuple):
    """What was done, in the frame of the corrupted crystal."""

    numbers: NDArray[np.int64]
    """[N] the true atomic numbers."""
    masked: NDArray[np.bool_]
    """[N] the atoms whose species was hidden."""
    displacement: NDArray[np.float64]
    """[N, 3] Å, how far each atom was moved, its crystal's mean being zero."""
    strain: NDArray[np.float64]
    """[B, 3, 3] the symmetric strain ε put on the cell: L' = L(1 + ε)."""


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """Settings of the corruption.

    Attributes:
        mask_fraction: share of each crystal's atoms whose species is hidden, rounded up; in a crystal of one atom
            none is.
        displacement: standard deviation per coordinate in Å, at full strength.
        strain: standard deviation of the strain's diagonal entries, at full strength (off the diagonal 1/√2 of it).
        vary: each crystal gets a strength drawn uniformly from 0 to 1, so that clean crystals are seen too; else 1.
        min_atoms: smaller crystals are left out.
        resample: draw anew every epoch; else the same corruption always, but for batches that it brings over
            ``data.max_edges``.
    """

    mask_fraction: float = 0.3
    displacement: float = 0.0
    strain: float = 0.0
    vary: bool = True
    min_atoms: int = 1
    resample: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.mask_fraction <= 1.0 or self.displacement < 0.0 or not 0.0 <= self.strain < 0.2:
            raise ValueError(f"mask_fraction must be 0 to 1, displacement ≥ 0 Å and strain 0 to 0.2: {self}")

    def apply(self, crystals: Crystals, rng: np.random.Generator) -> tuple[Crystals, Undo]:
        """Corrupt a batch; the input is left as it is."""
        owner, sizes = crystals.crystal, crystals.sizes
        masked = self._draw_mask(crystals, rng)
        strength = rng.random(len(crystals)) if self.vary else np.ones(len(crystals))
        moved = rng.standard_normal((len(crystals.numbers), 3)) * (self.displacement * strength[owner])[:, None]
        drift = np.stack([np.bincount(owner, moved[:, axis], len(crystals)) for axis in range(3)], axis=1)
        moved -= (drift / np.maximum(sizes, 1)[:, None])[owner]
        raw = rng.standard_normal((len(crystals), 3, 3)) * (self.strain * strength)[:, None, None]
        strain = (raw + raw.transpose(0, 2, 1)) / 2.0

        frac = crystals.frac_coords + np.einsum("ni,nij->nj", moved, np.linalg.inv(crystals.lattice)[owner])
        stretched = np.eye(3) + strain
        corrupted = Crystals(
            crystals.lattice @ stretched, crystals.ptr, np.where(masked, MASKED, crystals.numbers), frac
        )
        displacement = np.einsum("ni,nij->nj", moved, stretched[owner])
        return corrupted, Undo(crystals.numbers.astype(np.int64), masked, displacement, strain)

    def _draw_mask(self, crystals: Crystals, rng: np.random.Generator) -> NDArray[np.bool_]:
        sizes = crystals.sizes
        hidden = np.where(sizes > 1, np.maximum(np.ceil(self.mask_fraction * sizes), 1), 0).astype(np.int64)
        if self.mask_fraction == 0.0:
            hidden[:] = 0
        order = np.lexsort((rng.random(len(crystals.numbers)), crystals.crystal))
        masked = np.zeros(len(crystals.numbers), bool)
        rank = np.arange(len(order)) - np.repeat(crystals.ptr[:-1], sizes)
        masked[order] = rank < hidden[crystals.crystal]
        return masked
