"""Read crystals from records: mappings from JSON, CSV, data frames and data sets, one per crystal.

=========  =================================================================================================
pymatgen   ``Structure.as_dict()``: ``lattice.matrix`` and ``sites`` with ``species`` and ``abc``
JARVIS     ``lattice_mat``, ``coords``, ``elements`` and ``cartesian``, as in ``atoms`` of jarvis-tools' files
OPTIMADE   ``lattice_vectors``, ``cartesian_site_positions``, ``species_at_sites``; also LeMat-Bulk's columns
schema     ``lattice``, ``atomic_numbers``, ``frac_coords`` of this package's Parquet files
objects    pymatgen's ``Structure`` and ASE's ``Atoms``
text       a CIF, or one of the above as JSON
=========  =================================================================================================

A record is one of these, or contains one under a key such as ``structure``, ``atoms`` or ``cif``; its other numbers and
texts are properties. Nothing named in a record is imported or called.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crysldnet.data.elements import SYMBOLS
from crysldnet.errors import DataError
from crysldnet.readers.rows import Piece, Rows
from crysldnet.readers.sources import Settings, refuse_noted
from crysldnet.readers.species import element_symbols
from crysldnet.readers.structure_files import Structure, checked, parse_structure

ID_KEYS = ("material_id", "id", "jid", "immutable_id", "mp_id", "mpid", "task_id", "__index_level_0__")
"""Keys of a record's id in order of preference; the last is how pandas writes an index."""
PREFERRED = ("structure", "atoms", "cif", "final_structure", "optimized_structure", "relaxed_structure")
"""Preferred keys of a record's crystal, in order."""
JARVIS_UNITS = {
    "formation_energy_peratom": "eV/atom",
    "optb88vdw_total_energy": "eV/atom",
    "optb88vdw_bandgap": "eV",
    "mbj_bandgap": "eV",
    "hse_gap": "eV",
    "ehull": "eV/atom",
    "bulk_modulus_kv": "GPa",
    "shear_modulus_gv": "GPa",
    "magmom_oszicar": "muB",
    "magmom_outcar": "muB",
    "exfoliation_energy": "meV/atom",
}
"""Documented units of JARVIS-DFT columns."""

_NUMBER = {symbol: number for number, symbol in enumerate(SYMBOLS)}
_SYMBOLS = {*SYMBOLS[1:], "D", "T"}
_WHOLE = "has partial occupancy: a crystal needs whole atoms, make an ordered approximation"
_OF_STRUCTURE = {
    "pymatgen": ("@module", "@class", "@version", "charge", "lattice", "sites", "properties"),
    "JARVIS": ("lattice_mat", "coords", "elements", "cartesian", "props", "abc", "angles"),
    "OPTIMADE": ("lattice_vectors", "cartesian_site_positions", "species", "species_at_sites", "dimension_types"),
    "schema": ("lattice", "atomic_numbers", "frac_coords"),
}
_KEYS = {
    "pymatgen": ("lattice", "sites"),
    "JARVIS": ("lattice_mat", "coords", "elements"),
    "OPTIMADE": ("lattice_vectors", "cartesian_site_positions", "species_at_sites"),
    "schema": ("lattice", "atomic_numbers", "frac_coords"),
}


class Entry(NamedTuple):
    """A record, its location, and a default id.

    The record is a mapping, an object, JSON text, or a DataError with the reason why there is none.
    """

    place: str
    default_id: str
    record: Any


def read_entries(entries: Iterable[Entry], settings: Settings, units: Mapping[str, str]) -> Piece:
    """Read a chunk of a file of records."""
    rows = Rows()
    rows.units.update(units)
    for place, default_id, record in entries:
        material_id = default_id
        notes: list[str] = []
        try:
            if isinstance(record, DataError):
                raise record
            if isinstance(record, (str, bytes)):
                record = _loaded(record)
            if _is_about(record):
                continue
            record = _flat(record)
            material_id = _id_of(record, settings.id_column, default_id)
            structure, properties, found_units = _read(record, settings, notes)
            refuse_noted(notes, settings)
        except DataError as error:
            rows.reject(place, material_id, str(error))
            continue
        rows.units |= found_units
        rows.add(place, material_id, structure, properties)
        for note in notes:
            rows.note(f"crystals {note}", place, material_id)
    return rows.piece(settings.max_atoms)


def is_record(value: Any) -> bool:
    """Return whether a value is a record of a crystal, from its keys."""
    return isinstance(value, Mapping) and bool(structures_in(_flat(value)))


def _loaded(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error})") from error


def _is_about(record: Any) -> bool:
    """Return whether a record of an OPTIMADE file describes the file instead of a crystal."""
    return isinstance(record, Mapping) and (
        "x-optimade" in record or record.get("type") in ("info", "references", "links")
    )


def _flat(record: Any) -> Mapping[str, Any]:
    if is_object(record):
        return {"structure": record}
    if not isinstance(record, Mapping):
        raise DataError(f"not a record of a crystal but {type(record).__name__}")
    attributes = record.get("attributes")
    if isinstance(attributes, Mapping):  # a resource of an OPTIMADE response
        return {"id": record.get("id"), **{key: value for key, value in attributes.items() if key != "id"}}
    return record


