"""A user's module, which tests copy into a working folder: it adds one part of each kind, and records each use.

A line ``kind process`` is added to the file named in ``MY_PARTS_USED``. With ``MY_PARTS_STOP`` in the environment, the
encoder asks its process to stop after the second batch that it was trained on.
"""

import json
import os
import signal
from functools import cache, partial

import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from crysldnet.build import Part
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.encoders.protocol import Encoder
from crysldnet.graphs.corruption import Corruption
from crysldnet.graphs.spec import GraphSpec
from crysldnet.measures import Measure
from crysldnet.models.objectives import Objective, Reconstruction, masked_species
from crysldnet.models.targets import Classes, Number
from crysldnet.readers.rows import Rows
from crysldnet.readers.sources import register
from crysldnet.readers.structure_files import checked


def used(kind):
    if "MY_PARTS_USED" in os.environ:
        _record(os.environ["MY_PARTS_USED"], kind, os.getpid())


@cache
def _record(file, kind, process):
    with open(file, "a") as log:
        log.write(f"{kind} {process}\n")


class Species(Encoder):
    """Each atom's species alone."""

    exportable = True
    trained = 0

    def __init__(self, *, width: int = 16, k: int = 4):
        super().__init__()
        self.width, self.graph = width, GraphSpec(k=k)
        self.species = nn.Embedding(119, width)

    def forward(self, batch):
        used("encoder")
        self.trained += self.training
        if self.trained == 2 and "MY_PARTS_STOP" in os.environ:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.species(batch.numbers)


class Hidden(Objective):
    """Hidden species alone."""

    measures = (Measure("certainty", "certainty of a species", "%", better="higher", shown=True),)

    def __init__(self, *, latent_dim: Part[int], corruption: Corruption):
        super().__init__()
        self.corruption, self.species = corruption, nn.Linear(latent_dim, 119)

    def forward(self, z, batch):
        used("objective")
        logits = self.species(z)
        loss, measures = masked_species(logits, batch.undo)
        certain = 100 * logits.detach().softmax(-1).amax(-1)
        measures["certainty"] = (certain.sum(), torch.tensor(float(len(certain))))
        return Reconstruction({"species": loss}, measures)


class Few(CrystalDataModule):
    """Crystals of up to twelve atoms."""

    def setup(self, stage=None):
        used("data set")
        self.max_crystal_atoms = 12
        super().setup(stage)


class SquareRoot(Number):
    """A number from 0 on, trained on its square root, and compared by the squared error."""

    name = "square_root"
    grows = False
    bounds = (0.0, float("inf"))
    measure = Measure("mean_squared_error", "squared error", "eV²", baseline="mean of others")

    def coordinate(self, values):
        return values.clamp_min(0.0).sqrt()

    def from_line(self, line):
        used("target type")
        return line.clamp_min(0.0).square()

    def slope(self, values):
        return 2.0 * values.sqrt()

    def errors(self, predicted, true):
        return (predicted - true) ** 2


class Careful(Classes):
    """Classes, none of which has a probability of 1."""

    name = "careful"

    def from_table(self, outputs, spread):
        used("class type")
        return super().from_table(0.9 * outputs + 0.05, spread)


class MySingle(SingleDeviceStrategy):
    """That of Lightning, which notes its use."""

    def setup(self, trainer):
        used("strategy")
        super().setup(trainer)


class MyDDP(DDPStrategy):
    """That of Lightning, which notes its use."""

    def setup(self, trainer):
        used("strategy")
        super().setup(trainer)


def my_single() -> SingleDeviceStrategy:
    return MySingle("cpu")


def my_ddp(*, bucket_cap_mb: int = 25) -> DDPStrategy:
    return MyDDP(bucket_cap_mb=bucket_cap_mb)


class CellsReader:
    """Files of a crystal a line: id, lattice, atomic numbers, coordinates and band gap, as JSON."""

    def __init__(self, path):
        self.path, self.name, self.metadata, self.total = path, path.name, {}, None

    def tasks(self, settings):
        yield partial(read_cells, str(self.path), settings)


def read_cells(path, settings):
    used("file format")
    rows = Rows()
    with open(path) as lines:
        for number, line in enumerate(lines, 1):
            name, lattice, numbers, places, gap = json.loads(line)
            structure = checked(np.array(lattice), np.array(numbers), np.array(places))
            rows.add(f"{path}:{number}", name, structure, {"band_gap": gap})
    return rows.piece(settings.max_atoms)


register(".cells", CellsReader)
