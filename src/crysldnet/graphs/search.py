"""The search for periodic neighbors, compiled; see :mod:`crysldnet.graphs.neighbors`.

For a target atom i every lattice point j + n within a radius is enumerated exactly: the lattice is brought to lower
triangular form, so that the third, then the second, then the first component of n runs over just the integers whose
coordinate can lie inside the sphere. Nothing is assumed of the cell: needles, plates and skewed cells are exact too.

That tries every atom of the cell. Where atoms are many and the cell isn't skewed, the images within reach of the cell
are listed first, in the same order, and divided into lists for boxes of the cell. An atom then looks through the list
of its box, in single precision with a margin. What passes is computed exactly as in the first way, to the last bit.

Keep all of it in one file: numba recompiles a cached function when its own file changes, not when another one does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crysldnet.graphs.compiled import njit

inner = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""For functions that only compiled ones call, which compile faster."""
MOST_IMAGES = 3.0
"""Images of the cell, for each of its atoms, up to which lists are made; measured."""
BLOCK = 64
"""Points that one turn of a vectorized loop takes."""
BOX = 0.7
"""Length of a box in units of the radius; measured."""


class _Lists(NamedTuple):
    """What may lie within a radius of each box of a cell."""

    parts: NDArray[np.int64]  # [3] boxes along each lattice vector; 0 for no lists
    begin: NDArray[np.int64]  # [boxes + 1] where the list of each box begins, in place and of
    place: NDArray[np.float32]  # [3, L] Cartesian coordinates from the middle of the cell
    of: NDArray[np.int32]  # [L] number within label
    label: NDArray[np.int32]  # [4, C] atom j and cell n of each image, ascending by j, n₂, n₁, n₀
    margin: float  # Å by which single precision may be wrong
    squares: NDArray[np.float32]
    kept: NDArray[np.int32]


@inner
def _triangular(lattice):
    """Return the lower triangular T with T = lattice · Q for a rotation Q (Gram–Schmidt on the rows)."""
    t = np.zeros((3, 3))
    basis = np.zeros((3, 3))
    for row in range(3):
        rest = lattice[row].copy()
        for other in range(row):
            t[row, other] = rest[0] * basis[other, 0] + rest[1] * basis[other, 1] + rest[2] * basis[other, 2]
            for axis in range(3):
                rest[axis] -= t[row, other] * basis[other, axis]
        t[row, row] = np.sqrt(rest[0] ** 2 + rest[1] ** 2 + rest[2] ** 2)
        for axis in range(3):
            basis[row, axis] = rest[axis] / t[row, row]
    return t


@inner
def _first_radius(t, atoms, wanted, radius):
    """Return a radius within which an atom probably has as many neighbors as wanted."""
    volume = t[0, 0] * t[1, 1] * t[2, 2]
    if not 0.0 < volume < np.inf:
        raise ValueError("a cell without volume has no neighbor list")
    expected = wanted + 2.0 * np.sqrt(wanted) + 2.0
    return max(radius, (0.75 / np.pi * expected * volume / max(atoms, 1)) ** (1.0 / 3.0)) if wanted > 0 else radius


@inner
def _points_in_sphere(t, frac, first, last, center, radius, size, source, image, d2s):
    """Append all (j, n) within ``radius`` of atom ``center``; return the new size, or −1 where the arrays are full."""
    r2 = radius * radius
    slack = 1e-9
    t00, t10, t11, t20, t21, t22 = t[0, 0], t[1, 0], t[1, 1], t[2, 0], t[2, 1], t[2, 2]
    per0, per1, per2 = 1.0 / t00, 1.0 / t11, 1.0 / t22
    c0, c1, c2 = frac[center, 0], frac[center, 1], frac[center, 2]
    for j in range(first, last):
        f0, f1, f2 = frac[j, 0] - c0, frac[j, 1] - c1, frac[j, 2] - c2
        reach2 = radius * per2
        for n2 in range(int(np.ceil(-reach2 - f2 - slack)), int(np.floor(reach2 - f2 + slack)) + 1):
            g2 = f2 + n2
            z = g2 * t22
            left2 = r2 - z * z
            if left2 < 0.0:
                continue
            shift1 = f1 + g2 * t21 * per1
            reach1 = np.sqrt(left2) * per1
            for n1 in range(int(np.ceil(-reach1 - shift1 - slack)), int(np.floor(reach1 - shift1 + slack)) + 1):
                g1 = f1 + n1
                y = g1 * t11 + g2 * t21
                left1 = left2 - y * y
                if left1 < 0.0:
                    continue
                across = g1 * t10 + g2 * t20
                shift0 = f0 + across * per0
                reach0 = np.sqrt(left1) * per0
                for n0 in range(int(np.ceil(-reach0 - shift0 - slack)), int(np.floor(reach0 - shift0 + slack)) + 1):
                    x = (f0 + n0) * t00 + across
                    d2 = x * x + y * y + z * z
                    if d2 > r2 or (j == center and n0 == 0 and n1 == 0 and n2 == 0):
                        continue
                    if size == len(d2s):
                        return -1
                    source[size], d2s[size] = j, d2
                    image[size, 0], image[size, 1], image[size, 2] = n0, n1, n2
                    size += 1
    return size


