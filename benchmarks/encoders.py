"""Measure a training step of every encoder on one thread.

python -m benchmarks.encoders [--data FILE.parquet] [--rounds N] [--batch N] [--device cpu|cuda]

One step is forward, backward and optimizer on one batch of the same crystals, with a mean readout and a linear head. In
every round each contender takes its turn, and ratios are taken within a round. Published encoders run as published
and factorized: the same function of the same weights, computed as the released code does, and with linear maps on
atoms first. Peak memory is what a process of its own needs for three steps, over what it had before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.unfactorized import unfactorize
from crysldnet.build import build
from crysldnet.config import conf_folder, load_yaml
from crysldnet.data.datamodule import open_store
from crysldnet.encoders.protocol import Encoder
from crysldnet.graphs.batch import CrystalBatch, make_batch
from crysldnet.graphs.crystals import Crystals
from crysldnet.models.head import PropertyHead
from crysldnet.training.trainer import keep_freed_memory
from experiments import evidence

HERE = Path(__file__).parent
COMMAND = "python -m benchmarks.encoders"
PUBLISHED = ("cgcnn", "cogn", "potnet", "pddformer", "cartnet", "ecomformer", "icomformer", "matformer")
OWN = ("neighbor_attention", "neighbor_attention_small")
SHARP = "sharp cutoff"
"""Our own encoders with all ties of the twelfth neighbor and no fade, to measure what fading edges cost."""
MAX_ATOMS = 20
"""Skip larger crystals."""
PRODUCT = "matrix product"
MATRIX = 1024
"""Rows and columns of the matrix product that measures the rate of the core."""


def make_encoder(name: str, **changes: object) -> Encoder:
    """Build an encoder of ``conf/encoder`` with fresh weights and the given changes of its settings."""
    torch.manual_seed(0)
    return build({**load_yaml(conf_folder() / "encoder" / f"{name}.yaml"), **changes}, "encoder")


def draw(data: str, n: int) -> Crystals:
    """Draw n crystals of at most 20 atoms, the same each time."""
    store = open_store(data).crystals
    rows = np.random.default_rng(0).permutation(np.flatnonzero(store.sizes <= MAX_ATOMS))[:n]
    return store.take(np.sort(rows))


@dataclass
class Contender:
    """One encoder with its graph and optimizer."""

    encoder: Encoder
    batch: CrystalBatch
    head: nn.Module
    optimizer: torch.optim.Optimizer

    @classmethod
    def make(cls, encoder: Encoder, crystals: Crystals, device: str) -> Contender:
        """Move an encoder and its graph to a device."""
        encoder = encoder.to(device)
        head = PropertyHead(width=encoder.width, outputs=1, layers=0).to(device)
        optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-4)
        return cls(encoder, make_batch(crystals, encoder.graph).to(device), head, optimizer)

    def step(self) -> None:
        """Take one training step."""
        self.optimizer.zero_grad()
        out = self.head(self.head.read(self.encoder, self.batch), self.batch.crystal, self.batch.num_crystals)
        out.square().mean().backward()
        self.optimizer.step()

    def timed(self) -> float:
        """Return the seconds of one step; on a CPU, processor time, so that other work matters less."""
        clock = time.perf_counter if self.batch.numbers.is_cuda else time.process_time
        if self.batch.numbers.is_cuda:
            torch.cuda.synchronize()
        start = clock()
        self.step()
        if self.batch.numbers.is_cuda:
            torch.cuda.synchronize()
        return clock() - start

    def flops(self) -> int:
        """Count the floating-point operations of the matrix products in one step."""
        with FlopCounterMode(display=False) as counter:
            self.step()
        return counter.get_total_flops()


def peak_memory(name: str, changes: dict[str, object], data: str, batch: int) -> float:
    """Return the peak memory of three steps in MB, measured in a separate process."""
    code = (
        f"import sys; sys.path.insert(0, {str(HERE.parent)!r})\n"
        "from pathlib import Path\n"
        "from benchmarks.encoders import Contender, draw, make_encoder\n"
        "def memory(field):\n"
        "    return int(Path('/proc/self/status').read_text().split(field)[1].split()[0]) / 1024\n"
        f"c = Contender.make(make_encoder({name!r}, **{changes!r}), draw({data!r}, {batch}), 'cpu')\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"
        "before = memory('VmRSS:')\n"
        "[c.step() for _ in range(3)]\n"
        "print(memory('VmHWM:') - before)"
    )
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def time_of_products(a: torch.Tensor, products: int = 5) -> float:
    """Return the processor seconds of a single-precision matrix product."""
    start = time.process_time()
    for _ in range(products):
        a @ a
    return (time.process_time() - start) / products


def measure(crystals: Crystals, rounds: int, device: str) -> tuple[dict[str, Contender], dict[str, list[float]]]:
    """Time every contender once per round, on a CPU also a matrix product; return contenders and seconds."""
    contenders: dict[str, Contender] = {}
    for name in PUBLISHED:
        for factorized in (True, False):
            encoder = make_encoder(name, variant="published")
            if not factorized:
                unfactorize(encoder)
            title = name if factorized else f"{name}, unfactorized"
            contenders[title] = Contender.make(encoder, crystals, device)
    for name in OWN:
        contenders[name] = Contender.make(make_encoder(name), crystals, device)
        contenders[f"{name}, {SHARP}"] = Contender.make(make_encoder(name, k=12, fade=0.0), crystals, device)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.step()
    matrix = torch.randn(MATRIX, MATRIX)
    for _ in range(rounds):
        if device == "cpu":
            seconds.setdefault(PRODUCT, []).append(time_of_products(matrix))
        for name, contender in contenders.items():
            seconds[name].append(contender.timed())
    return contenders, seconds


def main() -> None:
    """Measure; write results.json and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="embedded:mp_starter", help="crystals: embedded:NAME, a store or Parquet file"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    settings = parser.parse_args()
    commit = evidence.current_commit(HERE)
    keep_freed_memory()
    crystals = draw(settings.data, settings.batch)
    n, atoms = len(crystals), len(crystals.numbers)
    contenders, seconds = measure(crystals, settings.rounds, settings.device)
    records = []

    on_gpu = settings.device == "cuda"
    about = {
        "data": f"{Path(settings.data).stem}, one batch of {n} crystals, {atoms} atoms",
        "command": f"{COMMAND} --device cuda" if on_gpu else COMMAND,
        "commit": commit,
    }
    where = f", {torch.cuda.get_device_name()}" if on_gpu else ""

    def record(name: str, metric: str, unit: str, values: list[float]) -> None:
        records.append(evidence.timed(values, name=f"{name}{where}", metric=metric, unit=unit, **about))

    slow = {name: seconds.get(f"{name}, unfactorized", seconds[name]) for name in (*PUBLISHED, *OWN)}
    for name in sorted((*PUBLISHED, *OWN), key=lambda name: statistics.median(seconds[name])):
        parameters = sum(p.numel() for p in contenders[name].encoder.parameters())
        record(name, "parameters", "1", [float(parameters)])
        flops = contenders[name].flops()
        record(name, "matrix products", "GFLOP/structure", [flops / n / 1e9])
        if not on_gpu:
            shares = [
                100 * flops / s * p / (2 * MATRIX**3) for s, p in zip(seconds[name], seconds[PRODUCT], strict=True)
            ]
            record(name, "of the core's rate in matrix products", "%", shares)
        record(name, "speed", "structures/s", [n / s for s in seconds[name]])
        record(name, "speed", "atoms/s", [atoms / s for s in seconds[name]])
        if name in PUBLISHED:
            record(name, "over unfactorized", "ratio", [u / f for u, f in zip(slow[name], seconds[name], strict=True)])
        for other, of in (("matformer", slow["matformer"]), ("cartnet", seconds["cartnet"])):
            title = f"over {other}" + (" as published" if other == "matformer" else "")
            record(name, title, "ratio", [o / s for o, s in zip(of, seconds[name], strict=True)])
        if name in OWN:
            sharp = seconds[f"{name}, {SHARP}"]
            record(
                name, "over a sharp cutoff at k=12", "ratio", [o / s for o, s in zip(sharp, seconds[name], strict=True)]
            )
        if settings.device == "cpu":
            changes: dict[str, object] = {"variant": "published"} if name in PUBLISHED else {}
            record(name, "memory of a step", "MB", [peak_memory(name, changes, settings.data, settings.batch)])
    evidence.write(HERE, records)
    print(evidence.table_by_name(records))


if __name__ == "__main__":
    main()
