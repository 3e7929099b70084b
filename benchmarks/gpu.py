"""Measure everything that needs a GPU, in less than ten minutes.

python -m benchmarks.gpu [--batch N] [--steps N] [--workers N] [--minutes M] [--device cuda|cpu] [--no-tests]

First, ``tests/test_gpu.py`` runs. Then four encoders pretrain on batches of the data module, in both stages: in
float32, TF32 and bfloat16, with graphs from the host and from the device, and compiled. Printed are the time of a step
with loading and the share of it spent waiting for data, the time of a step on a batch that is already there, how much
of the card's own measured speed in matrix products and of its bandwidth that uses, and memory. What doesn't fit into
the minutes is left out. With ``--device cpu`` nothing is written to results.json.

Operations are those of an eager step, except views, and bytes those that each reads and writes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from crysldnet.config import compose, validate
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.graphs.device_graph import Where
from crysldnet.models.pretraining import PretrainingModel
from crysldnet.platforms import is_out_of_memory
from crysldnet.pretrain import PretrainConfig, build_model, make_data
from crysldnet.training.diagnostics import device_memory_mb
from experiments import evidence

HERE = Path(__file__).parent
COMMAND = "python -m benchmarks.gpu"
ENCODERS = ("neighbor_attention_small", "neighbor_attention", "cartnet", "matformer")
STAGES: tuple[Literal["vae", "diffusion"], ...] = ("vae", "diffusion")
FORMATS = ("float32", "TF32", "bfloat16")
WARMUP = 4
"""Steps before those that are timed."""


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        encoder, stage: what is trained.
        numbers: format of matrix products.
        graph_on: where graphs are built.
        compiled: whether the encoder is compiled.
    """

    encoder: str
    stage: Literal["vae", "diffusion"]
    numbers: str = "TF32"
    graph_on: Where = "host"
    compiled: bool = False

    def __str__(self) -> str:
        how = "compiled" if self.compiled else "eager"
        return f"{self.encoder}, {self.stage}, {self.numbers}, {how}, graph on {self.graph_on}"


def all_cases() -> list[Case]:
    """Return every case; those that take longest come last."""
    pairs = list(itertools.product(ENCODERS, STAGES))
    cases = [Case(encoder, stage, numbers) for encoder, stage in pairs for numbers in FORMATS]
    cases += [Case(encoder, stage, graph_on="device") for encoder, stage in pairs]
    return cases + [Case(encoder, "vae", compiled=True) for encoder in ENCODERS]


class Operations(TorchDispatchMode):
    """Count operations, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            parts = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.count += 1
            self.bytes += sum(part.numel() * part.element_size() for part in parts)
        return out


def seconds_of(work: Callable[[], object], device: str, repeats: int) -> float:
    """Return the mean seconds of some work on a device."""
    wait(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    wait(device)
    return (time.perf_counter() - begun) / repeats


def wait(device: str) -> None:
    """Wait until a GPU has finished."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def computing_in(numbers: str, device: str) -> Iterator[None]:
    """Compute matrix products in a format."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if numbers == "float32" else "high")
    try:
        with torch.autocast(device, torch.bfloat16, enabled=numbers == "bfloat16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def ceilings(device: str, side: int) -> dict[str, float]:
    """Return FLOP/s of matrix products of a size in each format, and bytes/s of a copy."""
    a, found = torch.randn(side, side, device=device), {}
    for numbers in FORMATS:
        with computing_in(numbers, device), torch.no_grad():
            torch.mm(a, a)
            found[numbers] = 2.0 * side**3 / seconds_of(lambda: torch.mm(a, a), device, 10)
    target = torch.empty_like(a)
    found["copy"] = 2.0 * a.numel() * a.element_size() / seconds_of(lambda: target.copy_(a), device, 10)
    return found


class Training:
    """A stage's model and optimizer on a device, and batches as in training."""

    def __init__(self, case: Case, device: str, batch: int, workers: int, words: list[str]) -> None:
        torch.manual_seed(0)
        words = [f"encoder={case.encoder}", f"data.batch_size={batch}", f"data.num_workers={workers}", *words]
        config = validate(compose("pretrain", [*words, f"data.graph_on={case.graph_on}"]), PretrainConfig)
        self.case, self.device = case, device
        self.model: PretrainingModel = build_model(config, with_flow=case.stage == "diffusion")
        self.data: CrystalDataModule = make_data(config, self.model)
        self.data.setup()
        self.model.start_teacher()
        self.model.to(device)
        if case.compiled:
            self.model.encoder.compile_layers()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device == "cuda")
        self.trained = trained

    def batches(self) -> Iterator[CrystalBatch]:
        """Yield batches on the host without end."""
        loader = self.data.train_dataloader()
        while True:
            yield from loader

    def send(self, batch: CrystalBatch) -> CrystalBatch:
        """Copy a batch to the device."""
        return self.data.transfer_batch_to_device(batch, torch.device(self.device), 0)

    def step(self, batch: CrystalBatch) -> None:
        """Take a step: forward, backward, clipping, optimizer."""
        self.optimizer.zero_grad()
        with computing_in(self.case.numbers, self.device):
            loss = torch.stack([term.float() for term in self.model(batch).terms.values()]).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.model.update_teacher()