@inner
def _cloud(t, frac, first, last, reach):
    """Return ``place`` and ``label`` of the images within ``reach`` [3], fractions of the cell, and their number."""
    most = (last - first) * int(2.0 + 2.0 * reach[0]) * int(2.0 + 2.0 * reach[1]) * int(2.0 + 2.0 * reach[2])
    place, label = np.empty((3, most + BLOCK), np.float32), np.empty((4, most), np.int32)
    count = 0
    for j in range(first, last):
        s0, s1, s2 = np.floor(frac[j, 0]), np.floor(frac[j, 1]), np.floor(frac[j, 2])
        w0, w1, w2 = frac[j, 0] - s0, frac[j, 1] - s1, frac[j, 2] - s2
        low0, high0 = int(np.ceil(-reach[0] - w0)), int(np.floor(1.0 + reach[0] - w0))
        low1, high1 = int(np.ceil(-reach[1] - w1)), int(np.floor(1.0 + reach[1] - w1))
        for n2 in range(int(np.ceil(-reach[2] - w2)), int(np.floor(1.0 + reach[2] - w2)) + 1):
            g2 = w2 + n2 - 0.5
            for n1 in range(low1, high1 + 1):
                g1 = w1 + n1 - 0.5
                y, across = g1 * t[1, 1] + g2 * t[2, 1], g1 * t[1, 0] + g2 * t[2, 0]
                for n0 in range(low0, high0 + 1):
                    place[0, count], place[1, count] = (w0 + n0 - 0.5) * t[0, 0] + across, y
                    place[2, count] = g2 * t[2, 2]
                    label[0, count], label[1, count] = j, n0 - s0
                    label[2, count], label[3, count] = n1 - s1, n2 - s2
                    count += 1
    return place, label, count


