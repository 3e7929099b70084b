"""Draw a crystal's unit cell as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from crysldnet.data.elements import SYMBOLS

_EDGES = [(i, i | 1 << k) for i in range(8) for k in range(3) if not i >> k & 1]
_NEAR = 0.02
"""Fraction of a cell edge: atoms this close to a face are also drawn on the opposite face."""
_MOST_IMAGES = 300
_TURN = np.radians(-20.0)
_TILT = np.radians(12.0)


@cache
def _look(z: int) -> tuple[str, float]:
    """Return the color of an element (Jmol's) and its radius in Å."""
    from pymatgen.core import Element
    from pymatgen.vis.structure_vtk import EL_COLORS

    element = Element.from_Z(z)
    radius = element.atomic_radius or element.atomic_radius_calculated or 1.5
    red, green, blue = EL_COLORS["Jmol"].get(SYMBOLS[z], (150, 150, 150))
    return f"#{red:02x}{green:02x}{blue:02x}", float(radius)


def _oriented(lattice: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Cartesian axes with the first lattice vector to the right, the third up, viewed slightly aside."""
    a = lattice[0] / np.linalg.norm(lattice[0])
    normal = np.cross(lattice[0], lattice[1])
    up = normal / np.linalg.norm(normal)
    turned = lattice @ np.stack([a, np.cross(up, a), up]).T  # a along x, b in the plane, c up
    if np.linalg.det(lattice) < 0:
        turned[:, 2] *= -1
    c, s = np.cos(_TURN), np.sin(_TURN)
    turned = turned @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]).T
    c, s = np.cos(_TILT), np.sin(_TILT)
    return turned @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]]).T


def _with_images(frac: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return atoms and their periodic images on faces, edges and corners: atom index and coordinates."""
    frac = frac - np.floor(frac)
    frac = np.where(frac > 1 - _NEAR, frac - 1, frac)
    which, where = [np.arange(len(frac))], [frac]
    for shift in product((0, 1), repeat=3):
        if any(shift):
            again = np.flatnonzero((np.abs(frac[:, np.array(shift) == 1]) <= _NEAR).all(axis=1))
            which.append(again)
            where.append(frac[again] + np.array(shift))
    if sum(map(len, which)) > _MOST_IMAGES:
        return which[0], where[0]
    return np.concatenate(which), np.concatenate(where)


def draw_structure(
    lattice: NDArray[np.float64],
    numbers: NDArray[np.uint8],
    frac: NDArray[np.floating],
    colors: Sequence[str] | None = None,
) -> str:
    """Draw the cell and its atoms in parallel projection, viewed along the second lattice vector from slightly above.

    Args:
        lattice: [3, 3] in Å, rows are lattice vectors.
        numbers: [n] atomic numbers.
        frac: [n, 3] fractional coordinates.
        colors: [n] atom colors, by default those of the elements.
    """
    axes = _oriented(lattice)
    which, places = _with_images(np.asarray(frac, np.float64))
    atoms, corners = places @ axes, np.array(list(product((0, 1), repeat=3)), float)[:, ::-1] @ axes
    looks = [_look(int(numbers[i])) for i in which]
    radii = np.array([0.4 * radius for _, radius in looks])
    span = np.concatenate([atoms[:, ::2] - radii[:, None], atoms[:, ::2] + radii[:, None], corners[:, ::2]])
    low, high = span.min(axis=0), span.max(axis=0)
    scale = 96 / float((high - low).max())
    middle = (low + high) / 2

    def at(point: NDArray[np.float64]) -> tuple[float, float]:
        x, y = (point[::2] - middle) * scale
        return 50 + float(x), 50 - float(y)

    parts: list[tuple[float, str]] = []  # depth and shape; farthest first
    for i, j in _EDGES:
        (x1, y1), (x2, y2) = at(corners[i]), at(corners[j])
        depth = float(corners[i][1] + corners[j][1]) / 2
        parts.append((depth, f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'))
    for point, (color, _), radius, atom in zip(atoms, looks, radii, which, strict=True):
        color = color if colors is None else colors[atom]
        x, y = at(point)
        title = SYMBOLS[int(numbers[atom])]
        circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius * scale:.1f}" fill="{color}"><title>{title}</title>'
        parts.append((float(point[1]), f"{circle}</circle>"))
    drawn = "".join(part for _, part in sorted(parts, key=lambda part: -part[0]))
    return f'<svg class="structure" viewBox="0 0 100 100" role="img" aria-label="the cell">{drawn}</svg>'