def _id_of(record: Mapping[str, Any], id_column: str | None, default_id: str) -> str:
    key = next((key for key in (id_column, *ID_KEYS) if key is not None and key in record), None)
    value = record[key] if key is not None else default_id
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:  # a numeric column with missing values
        value = int(value)
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DataError(f"its id ({key}) is no text but {value!r:.50}")
    return str(value).strip()


def _read(
    record: Mapping[str, Any], settings: Settings, notes: list[str]
) -> tuple[Structure, dict[str, Any], dict[str, str]]:
    """Return a record's structure, its properties, and the units defined by its layout."""
    key = settings.structure or _chosen(structures_in(record), notes)
    value = _value_at(record, key)
    if isinstance(value, str) and value.lstrip()[:1] == "{":
        value = _loaded(value)
    structure = _structure(value, settings.max_atoms, notes)
    layout = _layout(value)
    used = {key, settings.id_column, *ID_KEYS, ""} | (set(_OF_STRUCTURE[layout]) if key == "" and layout else set())
    properties = {name: value for name, value in record.items() if isinstance(name, str) and name not in used}
    units = {name: unit for name, unit in JARVIS_UNITS.items() if name in properties} if layout == "JARVIS" else {}
    return structure, properties, units


def structures_in(record: Mapping[str, Any]) -> list[str]:
    """Return the keys of a record's structures: "" if it is itself a structure, ``a.b`` for nested ones.

    Nested ones are only searched if there is no other.
    """
    if _layout(record):
        return [""]
    keys = [key for key, value in record.items() if _is_structure(value, key in PREFERRED)]
    inner = ((key, value.items()) for key, value in record.items() if isinstance(value, Mapping))
    return keys or [f"{key}.{name}" for key, items in inner for name, value in items if _is_structure(value, False)]


def _chosen(keys: list[str], notes: list[str]) -> str:
    if not keys:
        raise DataError("it has no structure in a layout that is known")
    if len(keys) == 1:
        return keys[0]
    key = next((key for key in PREFERRED if key in keys), None)
    if key is None:
        named = f"such as --structure {keys[-1]} (structure= in Python)"
        raise DataError(f"it has several structures ({', '.join(keys)}); choose one when you import, {named}")
    notes.append(f"have several structures, {', '.join(keys)}, of which {key!r} was read (--structure chooses another)")
    return key


def _value_at(record: Mapping[str, Any], key: str) -> Any:
    outer, _, inner = key.partition(".")
    if key == "":
        return record
    if key in record:
        return record[key]
    if isinstance(record.get(outer), Mapping) and inner in record[outer]:
        return record[outer][inner]
    raise DataError(f"it has no structure {key!r}; there is {', '.join(structures_in(record)) or 'none'}")


def _layout(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return None
    return next((name for name, keys in _KEYS.items() if all(key in value for key in keys)), None)


def _is_structure(value: Any, expected: bool) -> bool:
    """Return whether a value is a structure; JSON text counts if it has a lattice or if a structure is expected."""
    if isinstance(value, str):
        start = value.lstrip()
        json_ = start.startswith("{") and (expected or '"lattice' in value)
        return json_ or "_cell_length_a" in value or start[:5].lower() == "data_"
    return _layout(value) is not None or is_object(value)


def is_object(value: Any) -> bool:
    """Return whether a value is a pymatgen ``Structure`` or ASE ``Atoms``, without importing either."""
    return (hasattr(value, "lattice") and hasattr(value, "sites")) or hasattr(value, "get_scaled_positions")


def is_data_frame(value: Any) -> bool:
    """Return whether a value is a pandas ``DataFrame``, without importing it; a ``Series`` is a list of values."""
    return hasattr(value, "iloc") and hasattr(value, "columns")


def _structure(value: Any, max_atoms: int, notes: list[str]) -> Structure:
    if isinstance(value, str):
        return parse_structure(value, "x.cif", max_atoms=max_atoms, notes=notes)
    readers = {"pymatgen": _pymatgen, "JARVIS": _jarvis, "OPTIMADE": _optimade, "schema": _schema}
    try:
        if hasattr(value, "get_scaled_positions"):
            return _atoms(value)
        if is_object(value):
            value = value.as_dict()
        return readers[_layout(value) or "pymatgen"](value, notes)
    except DataError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, np.linalg.LinAlgError) as error:
        what = f"it has no {error.args[0]}" if isinstance(error, KeyError) else " ".join(str(error).split())[:150]
        raise DataError(f"its structure can't be read ({what})") from error


def _floats(value: Any, width: int) -> NDArray[np.float64]:
    """Return [n, width] numbers from nested lists or arrays."""
    rows = [[_float(x) for x in row] for row in value]
    if any(len(row) != width for row in rows):
        raise DataError(f"a vector of it doesn't have {width} numbers")
    return np.array(rows, np.float64).reshape(-1, width)


