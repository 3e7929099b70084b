"""What an encoder is.

An encoder is an ``nn.Module`` whose keyword-only constructor takes plain values (they are its configuration), with
``width``, ``graph`` and ``forward(batch) -> [N, width]``. Its features don't change under translation, rotation,
choice of origin, and follow the order of the atoms. To add one: write the class in a file of its own, put its name on
the list in ``build.py`` (or call ``allow``) and a YAML with its settings into ``conf/encoder/``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from crysldnet.data.batch import CrystalBatch
from crysldnet.data.graph import GraphSpec


class Encoder(nn.Module, ABC):
    """Base of all encoders.

    Attributes:
        width: D, number of features of an atom.
        graph: the graph it needs.
    """

    width: int
    graph: GraphSpec

    def compile_layers(self) -> None:
        """Compile the encoder for speed, once for all sizes of batches; the results stay the same up to rounding."""
        self.compile(dynamic=True)

    @abstractmethod
    def forward(self, batch: CrystalBatch) -> Tensor:
        """Return [N, D] features of the atoms; masked atoms have the atomic number 0."""
