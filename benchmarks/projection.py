"""Project, on paper, how pretraining scales over GPUs: gradient bytes and interconnect against the time of a step.

Nothing is measured here but the number of parameters and how even batches are, and nothing was measured on GPUs: the
time of a step is an assumption, given as a range. Prints the tables of docs/cluster.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crysldnet.config import compose, validate
from crysldnet.data.locations import open_store
from crysldnet.data.sampler import Budget, pack
from crysldnet.pretrain import PretrainConfig, build_model

GPUS_A_NODE = 8
STEP_S = (0.02, 0.1)
"""Assumed: forward, backward and update of one GPU's share, fast and slow."""
INSIDE = 300e9
"""Assumed bytes/s of an all-reduce over the GPUs of a node."""
BETWEEN = {"400 Gbit/s a GPU": 400e9, "one 200 Gbit/s port a node": 25e9}
"""Assumed bytes/s of a node to the others."""
LATENCY_S = 20e-6
"""Assumed, of one of the 2 log2(n) messages that follow each other."""
CRYSTALS = 8
"""In the batch of one process, where it is asked how even batches are."""
HIDDEN = 0.5
"""Assumed share of a step that gradients can travel in while the backward pass goes on."""


@dataclass(frozen=True)
class Link:
    """A cluster: how fast its nodes are connected."""

    between: float

    def all_reduce_s(self, size: float, gpus: int) -> float:
        """Return the seconds of an all-reduce of ``size`` bytes, by rings inside nodes and between them."""
        inside = min(gpus, GPUS_A_NODE)
        nodes = gpus // inside
        travel = 2 * size * ((inside - 1) / inside / INSIDE + (nodes - 1) / nodes / self.between)
        return travel + LATENCY_S * 2 * (gpus - 1).bit_length()


def efficiency(step_s: float, reduce_s: float, hidden: float) -> float:
    """Return the share of the time that isn't spent waiting for gradients, of which ``hidden`` steps cost nothing."""
    return step_s / (step_s + max(0.0, reduce_s - hidden * step_s))


def gradient_bytes(with_flow: bool) -> float:
    """Return the bytes of the gradient of a stage of the published recipe, in float32."""
    composition = compose("pretrain", ["preset=published"])
    model = build_model(validate(composition, PretrainConfig), with_flow=with_flow)
    return 4.0 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def table() -> str:
    """Return the projection as Markdown."""
    lines = [
        "| stage, gradient | nodes connected by | step on a GPU | 8 GPUs | 64 GPUs | 512 GPUs |",
        "|---|---|---|---|---|---|",
    ]
    for stage, with_flow in (("`vae`", False), ("`diffusion`", True)):
        size = gradient_bytes(with_flow)
        for name, between in BETWEEN.items():
            for step in STEP_S:
                waits = [Link(between).all_reduce_s(size, gpus) for gpus in (8, 64, 512)]
                cells = " | ".join(f"{efficiency(step, w, HIDDEN):.0%} ({efficiency(step, w, 0):.0%})" for w in waits)
                lines.append(f"| {stage}, {size / 1e6:.0f} MB | {name} | {step * 1e3:.0f} ms | {cells} |")
    return "\n".join(lines)


def evenness() -> str:
    """Return as Markdown how even the batches of the embedded crystals are: in a step, and over an epoch."""
    atoms = open_store("embedded:mp_starter").crystals.sizes
    lines = [
        "| processes × crystals | largest batch of a step over the mean | worst step | a process's epoch, worst |",
        "|---|---|---|---|",
    ]
    for processes in (8, 32, 64):
        packed = pack(
            atoms, None, Budget(crystals=CRYSTALS), processes, np.random.default_rng(0).permutation(len(atoms))
        )
        sizes = np.array([atoms[rows].sum() for rows in packed]).reshape(-1, processes)
        over = sizes.max(axis=1) / sizes.mean(axis=1) - 1
        epoch = sizes.sum(axis=0)
        worst = abs(epoch / epoch.mean() - 1).max()
        lines.append(f"| {processes} × {CRYSTALS} | {over.mean():.1%} | {over.max():.1%} | {worst:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
    print()
    print(evenness())
