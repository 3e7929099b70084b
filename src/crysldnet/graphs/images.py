"""Compiled lists of the images of a cell that may be within a radius of an atom; see :mod:`crysldnet.graphs.search`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crysldnet.graphs.compiled import njit

inner = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""For functions called only by compiled ones, which compile faster."""
inlined = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True)
"""For functions called for each atom or crystal, because a call counts the references to every array."""
U = np.uint64
"""Signed indices may count from the end, which costs time in numba."""
BLOCK = 64
"""Points per iteration of a vectorized loop."""
PLACES = np.array(
    [sum(bit << (8 * place) for place, bit in enumerate(b for b in range(8) if mask >> b & 1)) for mask in range(256)],
    np.uint64,
)
"""Which of eight bits are 1, as eight bytes."""
MOST_IMAGES = 60.0
"""Number of images of the cell up to which they are listed; lower for few atoms."""
LEAST_IMAGES = 4.0
"""Minimum limit per atom, plus one."""
BOX = 0.9
"""Length of a box in units of the radius."""
FEWEST = 12
"""Minimum mean number of atoms per box. All four constants are measured."""


class Room(NamedTuple):
    """Work arrays reused for successive crystals: the images of a cell and, behind them, the list of each box."""

    x: NDArray[np.float32]  # [C] Cartesian coordinates of each image, relative to the middle of the cell
    y: NDArray[np.float32]
    z: NDArray[np.float32]
    row: NDArray[np.int32]  # [C] row of label
    label: NDArray[np.int32]  # [C · 4] atom j and cell n of each image, ascending by j, n₂, n₁, n₀
    own: NDArray[np.int32]  # [C] row of label of each atom of the crystal itself
    inside: NDArray[np.uint8]  # [C] 1 or 0
    eights: NDArray[np.uint64]  # [C / 8] the same, eight at a time
    kept: NDArray[np.int32]  # [C] rows of label found for an atom
    d2s: NDArray[np.float64]  # [C] their squared distances
    scratch: NDArray[np.float64]  # [C]
    parts: NDArray[np.int64]  # [3] boxes along each lattice vector
    begin: NDArray[np.int64]  # [C] where the list of each box begins
    t: NDArray[np.float64]  # [3, 3] triangular lattice
    basis: NDArray[np.float64]  # [3, 3] directions of its axes
    reach: NDArray[np.float64]  # [3] how many cells a sphere reaches along each lattice vector


@inner
def room_for(images):
    """Return capacity for images."""
    size = (images + 7) // 8 * 8 + BLOCK
    x, y, z, row = (
        np.empty(size, np.float32),
        np.empty(size, np.float32),
        np.empty(size, np.float32),
        np.empty(size, np.int32),
    )
    label, own, kept = np.empty(4 * size, np.int32), np.empty(size, np.int32), np.empty(size, np.int32)
    inside, d2s, scratch, begin = np.empty(size, np.uint8), np.empty(size), np.empty(size), np.zeros(size, np.int64)
    small = (np.zeros(3, np.int64), begin, np.zeros((3, 3)), np.zeros((3, 3)), np.zeros(3))
    return Room(x, y, z, row, label, own, inside, inside.view(np.uint64), kept, d2s, scratch, *small)


@inlined
def triangular(lattices, b, t, basis):
    """Write the lower triangular T with T = lattices[b] · Q for a rotation Q (Gram–Schmidt on the rows)."""
    for row in range(3):
        x, y, z = lattices[b, row, 0], lattices[b, row, 1], lattices[b, row, 2]
        for other in range(row):
            along = x * basis[other, 0] + y * basis[other, 1] + z * basis[other, 2]
            x, y, z = x - along * basis[other, 0], y - along * basis[other, 1], z - along * basis[other, 2]
            t[row, other] = along
        length = np.sqrt(x**2 + y**2 + z**2)
        t[row, row], basis[row, 0], basis[row, 1], basis[row, 2] = length, x / length, y / length, z / length