def _float(value: Any) -> float:
    if isinstance(value, (bool, str)) or value is None:
        raise DataError(f"{value!r} stands where a number should")
    return float(value)


def _atomic_numbers(symbols: Iterable[Any], notes: list[str]) -> list[int]:
    texts = list(symbols)
    wrong = [text for text in texts if not isinstance(text, str) or text not in _SYMBOLS]
    if wrong:
        raise DataError(f"{wrong[0]!r} is not a chemical element (1 to 118)")
    return [_NUMBER[symbol] for symbol in element_symbols(texts, notes=notes)]


def whole_numbers(values: Iterable[Any]) -> list[int]:
    """Return atomic numbers.

    Raises:
        DataError: one isn't an integer from 1 to 118; booleans are invalid.
    """
    for value in values:
        whole = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        if not (whole and value == value // 1 and 1 <= value <= 118):
            raise DataError(f"the atomic number {value!r} is not a whole number between 1 and 118")
    return [int(value) for value in values]


def _fractional(positions: NDArray[np.float64], lattice: NDArray[np.float64]) -> NDArray[np.float64]:
    checked(lattice, [1], [[0, 0, 0]])
    return np.asarray(np.linalg.solve(lattice.T, positions.T).T, np.float64)


def _pymatgen(value: Mapping[str, Any], notes: list[str]) -> Structure:
    pbc = value["lattice"].get("pbc", (True, True, True))
    if not all(pbc):
        raise DataError("it isn't periodic in three directions")
    lattice = _floats(value["lattice"]["matrix"], 3)
    symbols, places = [], []
    for i, site in enumerate(value["sites"], 1):
        species = site["species"]
        if len(species) != 1 or abs(_float(species[0]["occu"]) - 1) > 1e-3:
            raise DataError(f"site {i} {_WHOLE}")
        symbols.append(species[0]["element"])
        places.append(site["abc"])
    return checked(lattice, _atomic_numbers(symbols, notes), _floats(places, 3))


def _jarvis(value: Mapping[str, Any], notes: list[str]) -> Structure:
    lattice, places = _floats(value["lattice_mat"], 3), _floats(value["coords"], 3)
    if not isinstance(value.get("cartesian"), (bool, np.bool_)):
        raise DataError("it doesn't say whether its coordinates are cartesian")
    frac_coords = _fractional(places, lattice) if value["cartesian"] else places
    return checked(lattice, _atomic_numbers(value["elements"], notes), frac_coords)


def _optimade(value: Mapping[str, Any], notes: list[str]) -> Structure:
    directions = value.get("nperiodic_dimensions")
    if directions is None and value.get("dimension_types") is not None:
        directions = sum(value["dimension_types"])
    if directions not in (3, None):
        raise DataError(f"it is periodic in {directions} directions, not in 3")
    species = _loaded(text) if isinstance(text := value.get("species"), str) else text
    symbols: dict[str, str] = {}
    for kind in [] if species is None else species:
        concentration = kind.get("concentration")
        whole = concentration is None or (len(concentration) == 1 and abs(_float(concentration[0]) - 1) < 1e-3)
        if len(kind["chemical_symbols"]) != 1 or not whole:
            raise DataError(f"species {kind['name']} {_WHOLE}")
        if kind.get("attached") or kind["chemical_symbols"][0] == "vacancy":
            raise DataError(f"species {kind['name']} isn't one atom")
        symbols[kind["name"]] = kind["chemical_symbols"][0]
    lattice = _floats(value["lattice_vectors"], 3)
    names = value["species_at_sites"]
    numbers = _atomic_numbers(names if species is None else [symbols.get(name) for name in names], notes)
    return checked(lattice, numbers, _fractional(_floats(value["cartesian_site_positions"], 3), lattice))


def _schema(value: Mapping[str, Any], _notes: list[str]) -> Structure:
    lattice = np.array([_float(x) for x in np.ravel(value["lattice"])])
    if len(lattice) != 9:
        raise DataError("lattice must have 9 numbers")
    numbers = whole_numbers(value["atomic_numbers"])
    frac_coords = np.array([_float(x) for x in np.ravel(value["frac_coords"])])
    if len(frac_coords) != 3 * len(numbers):
        raise DataError("frac_coords must have 3 numbers for each of atomic_numbers")
    return checked(lattice, numbers, frac_coords)


def _atoms(atoms: Any) -> Structure:
    if not all(atoms.pbc):
        raise DataError("it isn't periodic in three directions")
    occupancies = atoms.info.get("occupancy")
    if isinstance(occupancies, Mapping) and any(set(site.values()) != {1.0} for site in occupancies.values()):
        raise DataError(_WHOLE)
    lattice, numbers = np.array(atoms.cell), atoms.numbers
    if ((numbers < 1) | (numbers > 118)).any():
        raise DataError("an atomic number is not between 1 and 118")
    return checked(lattice, numbers, _fractional(np.array(atoms.positions), lattice))