def measure(training: Training, steps: int, peaks: dict[str, float]) -> list[tuple[str, str, float]]:
    """Return names, units and values of everything measured about a case."""
    batches = training.batches()
    batch = training.send(next(batches))
    flops, done = FlopCounterMode(display=False), Operations()
    if not training.case.compiled:
        with flops:
            training.step(batch)
        with done:
            training.step(batch)
    for _ in range(WARMUP):
        training.step(training.send(next(batches)))
    if training.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait(training.device)
    waited, crystals, begun = 0.0, 0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        loaded = next(batches)
        waited += time.perf_counter() - asked
        training.step(training.send(loaded))
        crystals += loaded.num_crystals
    wait(training.device)
    total = time.perf_counter() - begun
    memory = device_memory_mb(torch.device(training.device))
    alone = seconds_of(lambda: training.step(batch), training.device, steps)
    found = [
        ("step with loading", "ms", 1e3 * total / steps),
        ("waiting for data", "%", 100.0 * waited / total),
        ("speed", "structures/s", crystals / total),
        ("step alone", "ms", 1e3 * alone),
    ]
    if not training.case.compiled:
        product = flops.get_total_flops() / alone / peaks[training.case.numbers]
        found += [("operations", "1", float(done.count))]
        found += [("of the card's matrix products", "%", 100.0 * product)]
        found += [("of the card's bandwidth", "%", 100.0 * done.bytes / alone / peaks["copy"])]
    return [*found, ("memory", "MB", memory)]


def results(
    cases: list[Case], device: str, *, batch: int, steps: int, workers: int, words: list[str], until: float, side: int
) -> Iterator[tuple[str, list[tuple[str, str, float]]]]:
    """Yield the measures of the card, then those of each case.

    Args:
        cases: what to measure.
        device: where.
        batch: crystals per batch.
        steps: steps to time.
        workers: processes that load data.
        words: further settings of every run.
        until: time on the monotonic clock after which no case is started.
        side: of the matrices that measure the card.
    """
    peaks = ceilings(device, side)
    units = {name: ("GB/s" if name == "copy" else "TFLOP/s", 1e9 if name == "copy" else 1e12) for name in peaks}
    yield "the card itself", [(name, units[name][0], value / units[name][1]) for name, value in peaks.items()]
    for case in cases:
        if time.monotonic() > until:
            print(f"left out, no time: {case}", flush=True)
            continue
        try:
            yield str(case), measure(Training(case, device, batch, workers, words), steps, peaks)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            print(f"left out, out of memory: {case}", flush=True)
        torch._dynamo.reset()


def run_tests() -> None:
    """Run the tests that need a GPU, and stop if one fails."""
    done = subprocess.run([sys.executable, "-m", "pytest", "tests/test_gpu.py", "-q"], cwd=HERE.parent)
    if done.returncode:
        raise SystemExit("tests/test_gpu.py failed; nothing was measured (--no-tests skips the tests)")


def main() -> None:
    """Test and measure; print each result, and on a GPU write results.json and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--no-tests", action="store_true")
    settings = parser.parse_args()
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU; --device cpu tries this script without one")
    until = time.monotonic() + 60.0 * settings.minutes
    commit = evidence.current_commit(HERE)
    if not settings.no_tests:
        run_tests()
    on_gpu = settings.device == "cuda"
    where = f", {torch.cuda.get_device_name()}" if on_gpu else ""
    data = f"embedded:mp_starter, batches of {settings.batch} crystals, {settings.workers} workers"
    records = []
    for name, measures in results(
        all_cases(),
        settings.device,
        batch=settings.batch,
        steps=settings.steps,
        workers=settings.workers,
        words=[],
        until=until,
        side=8192 if on_gpu else 512,
    ):
        print(name, *(f"  {metric}: {value:.4g} {unit}" for metric, unit, value in measures), sep="\n", flush=True)
        about = {"name": f"{name}{where}", "data": data, "command": COMMAND, "commit": commit}
        records += [evidence.timed([value], metric=metric, unit=unit, **about) for metric, unit, value in measures]
        if on_gpu:
            evidence.write(HERE, records)


if __name__ == "__main__":
    main()
