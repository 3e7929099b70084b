"""Monitor the processes of a run: where they run, and whether all are alive.

Collectives wait for a dead or stuck rank, and their errors don't name it. Each process therefore reports a heartbeat
and its position to the shared key-value store once a second from its own thread. The first rank monitors the others,
and they monitor it. If one fails, dies or stays silent, all exit with a message that names it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from subprocess import Popen, TimeoutExpired
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import distributed as dist

from crysldnet import signals
from crysldnet.errors import UNFINISHED, Interrupted
from crysldnet.training.strategies import name_of

FEW = 30
"""Crystals per batch of a GPU below which a warning is printed. A step of our encoders has 1,300 to 3,000 operations,
and a GPU needs about 5 µs to start each, or 7 to 15 ms.
"""
BEAT_S = 1.0
GONE_S = 5.0
"""Silence after which a rank is considered the cause of a failed collective."""
SEARCH_S = 12.0
"""How long to search for the cause of a failed collective."""
FAILURE = "failure"
STOPPED = "stopped"
"""Sent in place of a failure by a rank that was asked to stop: the others will stop too, without an error."""


def topology(trainer: pl.Trainer, hosts: list[str]) -> str:
    """Describe processes, hosts, strategy, precision and the batch size per process."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    accumulate = trainer.accumulate_grad_batches
    share = data.share_of_a_step(trainer.world_size * accumulate)
    nodes = ", ".join(f"{count} on {host}" for host, count in Counter(hosts).items())
    return (
        f"{trainer.world_size} processes ({nodes}), strategy {name_of(trainer.strategy)}, precision "
        f"{trainer.precision}; a batch of at most {share} in each"
        f"{f', {accumulate} of them a step' if accumulate > 1 else ''}"
    )


