"""Estimate how pretraining scales from gradient size, interconnect and step time.

The bytes of the gradient are counted and the time of a step on a CPU is measured, by ``benchmarks/pretrain.py``; that
of a step on a GPU is assumed, as a range, until ``benchmarks/pretrain.py --device cuda`` has measured it. How even
batches are is measured here. Prints the tables of docs/cluster.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import pretrain
from crysldnet.data.datasets import open_store
from crysldnet.data.sampler import BatchLimits, pack
from experiments import evidence

HERE = Path(__file__).parent
A_NODE = 8
"""Processes per node."""
PROCESSES = (8, 64, 512)
ASSUMED_S = (0.002, 0.005)
"""Seconds for forward, backward and update on one GPU: short, so that waiting for others counts most."""
LATENCY_S = 20e-6
"""Assumed latency of each of the 2 log2(n) successive messages."""
CRYSTALS = 8
"""Crystals per process and batch when checking how even batches are."""
HIDDEN = 0.5
"""Assumed share of a step during which communication overlaps with the backward pass."""


@dataclass(frozen=True)
class Link:
    """How processes are connected: assumed all-reduce bandwidth in bytes/s, within a node and between nodes."""

    name: str
    inside: float
    between: float

    def all_reduce_s(self, size: float, processes: int) -> float:
        """Return the seconds for a ring all-reduce of ``size`` bytes, within nodes and between them."""
        inside = min(processes, A_NODE)
        nodes = processes // inside
        travel = 2 * size * ((inside - 1) / inside / self.inside + (nodes - 1) / nodes / self.between)
        return travel + LATENCY_S * 2 * (processes - 1).bit_length()


OF_GPUS = (Link("400 Gbit/s a GPU", 300e9, 400e9), Link("one 200 Gbit/s port a node", 300e9, 25e9))
OF_CPUS = (Link("one 25 Gbit/s port a node", 10e9, 3.125e9),)


def efficiency(step_s: float, reduce_s: float, hidden: float) -> float:
    """Return the share of time not spent waiting for gradients; the share ``hidden`` of a step overlaps with them."""
    return step_s / (step_s + max(0.0, reduce_s - hidden * step_s))


def measured(stage: str, command: str) -> float | None:
    """Return the measured seconds per step of the published recipe, None if no benchmark has measured it."""
    records = [r for r in evidence.read(HERE / "results.json") if (r.metric, r.command) == ("step", command)]
    return next((r.value for r in records if r.name.startswith(f"published, {stage}")), None)


def steps(stage: str) -> Iterator[tuple[str, float, tuple[Link, ...]]]:
    """Yield what a step is taken on, its seconds, and how those are connected."""
    on_cpu, on_gpu = (measured(stage, pretrain.COMMAND + option) for option in ("", " --device cuda"))
    if on_cpu is not None:
        yield f"one core: {on_cpu:.1f} s, measured", on_cpu, OF_CPUS
    if on_gpu is not None:
        yield f"a GPU: {on_gpu * 1e3:.0f} ms, measured", on_gpu, OF_GPUS
    else:
        yield from ((f"a GPU: {step * 1e3:.0f} ms, assumed", step, OF_GPUS) for step in ASSUMED_S)


def table() -> str:
    """Return the projection as Markdown."""
    lines = [
        f"| stage, gradient | step on | nodes connected by | {' | '.join(f'{n} processes' for n in PROCESSES)} |",
        "|---" * (3 + len(PROCESSES)) + "|",
    ]
    for stage in pretrain.STAGES:
        size = pretrain.gradient_bytes(pretrain.make_model("published", stage))
        for on, step, links in steps(stage):
            for link in links:
                waits = [link.all_reduce_s(size, n) for n in PROCESSES]
                cells = " | ".join(f"{efficiency(step, w, HIDDEN):.0%} ({efficiency(step, w, 0):.0%})" for w in waits)
                lines.append(f"| `{stage}`, {size / 1e6:.0f} MB | {on} | {link.name} | {cells} |")
    return "\n".join(lines)


def evenness() -> str:
    """Return as Markdown how even batches of the embedded crystals are, per step and per epoch."""
    atoms = open_store("embedded:mp_starter").crystals.sizes
    lines = [
        "| processes × crystals | largest batch of a step over the mean | worst step | a process's epoch, worst |",
        "|---|---|---|---|",
    ]
    for processes in (8, 32, 64):
        packed = pack(
            atoms, None, BatchLimits(crystals=CRYSTALS), processes, np.random.default_rng(0).permutation(len(atoms))
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
