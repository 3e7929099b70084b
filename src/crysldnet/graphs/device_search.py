"""Periodic neighbor lists of a whole batch in plain torch, on its device.

They are those of :mod:`crysldnet.graphs.neighbors`: the same edges in the same order, and vectors equal to the last
bit, because squared distances and vectors are computed by the same operations in double precision.

The images of each cell within a radius are listed in a reduced cell, in which few are needed whatever the shape of the
cell. All pairs of an atom and an image are compared in blocks, with a margin, and the near ones exactly. For ``k``
neighbors the radius is estimated from the density; crystals with an atom that has too few neighbors within it are
searched again with a larger one. The host waits for the device a few times per batch, to learn numbers of edges.

Shapes: ``B`` crystals, ``N`` atoms, ``E`` directed edges, ``C`` pairs of an atom and an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crysldnet.graphs.crystals import Crystals
from crysldnet.graphs.lattice_edges import reduced_bases

BLOCK = 1 << 19
"""Pairs compared at once; they take about 150 bytes each."""
MARGIN = 1e-6
"""Å, and fraction of a cell; more than the rounding errors of the first comparison."""
ENLARGE = 1.4
"""Factor of the radius of crystals with an atom that has too few neighbors within it."""


@dataclass
class Cells:
    """What the neighbors of a batch are searched in.

    Attributes:
        frac_coords: [N, 3] float64.
        lattice: [B, 3, 3] float64, rows are lattice vectors in Å.
        triangular: [B, 3, 3] float64, the lattice rotated to lower triangular form.
        reduced: [B, 3, 3] float64, a reduced basis as integer multiples of the lattice vectors.
        inverse: [B, 3, 3] float64, its inverse, also integers.
        crystal: [N] crystal of each atom.
        ptr: [B + 1] first atom of each crystal, on the host.
        heights: [B, 3] distances between the faces of the reduced cell in Å, on the host.
        volumes: [B] Å³, on the host.
    """

    frac_coords: Tensor
    lattice: Tensor
    triangular: Tensor
    reduced: Tensor
    inverse: Tensor
    crystal: Tensor
    ptr: NDArray[np.int64]
    heights: NDArray[np.float64]
    volumes: NDArray[np.float64]

    @classmethod
    def of(cls, crystals: Crystals) -> Cells:
        """Prepare a search on the host."""
        lattice = np.ascontiguousarray(crystals.lattice, np.float64)
        triangular = _triangular(lattice)
        reduced = reduced_bases(lattice)
        one, two, three = reduced.transpose(1, 0, 2)
        cofactors = np.stack([np.cross(two, three), np.cross(three, one), np.cross(one, two)], axis=2)
        inverse = cofactors * (one * cofactors[:, :, 0]).sum(1)[:, None, None]  # the determinant is 1 or −1
        heights = 1.0 / np.linalg.norm(np.linalg.inv(reduced @ lattice), axis=1)
        return cls(
            frac_coords=torch.from_numpy(crystals.frac_coords.astype(np.float64)),
            lattice=torch.from_numpy(lattice),
            triangular=torch.from_numpy(triangular),
            reduced=torch.from_numpy(reduced.astype(np.float64)),
            inverse=torch.from_numpy(inverse.astype(np.float64)),
            crystal=torch.from_numpy(crystals.crystal),
            ptr=np.asarray(crystals.ptr),
            heights=heights,
            volumes=np.prod(np.diagonal(triangular, axis1=1, axis2=2), axis=1),
        )


@dataclass
class DeviceNeighbors:
    """Directed edges as in :class:`crysldnet.graphs.neighbors.Neighbors`, and their squared distances.

    Attributes:
        source, target: [E].
        image: [E, 3] int64.
        d2: [E] float64, Å².
        limit2: [N] float64, squared cutoff of each atom's own neighbors in Å².
        distances: [N, n_distances] float64, Å.
    """

    source: Tensor
    target: Tensor
    image: Tensor
    d2: Tensor
    limit2: Tensor
    distances: Tensor


def _triangular(lattice: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the lower triangular forms [B, 3, 3] of lattices, to the last bit those of
    :func:`crysldnet.graphs.images.triangular`.
    """
    t, basis = np.zeros_like(lattice), np.zeros_like(lattice)
    for row in range(3):
        x, y, z = (lattice[:, row, axis].copy() for axis in range(3))
        for other in range(row):
            u, v, w = (basis[:, other, axis] for axis in range(3))
            along = x * u + y * v + z * w
            x, y, z = x - along * u, y - along * v, z - along * w
            t[:, row, other] = along
        length = np.sqrt(x * x + y * y + z * z)
        t[:, row, row] = length
        for axis, value in enumerate((x, y, z)):
            basis[:, row, axis] = value / length
    return t


