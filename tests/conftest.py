"""Crystals that several tests use."""

import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from filelock import FileLock
from numpy.typing import NDArray

from crysldnet.data.datasets import CACHE_VARIABLE, open_store
from crysldnet.data.store import CrystalStore
from crysldnet.graphs.crystals import Crystals
from crysldnet.signals import RUN_NAME
from crysldnet.training import plots

DRAW = {name: getattr(plots, name) for name in ("learning_curves", "parity", "reliability")}


def pytest_configure() -> None:
    """Compute on one thread: tensors are small here, and threads that wait for a core are slower than none.

    Nothing is left in the user's cache. PyTorch uses AVX2 on processors with AVX-512 too, whose rounding differs from
    that of the machine where the files in ``fixtures`` were made.
    """
    os.environ[CACHE_VARIABLE] = "none"
    processor = Path("/proc/cpuinfo")
    if processor.exists() and "avx512" in processor.read_text():
        os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
    torch.set_num_threads(1)


def draw_nothing() -> None:
    """Leave out the drawings that a run ends with, which take longer than a tiny run."""
    for name in DRAW:
        setattr(plots, name, lambda *_, **__: None)


@pytest.fixture(scope="session", autouse=True)
def _no_drawings() -> None:
    draw_nothing()


@pytest.fixture(autouse=True)
def _no_run_name() -> Iterator[None]:
    """Leave no name of a run behind, which a run without one would take over in the next test."""
    os.environ.pop(RUN_NAME, None)
    yield
    os.environ.pop(RUN_NAME, None)


@contextmanager
def drawing() -> Iterator[None]:
    """Have them drawn."""
    with pytest.MonkeyPatch.context() as patch:
        for name, draw in DRAW.items():
            patch.setattr(plots, name, draw)
        yield


class Cell(NamedTuple):
    """One crystal, coordinates in float64."""

    lattice: NDArray[np.float64]
    numbers: NDArray[np.int64]
    frac_coords: NDArray[np.float64]

    @property
    def positions(self) -> NDArray[np.float64]:
        return self.frac_coords @ self.lattice


def cell(lattice: object, numbers: object, frac_coords: object) -> Cell:
    return Cell(np.array(lattice, float), np.array(numbers), np.array(frac_coords, float).reshape(-1, 3))


def put_together(cells: Iterable[Cell]) -> Crystals:
    """Put cells side by side without rounding their coordinates to float32."""
    cells = list(cells)
    return Crystals(
        np.stack([c.lattice for c in cells]),
        np.concatenate([[0], np.cumsum([len(c.numbers) for c in cells])]),
        np.concatenate([c.numbers for c in cells]).astype(np.uint8),
        np.concatenate([c.frac_coords for c in cells]),
    )


def cells_of(store: CrystalStore, rows: Iterable[int]) -> list[Cell]:
    crystals = store.crystals
    found = []
    for row in rows:
        atoms = slice(crystals.ptr[row], crystals.ptr[row + 1])
        found.append(cell(crystals.lattice[row], crystals.numbers[atoms], crystals.frac_coords[atoms]))
    return found


def supercell(c: Cell, repeats: tuple[int, int, int]) -> Cell:
    """Repeat a cell; copy m of atom i is atom m · n + i."""
    shifts = np.stack(np.meshgrid(*map(np.arange, repeats), indexing="ij"), axis=-1).reshape(-1, 3)
    frac = (shifts[:, None, :] + c.frac_coords[None]).reshape(-1, 3) / repeats
    return Cell(c.lattice * np.array(repeats)[:, None], np.tile(c.numbers, len(shifts)), frac)


def random_triclinic(rng: np.random.Generator, n_atoms: int) -> Cell:
    """A cell with angles of 50° to 120°, lengths that differ by up to a factor of two and about 15 Å³ an atom."""
    while True:
        angles = np.radians(rng.uniform(50, 120, 3))
        cosines = np.cos(angles)
        gram = np.eye(3)
        gram[1, 2] = gram[2, 1] = cosines[0]
        gram[0, 2] = gram[2, 0] = cosines[1]
        gram[0, 1] = gram[1, 0] = cosines[2]
        if np.linalg.det(gram) > 0.1:
            break
    lattice = np.linalg.cholesky(gram) * rng.uniform(1, 2, 3)[:, None]
    lattice *= np.cbrt(15 * n_atoms / np.linalg.det(lattice))
    return cell(lattice, rng.integers(1, 90, n_atoms), rng.random((n_atoms, 3)))


def _face_centred(a: float) -> NDArray[np.float64]:
    return a / 2 * np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]])


FACES = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
ROCKSALT = cell(_face_centred(5.64), [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]])
ROCKSALT_CUBE = cell(np.eye(3) * 5.64, [11] * 4 + [17] * 4, [*FACES, *(np.array(FACES) + 0.5)])
COPPER = cell(_face_centred(3.61), [29], [[0, 0, 0]])
COPPER_CUBE = cell(np.eye(3) * 3.61, [29] * 4, FACES)
PEROVSKITE = cell(np.eye(3) * 3.905, [38, 22, 8, 8, 8], [[0, 0, 0], [0.5, 0.5, 0.5], *FACES[1:]])
TRICLINIC = cell(
    [[3, 0, 0], [1.2, 3.4, 0], [-0.7, 0.9, 4.1]],
    [14, 8],
    [[0, 0, 0], [0.37, 0.52, 0.41]],
)


@pytest.fixture(scope="session")
def starter() -> CrystalStore:
    return open_store("embedded:mp_starter")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with crystals, a tiny pretraining and a tiny finetuning run of them, for all processes; only to read."""
    from crysldnet import finetune, pretrain
    from tiny import finetune_config, pretrain_config, subset

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            folder.mkdir()
            data = subset(folder / "data.parquet", train=40, val=12, test=12)
            given = [f"runs={folder}", "name=tiny", f"data.path={data}"]
            assert pretrain.run(*pretrain_config(*given, "stage=vae", "stages.vae.epochs=1")) == 0
            os.environ.pop(RUN_NAME, None)
            assert finetune.run(*finetune_config(*given, "epochs=1")) == 0
            os.environ.pop(RUN_NAME, None)
            (folder / "complete").touch()
    return folder


@pytest.fixture(scope="session")
def pretrained(shared: Path) -> Path:
    """The encoder of the tiny pretraining run."""
    return shared / "pretrain/tiny/encoder.safetensors"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A file system of 8 MiB, and a function that fills it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.decode().strip()}")

    def fill() -> None:
        with (folder / "filler").open("wb") as file:
            while os.statvfs(folder).f_bavail:
                file.write(bytes(os.statvfs(folder).f_frsize))
                file.flush()

    yield folder, fill
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
