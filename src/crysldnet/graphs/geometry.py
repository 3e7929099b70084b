"""Lattice mathematics.

Shapes: ``B`` crystals, ``N`` atoms. A lattice is a 3×3 matrix whose rows are the lattice vectors in Å; fractional
coordinates ``f`` give Cartesian ones as ``f @ lattice``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lattice_parameters(lattice: Tensor) -> tuple[Tensor, Tensor]:
    """Return lengths (a, b, c) in Å and angles (α, β, γ) in degrees.

    Args:
        lattice: [..., 3, 3], rows are lattice vectors in Å.

    Returns:
        lengths [..., 3] and angles [..., 3]; α lies between b and c, β between a and c, γ between a and b.
        Both are invariant under rotation of the crystal.
    """
    lengths = lattice.norm(dim=-1)
    unit = lattice / lengths.unsqueeze(-1)
    cosines = torch.stack(
        [(unit[..., i, :] * unit[..., j, :]).sum(-1) for i, j in ((1, 2), (0, 2), (0, 1))],
        dim=-1,
    )
    return lengths, torch.rad2deg(torch.acos(cosines.clamp(-1.0, 1.0)))


def undo_strain(lattice: Tensor, strain: Tensor) -> Tensor:
    """Return the lattice L from the strained one L(1 + ε).

    Args:
        lattice: [B, 3, 3], the strained lattice, rows in Å.
        strain: [B, 3, 3], the symmetric strain ε, in Cartesian axes.
    """
    eye = torch.eye(3, dtype=lattice.dtype, device=lattice.device)
    return lattice @ inverse(eye + strain)


def inverse(matrix: Tensor) -> Tensor:
    """Return the inverses of matrices [..., 3, 3] by their cofactors.

    Unlike ``torch.linalg.inv``, this doesn't synchronize with the device to check for singular matrices.
    """
    a, b, c = matrix.unbind(-2)
    cofactors = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], dim=-1)
    return cofactors / (a * cofactors[..., 0]).sum(-1)[..., None, None]


def random_rotations(n: int, *, like: Tensor) -> Tensor:
    """Sample n uniform rotation matrices [n, 3, 3] with the type and device of ``like``.

    A unit quaternion (w, x, y, z) that is uniform on the sphere gives a uniform rotation.
    """
    w, x, y, z = torch.nn.functional.normalize(torch.randn(n, 4, dtype=like.dtype, device=like.device), dim=1).unbind(1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
