"""Compiled search for periodic neighbors; see :mod:`crysldnet.graphs.neighbors`.

First, the images of the cell's atoms within a radius of the cell are listed in the order of the edges. Each atom
searches them in single precision with a margin, and only uncertain cases are decided in double precision. In large
cells the list is divided into lists for boxes of the cell, so that the work per atom doesn't grow with the cell.

If the cell is so small or skewed that it has many images, every lattice point j + n within the radius of an atom i is
enumerated instead: the lattice is brought to lower triangular form, so that the third, then the second, then the
first component of n runs over exactly the integers whose coordinate can be inside the sphere. Needles, plates and
skewed cells are exact too. Both methods find the same edges in the same order, to the last bit.

Arrays are flat, and indices unsigned where it matters, which is faster in numba.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crysldnet.graphs.compiled import njit
from crysldnet.graphs.images import U, exactly, inlined, inner, lists_of, points_in_sphere, room_for, triangular, within

ROOM = 512
"""Initial capacity for images."""
DONE, MORE_EDGES, MORE_ROOM, LARGER_RADIUS = 0, 1, 2, 3


class _Edges(NamedTuple):
    """Edges found so far, with spare capacity."""

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    image: NDArray[np.int32]  # [· 3]
    vector: NDArray[np.float64]  # [· 3], or empty if not requested
    d2: NDArray[np.float64]  # likewise


@inlined
def _first_radius(t, atoms, wanted, radius):
    """Return a radius within which an atom probably has the required number of neighbors."""
    volume = t[0, 0] * t[1, 1] * t[2, 2]
    if not 0.0 < volume < np.inf:
        raise ValueError("a cell without volume has no neighbor list")
    expected = wanted + 2.0 * np.sqrt(wanted) + 2.0
    return max(radius, (0.75 / np.pi * expected * volume / max(atoms, 1)) ** (1.0 / 3.0)) if wanted > 0 else radius


@inlined
def _kth_smallest(values, count, k):
    """Return the k-th smallest (k from 0) of ``values[:count]``, reordering them (quickselect without branches)."""
    low, high = U(0), U(count)
    while True:
        pivot = values[(low + high) // U(2)]
        middle = low
        for i in range(low, high):
            value = values[i]
            values[i] = values[middle]
            values[middle] = value
            middle += U(value < pivot)
        if k < middle:
            high = middle
            continue
        low = middle
        for i in range(low, high):
            value = values[i]
            values[i] = values[middle]
            values[middle] = value
            middle += U(value <= pivot)
        if k < middle or middle == low:  # the latter with a NaN
            return pivot
        low = middle


@inner
def _edges(room, vectors, squares):
    """Return capacity for edges, their vectors and their squared distances."""
    source, target, image = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(3 * room, np.int32)
    return _Edges(source, target, image, np.empty(3 * vectors), np.empty(squares))


@inner
def _more_edges(edges, size, more):
    """Return arrays with capacity for ``more`` edges after the first ``size``."""
    room = 2 * len(edges.source) + more + 64
    grown = _edges(room, room if len(edges.vector) > 0 else 0, room if len(edges.d2) > 0 else 0)
    for e in range(size):  # copy one by one: a slice takes numba seconds to compile
        grown.source[e], grown.target[e] = edges.source[e], edges.target[e]
        if len(edges.d2) > 0:
            grown.d2[e] = edges.d2[e]
    for e in range(3 * size):
        grown.image[e] = edges.image[e]
        if len(edges.vector) > 0:
            grown.vector[e] = edges.vector[e]
    return grown


@inlined
def _write(edges, size, lattices, b, frac, center, c0, c1, c2, label, own, s0, s1, s2, count, kept, d2s):
    """Append the edges to an atom from ``label[kept[:count]]``, except itself; return the new size."""
    source, target, image, vector, squares = edges
    l00, l01, l02 = lattices[b, 0, 0], lattices[b, 0, 1], lattices[b, 0, 2]
    l10, l11, l12 = lattices[b, 1, 0], lattices[b, 1, 1], lattices[b, 1, 2]
    l20, l21, l22 = lattices[b, 2, 0], lattices[b, 2, 1], lattices[b, 2, 2]
    e = U(size)
    for m in range(count):
        c = kept[m]
        at, to = U(4 * c), U(3) * e
        j, n0, n1, n2 = label[at], label[at + U(1)] + s0, label[at + U(2)] + s1, label[at + U(3)] + s2
        source[e], target[e] = j, center
        image[to], image[to + U(1)], image[to + U(2)] = n0, n1, n2
        if len(vector) > 0:
            f = U(3 * j)
            g0, g1, g2 = c0 - frac[f] - n0, c1 - frac[f + U(1)] - n1, c2 - frac[f + U(2)] - n2
            vector[to] = g0 * l00 + g1 * l10 + g2 * l20
            vector[to + U(1)] = g0 * l01 + g1 * l11 + g2 * l21
            vector[to + U(2)] = g0 * l02 + g1 * l12 + g2 * l22
        if len(squares) > 0:
            squares[e] = d2s[m]
        e += U(c != own)
    return np.int64(e)


@inlined
def _sort(values, count):
    """Sort ``values[:count]`` (shell sort): NumPy's takes numba a second to compile."""
    for gap in (301, 132, 57, 23, 10, 4, 1):
        for i in range(gap, count):
            value, place = values[i], i
            while place >= gap and values[place - gap] > value:
                values[place] = values[place - gap]
                place -= gap
            values[place] = value


