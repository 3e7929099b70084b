"""The graph of a crystal, as an encoder asks for it."""

from __future__ import annotations

from dataclasses import dataclass

from crysldnet.data.crystals import Crystals
from crysldnet.data.neighbors import Neighbors, neighbor_list


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """Which graph an encoder needs; the data module reads it from the encoder, so that the two can't disagree.

    Attributes:
        k: each target's k nearest neighbors and all that tie with the k-th; or
        radius: all neighbors within this many Å.
        tolerance: Å by which distances of one shell may differ.
        symmetric: add the reverse of every edge that lacks it.
        repeat_self_images: edges between an atom and its own images count twice (a quirk of the published graphs).
        n_distances: length of each atom's pairwise distance distribution; 0 for none.
    """

    k: int | None = None
    radius: float | None = None
    tolerance: float = 1e-4
    symmetric: bool = False
    repeat_self_images: bool = False
    n_distances: int = 0

    def __post_init__(self) -> None:
        if (self.k is None) == (self.radius is None):
            raise ValueError("a graph is made by k or by radius, not both or neither")

    def build(self, crystals: Crystals) -> Neighbors:
        """Find the edges of all crystals at once."""
        return neighbor_list(
            crystals.lattice,
            crystals.frac_coords,
            crystals.ptr,
            k=self.k,
            radius=self.radius,
            tolerance=self.tolerance,
            symmetric=self.symmetric,
            repeat_self_images=self.repeat_self_images,
            n_distances=self.n_distances,
        )
