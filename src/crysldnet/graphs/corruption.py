"""Corruption for denoising objectives: mask species, displace atoms, strain the cell.

Shapes: ``B`` crystals, ``N`` atoms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crysldnet.graphs.crystals import Crystals

MASKED = 0
"""Atomic number of a masked atom."""


class DenoisingTargets(NamedTuple):
    """The corruption in the frame of the corrupted crystal."""

    numbers: NDArray[np.int64]
    """[N] the true atomic numbers."""
    masked: NDArray[np.bool_]
    """[N] the masked atoms."""
    displacement: NDArray[np.float64]
    """[N, 3] Å, displacement of each atom, with zero mean per crystal."""
    strain: NDArray[np.float64]
    """[B, 3, 3] symmetric strain ε of the cell: L' = L(1 + ε)."""
    levels: NDArray[np.float64]
    """[B, 2] standard deviations of displacement (Å) and strain used for sampling; 0 without corruption."""


Amount = float | list[float]
"""A number, or a range from which each crystal's value is sampled."""


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """Settings of the corruption.

    Attributes:
        mask_fraction: fraction of masked atoms per crystal, rounded up; none in a crystal of one atom. A range is
            sampled uniformly, and the number of atoms is rounded randomly.
        displacement: standard deviation per coordinate in Å, at full strength. A range is sampled log-uniformly.
        strain: standard deviation of the strain's diagonal entries, at full strength (off the diagonal 1/√2 of it).
            A range is sampled log-uniformly.
        vary: sample a strength uniformly from 0 to 1 per crystal, for displacement and strain given as numbers; else 1.
        clean_fraction: fraction of crystals left uncorrupted.
        min_atoms: smaller crystals are excluded.
        resample: new draw every epoch; else always the same corruption, except for batches that exceed
            ``data.max_edges``.
    """

    mask_fraction: Amount = 0.3
    displacement: Amount = 0.0
    strain: Amount = 0.0
    vary: bool = True
    clean_fraction: float = 0.0
    min_atoms: int = 1
    resample: bool = True

    def __post_init__(self) -> None:
        for name, lowest, highest in (("mask_fraction", 0.0, 1.0), ("displacement", 0.0, np.inf), ("strain", 0.0, 0.2)):
            low, high = _ends(getattr(self, name), name)
            positive = low > 0 or name == "mask_fraction" or not isinstance(getattr(self, name), list)
            if not lowest <= low <= high <= highest or not positive:
                raise ValueError(
                    f"{name}={getattr(self, name)}: give {lowest:g} to {highest:g}, or a range of two such, the "
                    f"lower first{'' if name == 'mask_fraction' else ' and over 0'}"
                )
        if not 0.0 <= self.clean_fraction < 1.0:
            raise ValueError(f"clean_fraction={self.clean_fraction}: it must be at least 0 and below 1")

    def highest(self, name: Literal["displacement", "strain"]) -> float:
        """Return the largest possible standard deviation."""
        return _ends(getattr(self, name), name)[1]

    def lowest(self, name: Literal["displacement", "strain"]) -> float | None:
        """Return the lower end of a range; None for a number."""
        value = getattr(self, name)
        return value[0] if isinstance(value, list) else None

    def apply(self, crystals: Crystals, rng: np.random.Generator) -> tuple[Crystals, DenoisingTargets]:
        """Corrupt a copy of a batch."""
        owner, sizes = crystals.crystal, crystals.sizes
        masked = self._draw_mask(crystals, rng)
        strength = rng.random(len(crystals)) if self.vary else np.ones(len(crystals))
        moving = self._levels(self.displacement, strength, rng)
        straining = self._levels(self.strain, strength, rng)
        if self.clean_fraction:
            clean = rng.random(len(crystals)) < self.clean_fraction
            masked &= ~clean[owner]
            moving, straining = np.where(clean, 0.0, moving), np.where(clean, 0.0, straining)
        moved = rng.standard_normal((len(crystals.numbers), 3)) * moving[owner][:, None]
        drift = np.stack([np.bincount(owner, moved[:, axis], len(crystals)) for axis in range(3)], axis=1)
        moved -= (drift / np.maximum(sizes, 1)[:, None])[owner]
        raw = rng.standard_normal((len(crystals), 3, 3)) * straining[:, None, None]
        strain = (raw + raw.transpose(0, 2, 1)) / 2.0

        frac = crystals.frac_coords + np.einsum("ni,nij->nj", moved, np.linalg.inv(crystals.lattice)[owner])
        stretched = np.eye(3) + strain
        corrupted = Crystals(
            crystals.lattice @ stretched, crystals.ptr, np.where(masked, MASKED, crystals.numbers), frac
        )
        displacement = np.einsum("ni,nij->nj", moved, stretched[owner])
        levels = np.stack([moving, straining], axis=1)
        return corrupted, DenoisingTargets(crystals.numbers.astype(np.int64), masked, displacement, strain, levels)

    @staticmethod
    def _levels(amount: Amount, strength: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
        """Return the standard deviation [B] of each crystal."""
        if not isinstance(amount, list):
            return amount * strength
        low, high = np.log(amount)
        return np.exp(rng.uniform(low, high, len(strength)))

    def _draw_mask(self, crystals: Crystals, rng: np.random.Generator) -> NDArray[np.bool_]:
        sizes = crystals.sizes
        if isinstance(self.mask_fraction, list):
            low, high = self.mask_fraction
            share = rng.uniform(low, high, len(crystals)) * sizes
            hidden = np.where(sizes > 1, np.minimum(np.floor(share + rng.random(len(crystals))), sizes - 1), 0)
        else:
            hidden = np.where(sizes > 1, np.maximum(np.ceil(self.mask_fraction * sizes), 1), 0)
            if self.mask_fraction == 0.0:
                hidden[:] = 0
        order = np.lexsort((rng.random(len(crystals.numbers)), crystals.crystal))
        masked = np.zeros(len(crystals.numbers), bool)
        rank = np.arange(len(order)) - np.repeat(crystals.ptr[:-1], sizes)
        masked[order] = rank < hidden[crystals.crystal]
        return masked


def _ends(amount: Amount, name: str) -> tuple[float, float]:
    if not isinstance(amount, list):
        return amount, amount
    if len(amount) != 2:
        raise ValueError(f"{name}={amount}: a range has two ends, as in [0.01, 0.25]")
    return amount[0], amount[1]