@inlined
def _shell(d2s, count, k, radius, tolerance, scratch, distances, i):
    """Return the cutoff distance of an atom's neighbors and its square; write its nearest distances."""
    n_distances = distances.shape[1]
    for m in range(count):
        scratch[m] = d2s[m]
    limit, least2 = radius, 0.0
    if k > 0:
        least2 = _kth_smallest(scratch, count, k - 1)
        limit = np.sqrt(least2) + tolerance
    if n_distances > 0:
        _kth_smallest(scratch, count, n_distances - 1)
        _sort(scratch, n_distances)
        for m in range(n_distances):
            distances[i, m] = np.sqrt(scratch[m])
    return limit, max(limit * limit, least2)  # the square of a root may be one rounding below


@inlined
def _candidates(c0, c1, c2, t, room, margin, search):
    """Write to ``room.kept`` which images in the list of an atom's box may be within a radius.

    Returns:
        Their number, whether any are uncertain, and the cell of the atom.
    """
    s0, s1, s2 = int(np.floor(c0)), int(np.floor(c1)), int(np.floor(c2))
    w0, w1, w2 = c0 - s0, c1 - s1, c2 - s2
    parts0, parts1, parts2 = room.parts[0], room.parts[1], room.parts[2]
    box = min(int(w2 * parts2), parts2 - 1) * parts1 + min(int(w1 * parts1), parts1 - 1)
    box = box * parts0 + min(int(w0 * parts0), parts0 - 1)
    g0, g1, g2 = w0 - 0.5, w1 - 0.5, w2 - 0.5
    x, y, z = g0 * t[0, 0] + g1 * t[1, 0] + g2 * t[2, 0], g1 * t[1, 1] + g2 * t[2, 1], g2 * t[2, 2]
    count, doubt = within(room, room.begin[box], room.begin[box + 1], x, y, z, search + margin, 2.0 * margin)
    return count, doubt, s0, s1, s2


@inlined
def _up_to(limit2, count, kept, d2s):
    """Keep images up to a distance; return their number."""
    left = U(0)
    for m in range(count):
        d2, c = d2s[m], kept[m]
        kept[left], d2s[left] = c, d2
        left += U(d2 <= limit2)
    return np.int64(left)