@inlined
def points_in_sphere(t, frac, first, last, center, radius, label, kept, d2s):
    """List all (j, n) within ``radius`` of atom ``center``; return their number, or −1 if the arrays are full."""
    r2 = radius * radius
    slack, size = 1e-9, 0
    t00, t10, t11, t20, t21, t22 = t[0, 0], t[1, 0], t[1, 1], t[2, 0], t[2, 1], t[2, 2]
    per0, per1, per2 = 1.0 / t00, 1.0 / t11, 1.0 / t22
    c0, c1, c2 = frac[3 * center], frac[3 * center + 1], frac[3 * center + 2]
    for j in range(first, last):
        f0, f1, f2 = frac[3 * j] - c0, frac[3 * j + 1] - c1, frac[3 * j + 2] - c2
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
                    kept[size], d2s[size], label[4 * size] = size, d2, j
                    label[4 * size + 1], label[4 * size + 2], label[4 * size + 3] = n0, n1, n2
                    size += 1
    return size


@inlined
def _reach(t, radius, reach):
    """Write how many cells a sphere reaches along each lattice vector."""
    reach[2] = radius / t[2, 2]
    reach[1] = reach[2] * np.sqrt(t[2, 2] ** 2 + t[2, 1] ** 2) / t[1, 1]
    n0, n1, n2 = t[1, 1] * t[2, 2], t[1, 0] * t[2, 2], t[1, 0] * t[2, 1] - t[1, 1] * t[2, 0]
    reach[0] = radius * np.sqrt(n0 * n0 + n1 * n1 + n2 * n2) / (t[0, 0] * t[1, 1] * t[2, 2])


@inlined
def _fill(t, frac, first, last, reach, xs, ys, zs, rows, label, own):
    """List the images within ``reach`` of the cell; return their number."""
    t00, t10, t11, t20, t21, t22 = t[0, 0], t[1, 0], t[1, 1], t[2, 0], t[2, 1], t[2, 2]
    reach0, reach1, reach2 = reach[0], reach[1], reach[2]
    count = U(0)
    for j in range(first, last):
        f0, f1, f2 = np.floor(frac[3 * j]), np.floor(frac[3 * j + 1]), np.floor(frac[3 * j + 2])
        w0, w1, w2 = frac[3 * j] - f0, frac[3 * j + 1] - f1, frac[3 * j + 2] - f2
        s0, s1, s2 = int(f0), int(f1), int(f2)
        low0, high0 = int(np.ceil(-reach0 - w0)), int(np.floor(1.0 + reach0 - w0))
        low1, high1 = int(np.ceil(-reach1 - w1)), int(np.floor(1.0 + reach1 - w1))
        for n2 in range(int(np.ceil(-reach2 - w2)), int(np.floor(1.0 + reach2 - w2)) + 1):
            g2 = w2 + n2 - 0.5
            for n1 in range(low1, high1 + 1):
                g1 = w1 + n1 - 0.5
                x, y, z = (w0 - 0.5) * t00 + (g1 * t10 + g2 * t20), g1 * t11 + g2 * t21, g2 * t22
                if n1 == 0 and n2 == 0:
                    own[j - first] = np.int64(count) - low0
                for n0 in range(low0, high0 + 1):
                    xs[count], ys[count], zs[count], rows[count] = x + n0 * t00, y, z, count
                    at = U(4) * count
                    label[at], label[at + U(1)] = j, n0 - s0
                    label[at + U(2)], label[at + U(3)] = n1 - s1, n2 - s2
                    count += U(1)
    return np.int64(count)


