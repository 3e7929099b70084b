"""Project, on paper, how pretraining scales over GPUs: gradient bytes and interconnect against the time of a step.

Nothing is measured here but the number of parameters, and nothing was measured on GPUs: the time of a step is an
assumption, given as a range. Prints the table of docs/cluster.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from crysldnet.config import compose, validate
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


if __name__ == "__main__":
    print(table())