@inlined
def _atoms(
    lattices, b, frac, first, last, i, search, k, radius, tolerance, margin, room, edges, start, limit2, distances
):
    """Find the neighbors of the atoms of a crystal, starting at i.

    Returns:
        The atom that needs more capacity, which one, and the radius, increased if needed.
    """
    wanted, need = max(k, distances.shape[1]), DONE
    t, kept, d2s, label, owns = room.t, room.kept, room.d2s, room.label, room.own
    while i < last:
        own, s0, s1, s2 = -1, 0, 0, 0
        c0, c1, c2 = frac[3 * i], frac[3 * i + 1], frac[3 * i + 2]
        if margin > 0.0:
            count, doubt, s0, s1, s2 = _candidates(c0, c1, c2, t, room, margin, search)
            own = owns[i - first]
            if wanted > 0 or doubt:
                count = exactly(t, frac, c0, c1, c2, search, label, own, s0, s1, s2, count, kept, d2s)
                own = -1
        else:
            count = points_in_sphere(t, frac, first, last, i, search, label, kept, d2s)
            if count < 0:
                need = MORE_ROOM
                break
        if wanted > 0:
            if count < wanted:
                need, search = LARGER_RADIUS, search * 1.25
                break
            limit, limit2[i] = _shell(d2s, count, k, radius, tolerance, room.scratch, distances, i)
            if limit > search:
                need, search = LARGER_RADIUS, limit * (1.0 + 1e-9)
                break
            count = _up_to(limit2[i], count, kept, d2s)
        if start[i] + count > len(edges.source):
            need = MORE_EDGES
            break
        start[i + 1] = _write(
            edges, start[i], lattices, b, frac, i, c0, c1, c2, label, own, s0, s1, s2, count, kept, d2s
        )
        i += 1
    return i, need, search


@inner
def _crystals(lattices, frac, ptr, k, radius, tolerance, room, edges, start, limit2, distances, crystal, i, search):
    """Find the neighbors of the atoms of all crystals, starting at atom i of a crystal with a radius, 0 if unknown.

    Returns:
        The crystal and atom that need more capacity, the radius, and which capacity.
    """
    t, wanted = room.t, max(k, distances.shape[1])
    for b in range(crystal, lattices.shape[0]):
        first, last = ptr[b], ptr[b + 1]
        triangular(lattices, b, t, room.basis)
        if search == 0.0:
            search = _first_radius(t, last - first, wanted, radius)
        need = LARGER_RADIUS
        while need == LARGER_RADIUS:
            margin = lists_of(t, frac, first, last, search, room)
            if margin < 0.0:
                need = MORE_ROOM
            else:
                i, need, search = _atoms(
                    lattices,
                    b,
                    frac,
                    first,
                    last,
                    i,
                    search,
                    k,
                    radius,
                    tolerance,
                    margin,
                    room,
                    edges,
                    start,
                    limit2,
                    distances,
                )
        if need != DONE:
            return b, i, search, need
        search = 0.0
    return lattices.shape[0], i, search, DONE


@njit(cache=True, python_up_to=1000, nogil=True, error_model="numpy")
def directed(lattices, frac, ptr, k, radius, tolerance, n_distances, room_for_edges, final):
    """Find each target's own neighbors.

    The arguments are those of :func:`crysldnet.graphs.neighbors.neighbor_list`, flat coordinates, 0 if not given, the
    initial capacity for edges, and whether the edges are final.

    Returns:
        start [N + 1]; the edges start[i] … start[i + 1] − 1 of each atom i, in arrays longer than start[N], with
        vectors if they are final and squared distances if not; the squared cutoff [N]; distances
        [N, n_distances].
    """
    atoms = len(frac) // 3
    start = np.zeros(atoms + 1, np.int64)
    limit2, distances = np.full(atoms, radius * radius), np.empty((atoms, n_distances))
    edges = _edges(room_for_edges, room_for_edges if final else 0, 0 if final else room_for_edges)
    room = room_for(start[0] + ROOM)  # a plain ROOM would compile it a second time
    crystal, i, search, need = start[0], start[0], 0.0, MORE_ROOM
    while need != DONE:
        crystal, i, search, need = _crystals(
            lattices, frac, ptr, k, radius, tolerance, room, edges, start, limit2, distances, crystal, i, search
        )
        if need == MORE_EDGES:
            edges = _more_edges(edges, start[i], len(room.kept))
        elif need == MORE_ROOM:
            room = room_for(4 * len(room.kept))
    return start, edges, limit2, distances