@inlined
def _compact(rows, begin, many, inside, eights, kept):
    """Write the rows of points that are inside to ``kept``; return their number.

    Of eight points, rarely more than two are inside.
    """
    for c in range(many, (many + 7) // 8 * 8):
        inside[c] = 0
    count = U(0)
    for eight in range((many + 7) // 8):
        flags, at = eights[U(eight)], begin + U(8 * eight)
        places, found = PLACES[(flags * U(0x0102040810204080)) >> U(56)], (flags * U(0x0101010101010101)) >> U(56)
        kept[count] = rows[at + (places & U(7))]
        kept[count + U(1)] = rows[at + ((places >> U(8)) & U(7))]
        if found > U(2):
            for one in range(2, 8):
                kept[count + U(one)] = rows[at + ((places >> U(8 * one)) & U(7))]
        count += found
    return count


@inlined
def within(room, start, stop, x, y, z, radius, doubt):
    """Write which of ``room.row[start:stop]`` are within a radius of a point to ``room.kept``.

    Returns:
        Their number, and whether any are uncertain.
    """
    xs, ys, zs, inside = room.x, room.y, room.z, room.inside
    x, y, z, bound = np.float32(x), np.float32(y), np.float32(z), np.float32(radius * radius)
    sure, doubtful = np.float32(max(0.0, radius - doubt) ** 2), False
    begin, many = U(start), stop - start
    for c in range((many + BLOCK - 1) // BLOCK * BLOCK):  # separate loop over whole blocks: vectorized
        dx, dy, dz = xs[begin + U(c)] - x, ys[begin + U(c)] - y, zs[begin + U(c)] - z
        square = dx * dx + dy * dy + dz * dz
        inside[c] = square <= bound
        doubtful |= (square <= bound) & (square > sure)
    return np.int64(_compact(room.row, begin, many, inside, room.eights, room.kept)), doubtful


@inlined
def _half_diagonal(t, parts):
    """Return half the longest diagonal of a box."""
    longest = 0.0
    for sign1 in (-1.0, 1.0):
        for sign2 in (-1.0, 1.0):
            square = 0.0
            for axis in range(3):
                along = t[0, axis] / parts[0] + sign1 * t[1, axis] / parts[1] + sign2 * t[2, axis] / parts[2]
                square += along * along
            longest = max(longest, square)
    return 0.5 * np.sqrt(longest)


@inlined
def _divided(t, parts, count, radius, reach, xs, ys, zs, rows, begin, inside, eights, kept):
    """Divide the images of a cell into lists for its boxes; return the size of all, or −1 if the arrays are full."""
    begin[0], begin[1] = 0, count
    boxes = parts[0] * parts[1] * parts[2]
    if boxes == 1:
        return count
    radius += _half_diagonal(t, parts)
    bound, size = np.float32(radius * radius), U(count + BLOCK)
    i00, i11, i22 = np.float32(1.0 / t[0, 0]), np.float32(1.0 / t[1, 1]), np.float32(1.0 / t[2, 2])
    t10, t20, t21 = np.float32(t[1, 0]), np.float32(t[2, 0]), np.float32(t[2, 1])
    far0 = np.float32(0.5 / parts[0] + reach[0])
    far1 = np.float32(0.5 / parts[1] + reach[1])
    far2 = np.float32(0.5 / parts[2] + reach[2])
    begin[0] = size
    for box in range(boxes):
        if size + U(count + BLOCK) > U(len(kept)):
            return -1
        h0 = (box % parts[0] + 0.5) / parts[0] - 0.5
        h1 = (box // parts[0] % parts[1] + 0.5) / parts[1] - 0.5
        h2 = (box // (parts[0] * parts[1]) + 0.5) / parts[2] - 0.5
        x, y = np.float32(h0 * t[0, 0] + h1 * t[1, 0] + h2 * t[2, 0]), np.float32(h1 * t[1, 1] + h2 * t[2, 1])
        z = np.float32(h2 * t[2, 2])
        for c in range((count + BLOCK - 1) // BLOCK * BLOCK):
            dx, dy, dz = xs[U(c)] - x, ys[U(c)] - y, zs[U(c)] - z
            g2 = dz * i22
            g1 = (dy - g2 * t21) * i11
            g0 = (dx - g1 * t10 - g2 * t20) * i00
            near = (dx * dx + dy * dy + dz * dz <= bound) & (abs(g0) <= far0)
            inside[c] = near & (abs(g1) <= far1) & (abs(g2) <= far2)
        for m in range(_compact(rows, U(0), count, inside, eights, kept)):
            at = U(kept[m])
            xs[size], ys[size], zs[size], rows[size] = xs[at], ys[at], zs[at], at
            size += U(1)
        begin[box + 1] = size
    return np.int64(size)


@inlined
def lists_of(t, frac, first, last, radius, room):
    """List the images of a crystal that may be within a radius of each box of its cell.

    Returns:
        The largest error of single precision in Å; 0 if there are no lists, because the cell is small or skewed and
        has many images, or because a coordinate isn't finite; −1 if the arrays are full.
    """
    parts, reach, atoms = room.parts, room.reach, last - first
    _reach(t, radius, reach)
    images = (1.0 + 2.0 * reach[0]) * (1.0 + 2.0 * reach[1]) * (1.0 + 2.0 * reach[2])
    size = 0.0
    for i in range(3 * first, 3 * last):
        size += abs(frac[i])
    margin = 0.0
    if images < min(MOST_IMAGES, LEAST_IMAGES * (1 + atoms)) and size < 1e9:
        box, boxes = BOX * radius, 0
        while boxes == 0 or boxes > max(1, atoms // FEWEST):
            for axis in range(3):
                length = np.sqrt(t[axis, 0] ** 2 + t[axis, 1] ** 2 + t[axis, 2] ** 2)
                parts[axis] = max(1, int(min(length / box, 1e6)))
            boxes = parts[0] * parts[1] * parts[2]
            box *= 1.25
        margin = 1e-3 + 1e-6 * (radius + t[0, 0] + abs(t[1, 0]) + abs(t[2, 0]) + t[1, 1] + abs(t[2, 1]) + t[2, 2])
        for axis in range(3):
            reach[axis] = reach[axis] * (1.0 + 2.0 * margin / radius) + 1e-6
        most = atoms * int(2.0 + 2.0 * reach[0]) * int(2.0 + 2.0 * reach[1]) * int(2.0 + 2.0 * reach[2])
        if most + BLOCK > len(room.kept):
            margin = -1.0
        else:
            xs, ys, zs, rows, inside, eights, kept = (
                room.x,
                room.y,
                room.z,
                room.row,
                room.inside,
                room.eights,
                room.kept,
            )
            count = _fill(t, frac, first, last, reach, xs, ys, zs, rows, room.label, room.own)
            far = radius + 2.0 * margin
            if _divided(t, parts, count, far, reach, xs, ys, zs, rows, room.begin, inside, eights, kept) < 0:
                margin = -1.0
    return margin


@inlined
def exactly(t, frac, c0, c1, c2, radius, label, own, s0, s1, s2, near, kept, d2s):
    """Keep the points within the exact radius and their squared distances; return their number."""
    r2 = radius * radius
    t00, t10, t11, t20, t21, t22 = t[0, 0], t[1, 0], t[1, 1], t[2, 0], t[2, 1], t[2, 2]
    count = U(0)
    for m in range(near):
        c = kept[m]
        at = U(4 * c)
        j = U(3 * label[at])
        g2 = frac[j + U(2)] - c2 + (label[at + U(3)] + s2)
        z = g2 * t22
        left2 = r2 - z * z
        g1 = frac[j + U(1)] - c1 + (label[at + U(2)] + s1)
        y = g1 * t11 + g2 * t21
        x = (frac[j] - c0 + (label[at + U(1)] + s0)) * t00 + (g1 * t10 + g2 * t20)
        d2 = x * x + y * y + z * z
        kept[count], d2s[count] = c, d2
        count += U((d2 <= r2) & (left2 >= 0.0) & (left2 - y * y >= 0.0) & (c != own))
    return np.int64(count)
