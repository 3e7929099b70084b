"""Tasks for comparing encoders: crystals with values, and which are labeled in each draw.

Every task is drawn from crystals whose formulas no encoder has seen. All crystals of a formula are labelled together or
tested together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crysldnet.data.elements import reduced_formula
from crysldnet.data.store import CrystalStore

TESTED = 2000
"""Maximum number of test crystals per draw."""
VACUUM_AXIS = 2
"""The crystals of matbench_jdft2d are single layers across c."""


@dataclass(frozen=True)
class Task:
    """A property of some crystals.

    Attributes:
        name: of the task.
        files: that hold the crystals.
        column: of the values.
        unit: of what is predicted.
        log: predict the logarithm to base 10 of the value.
        per_area: divide by the area of the layer per atom first.
        plausible: values of a larger size are errors of the source.
    """

    name: str
    files: tuple[str, ...]
    column: str
    unit: str
    log: bool = False
    per_area: bool = False
    plausible: float = np.inf


TASKS = (
    Task("formation energy", ("mp_cgcnn_test",), "formation_energy_per_atom", "eV/atom", plausible=5.0),
    Task("band gap", ("mp_cgcnn_test",), "band_gap", "eV"),
    Task("bulk modulus", ("mp_elasticity_train", "mp_elasticity_val", "mp_elasticity_test"), "bulk_modulus_vrh",
         "log10 GPa", log=True),
    Task("shear modulus", ("mp_elasticity_train", "mp_elasticity_val", "mp_elasticity_test"), "shear_modulus_vrh",
         "log10 GPa", log=True),
    Task("phonon peak", ("matbench_phonons",), "last_phdos_peak", "1/cm"),
    Task("exfoliation energy", ("matbench_jdft2d",), "exfoliation_energy", "log10 meV/Å²", log=True, per_area=True),
    Task("measured enthalpy", ("expt_formation_kingsbury",), "expt_formation_enthalpy_per_atom", "eV/atom"),
)  # fmt: skip


def open_files(folder: Path, names: tuple[str, ...], columns: list[str]) -> CrystalStore:
    """Open some files of the folder as one store with these property columns."""
    wanted = ["material_id", "lattice", "atomic_numbers", "frac_coords", *columns]
    tables = [pq.read_table(folder / f"{name}.parquet").select(wanted) for name in names]
    schema = pa.schema([field.remove_metadata() for field in tables[0].schema])
    return CrystalStore.from_table(pa.concat_tables([t.cast(schema) for t in tables]), " + ".join(names))


def formulas_of_store(store: CrystalStore) -> NDArray[np.str_]:
    """Return each crystal's reduced formula."""
    crystals = store.crystals
    return np.array([reduced_formula(n) for n in np.split(crystals.numbers, crystals.ptr[1:-1])])


@dataclass(frozen=True)
class Labelled:
    """The crystals of a task.

    Attributes:
        task: the task.
        store: of its files.
        rows: [n] the crystals that can be used.
        values: [n] what is predicted.
        groups: [n] reduced formulas.
    """

    task: Task
    store: CrystalStore
    rows: NDArray[np.int64]
    values: NDArray[np.float64]
    groups: NDArray[np.str_]

    def draw(self, labels: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Return which of the n crystals are labeled and which are tested, None if there are too few.

        Formulas are drawn in a random order until there are enough labels; the others are for the test.
        """
        rng = np.random.default_rng([seed, 1])
        names, group = np.unique(self.groups, return_inverse=True)
        order = rng.permutation(len(names))
        rank = np.empty(len(names), np.int64)
        rank[order] = np.arange(len(names))
        sorted_rows = np.argsort(rank[group], kind="stable")
        if len(self.rows) < labels + 100:
            return None
        train = sorted_rows[:labels]
        rest = np.setdiff1d(sorted_rows[labels:], np.flatnonzero(np.isin(group, group[train])))
        return np.sort(train), np.sort(rng.permutation(rest)[:TESTED])

    def write(self, labels: int, seed: int, folder: Path) -> bool:
        """Write a draw as train, val and test.parquet with the column ``y``; False if there are too few crystals.

        A sixth of the labels validate.
        """
        drawn = self.draw(labels, seed)
        if drawn is None or folder.exists():
            return drawn is not None
        train, test = drawn
        chosen = np.random.default_rng(seed).permutation(train)
        held = max(labels // 6, 10)
        values = np.full(len(self.store), np.nan)
        values[self.rows] = self.values
        table = self.store.to_table().select(["material_id", "lattice", "atomic_numbers", "frac_coords"])
        table = table.append_column("y", pa.array(values))
        partial = folder.with_name(f".{folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        for name, rows in (("train", chosen[held:]), ("val", chosen[:held]), ("test", test)):
            pq.write_table(table.take(pa.array(np.sort(self.rows[rows]))), partial / f"{name}.parquet")
        partial.rename(folder)
        return True


def finetuning(folder: Path, seed: int) -> list[str]:
    """Return the ``crysldnet finetune`` arguments for a draw written by :meth:`Labelled.write`."""
    files = ", ".join(f"{name}: {folder / name}.parquet" for name in ("train", "val", "test"))
    return ["data=custom", "data.targets=[y]", f"data.path={{{files}}}", f"seed={seed}"]


def load(task: Task, folder: Path, max_atoms: int) -> Labelled:
    """Read the crystals of a task."""
    store = open_files(folder, task.files, [task.column])
    values = store.numbers_of(task.column).astype(np.float64)
    if task.per_area:
        lattice = store.crystals.lattice
        area = np.linalg.norm(np.cross(lattice[:, 0], lattice[:, 1]), axis=1)
        values = values * store.crystals.sizes / area
    good = np.isfinite(values) & (store.crystals.sizes <= max_atoms) & (np.abs(values) <= task.plausible)
    if task.log:
        good &= values > 0
        values = np.log10(np.where(values > 0, values, 1.0))
    rows = np.flatnonzero(good)
    return Labelled(task, store, rows, values[rows], formulas_of_store(store)[rows])
