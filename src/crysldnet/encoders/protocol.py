"""The encoder protocol.

An encoder is an ``nn.Module`` whose keyword-only constructor takes plain values (its configuration), with ``width``,
``graph`` and ``layer_features(batch)``, the features after each of its layers. Its features are invariant to
translation, rotation and choice of origin, and equivariant to permutation of atoms. To add one, write the class in its
own file, put its name on the list in ``build.py`` (or load its module as a plugin) and a YAML with its settings into
``conf/encoder/``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Literal, overload

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.spec import GraphSpec


class Encoder(nn.Module):
    """Base of all encoders.

    Attributes:
        width: D, number of features per atom.
        graph: the required graph.
        smooth: edges fade out before the cutoff, so that features change continuously as atoms move.
        exportable: torch.export can trace it, and it reads only the fields in ``crysldnet.tools.export.INPUTS``.
    """

    width: int
    graph: GraphSpec
    smooth: bool = False
    exportable: bool = False

    def compile_layers(self) -> None:
        """Compile the encoder once for all batch sizes; results stay the same up to rounding."""
        self.compile(dynamic=True)

    @property
    def n_layers(self) -> int:
        """Number of successive layers: the length of the longest module list."""
        return max((len(part) for part in self.children() if isinstance(part, nn.ModuleList)), default=0)

    def layer_of(self, name: str) -> int:
        """Return the layer of a named parameter: 0 before the layers, then 1 … n.

        A member of a module list belongs to the layer of its index, and a part created after the lists to the last one.
        Encoders with a different structure override this.
        """
        parts = [part for part, _ in self.named_children()]
        lists = [part for part, module in self.named_children() if isinstance(module, nn.ModuleList)]
        first, _, rest = name.partition(".")
        if first in lists:
            return 1 + int(rest.partition(".")[0] or 0)
        after = first in parts and bool(lists) and parts.index(first) > parts.index(lists[-1])
        return self.n_layers if after else 0

    def checkpoint_layers(self) -> None:
        """Recompute every layer in the backward pass instead of storing its activations: less memory, more time.

        Losses and gradients stay the same, and batch statistics are updated once per step as before.
        """
        for layer in layers_of(self):
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, context_fn=partial(_contexts, layer)
            )

    @property
    def depth(self) -> int:
        """Number of tensors in :meth:`layer_features`: the input and each layer, unless overridden.

        An encoder that only defines ``forward`` has a depth of 1.
        """
        return self.n_layers + 1 if type(self).forward is Encoder.forward else 1

    def layer_features(self, batch: CrystalBatch) -> list[Tensor]:
        """Return [N, D] features of the atoms before the first layer and after each; masked atoms have number 0."""
        raise NotImplementedError(f"{type(self).__name__} needs layer_features(batch), or a forward(batch) of its own")

    @overload
    def forward(self, batch: CrystalBatch) -> Tensor: ...

    @overload
    def forward(self, batch: CrystalBatch, every_layer: Literal[True]) -> list[Tensor]: ...

    def forward(self, batch: CrystalBatch, every_layer: bool = False) -> Tensor | list[Tensor]:
        """Return [N, D] features of the atoms, or with ``every_layer`` those of :meth:`layer_features`."""
        layers = self.layer_features(batch)
        return layers if every_layer else layers[-1]


def features_of_layers(encoder: Encoder, batch: CrystalBatch) -> list[Tensor]:
    """Return the features [N, D] of every layer that an encoder provides, its output last."""
    return encoder(batch, every_layer=True) if encoder.depth > 1 else [encoder(batch)]


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Return the layers of a module: the members of the module lists that it holds directly."""
    return [layer for child in module.children() if isinstance(child, nn.ModuleList) for layer in child]


def _contexts(layer: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _still_statistics(layer)


@contextmanager
def batch_statistics(module: nn.Module, *, own: bool) -> Iterator[None]:
    """Evaluate a module, with each batch's own batch normalization statistics if ``own``, without changing anything."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    for part in module.modules():
        part.training = own and isinstance(part, _BatchNorm)
    with _still_statistics(module):
        try:
            yield
        finally:
            for part, mode in modes.items():
                part.training = mode


def single_atom_statistics(module: nn.Module, batch: CrystalBatch) -> AbstractContextManager[None]:
    """Normalize a batch of one atom by running statistics and without dropout; one atom has no variance."""
    return batch_statistics(module, own=False) if batch.num_atoms == 1 else nullcontext()


@contextmanager
def _still_statistics(layer: nn.Module) -> Iterator[None]:
    """Freeze the running statistics of batch normalization, which have already seen this batch."""
    norms = [part for part in layer.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