@inner
def _within(place, start, stop, x, y, z, radius, squares, kept):
    """Write which of ``place[:, start:stop]`` lie within a radius of a point; return their number."""
    x, y, z, bound = np.float32(x), np.float32(y), np.float32(z), np.float32(radius * radius)
    xs, ys, zs = place[0, start:], place[1, start:], place[2, start:]
    for c in range((stop - start + BLOCK - 1) // BLOCK * BLOCK):  # a loop of its own, whole blocks: vectorized
        dx, dy, dz = xs[c] - x, ys[c] - y, zs[c] - z
        squares[c] = dx * dx + dy * dy + dz * dz
    count = 0
    for c in range(stop - start):
        kept[count] = start + c
        count += squares[c] <= bound
    return count


@inner
def _divided(t, parts, place, count, radius, squares, kept):
    """Divide a cell into boxes; return ``begin``, ``place`` and ``of`` of :class:`_Lists`."""
    half = 0.0  # of the longest diagonal of a box
    for sign1 in (-1.0, 1.0):
        for sign2 in (-1.0, 1.0):
            square = 0.0
            for axis in range(3):
                along = t[0, axis] / parts[0] + sign1 * t[1, axis] / parts[1] + sign2 * t[2, axis] / parts[2]
                square += along * along
            half = max(half, 0.5 * np.sqrt(square))
    boxes = parts[0] * parts[1] * parts[2]
    begin = np.zeros(boxes + 1, np.int64)
    listed, of = np.empty((3, 4 * count + BLOCK), np.float32), np.empty(4 * count, np.int32)
    size = 0
    for box in range(boxes):
        g0 = (box % parts[0] + 0.5) / parts[0] - 0.5
        g1 = (box // parts[0] % parts[1] + 0.5) / parts[1] - 0.5
        g2 = (box // (parts[0] * parts[1]) + 0.5) / parts[2] - 0.5
        x, y, z = g0 * t[0, 0] + g1 * t[1, 0] + g2 * t[2, 0], g1 * t[1, 1] + g2 * t[2, 1], g2 * t[2, 2]
        found = _within(place, begin[0], count, x, y, z, radius + half, squares, kept)
        if size + found > len(of):
            room = 2 * len(of) + found
            more, more_of = np.empty((3, room + BLOCK), np.float32), np.empty(room, np.int32)
            for e in range(size):
                more[0, e], more[1, e], more[2, e], more_of[e] = listed[0, e], listed[1, e], listed[2, e], of[e]
            listed, of = more, more_of
        for m in range(found):
            c = kept[m]
            listed[0, size], listed[1, size], listed[2, size], of[size] = place[0, c], place[1, c], place[2, c], c
            size += 1
        begin[box + 1] = size
    return begin, listed, of


@inner
def _lists(t, frac, first, last, radius):
    """Return the :class:`_Lists` of a crystal for a radius."""
    parts, reach = np.zeros(3, np.int64), np.empty(3)
    reach[2] = radius / t[2, 2]
    reach[1] = reach[2] * np.sqrt(t[2, 2] ** 2 + t[2, 1] ** 2) / t[1, 1]
    n0, n1, n2 = t[1, 1] * t[2, 2], t[1, 0] * t[2, 2], t[1, 0] * t[2, 1] - t[1, 1] * t[2, 0]
    reach[0] = radius * np.sqrt(n0 * n0 + n1 * n1 + n2 * n2) / (t[0, 0] * t[1, 1] * t[2, 2])
    images = (1.0 + 2.0 * reach[0]) * (1.0 + 2.0 * reach[1]) * (1.0 + 2.0 * reach[2])
    size = 0.0
    for i in range(first, last):
        size += abs(frac[i, 0]) + abs(frac[i, 1]) + abs(frac[i, 2])
    if not (images < min(64.0, MOST_IMAGES * (last - first)) and size < 1e9):  # nor where a coordinate isn't finite
        no_place, nothing = np.empty((3, 0), np.float32), np.empty(0, np.int32)
        return _Lists(parts, parts, no_place, nothing, np.empty((4, 0), np.int32), 0.0, no_place[0], nothing)
    box = BOX * radius
    while parts[0] == 0 or parts[0] * parts[1] * parts[2] > max(1, last - first):
        for axis in range(3):
            length = np.sqrt(t[axis, 0] ** 2 + t[axis, 1] ** 2 + t[axis, 2] ** 2)
            parts[axis] = max(1, int(min(length / box, 1e6)))
        box *= 1.25
    reach += 1e-6
    margin = 1e-3 + 1e-6 * (radius + t[0, 0] + abs(t[1, 0]) + abs(t[2, 0]) + t[1, 1] + abs(t[2, 1]) + t[2, 2])
    place, label, count = _cloud(t, frac, first, last, reach)
    squares, kept = np.empty(count + BLOCK, np.float32), np.empty(count + 1, np.int32)
    begin, listed, of = _divided(t, parts, place, count, radius + 2.0 * margin, squares, kept)
    return _Lists(parts, begin, listed, of, label, margin, squares, kept)


@inner
def _points_in_list(t, frac, center, radius, lists, size, source, image, d2s):
    """Do what :func:`_points_in_sphere` does, by the list of the atom's box."""
    c0, c1, c2 = frac[center, 0], frac[center, 1], frac[center, 2]
    s0, s1, s2 = int(np.floor(c0)), int(np.floor(c1)), int(np.floor(c2))
    w0, w1, w2 = c0 - s0, c1 - s1, c2 - s2
    parts = lists.parts
    box = min(int(w2 * parts[2]), parts[2] - 1) * parts[1] + min(int(w1 * parts[1]), parts[1] - 1)
    box = box * parts[0] + min(int(w0 * parts[0]), parts[0] - 1)
    t00, t10, t11, t20, t21, t22 = t[0, 0], t[1, 0], t[1, 1], t[2, 0], t[2, 1], t[2, 2]
    g0, g1, g2 = w0 - 0.5, w1 - 0.5, w2 - 0.5
    x, y, z = g0 * t00 + g1 * t10 + g2 * t20, g1 * t11 + g2 * t21, g2 * t22
    start, stop = lists.begin[box], lists.begin[box + 1]
    near = _within(lists.place, start, stop, x, y, z, radius + lists.margin, lists.squares, lists.kept)
    if size + near > len(d2s):
        return -1
    r2 = radius * radius
    for m in range(near):
        c = lists.of[lists.kept[m]]
        j = lists.label[0, c]
        n0, n1, n2 = lists.label[1, c] + s0, lists.label[2, c] + s1, lists.label[3, c] + s2
        g2 = frac[j, 2] - c2 + n2
        z = g2 * t22
        left2 = r2 - z * z
        g1 = frac[j, 1] - c1 + n1
        y = g1 * t11 + g2 * t21
        x = (frac[j, 0] - c0 + n0) * t00 + (g1 * t10 + g2 * t20)
        d2 = x * x + y * y + z * z
        if d2 > r2 or left2 < 0.0 or left2 - y * y < 0.0 or (j == center and n0 == 0 and n1 == 0 and n2 == 0):
            continue
        source[size], d2s[size] = j, d2
        image[size, 0], image[size, 1], image[size, 2] = n0, n1, n2
        size += 1
    return size


@inner
def _kth_smallest(values, count, k):
    """Return the k-th smallest (k from 0) of ``values[:count]``, reordering them (quickselect)."""
    low, high = 0, count - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if k <= j:
            high = j
        elif k >= i:
            low = i
        else:
            break
    return values[k]


@inner
def _grown(source, image, d2s, size):
    """Return arrays of twice the room."""
    room = 2 * len(source) + 64
    more_source, more_image, more_d2s = np.empty(room, np.int64), np.empty((room, 3), np.int32), np.empty(room)
    for e in range(size):  # copied one by one: a slice takes numba seconds to compile
        more_source[e], more_d2s[e] = source[e], d2s[e]
        more_image[e, 0], more_image[e, 1], more_image[e, 2] = image[e, 0], image[e, 1], image[e, 2]
    return more_source, more_image, more_d2s


@njit(cache=True, python_up_to=1000, nogil=True, error_model="numpy")
def directed(lattices, frac, ptr, k, radius, tolerance, n_distances, room):
    """Find each target's own neighbors.

    The arguments are those of :func:`crysldnet.graphs.neighbors.neighbor_list`, 0 for what isn't given, and the number
    of edges to make room for at first.

    Returns:
        start [N + 1]; source, image and squared distance of the edges start[i] … start[i + 1] − 1 of each atom i, in
        arrays longer than start[N]; the square [N] of the distance kept up to; distances [N, n_distances].
    """
    start = np.zeros(len(frac) + 1, np.int64)
    limit2, distances = np.empty(len(frac)), np.empty((len(frac), n_distances))
    source, image, d2s = np.empty(room, np.int64), np.empty((room, 3), np.int32), np.empty(room)
    scratch = np.empty(512)
    wanted = max(k, n_distances)
    size = start[0]  # a plain 0 would compile what it is handed to a second time
    for crystal in range(lattices.shape[0]):
        first, last = ptr[crystal], ptr[crystal + 1]
        t, listed = _triangular(lattices[crystal]), -1.0
        search = _first_radius(t, last - first, wanted, radius)
        for center in range(first, last):
            while True:
                if search != listed:
                    lists, listed = _lists(t, frac, first, last, search), search
                if lists.parts[0] > 0:
                    end = _points_in_list(t, frac, center, search, lists, size, source, image, d2s)
                else:
                    end = _points_in_sphere(t, frac, first, last, center, search, size, source, image, d2s)
                if end < 0:
                    source, image, d2s = _grown(source, image, d2s, size)
                    continue
                count = end - size
                if count < wanted:
                    search *= 1.25
                    continue
                if count > len(scratch):
                    scratch = np.empty(2 * count)
                limit, least2 = radius, 0.0
                for m in range(count if wanted > 0 else 0):
                    scratch[m] = d2s[size + m]
                if k > 0:
                    least2 = _kth_smallest(scratch, count, k - 1)
                    limit = np.sqrt(least2) + tolerance
                if limit > search:
                    search = limit * (1.0 + 1e-9)
                    continue
                break
            limit2[center] = max(limit * limit, least2)  # the square of a root may lie one rounding below
            if n_distances > 0:
                _kth_smallest(scratch, count, n_distances - 1)
                nearest = np.sort(scratch[:n_distances])
                for m in range(n_distances):
                    distances[center, m] = np.sqrt(nearest[m])
            for e in range(size, end):
                if d2s[e] <= limit2[center]:
                    source[size], d2s[size] = source[e], d2s[e]
                    image[size, 0], image[size, 1], image[size, 2] = image[e, 0], image[e, 1], image[e, 2]
                    size += 1
            start[center + 1] = size
    return start, source, image, d2s, limit2, distances
