"""Units in headers and cells: recognize units and compare them.

``eV/atom``, ``eV / at`` and ``eV atom^-1`` are the same unit. Text with an unknown symbol is no unit, so ``(PBE)`` in a
header ``band_gap (PBE)`` isn't a unit.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache

_PREFIXES = "TGMkhdcmμnpf"
_SCALED = set("eV J cal K Pa bar m s g N C V A W T Gs Hz Oe S Wb mol Ry Ha D emu Ω μB".split())
_PLAIN = set(
    "% ppm ppb ° degC degF rad atm Torr u Da Å bohr debye atom fu cell electron state HV au arb days yr".split()
)
_PLAIN |= {"dimensionless", "at%", "wt%", "mol%", "vol%", "site"}
_ALSO = {
    **dict.fromkeys("Ang ang Angstrom angstrom Angstroms angstroms Ångström".split(), "Å"),
    **dict.fromkeys("at atoms Atom".split(), "atom"),
    **dict.fromkeys("e e- |e| electrons".split(), "electron"),
    **dict.fromkeys("Ohm ohm".split(), "Ω"),
    **dict.fromkeys("muB mu_B uB Bohr_magneton".split(), "μB"),
    **dict.fromkeys("deg degree degrees".split(), "°"),
    **dict.fromkeys("°C Celsius celsius".split(), "degC"),
    **dict.fromkeys("Hartree hartree Eh".split(), "Ha"),
    **dict.fromkeys("Rydberg rydberg".split(), "Ry"),
    **{"ev": "eV", "gpa": "GPa", "Kelvin": "K", "kelvin": "K", "Bohr": "bohr", "Debye": "debye", "amu": "u"},
    **{"percent": "%", "year": "yr", "years": "yr", "states": "state", "cells": "cell", "sites": "site"},
    **{"unitless": "dimensionless", "uc": "cell", "uA": "μA"},
}
_WORDS = (
    (r"\bper\b", "/"),
    (r"f\.\s?u\.?|formula[ _]units?", "fu"),
    (r"u\.\s?c\.|unit[ _]cells?", "cell"),
    (r"a\.\s?u\.?", "au"),
    (r"arb\.\s?(u\.|units?)", "arb"),
    (r"(at|wt|mol|vol)\.?\s?%", r"\1%"),
    (r"\bcc\b", "cm3"),
    (r"W/\(?m[ -]?K\)?$", "W/m/K"),
    (r"/Vs$", "/V/s"),
)


@lru_cache(1024)
def factors_of(text: str) -> tuple[tuple[str, int], ...] | None:
    """Return the symbols of a unit with their powers in canonical order and spelling; None if the text isn't a unit."""
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("µ", "μ").strip()
    if logarithm := re.fullmatch(r"(log10|log|ln)[\s(]+(.+?)\)?", text):
        inner = factors_of(logarithm[2])
        return None if inner is None else ((logarithm[1], 1), *inner)
    for pattern, word in _WORDS:
        text = re.sub(pattern, word, text)
    powers: Counter[str] = Counter()
    for place, part in enumerate(text.split("/")):
        for factor in filter(None, re.split(r"[\s*·⋅×.()]+", part.replace("**", "^"))):
            match = re.fullmatch(r"(.+?)\^?([+-]?\d+)?", factor)
            if factor == "1" or match is None:
                continue
            symbol = _symbol(match[1])
            if symbol is None:
                return None
            powers[symbol] += int(match[2] or 1) * (-1 if place else 1)
    return tuple(sorted(powers.items())) or None


def _symbol(name: str) -> str | None:
    name = _ALSO.get(name, name)
    prefix, rest = name[:1].replace("u", "μ"), _ALSO.get(name[1:], name[1:])
    if name in _SCALED or name in _PLAIN or name.isdigit():
        return name
    return prefix + rest if prefix in _PREFIXES and rest in _SCALED else None


def is_unit(text: str) -> bool:
    """Return whether a text is a unit."""
    factors = factors_of(text)
    return factors is not None and not all(symbol.isdigit() for symbol, _ in factors)


def same_unit(one: str | None, other: str | None) -> bool:
    """Return whether two units are the same in any spelling; no unit only equals no unit."""
    if one is None or other is None:
        return one is other
    return one == other or (is_unit(one) and factors_of(one) == factors_of(other))


def name_and_unit(title: str) -> tuple[str, str | None]:
    """Split ``band_gap (eV)`` or ``band_gap [eV]``; parentheses without a unit are part of the name."""
    match = re.fullmatch(r"(.*\S)\s*[(\[]((?:[^()\[\]]|\([^()]*\))+)[)\]]", title)
    return (match[1], match[2].strip()) if match and is_unit(match[2]) else (title, None)
