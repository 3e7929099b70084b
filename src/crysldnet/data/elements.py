"""Element symbols and formulas."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from math import gcd

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from crysldnet.graphs.crystals import Crystals

SYMBOLS = (
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr "
    "Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb "
    "Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf "
    "Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
).split()
"""Symbol by atomic number; index 0 is the masked atom."""


def reduced_formula(numbers: NDArray[np.uint8]) -> str:
    """Return the formula with the smallest integers, elements in alphabetical order: ``Cl1Na1`` as ``ClNa``."""
    elements, counts = np.unique(numbers, return_counts=True)
    divisor = gcd(*counts.tolist())
    parts = sorted((SYMBOLS[z], count // divisor) for z, count in zip(elements, counts, strict=True))
    return "".join(f"{symbol}{count if count > 1 else ''}" for symbol, count in parts)


_CHUNK = 16_384
_ALPHABETICAL = np.argsort(SYMBOLS)
_RANK = np.argsort(_ALPHABETICAL)
"""Rank of each atomic number among the symbols in alphabetical order."""
_SYMBOLS = np.array(SYMBOLS)[_ALPHABETICAL].tolist()


def formulas_of(crystals: Crystals, rows: NDArray[np.int64] | None = None) -> list[str]:
    """Return the reduced formulas of some crystals, by default all, with elements in alphabetical order."""
    texts: list[str] = []
    for first, elements, counts in _compositions(crystals, rows):
        there = first[:-1] < first[1:]
        divisors = np.zeros(len(first) - 1, np.int64)
        if len(counts):
            divisors[there] = np.gcd.reduceat(counts, first[:-1][there])
        counts = counts // np.repeat(divisors, np.diff(first))
        written = ["", "", *map(str, range(2, int(counts.max(initial=1)) + 1))]
        pieces = np.stack([elements, len(SYMBOLS) + counts], axis=1).reshape(-1)
        texts += _joined(pa.array(_SYMBOLS + written), pieces, 2 * first, "")
    return texts


def chemical_systems_of(crystals: Crystals) -> list[str]:
    """Return the elements of each crystal in alphabetical order, as ``Cl-Na``."""
    symbols = pa.array(_SYMBOLS)
    return [
        text for first, elements, _ in _compositions(crystals, None) for text in _joined(symbols, elements, first, "-")
    ]


def _compositions(
    crystals: Crystals, rows: NDArray[np.int64] | None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Yield, for a chunk of crystals at a time: [B + 1] first element of each, [P] elements, [P] atoms of each.

    Elements are given by alphabetical rank.
    """
    rows = np.arange(len(crystals)) if rows is None else rows
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        begin = np.asarray(crystals.ptr[part])
        sizes = np.asarray(crystals.ptr[part + 1]) - begin
        atoms = np.arange(sizes.sum()) + np.repeat(begin - np.cumsum(sizes) + sizes, sizes)
        owner = np.repeat(np.arange(len(part)) * len(SYMBOLS), sizes)
        table = np.bincount(owner + _RANK[crystals.numbers[atoms]], minlength=len(part) * len(SYMBOLS))
        there = np.flatnonzero(table)
        crystal, element = np.divmod(there, len(SYMBOLS))
        yield np.searchsorted(crystal, np.arange(len(part) + 1)), element, table[there]


def _joined(texts: pa.Array, pieces: NDArray[np.int64], first: NDArray[np.int64], separator: str) -> list[str]:
    lists = pa.ListArray.from_arrays(first.astype(np.int32), texts.take(pa.array(pieces)))
    return pc.binary_join(lists, separator).to_pylist()


def formula_groups(crystals: Crystals, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return [n] a number for the reduced formula of each row, from 0 in alphabetical order."""
    return np.unique(formulas_of(crystals, rows), return_inverse=True)[1]


def element_pairs(crystals: Crystals) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return [P] each pair of a crystal and an element in it, once: row and atomic number."""
    pairs = np.unique(crystals.crystal * len(SYMBOLS) + crystals.numbers.astype(np.int64))
    return np.divmod(pairs, len(SYMBOLS))


def per_text(texts: Sequence[str], function: Callable[[list[str]], NDArray]) -> NDArray:
    """Apply a function once to each distinct text; return its value for every text."""
    encoded = pa.array(texts, pa.string()).dictionary_encode()
    return function(encoded.dictionary.to_pylist())[encoded.indices.to_numpy()]


def digests(texts: Sequence[str]) -> bytes:
    """Return the concatenated first 8 bytes of the sha256 of each text."""
    return b"".join([hashlib.sha256(text.encode()).digest()[:8] for text in texts])


def hashes(texts: Sequence[str]) -> NDArray[np.int64]:
    """Return the first 8 bytes of the sha256 of each text, as little-endian integers."""
    return per_text(texts, lambda different: np.frombuffer(digests(different), "<i8").astype(np.int64))
