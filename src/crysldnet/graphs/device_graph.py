"""The edges of a batch, built on its device: those that :class:`GraphSpec` builds on the host, to the last bit.

Shapes: ``B`` crystals, ``N`` atoms, ``E`` directed edges, ``R`` rows of ``K`` slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from crysldnet.errors import ConfigError
from crysldnet.graphs.device_search import Cells, DeviceNeighbors, find_nearest, find_within, root
from crysldnet.graphs.lattice_edges import CELL_IMAGES
from crysldnet.graphs.spec import GraphSpec

Where = Literal["host", "device"]
"""Where graphs are built."""


@dataclass
class UnbuiltGraph:
    """The graph of a batch that hasn't been built yet, and what it is built from."""

    graph: GraphSpec
    cells: Cells

    def apply(self, function: Callable[[Tensor], Tensor]) -> UnbuiltGraph:
        """Return a copy with all tensors replaced by the results of a function."""
        values = vars(self.cells).items()
        tensors: dict[str, Any] = {name: function(value) for name, value in values if isinstance(value, Tensor)}
        return UnbuiltGraph(self.graph, replace(self.cells, **tensors))


class DeviceGraph(NamedTuple):
    """Tensors of a :class:`crysldnet.graphs.batch.CrystalBatch`, real ones in float64."""

    edge_index: Tensor
    edge_vec: Tensor
    distances: Tensor
    cut: Tensor
    slots: Tensor | None = None
    slot_atom: Tensor | None = None

    @classmethod
    def empty(cls, n_atoms: int) -> DeviceGraph:
        """Return a graph without edges, in place of one that hasn't been built."""
        real = torch.zeros(0, dtype=torch.float64)
        return cls(torch.zeros(2, 0, dtype=torch.long), real.view(0, 3), real.view(n_atoms, 0), real)


def check_place(place: Where, graph: GraphSpec, key: str, max_edges: int | None = None) -> None:
    """Check that a graph can be built where the configuration asks for it.

    Args:
        place: where to build it.
        graph: the graph.
        key: the configuration key that sets the place.
        max_edges: limit of edges in one batch; None for none.

    Raises:
        ConfigError: it can't, with the reason and the remedy.
    """
    if place == "host":
        return
    if (name := needs_host(graph)) is not None:
        text = f"{key}=device: the graph of this encoder has {name}, which only the host builds; set {key}=host"
        raise ConfigError(text, key)
    if max_edges is not None:
        text = f"{key}=device: data.max_edges counts edges on the host; set {key}=host, or use data.max_atoms"
        raise ConfigError(text, key)


def needs_host(graph: GraphSpec) -> str | None:
    """Return the setting of a graph that is only built on the host; None if there is none."""
    wanted = {
        "cut_beyond": graph.cut_beyond is not None,
        "lattice_edges=frame": graph.lattice_edges == "frame",
        "frame": graph.frame,
        "potential": graph.potential != "none",
        "asymmetric_unit": graph.asymmetric_unit,
    }
    return next((name for name, needed in wanted.items() if needed), None)


def build_on_device(unbuilt: UnbuiltGraph) -> DeviceGraph:
    """Build the graphs of all crystals on the device of their cells."""
    graph, cells = unbuilt.graph, unbuilt.cells
    if graph.radius is not None:
        found = find_within(cells, graph.radius)
    else:
        assert graph.k is not None
        found = find_nearest(cells, graph.k, graph.tolerance, graph.n_distances)
    source, target, image = _with_reverses(found, graph)
    vector = _vectors(cells, source, target, image)
    if graph.lattice_edges == "cell":
        source, target, vector = _with_lattice_edges(graph, cells, found, source, target, image, vector)
    slots, atom = _slot_table(target, len(found.limit2), graph.slots) if graph.slots else (None, None)
    return DeviceGraph(torch.stack([source, target]), vector, found.distances, root(found.limit2), slots, atom)


