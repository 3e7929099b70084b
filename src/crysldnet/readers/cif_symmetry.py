"""Symmetry of a CIF: its listed operations, those of its space group, and the atoms they generate.

gemmi parses operations and has the space group tables; spglib determines the space group of operations in a setting
that isn't in the tables.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

import gemmi
import numpy as np
from numpy.typing import NDArray

from crysldnet.errors import DataError

MAX_OPERATIONS = 8 * 192
"""No space group has more than 192 operations; a 2 × 2 × 2 supercell may be written with eight times as many."""


class Operations(NamedTuple):
    """Rotations [M, 3, 3] and translations [M, 3] of a space group, its number, and the changes that the rotations make
    to a lattice metric, a matrix [U, 9].
    """

    rotations: NDArray[np.float64]
    translations: NDArray[np.float64]
    number: int
    strain: NDArray[np.float64]

    def same_as(self, other: Operations) -> bool:
        """Return whether these equal another list of operations, up to lattice translations."""
        own, others = (np.sort(_keys(*operations[:2])) for operations in (self, other))
        return np.array_equal(own, others)


class Named(NamedTuple):
    """The space group stated in a file: Hermann-Mauguin symbol, Hall symbol, number; "" if missing."""

    symbol: str
    hall: str
    number: str

    def __str__(self) -> str:
        return " ".join(filter(None, self))


def _operations(rotations: NDArray, translations: NDArray, number: int) -> Operations:
    """Prepare operations once for all files that list them."""
    unlike = np.unique(rotations.reshape(-1, 9), axis=0).reshape(-1, 3, 3)  # centering repeats rotations
    strain = np.einsum("mki,mlj->mijkl", unlike, unlike) - np.eye(9).reshape(3, 3, 3, 3)
    strain = (strain + strain.swapaxes(3, 4)).reshape(-1, 9) / 2  # the metric is symmetric
    return Operations(rotations, translations, number, np.unique(strain[np.any(strain, axis=1)], axis=0))


IDENTITY = _operations(np.eye(3)[None], np.zeros((1, 3)), 1)


@lru_cache(512)
def listed(triplets: tuple[str, ...]) -> Operations:
    """Return the group of operations such as ``x,-y,z+1/2``.

    Raises:
        DataError: an operation is invalid, they aren't a group, or there are more than in any group.
    """
    texts = list(dict.fromkeys(triplets))
    if len(texts) > MAX_OPERATIONS:
        raise DataError(f"it has {len(texts)} symmetry operations, more than any space group")
    if wrong := next((text or "?" for text in texts if not text or re.search("[a-w]", text, re.I)), None):
        raise DataError(f"its symmetry isn't understood ({wrong})")
    try:
        operations = [gemmi.Op(text).wrap() for text in texts]
    except (RuntimeError, ValueError) as error:
        raise DataError(f"its symmetry isn't understood ({error})") from error
    operations = list({operation.triplet(): operation for operation in operations}.values())
    rotations, translations = _arrays(operations)
    tabulated = gemmi.find_spacegroup_by_ops(gemmi.GroupOps(operations))
    if tabulated is not None and len(tabulated.operations()) == len(operations):
        return _operations(rotations, translations, tabulated.number)
    if not _is_group(rotations, translations):
        raise DataError("its symmetry operations don't form a group; write it with all operations, x,y,z included")
    return _operations(rotations, translations, _number_of(rotations, translations))


def _arrays(operations: list[gemmi.Op]) -> tuple[NDArray, NDArray]:
    den = gemmi.Op.DEN
    return np.array([op.rot for op in operations]) / den, np.array([op.tran for op in operations]) / den


def _is_group(rotations: NDArray, translations: NDArray) -> bool:
    """Return whether the product of any two operations is one of them, up to lattice translations."""
    own = _keys(rotations, translations)
    return all(
        np.isin(_keys(rotation @ rotations, translations @ rotation.T + shift), own).all()
        for rotation, shift in zip(rotations, translations, strict=True)
    )


def _keys(rotations: NDArray, translations: NDArray) -> NDArray[np.int64]:
    """Return a number for each operation, equal for those that differ by lattice translations."""
    den = gemmi.Op.DEN
    entries = np.concatenate([rotations.reshape(-1, 9) * den + 4 * den, translations * den % den], axis=1)
    return np.rint(entries).astype(np.int64) % (8 * den) @ (8 * den + 1) ** np.arange(12)


def _number_of(rotations: NDArray, translations: NDArray) -> int:
    """Return the space group number of operations in any setting."""
    import spglib

    found = spglib.get_spacegroup_type_from_symmetry(rotations.astype(np.intc), translations)
    return 0 if found is None else found.number


def fits(operations: Operations, lattice: NDArray[np.float64]) -> bool:
    """Return whether all rotations map the lattice onto itself."""
    metric = lattice @ lattice.T
    return bool(np.abs(operations.strain @ metric.reshape(9)).max(initial=0.0) <= 0.02 * metric.max())


@lru_cache(512)
def numbers_of(named: Named) -> frozenset[int]:
    """Return the space group numbers for the parts of a name, ignoring unknown parts."""
    group = gemmi.find_spacegroup_by_name(named.symbol) if named.symbol else None
    numbers = {group.number} if group else set()
    if named.hall and (hall := _of_hall(named.hall)):
        numbers.add(hall.number)
    if named.number.isdigit() and 1 <= int(named.number) <= 230:
        numbers.add(int(named.number))
    return frozenset(numbers)


def settings_of(named: Named, lattice: NDArray[np.float64]) -> list[Operations]:
    """Return the settings of a space group that match all parts of its name and the cell."""
    return [setting for setting in _settings(named) if fits(setting, lattice)]


def only_setting(named: Named, lattice: NDArray[np.float64]) -> Operations:
    """Return the operations of the only tabulated setting that matches this name and the cell."""
    settings = settings_of(named, lattice)
    if not settings:
        raise DataError(f"its symmetry isn't understood ({named}): write it with its symmetry operations")
    if len(settings) > 1:
        raise DataError(
            f"its space group ({named}) has {len(settings)} settings that fit its cell, and it doesn't say which it "
            "is in; write it with its symmetry operations"
        )
    return settings[0]


def same_settings(one: Named, other: Named, lattice: NDArray[np.float64]) -> bool:
    """Return whether two names refer to the same settings in a cell."""
    found = [settings_of(named, lattice) for named in (one, other)]
    return len(found[0]) == len(found[1]) and all(any(a.same_as(b) for b in found[1]) for a in found[0])


@lru_cache(512)
def _settings(named: Named) -> list[Operations]:
    if named.hall and (setting := _of_hall(named.hall)):
        return [setting] if numbers_of(named) == {setting.number} else []
    if named.hall:
        return []
    table = [*gemmi.spacegroup_table()]
    if named.symbol:
        found = gemmi.find_spacegroup_by_name(named.symbol)
        chosen = re.search(r":\s*[12hr]\s*$|\s[hr]$", named.symbol, re.I)
        table = [g for g in table if found and (g.xhm() == found.xhm() if chosen else g.hm == found.hm)]
    if named.number:
        table = [group for group in table if str(group.number) == named.number]
    settings: dict[bytes, Operations] = {}
    for group in table:
        setting = _operations(*_arrays([*group.operations()]), group.number)
        settings.setdefault(np.sort(_keys(*setting[:2])).tobytes(), setting)
    return [*settings.values()]


def _of_hall(symbol: str) -> Operations | None:
    """Return the operations of a Hall symbol, which determines setting and origin; None if invalid."""
    plain = "".join(symbol.split()).lower()
    tabulated = next((g for g in gemmi.spacegroup_table() if "".join(g.hall.split()).lower() == plain), None)
    try:
        operations = [*(tabulated.operations() if tabulated else gemmi.symops_from_hall(symbol))]
    except (RuntimeError, ValueError):
        return None
    return listed(tuple(operation.triplet() for operation in operations))


NOTE_MOVED = "have atoms beside a special position of their space group, which were moved onto it"

_SAME = 0.05
"""Å; closer images of an atom are one atom on a special position, written with few digits."""
_MOVED = 0.01
"""Å; moving an atom onto its special position by more than this is noted."""
_GRID = 1 << 16
"""steps per cell edge for distinguishing images on special positions"""


class Sites(NamedTuple):
    """Atomic numbers [S] and fractional coordinates [S, 3] of the listed sites."""

    numbers: NDArray[np.uint8]
    frac_coords: NDArray[np.float64]


class Cell(NamedTuple):
    """All atoms of a cell: site [N], atomic numbers [N], fractional coordinates [N, 3], and the number of symmetry
    operations.
    """

    site: NDArray[np.int64]
    numbers: NDArray[np.uint8]
    frac_coords: NDArray[np.float64]
    operations: int


def expand(sites: Sites, operations: Operations, lattice: NDArray[np.float64], notes: list[str]) -> Cell:
    """Return all atoms of the cell.

    An atom on a special position occurs once. It is moved onto the position exactly, to the mean of its images under
    the operations that keep it in place, because files give 0.3333 for 1/3.

    Raises:
        DataError: two sites give the same atom, or there are too many.
    """
    rotations, translations = operations[:2]
    numbers, frac_coords = sites
    count = len(rotations)
    if len(numbers) * count > 4_000_000 or len(numbers) >= 1 << 14:
        raise DataError(f"it has {len(numbers)} sites and {count} symmetry operations, more than can be expanded")
    frac_coords = frac_coords - np.floor(frac_coords)
    images, multiplicity = frac_coords[:, None], np.ones(len(numbers), np.int64)
    if count > 1:
        images, multiplicity = _images(frac_coords, rotations, translations, lattice, notes)
    # the offset keeps decimal fractions and multiples of 1/24 away from the boundaries between steps
    step = np.floor((images - np.floor(images)) * _GRID + 0.3779645).astype(np.int64) % _GRID
    keys = ((step[..., 0] * _GRID + step[..., 1]) * _GRID + step[..., 2]).reshape(-1)
    order = keys.argsort(kind="stable")
    ordered = keys[order]
    first = order[np.concatenate([[True], ordered[1:] != ordered[:-1]])]
    first.sort()
    if len(first) != (count // multiplicity).sum():
        raise DataError(
            "two sites stand at the same place: a disordered site, which needs an ordered approximation, "
            "or atoms listed in full beside symmetry operations that make them again"
        )
    return Cell(first // count, numbers[first // count], images.reshape(-1, 3)[first], count)


def _images(
    frac_coords: NDArray[np.float64],
    rotations: NDArray,
    translations: NDArray,
    lattice: NDArray[np.float64],
    notes: list[str],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the images [S, M, 3] of sites, and how many of them are the same atom."""
    images = np.einsum("mij,sj->smi", rotations, frac_coords) + translations
    near = images - np.rint(images - frac_coords[:, None])  # the copy of each image nearest to its site
    away = (near - frac_coords[:, None]) @ lattice
    stays = (away * away).sum(axis=2) < _SAME**2
    multiplicity = stays.sum(axis=1)
    special = multiplicity > 1
    if special.any():
        mean = (near * stays[..., None]).sum(axis=1)[special] / multiplicity[special, None]
        if np.linalg.norm((mean - frac_coords[special]) @ lattice, axis=1).max() > _MOVED:
            notes.append(NOTE_MOVED)
        images[special] = np.einsum("mij,sj->smi", rotations, mean) + translations
    return images, multiplicity


def gives_same(cell: Cell, operations: Operations, sites: Sites, lattice: NDArray[np.float64]) -> bool:
    """Return whether operations generate the same atoms from the listed sites."""
    from scipy.spatial import cKDTree

    numbers, frac_coords = sites
    if len(numbers) * len(operations.rotations) > 1_000_000:
        return False
    images = np.einsum("mij,sj->smi", operations.rotations, frac_coords) + operations.translations
    near = cKDTree(cell.frac_coords % 1.0 % 1.0, boxsize=1.0).query(images.reshape(-1, 3) % 1.0 % 1.0)[1]
    away = images.reshape(-1, 3) - cell.frac_coords[near]
    same = np.linalg.norm((away - np.rint(away)) @ lattice, axis=1) < _SAME
    same &= np.repeat(numbers, len(operations.rotations)) == cell.numbers[near]
    return bool(same.all()) and len(np.unique(near)) == len(cell.numbers)