def few_crystals(trainer: pl.Trainer) -> str | None:
    """Return a warning if the batches of a GPU are so small that starting operations takes longer than computing."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    parts = trainer.world_size * trainer.accumulate_grad_batches
    batches = data.steps_per_epoch(trainer.world_size, trainer.accumulate_grad_batches) * parts
    crystals = len(data.rows["train"]) / max(batches, 1)
    if trainer.strategy.root_device.type != "cuda" or crystals >= FEW:
        return None
    return (
        f"a batch of one GPU has only {crystals:.0f} crystals, because data.batch_size and data.batch_atoms are shared "
        f"by all {parts} batches of a step: starting the operations of a step takes longer than computing them. "
        "Raise data.batch_size, or use fewer GPUs"
    )


def of_a_collective(error: BaseException) -> bool:
    """Return whether an error may be caused by another process, as raised by gloo and NCCL."""
    kinds = tuple(kind for kind in (getattr(dist, "DistError", None),) if kind is not None)
    text = str(error)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))


class RankWatchdog(Callback):
    """Print the topology once, and end all processes of a run if one fails, dies or hangs.

    Args:
        timeout: how long a process may stay silent or make no progress.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.timeout_s = self._silence_s = timeout.total_seconds()
        self._place, self._moved, self._answered, self._moves = "before its first batch", 0.0, 0.0, 0
        self._heard: dict[int, tuple[str, float, int, str]] = {}
        """Monitored ranks: last heartbeat, its time, number of moves, and position."""
        self._children: list[Popen] = []
        self._watching, self._ending = threading.Event(), threading.Lock()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Connect to the others and start monitoring."""
        if trainer.world_size == 1 or not dist.is_initialized():
            return
        self.rank = trainer.global_rank
        everyone: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(everyone, (os.getpid(), socket.gethostname()))
        self._names = [f"rank {i} (process {pid} on {host})" for i, (pid, host) in enumerate(everyone)]
        if self.rank == 0 and stage == "fit":
            _print(topology(trainer, [host for _, host in everyone]))
            if (warning := few_crystals(trainer)) is not None:
                _print(warning)
        self._children = list(getattr(trainer.strategy.launcher, "procs", []))
        signals.children[:] = self._children
        where = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        server = dist.TCPStore(*where, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
        self._store = dist.PrefixStore("crysldnet", server)
        if self.rank == 0:
            self._store.set(FAILURE, "")
        self._store.set(str(self.rank), "0 0 ")
        dist.barrier()
        watched = range(1, trainer.world_size) if self.rank == 0 else range(1)
        now = time.monotonic()
        self._heard = dict.fromkeys(watched, ("", now, 0, ""))
        self._moved = self._answered = now
        self._watching.set()
        for task in (self._talk, self._judge):
            threading.Thread(target=task, daemon=True, name=f"ranks{task.__name__}").start()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop monitoring when all have finished."""
        if self._watching.is_set():
            dist.barrier()
            self._watching.clear()

    def _move(self, place: str) -> None:
        self._place, self._moved, self._moves = place, time.monotonic(), self._moves + 1

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the position of this rank."""
        self._move(f"in the forward pass of batch {batch_idx}, epoch {trainer.current_epoch}")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Record the position of this rank."""
        self._move(self._place.replace("forward", "backward"))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the position of this rank."""
        self._move(f"after batch {batch_idx}, epoch {trainer.current_epoch}")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Record the position of this rank."""
        self._move(f"in validation batch {batch_idx}, epoch {trainer.current_epoch}")

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Record the position of this rank."""
        self._move(f"in test batch {batch_idx}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Report a failure to the others, or give the watchdog time to find its cause."""
        if not self._watching.is_set():
            return
        if not isinstance(exception, Exception) or isinstance(exception, Interrupted):
            self._watching.clear()
            with suppress(RuntimeError):
                self._store.set(FAILURE, STOPPED)
            return
        if of_a_collective(exception):
            self._silence_s = min(self._silence_s, GONE_S)
            time.sleep(SEARCH_S)  # if a cause is found, this process exits here
            if self.rank == 0:  # only the first rank knows the state of all
                _print(f"a collective failed, and every process still answers. {self._places()}")
        with suppress(RuntimeError):
            self._store.set(FAILURE, f"{self._names[self.rank]} failed: {type(exception).__name__}: {exception}")
        self._watching.clear()
        time.sleep(3 * BEAT_S)  # let the others read it before the store disappears with this process
        self._end_children()

    def _talk(self) -> None:
        """Exchange heartbeats; if the first rank is stopped, a call never returns."""
        beats = 0
        while self._watching.is_set():
            beats += 1
            ranks = list(self._heard)
            try:
                self._store.set(str(self.rank), f"{beats} {self._moves} {self._place}")
                failure, *said = [b.decode() for b in self._store.multi_get([FAILURE, *map(str, ranks)])]
            except RuntimeError:
                time.sleep(GONE_S)  # if all were asked to stop, this rank will know soon
                if self._watching.is_set():
                    self._end(f"{self._names[0]} is gone: it ended, or its machine or network did", told=True)
                return
            now = self._answered = time.monotonic()
            if failure == STOPPED:
                self._watching.clear()
            elif failure:
                self._end(failure, told=True)
            for rank, text in zip(ranks, said, strict=True):
                count, moves, place = text.split(" ", 2)
                if count != self._heard[rank][0]:
                    self._heard[rank] = (count, now, int(moves), place)
            time.sleep(BEAT_S)

    def _judge(self) -> None:
        """End the run if a process died or was silent for too long."""
        while self._watching.is_set():
            time.sleep(BEAT_S)
            for i, child in enumerate(self._children):
                status = child.poll()
                if status not in (None, 0, UNFINISHED) and self._watching.is_set():
                    if status > 0:
                        time.sleep(2 * BEAT_S)  # its own report has priority
                    self._end(f"{self._names[self.rank + 1 + i]} ended with {_status(status)}")
            now = time.monotonic()
            for rank, (_, heard, _, place) in list(self._heard.items()):
                silent = now - (self._answered if rank == 0 else heard)
                if silent > self._silence_s and self._watching.is_set():
                    self._end(f"{self._names[rank]} hasn't answered for {silent:.0f} s; it was {place}", told=rank == 0)
            patience = self.timeout_s + SEARCH_S + (0.0 if self.rank == 0 else GONE_S)  # it knows all ranks
            if now - self._moved > patience and self._watching.is_set():
                self._end(f"nothing moved for {now - self._moved:.0f} s. {self._places()}")

    def _places(self) -> str:
        """Return the positions of the known processes, starting with those that all others wait for."""
        heard = {rank: (moves, place) for rank, (_, _, moves, place) in self._heard.items()}
        heard[self.rank] = (self._moves, self._place)
        groups: dict[tuple[int, str], list[int]] = {}
        for rank, where in heard.items():
            groups.setdefault(where, []).append(rank)
        (_, place), behind = min(groups.items())
        if len(groups) == 1:
            return f"All are {place}"
        named = ", ".join(self._names[rank] for rank in behind[:8])
        others = [
            f"rank {', '.join(map(str, ranks[:8]))}: {where}" for (_, where), ranks in sorted(groups.items())[1:8]
        ]
        return f"The others wait for {named}: {place}; {'; '.join(others)}"

    def _end(self, message: str, *, told: bool = False) -> NoReturn:
        """End this process and its children; the first rank prints the reason, or all if it is the cause."""
        self._ending.acquire()  # never released: the process exits
        if self.rank == 0 or self._names[0] in message:
            _print(f"{message}; the run ends")
        if not told:
            with suppress(RuntimeError):
                self._store.set(FAILURE, message)
            time.sleep(3 * BEAT_S)
        self._end_children()
        if self._names[0] in message and f"process {os.getppid()} on {socket.gethostname()})" in self._names[0]:
            os.kill(os.getppid(), signal.SIGKILL)  # the first rank started this one and can't exit by itself
        sys.stdout.flush()
        os._exit(1)

    def _end_children(self) -> None:
        for child in self._children:
            with suppress(TimeoutExpired):
                child.wait(timeout=3 * BEAT_S)
            child.kill()


def _status(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _print(text: str) -> None:
    """Write one line at once so that lines of several processes don't mix."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
