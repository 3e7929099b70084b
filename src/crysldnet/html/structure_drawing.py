"""Draw a crystal's unit cell as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from html import escape
from itertools import product

import numpy as np
from numpy.typing import NDArray

from crysldnet.data.elements import SYMBOLS, reduced_formula

_EDGES = [(i, i | 1 << k) for i in range(8) for k in range(3) if not i >> k & 1]
_NEAR = 0.02
"""Fraction of a cell edge: atoms this close to a face are also drawn on the opposite face."""
_MOST_IMAGES = 300
_TURN = np.radians(-20.0)
_TILT = np.radians(12.0)
_RING = (0.8, 1.8)
"""Narrowest and widest ring in units of the drawing, which is 100 wide."""
STYLE = """
.structure line { stroke: var(--soft); stroke-width: 0.6; }
.structure circle { stroke: var(--text); stroke-opacity: 0.6; stroke-width: 0.4; }
.structure .ring { stroke: var(--text); stroke-opacity: 1; stroke-width: 0.5; }
.structure ellipse { fill: #ffffff; fill-opacity: 0.35; }
.swatch { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 50%; margin-right: 0.5em; }
.swatch.element { border: 1px solid var(--soft); }
"""
"""CSS of drawings and their legends."""


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
    rings: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
) -> str:
    """Draw the cell and its atoms in parallel projection, viewed along the second lattice vector from slightly above.

    Atoms have the color and relative size of their element; nearer ones cover those behind.

    Args:
        lattice: [3, 3] in Å, rows are lattice vectors.
        numbers: [n] atomic numbers.
        frac: [n, 3] fractional coordinates.
        rings: [n] colors of a ring around each atom; none by default.
        titles: [n] tooltips in plain text, by default the symbols.
    """
    axes = _oriented(lattice)
    which, places = _with_images(np.asarray(frac, np.float64))
    atoms, corners = places @ axes, np.array(list(product((0, 1), repeat=3)), float)[:, ::-1] @ axes
    looks = [_look(int(numbers[i])) for i in which]
    radii = np.array([0.4 * radius for _, radius in looks])
    span = np.concatenate([atoms[:, ::2] - radii[:, None], atoms[:, ::2] + radii[:, None], corners[:, ::2]])
    low, high = span.min(axis=0), span.max(axis=0)
    scale = (96 if rings is None else 96 - 2 * _RING[1]) / float((high - low).max())
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
        title = SYMBOLS[int(numbers[atom])] if titles is None else titles[atom]
        ring = None if rings is None else rings[atom]
        parts.append((float(point[1]), _atom(*at(point), radius * scale, color, ring, title)))
    drawn = "".join(part for _, part in sorted(parts, key=lambda part: -part[0]))
    atoms_named = f"{len(numbers)} atom{'s' * (len(numbers) != 1)}"
    label = f"unit cell of {reduced_formula(numbers)} with {atoms_named}"
    return f'<svg class="structure" viewBox="0 0 100 100" role="img" aria-label="{label}">{drawn}</svg>'


def _atom(x: float, y: float, radius: float, color: str, ring: str | None, title: str) -> str:
    """Return a shaded atom: a circle with a highlight, and the ring behind it."""
    around = ""
    if ring is not None:
        width = min(max(0.4 * radius, _RING[0]), _RING[1])
        around = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="{radius + width:.1f}" fill="{ring}"/>'
    return (
        f'<g><title>{escape(title)}</title>{around}<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{color}"/>'
        f'<ellipse cx="{x - 0.3 * radius:.1f}" cy="{y - 0.3 * radius:.1f}" rx="{0.45 * radius:.1f}" '
        f'ry="{0.4 * radius:.1f}"/></g>'
    )


def element_legend(numbers: NDArray[np.uint8]) -> str:
    """Return the elements of a drawing with their colors, by atomic number."""
    entries = (f"<span>{swatch(int(z))}{SYMBOLS[int(z)]}</span>" for z in np.unique(numbers))
    return f'<p class="legend">{"".join(entries)}</p>'


def swatch(z: int) -> str:
    """Return a dot in an element's color."""
    return f'<i class="swatch element" style="background: {_look(z)[0]}"></i>'
