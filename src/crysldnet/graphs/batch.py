"""The typed batch used everywhere.

Shapes: ``B`` crystals, ``N`` atoms, ``E`` directed edges, ``M`` distances per atom, ``T`` targets, ``K`` descriptors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crysldnet.errors import ConfigError
from crysldnet.graphs.corruption import DenoisingTargets
from crysldnet.graphs.crystals import Crystals
from crysldnet.graphs.device_graph import DeviceGraph, UnbuiltGraph, Where, build_on_device
from crysldnet.graphs.device_search import Cells
from crysldnet.graphs.neighbors import Neighbors
from crysldnet.graphs.spec import Graph, GraphSpec
from crysldnet.graphs.transfer import copy_to, pack
from crysldnet.platforms import WITHOUT_FLOAT64

if TYPE_CHECKING:
    from torch_geometric.data import Data


@dataclass
class CorruptionTargets:
    """Targets of the objective; see :class:`crysldnet.graphs.corruption.DenoisingTargets`."""

    numbers: Tensor
    """[N] true atomic numbers."""
    masked: Tensor
    """[N] bool."""
    displacement: Tensor
    """[N, 3] Å."""
    strain: Tensor
    """[B, 3, 3]."""
    levels: Tensor
    """[B, 2] standard deviations of displacement (Å) and strain."""


@dataclass
class CrystalBatch:
    """Crystals as one graph of B components.

    ``edge_index`` follows PyG: row 0 is the source, row 1 the target; edges are sorted by target.
    """

    lattice: Tensor
    """[B, 3, 3] rows are lattice vectors in Å."""
    numbers: Tensor
    """[N] atomic numbers, 0 if masked."""
    positions: Tensor
    """[N, 3] Cartesian coordinates in Å."""
    crystal: Tensor
    """[N] the crystal of each atom."""
    sizes: Tensor
    """[B] number of atoms."""
    edge_index: Tensor
    """[2, E]."""
    edge_vec: Tensor
    """[E, 3] displacement from source to target in Å."""
    distances: Tensor
    """[N, M] nearest distances of each atom in Å, ascending."""
    cut: Tensor
    """[N] cutoff in Å for each atom's own neighbors: the k-th distance with tolerance, or the radius."""
    rows: Tensor
    """[B] row of each crystal in its store."""
    largest: int
    """Atoms of the largest crystal, to avoid synchronizing with the device."""
    targets: Tensor | None = None
    """[B, T] in physical units, NaN if unknown."""
    descriptors: Tensor | None = None
    """[B, K] additional inputs of the head, in physical units."""
    undo: CorruptionTargets | None = None
    frame: Tensor | None = None
    """[B, 3, 3] right-handed frame of three short lattice vectors in Å, if the graph has it."""
    pairs: Tensor | None = None
    """[2, P] source and target of every ordered pair of a crystal's atoms, if the graph has potentials."""
    potential: Tensor | None = None
    """[P] lattice sum of each pair's potential."""
    representative: Tensor | None = None
    """[N] representative of each atom in the asymmetric unit, if edges only end at those."""
    slots: Tensor | None = None
    """[R, K] edges of each atom in rows of K, E for empty slots, if the graph has slots."""
    slot_atom: Tensor | None = None
    """[R] the atom of each row, ascending."""
    clean: CrystalBatch | None = None
    """The clean crystals with the same atom order, if requested."""
    unbuilt: UnbuiltGraph | None = None
    """What :meth:`to` builds the edges from, if there are none yet."""

    @property
    def num_crystals(self) -> int:
        """B."""
        return self.sizes.shape[0]

    @property
    def num_atoms(self) -> int:
        """N."""
        return self.numbers.shape[0]

    def _apply(self, function: Callable[[Tensor], Tensor]) -> CrystalBatch:
        changed: dict[str, Tensor | CorruptionTargets | CrystalBatch | UnbuiltGraph] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
            elif isinstance(value, CorruptionTargets):
                changed[field.name] = CorruptionTargets(**{k: function(v) for k, v in vars(value).items()})
            elif isinstance(value, CrystalBatch):
                changed[field.name] = value._apply(function)
            elif isinstance(value, UnbuiltGraph):
                changed[field.name] = value.apply(function)
        return replace(self, **changed)  # type: ignore[arg-type]

    def _replaced(self, function: Callable[[list[Tensor]], list[Tensor]]) -> CrystalBatch:
        """Return the batch with all tensors replaced by the result of a function of their list."""
        tensors: list[Tensor] = []
        self._apply(lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
        results = iter(function(tensors))
        return self._apply(lambda _: next(results))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CrystalBatch:
        """Copy to a device, to an accelerator in a single copy of all tensors, and build the edges there if
        :func:`make_batch` has left them out.

        Raises:
            ConfigError: an Apple GPU can't build them.
        """
        if self.unbuilt is not None and torch.device(device).type in WITHOUT_FLOAT64:
            raise ConfigError("graph_on=device needs double precision, which Apple GPUs lack; set graph_on=host")
        moved = self._replaced(lambda tensors: copy_to(tensors, torch.device(device), non_blocking=non_blocking))
        return moved._built()

    def _built(self) -> CrystalBatch:
        """Return the batch with its edges."""
        built = self if self.clean is None else replace(self, clean=self.clean._built())
        if self.unbuilt is None:
            return built
        edges = build_on_device(self.unbuilt)
        real = {name: getattr(edges, name).to(self.positions.dtype) for name in ("edge_vec", "distances", "cut")}
        return replace(
            built, edge_index=edges.edge_index, slots=edges.slots, slot_atom=edges.slot_atom, unbuilt=None, **real
        )

    def pin_memory(self) -> CrystalBatch:
        """Copy to a single block of page-locked memory."""
        return self._replaced(lambda tensors: pack(tensors, pin=True))

    def double(self) -> CrystalBatch:
        """Copy with all real values in float64."""
        return self._apply(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)

    def to_crystals(self) -> Crystals:
        """Return the crystals with atoms at their positions in the batch."""
        lattice = self.lattice.detach().cpu().double().numpy()
        crystal, sizes = self.crystal.cpu().numpy(), self.sizes.cpu().numpy()
        inverse = np.linalg.inv(lattice)[crystal]
        inside = np.einsum("ni,nij->nj", self.positions.detach().cpu().double().numpy(), inverse)
        ptr = np.concatenate([[0], np.cumsum(sizes)])
        return Crystals(lattice, ptr, self.numbers.cpu().numpy().astype(np.uint8), inside.astype(np.float32))

    def to_pyg(self) -> Data:
        """Return a PyG ``Data`` with ``z``, ``pos``, ``batch``, ``edge_index``, ``edge_vec``, ``cell`` and ``y``."""
        from torch_geometric.data import Data

        return Data(
            z=self.numbers,
            pos=self.positions,
            batch=self.crystal,
            edge_index=self.edge_index,
            edge_vec=self.edge_vec,
            cell=self.lattice,
            y=self.targets,
        )


def make_batch(
    crystals: Crystals,
    graph: GraphSpec,
    *,
    rows: NDArray[np.int64] | None = None,
    targets: NDArray[np.float64] | None = None,
    descriptors: NDArray[np.float64] | None = None,
    undo: DenoisingTargets | None = None,
    neighbors: Neighbors | None = None,
    dtype: torch.dtype = torch.float32,
    graph_on: Where = "host",
) -> CrystalBatch:
    """Build the graph of some crystals.

    Args:
        crystals: B crystals.
        graph: the encoder's graph.
        rows: [B] rows in their store; default 0 … B − 1.
        targets: [B, T] in physical units, NaN if unknown.
        descriptors: [B, K] in physical units.
        undo: result of :meth:`Corruption.apply`.
        neighbors: result of :meth:`GraphSpec.neighbors`, if known.
        dtype: type of all real values except targets, which stay float32.
        graph_on: ``device`` leaves out the edges, which :meth:`CrystalBatch.to` then builds on the device.
    """

    def real(array: NDArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)

    return CrystalBatch(
        **(_built(graph.build(crystals, neighbors), real) if graph_on == "host" else _unbuilt(crystals, graph)),
        lattice=real(crystals.lattice),
        numbers=torch.from_numpy(crystals.numbers.astype(np.int64)),
        positions=real(crystals.positions),
        crystal=torch.from_numpy(crystals.crystal),
        sizes=torch.from_numpy(crystals.sizes),
        largest=int(crystals.sizes.max(initial=0)),
        rows=torch.from_numpy(np.arange(len(crystals)) if rows is None else np.asarray(rows, np.int64)),
        targets=None if targets is None else torch.from_numpy(targets.astype(np.float32)),
        descriptors=None if descriptors is None else real(descriptors),
        undo=None if undo is None else _targets_of(undo, real),
    )


def _built(graph: Graph, real: Callable[[NDArray], Tensor]) -> dict[str, Any]:
    """Return the fields of a graph that the host has built."""
    edges, whole = graph.neighbors, (graph.pairs, graph.representative, graph.slots, graph.slot_atom)
    names = ("pairs", "representative", "slots", "slot_atom")
    return {
        "edge_index": torch.from_numpy(np.stack([edges.source, edges.target])),
        "edge_vec": real(edges.vector),
        "distances": real(edges.distances),
        "cut": real(edges.shell),
        "frame": None if graph.frame is None else real(graph.frame),
        "potential": None if graph.potential is None else real(graph.potential),
        **{n: None if array is None else torch.from_numpy(array) for n, array in zip(names, whole, strict=True)},
    }


def _unbuilt(crystals: Crystals, graph: GraphSpec) -> dict[str, Any]:
    """Return the fields of a graph that a device will build."""
    empty = {k: v for k, v in DeviceGraph.empty(len(crystals.numbers))._asdict().items() if v is not None}
    return {**empty, "unbuilt": UnbuiltGraph(graph, Cells.of(crystals))}


def _targets_of(undo: DenoisingTargets, real: Callable[[NDArray], Tensor]) -> CorruptionTargets:
    return CorruptionTargets(
        torch.from_numpy(undo.numbers),
        torch.from_numpy(undo.masked),
        real(undo.displacement),
        real(undo.strain),
        real(undo.levels),
    )


def cut(sizes: NDArray[np.int64], crystals: int, atoms: int) -> Iterator[tuple[int, int]]:
    """Divide consecutive crystals into batches within both limits; a larger crystal gets its own batch."""
    start = total = 0
    for stop, size in enumerate(sizes.tolist()):
        if stop > start and (stop - start == crystals or total + size > atoms):
            yield start, stop
            start, total = stop, 0
        total += size
    if start < len(sizes):
        yield start, len(sizes)
