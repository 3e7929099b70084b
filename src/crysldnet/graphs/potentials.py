"""Sums of pair potentials over a lattice, for every ordered pair of a crystal's atoms.

Y. Lin et al., "Efficient Approximations of Complete Interatomic Potentials for Crystal Property Prediction" (PotNet),
ICML 2023 (arXiv 2306.10045).

With v = x_source − x_target and the lattice Λ,

    Coulomb  Z_{1/2}(v) = Σ_ℓ 1 / |v + ℓ|      by analytic continuation (a neutralizing background)
    London   Z_3(v)     = Σ_ℓ 1 / |v + ℓ|⁶     the zero vector left out in both
    Pauli    X(v)       = Σ_ℓ exp(−3 |v + ℓ|)  with ℓ = 0

    S = −0.801 Z_{1/2} − 0.074 Z_3 + 0.145 X.

Ewald's method in a cell scaled to unit volume, g = V^{1/3}, k running over reciprocal vectors without 2π:

    Z_p = g^{−2p}/Γ(p) [Σ_{ℓ≠−v} |v+ℓ|^{−2p} Γ(p, |v+ℓ|²) + π^{3/2} Σ_{k≠0} cos(2πk·v) (π²k²)^{p−3/2} Γ(3/2−p, π²k²)
          − π^{3/2}/(3/2−p)] − [v ∈ Λ] g^{−2p}/(p Γ(p)).

All incomplete Γ functions needed are elementary or erfc. ``published`` sums integers from −3 to 3 along each lattice
vector in Z, which misses terms in skewed cells, and divides lengths in X by √g, so that its decay depends on the volume
of the cell. ``corrected`` includes every term within a sphere in both spaces, and X as defined.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crysldnet.graphs.compiled import njit

COULOMB, LONDON, PAULI = -0.801, -0.074, 0.145
PAULI_DECAY = 3.0
PUBLISHED_REACH = 3
RADIUS2 = 28.0
"""Scaled |v + ℓ|² and π²k² beyond which exp(−x) is below 1e-12."""
PAULI_RADIUS = 9.0
"""Å, or Å/√g as published; exp(−3 · 9) is 2e-12."""
_PI_3_2 = math.pi**1.5
_ZERO = 1e-10


class LatticeSums(NamedTuple):
    """Every ordered pair of atoms of every crystal, including an atom with itself, sorted by target."""

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    sums: NDArray[np.float64]
    """[P, 3] Z_{1/2} in 1/Å, Z_3 in 1/Å⁶, X."""

    @property
    def potential(self) -> NDArray[np.float64]:
        """[P] S."""
        return self.sums @ np.array([COULOMB, LONDON, PAULI])


@njit(inline="always", error_model="numpy")
def _length2(f0, f1, f2, m):
    """Return the squared length of the row vector (f0, f1, f2) · m."""
    x = f0 * m[0, 0] + f1 * m[1, 0] + f2 * m[2, 0]
    y = f0 * m[0, 1] + f1 * m[1, 1] + f2 * m[2, 1]
    z = f0 * m[0, 2] + f1 * m[1, 2] + f2 * m[2, 2]
    return x * x + y * y + z * z


@njit(cache=True, nogil=True, error_model="numpy")
def _images_within(lattice, radius, fixed):
    """Return integers [n, 3] along each vector from −fixed to fixed, or if fixed is 0 as far as a sphere requires."""
    inverse = np.linalg.inv(lattice)
    reach = np.empty(3, np.int64)
    for axis in range(3):  # one more, because v may be anywhere in the cell
        height = np.sqrt((inverse[:, axis] ** 2).sum())
        reach[axis] = fixed if fixed > 0 else int(np.ceil(radius * height)) + 1
    room = (2 * reach[0] + 1) * (2 * reach[1] + 1) * (2 * reach[2] + 1)
    images = np.empty((room, 3))
    count = 0
    for n0 in range(-reach[0], reach[0] + 1):
        for n1 in range(-reach[1], reach[1] + 1):
            for n2 in range(-reach[2], reach[2] + 1):
                images[count, 0], images[count, 1], images[count, 2] = n0, n1, n2
                count += 1
    return images[:count]


@njit(cache=True, nogil=True, error_model="numpy")
def _reciprocal_terms(lattice, fixed):
    """Return integers k [n, 3], half of them, and the doubled coefficients of cos(2πk·f) for p = 1/2 and p = 3."""
    inverse_t = np.linalg.inv(lattice).T.copy()
    images = _images_within(inverse_t, np.sqrt(RADIUS2) / np.pi, fixed)
    keep, coulomb, london = np.empty((len(images), 3)), np.empty(len(images)), np.empty(len(images))
    count = 0
    for n in images:
        if n[0] < 0 or (n[0] == 0 and (n[1] < 0 or (n[1] == 0 and n[2] <= 0))):
            continue  # k and −k give the same cosine
        x = np.pi**2 * _length2(n[0], n[1], n[2], inverse_t)
        if x > RADIUS2:
            continue
        gauss, root = np.exp(-x), np.sqrt(x)
        half = np.sqrt(np.pi) * math.erfc(root)  # Γ(1/2, x)
        minus_half = 2.0 * (gauss / root - half)
        minus_three_halves = (gauss / (x * root) - minus_half) / 1.5
        keep[count] = n
        coulomb[count] = 2.0 * _PI_3_2 * gauss / x
        london[count] = 2.0 * _PI_3_2 * x * root * minus_three_halves
        count += 1
    return keep[:count], coulomb[:count], london[:count]


@njit(cache=True, nogil=True, error_model="numpy")
def _lattice_sums(lattices, frac, ptr, published):
    """Return [P, 3] sums of every ordered pair, targets outside, sources inside."""
    pairs = 0
    for crystal in range(lattices.shape[0]):
        pairs += (ptr[crystal + 1] - ptr[crystal]) ** 2
    out = np.empty((pairs, 3))
    fixed = PUBLISHED_REACH if published else 0
    at = 0
    for crystal in range(lattices.shape[0]):
        lattice = lattices[crystal]
        g = np.abs(np.linalg.det(lattice)) ** (1.0 / 3.0)
        scaled = lattice / g
        real = _images_within(scaled, np.sqrt(RADIUS2), fixed)
        waves, coulomb_k, london_k = _reciprocal_terms(scaled, fixed)
        unit = np.sqrt(g) if published else 1.0  # unit of lengths in the Pauli term, in Å
        pauli = _images_within(lattice / unit, PAULI_RADIUS, 0)
        first, last = ptr[crystal], ptr[crystal + 1]
        for target in range(first, last):
            for source in range(first, last):
                if source < target:  # the sums are even in v
                    out[at + source - first] = out[at + (source - target) * (last - first) + target - first]
                    continue
                f = frac[source] - frac[target]
                for axis in range(3):
                    f[axis] -= np.floor(f[axis] + 0.5) if not published else 0.0
                coulomb, london, repulsion, same = 0.0, 0.0, 0.0, False
                for n in real:
                    d2 = _length2(f[0] + n[0], f[1] + n[1], f[2] + n[2], scaled)
                    if d2 < _ZERO:
                        same = True
                    elif d2 < RADIUS2:
                        coulomb += np.sqrt(np.pi) * math.erfc(np.sqrt(d2)) / np.sqrt(d2)
                        london += (d2 * d2 + 2.0 * d2 + 2.0) * np.exp(-d2) / d2**3
                for n in pauli:
                    length = np.sqrt(_length2(f[0] + n[0], f[1] + n[1], f[2] + n[2], lattice)) / unit
                    if length < PAULI_RADIUS:
                        repulsion += np.exp(-PAULI_DECAY * length)
                for w in range(len(waves)):
                    phase = np.cos(2.0 * np.pi * (waves[w, 0] * f[0] + waves[w, 1] * f[1] + waves[w, 2] * f[2]))
                    coulomb += coulomb_k[w] * phase
                    london += london_k[w] * phase
                coulomb -= _PI_3_2
                london += _PI_3_2 / 1.5
                if same:
                    coulomb -= 2.0
                    london -= 1.0 / 3.0
                row = at + source - first
                out[row, 0] = coulomb / (g * np.sqrt(np.pi))
                out[row, 1] = london / (2.0 * g**6)
                out[row, 2] = repulsion
            at += last - first
    return out


def lattice_sums(
    lattices: NDArray[np.floating], frac_coords: NDArray[np.floating], ptr: NDArray[np.int64], *, published: bool
) -> LatticeSums:
    """Sum the three potentials over the lattice, for all n² ordered pairs of each crystal.

    Args:
        lattices: [B, 3, 3] in Å, rows are lattice vectors.
        frac_coords: [N, 3].
        ptr: [B + 1] first atom of each crystal.
        published: use the terms and scale of the released code, see the module docstring.
    """
    sizes = np.diff(ptr)
    each = np.repeat(sizes, sizes)  # for every target atom
    target = np.repeat(np.arange(ptr[-1]), each)
    begin = np.repeat(np.repeat(ptr[:-1], sizes), each)
    source = begin + np.arange(len(target)) - np.repeat(np.cumsum(each) - each, each)
    sums = _lattice_sums(
        np.ascontiguousarray(lattices, np.float64),
        np.ascontiguousarray(frac_coords, np.float64),
        np.ascontiguousarray(ptr, np.int64),
        published,
    )
    return LatticeSums(source, target, sums)