@dataclass
class _Pairs:
    """Pairs of an atom and an image within a radius, [C] each, and their images [C, 3] and exact distances."""

    source: Tensor
    target: Tensor
    image: Tensor
    d2: Tensor

    def where(self, chosen: Tensor) -> _Pairs:
        """Return the pairs at which ``chosen`` [C] is true, or at its indices."""
        return _Pairs(self.source[chosen], self.target[chosen], self.image[chosen], self.d2[chosen])

    @classmethod
    def joined(cls, parts: list[_Pairs]) -> _Pairs:
        """Concatenate."""
        return cls(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("source", "target", "image", "d2"))
        )


class _Search:
    """The atoms of a batch in reduced cells, wrapped into them."""

    def __init__(self, cells: Cells) -> None:
        self.cells, self.device = cells, cells.frac_coords.device
        inside = _product(cells.frac_coords, cells.inverse.index_select(0, cells.crystal))
        self.shift = inside.floor()
        self.basis = torch.einsum("bij,bjk->bik", cells.reduced, cells.lattice)
        self.position = _product(inside - self.shift, self.basis.index_select(0, cells.crystal))

    def within(self, rows: NDArray[np.int64], radius: NDArray[np.float64]) -> Iterator[_Pairs]:
        """Yield all pairs within a radius, and few beyond, of the atoms of some crystals, by target.

        Args:
            rows: [A] crystals.
            radius: [A] Å.
        """
        half = np.floor(radius[:, None] / self.cells.heights[rows] + 1.0 + MARGIN).astype(np.int64)
        for pieces in _blocks(_pieces(self.cells.ptr, rows, half)):
            yield self._compare(pieces, torch.from_numpy(radius[pieces[:, 0]]).to(self.device))

    def _compare(self, pieces: NDArray[np.int64], radius: Tensor) -> _Pairs:
        """Compare the pairs of :func:`_pieces` and keep the near ones."""
        n_images = pieces[:, 5:].prod(axis=1)
        counts = pieces[:, 2] * pieces[:, 4] * n_images
        starts = np.cumsum(counts) - counts
        table = np.column_stack([pieces, n_images, starts, np.cumsum(n_images) - n_images, counts])
        on_device = torch.from_numpy(table).to(self.device)
        image, translation = self._images(on_device, int(n_images.sum()))
        piece = _owners(on_device[:, 11], int(counts.sum()))
        place = torch.arange(len(piece), device=self.device) - on_device[:, 9].index_select(0, piece)
        images, atoms = on_device[:, 8].index_select(0, piece), on_device[:, 4].index_select(0, piece)
        pair = place // images
        at = place - pair * images + on_device[:, 10].index_select(0, piece)
        target = pair // atoms
        source = pair - target * atoms + on_device[:, 3].index_select(0, piece)
        target = target + on_device[:, 1].index_select(0, piece)
        away = self.position.index_select(0, source) + translation.index_select(0, at)
        away -= self.position.index_select(0, target)
        near = (away.square_().sum(1) <= (radius + MARGIN).square().index_select(0, piece)).nonzero().squeeze(1)
        r2 = radius.square().index_select(0, piece[near])
        return self._exact(source[near], target[near], image.index_select(0, at[near]), r2)

    def _images(self, pieces: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the cells of all images of all pieces and their translations in Å."""
        piece = _owners(pieces[:, 8], count)
        place = torch.arange(count, device=self.device) - pieces[:, 10].index_select(0, piece)
        sides = pieces[:, 5:8].index_select(0, piece)
        first = place // sides[:, 0]
        image = torch.stack([place - first * sides[:, 0], first % sides[:, 1], first // sides[:, 1]], dim=1)
        image = (image - (sides - 1) // 2).double()
        crystal = self.cells.crystal[pieces[:, 3]].index_select(0, piece)
        return image, _product(image, self.basis.index_select(0, crystal))

    def _exact(self, source: Tensor, target: Tensor, image: Tensor, r2: Tensor) -> _Pairs:
        """Return the pairs up to a squared distance, without those of an atom with itself.

        Their images are cells of the lattice, and their distances are rounded as in the compiled search.
        """
        cells = self.cells
        crystal = cells.crystal.index_select(0, target)
        moved = image - self.shift.index_select(0, source) + self.shift.index_select(0, target)
        image = _product(moved, cells.reduced.index_select(0, crystal))
        t = cells.triangular.index_select(0, crystal)
        frac = cells.frac_coords.index_select(0, source) - cells.frac_coords.index_select(0, target)
        g0, g1, g2 = (frac + image).unbind(1)
        z = g2 * t[:, 2, 2]
        y = g1 * t[:, 1, 1] + g2 * t[:, 2, 1]
        x = g0 * t[:, 0, 0] + (g1 * t[:, 1, 0] + g2 * t[:, 2, 0])
        d2, left2 = x * x + y * y + z * z, r2 - z * z
        other = (source != target) | (image != 0.0).any(dim=1)
        inside = other & (d2 <= r2) & (left2 >= 0.0) & (left2 - y * y >= 0.0)
        return _Pairs(source, target, image.long(), d2).where(inside)


def _product(vectors: Tensor, matrices: Tensor) -> Tensor:
    """Return the products [C, 3] of vectors [C, 3] and matrices [C, 3, 3]."""
    a, b, c = vectors.unsqueeze(-1).unbind(1)
    return a * matrices[:, 0] + b * matrices[:, 1] + c * matrices[:, 2]


def root(x: Tensor) -> Tensor:
    """Return correctly rounded square roots of float64 numbers, unlike ``torch.sqrt`` on CPUs.

    The remainder of a first approximation s is found exactly, by splitting s as T. J. Dekker, Numer. Math. 18, 224
    (1971), and corrects s.
    """
    s = x.sqrt()
    high = s * 134217729.0  # 2²⁷ + 1
    high = high - (high - s)
    low, square = s - high, s * s
    remainder = (x - square) - (((high * high - square) + 2.0 * high * low) + low * low)
    return torch.where(x > 0.0, s + remainder / (2.0 * s), s)


def _owners(counts: Tensor, total: int) -> Tensor:
    """Return [total] the index of the row of ``counts`` that each of its items belongs to."""
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=total)


def _pieces(ptr: NDArray[np.int64], rows: NDArray[np.int64], half: NDArray[np.int64]) -> NDArray[np.int64]:
    """Divide the atoms of crystals into pieces of at most ``BLOCK`` pairs.

    Returns:
        [P, 8] place in ``rows``, first target, targets, first atom and atoms of the crystal, and three numbers of
        images.
    """
    sizes, sides = ptr[rows + 1] - ptr[rows], 2 * half + 1
    step = np.maximum(1, BLOCK // (sizes * sides.prod(axis=1)))
    number = -(-sizes // step)
    place = np.repeat(np.arange(len(rows)), number)
    begin = (np.arange(len(place)) - np.repeat(np.cumsum(number) - number, number)) * step[place]
    targets = np.minimum(step[place], sizes[place] - begin)
    first = ptr[rows][place]
    return np.column_stack([place, first + begin, targets, first, sizes[place], sides[place]])


def _blocks(pieces: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Group successive pieces into blocks of at most ``BLOCK`` pairs, or of one piece."""
    counts = pieces[:, 2] * pieces[:, 4] * pieces[:, 5:].prod(axis=1)
    begin = total = 0
    for end, count in enumerate(counts.tolist()):
        if end > begin and total + count > BLOCK:
            yield pieces[begin:end]
            begin, total = end, 0
        total += count
    yield pieces[begin:]


def find_within(cells: Cells, radius: float) -> DeviceNeighbors:
    """Find all neighbors within a radius in Å."""
    n_crystals = len(cells.volumes)
    found = _Pairs.joined(list(_Search(cells).within(np.arange(n_crystals), np.full(n_crystals, radius))))
    limit2 = cells.frac_coords.new_full((len(cells.frac_coords),), radius * radius)
    return _in_order(found, limit2, limit2.new_empty(len(limit2), 0))


def find_nearest(cells: Cells, k: int, tolerance: float, n_distances: int) -> DeviceNeighbors:
    """Find each atom's k nearest neighbors, all others up to the k-th distance plus ``tolerance`` in Å, and its
    ``n_distances`` nearest distances.
    """
    search, wanted = _Search(cells), max(k, n_distances)
    sizes, n_atoms, device = np.diff(cells.ptr), len(cells.frac_coords), cells.frac_coords.device
    radius = np.cbrt(0.75 / np.pi * (wanted + 3.0 * np.sqrt(wanted) + 2.0) * cells.volumes / sizes)
    rows, kept = np.arange(len(sizes)), []
    limit2 = cells.frac_coords.new_zeros(n_atoms)
    distances = limit2.new_zeros(n_atoms, n_distances)
    while len(rows):
        found = _Pairs.joined(list(search.within(rows, radius[rows])))
        reach = torch.from_numpy(radius).to(device).index_select(0, cells.crystal)
        own2, nearest, good = _shells(found, reach, k, tolerance, n_distances)
        bad = torch.zeros(len(sizes), dtype=torch.long, device=device).index_add_(0, cells.crystal, (~good).long()) > 0
        now = torch.zeros_like(bad)
        now[torch.from_numpy(rows).to(device)] = True
        done = (now & ~bad).index_select(0, cells.crystal)
        limit2 = torch.where(done, own2, limit2)
        distances = torch.where(done.unsqueeze(1), nearest, distances)
        near = found.d2 <= limit2.index_select(0, found.target)
        kept.append(found.where(near & done.index_select(0, found.target)))
        rows = rows[bad.cpu().numpy()[rows]]
        radius[rows] *= ENLARGE
    return _in_order(_Pairs.joined(kept), limit2, distances)


def _shells(found: _Pairs, reach: Tensor, k: int, tolerance: float, n_distances: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each atom's squared cutoff [N], nearest distances [N, n_distances], and whether all of its neighbors are
    within the radius ``reach`` [N].
    """
    by_distance = found.d2.argsort()
    order = by_distance[found.target[by_distance].argsort(stable=True)]
    d2 = torch.nn.functional.pad(found.d2[order], (0, 1))
    counts = torch.zeros_like(reach, dtype=torch.long).index_add_(0, found.target, torch.ones_like(found.target))
    start = counts.cumsum(0) - counts
    least2 = d2[(start + k - 1).clamp(max=len(d2) - 1)]
    limit = root(least2) + tolerance
    places = (start.unsqueeze(1) + torch.arange(n_distances, device=d2.device)).clamp(max=len(d2) - 1)
    good = (counts >= max(k, n_distances)) & (limit <= reach)
    return torch.maximum(limit * limit, least2), root(d2[places]), good


def _in_order(found: _Pairs, limit2: Tensor, distances: Tensor) -> DeviceNeighbors:
    """Sort pairs by target, source, and the third, second and first component of the image."""
    order = torch.arange(len(found.d2), device=limit2.device)
    for key in (*found.image.unbind(1), found.target * len(limit2) + found.source):
        order = order[key[order].argsort(stable=True)]
    found = found.where(order)
    return DeviceNeighbors(found.source, found.target, found.image, found.d2, limit2, distances)