def _with_reverses(found: DeviceNeighbors, graph: GraphSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return sources, targets and images with the requested reverse and repeated edges, by target."""
    source, target, image, d2 = found.source, found.target, found.image, found.d2
    if graph.repeat_self_images:
        times = 1 + (source == target).long()
        source, target, image, d2 = (part.repeat_interleave(times, dim=0) for part in (source, target, image, d2))
    if not graph.symmetric or graph.k is None:
        return source, target, image
    missing = (d2 > found.limit2[source]).nonzero().squeeze(1)
    listed_at = torch.cat([target, target[missing]])  # edges to one atom are in the order of the atoms that list them
    source, target = torch.cat([source, target[missing]]), torch.cat([target, source[missing]])
    image = torch.cat([image, -image[missing]])
    order = (target * len(found.limit2) + listed_at).argsort(stable=True)
    return source[order], target[order], image[order]


def _along(factors: Tensor, lattice: Tensor) -> Tensor:
    """Return [E, 3] the sums of lattice vectors [E, 3, 3] with factors [E, 3], rounded as in the compiled code."""
    a, b, c = factors.unsqueeze(-1).unbind(1)
    return a * lattice[:, 0] + b * lattice[:, 1] + c * lattice[:, 2]


def _vectors(cells: Cells, source: Tensor, target: Tensor, image: Tensor) -> Tensor:
    """Return the displacement [E, 3] from source to target in Å."""
    inside = cells.frac_coords.index_select(0, target) - cells.frac_coords.index_select(0, source) - image
    return _along(inside, cells.lattice[cells.crystal[target]])


def _with_lattice_edges(
    graph: GraphSpec,
    cells: Cells,
    found: DeviceNeighbors,
    source: Tensor,
    target: Tensor,
    image: Tensor,
    vector: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Connect every atom to its own images along the cell, unless already connected; return sources, targets, vectors.

    The new edges of an atom follow its others.
    """
    n_atoms = len(found.limit2)
    images = torch.from_numpy(CELL_IMAGES).to(image)
    same = (source == target).unsqueeze(1) & (image.unsqueeze(1) == images).all(dim=2)
    wanted = torch.zeros(n_atoms, len(images), dtype=torch.long, device=image.device)
    wanted = wanted.index_add_(0, target, same.long()) == 0
    if graph.lattice_edges_within is not None:
        far = (root(found.limit2) > graph.lattice_edges_within).long()
        sparse = torch.zeros(len(cells.volumes), dtype=torch.long, device=image.device)
        wanted &= (sparse.index_add_(0, cells.crystal, far) == 0)[cells.crystal].unsqueeze(1)
    atom, place = wanted.nonzero().unbind(1)
    along = _along(images[place].double(), cells.lattice[cells.crystal[atom]])
    atom, along = atom.repeat_interleave(2), torch.stack([-along, along], dim=1).flatten(0, 1)
    order = torch.cat([target, atom]).argsort(stable=True)
    parts = ((source, atom), (target, atom), (vector, along))
    source, target, vector = (torch.cat(part)[order] for part in parts)
    return source, target, vector


def _slot_table(target: Tensor, n_atoms: int, k: int) -> tuple[Tensor, Tensor]:
    """Arrange edges in rows of k slots, as :func:`crysldnet.graphs.spec.slot_table` does."""
    n_edges = len(target)
    degree = torch.zeros(n_atoms, dtype=torch.long, device=target.device).index_add_(0, target, torch.ones_like(target))
    rows = (degree + k - 1).div(k, rounding_mode="floor").clamp(min=1)
    atom = torch.arange(n_atoms, device=target.device).repeat_interleave(rows)
    first_row, first_edge = rows.cumsum(0) - rows, degree.cumsum(0) - degree
    edge = torch.arange(n_edges, device=target.device)
    rank = edge - first_edge[target]
    table = torch.full((len(atom) * k,), n_edges, dtype=torch.long, device=target.device)
    table[first_row[target] * k + rank] = edge
    return table.view(-1, k), atom
