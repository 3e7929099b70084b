"""Train a stage until it finishes or is stopped, and export the result."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, distributed, nn

from crysldnet import signals
from crysldnet.artifacts.model_file import refuse_diverged
from crysldnet.console import note
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.errors import DataError, DeviceError, Interrupted
from crysldnet.platforms import is_out_of_memory
from crysldnet.training.callbacks import BatchWatch
from crysldnet.training.checkpointing import PreemptionCheckpoint, check_position
from crysldnet.training.strategies import SHARDED, name_of
from crysldnet.training.watchdog import of_a_collective

Metrics = dict[str, float]


def total_steps(trainer: pl.Trainer) -> int:
    """Return the optimizer steps of a whole run, as counted by the sampler."""
    data: CrystalDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return data.steps_per_epoch(trainer.world_size, trainer.accumulate_grad_batches) * (trainer.max_epochs or 1)


def split_sizes(data: CrystalDataModule) -> str:
    """Return how many crystals there are to train, validate and test with."""
    train, val, test = (f"{len(data.rows[part]):,}" for part in ("train", "val", "test"))
    return f"{train} training, {val} validation and {test} test"


@rank_zero_only
def announce(stage: str, trainer: pl.Trainer, model: nn.Module, data: CrystalDataModule) -> None:
    """Print the setup once: crystals, parameters, devices, and exclusions."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    device = f"{trainer.world_size} × {trainer.accelerator.__class__.__name__.removesuffix('Accelerator')}"
    note(
        f"{stage}: {split_sizes(data)} crystals of {data.store.name}, {trainable:,} parameters, "
        f"{trainer.max_epochs} epochs on {device}"
    )
    for reason, count in data.left_out.items():
        note(f"{count:,} crystals left out: {reason}")


def fit_and_export(
    title: str,
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: CrystalDataModule,
    evaluate: Callable[[Metrics], Metrics],
    export: Callable[[Metrics, dict[str, Tensor]], None],
) -> Metrics:
    """Train, evaluate and export a module's ``model``; return its metrics.

    Args:
        title: name of the stage in messages.
        trainer: Trainer of this stage.
        module: has a ``model``.
        data: the crystals.
        evaluate: maps the last value of each training metric to the metrics to keep; runs on all ranks.
        export: writes files from these metrics and the gathered model weights; runs on the first rank only.

    Raises:
        CheckpointError: a weight isn't finite.
    """
    model: nn.Module = module.model  # type: ignore[assignment]
    announce(title, trainer, model, data)
    metrics = evaluate(fit(trainer, module, data))
    export_weights(title, trainer, lambda weights: export(metrics, weights))
    return metrics


@contextlib.contextmanager
def unlogged(trainer: pl.Trainer) -> Iterator[None]:
    """Disable logging by the Trainer within this context."""
    loggers = trainer.loggers
    trainer.loggers = []
    try:
        yield
    finally:
        trainer.loggers = loggers


def export_weights(title: str, trainer: pl.Trainer, export: Callable[[dict[str, Tensor]], None]) -> None:
    """Gather a model's weights on all ranks and have the first rank write them."""
    whole = trainer.strategy.lightning_module_state_dict()
    refuse_diverged(whole, title)
    if trainer.is_global_zero:
        export({key.removeprefix("model."): value for key, value in whole.items() if key.startswith("model.")})
    trainer.strategy.barrier("export")


def _no_meeting(error: BaseException, nodes: int) -> str:
    """Return why the processes of a run can't connect, and the remedy."""
    reason = str(error).splitlines()[0].rstrip(".")
    if "in use" in reason:
        remedy = f"set MASTER_PORT to a free one{', or leave it unset' if nodes == 1 else ''}"
    else:
        remedy = "if one of them is missing, its own error is further up"
    place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    return f"the processes of this run can't connect at {place}: {reason}; {remedy}"


def fit(trainer: pl.Trainer, module: pl.LightningModule, data: CrystalDataModule) -> Metrics:
    """Train to the end, from the checkpoint to resume if any; return the last value of each metric.

    Raises:
        Interrupted: the run was stopped before its last epoch.
        CheckpointError: the checkpoint is incompatible with the current processes or strategy.
        DataError: a data loader process died.
        DeviceError: the processes can't connect, or memory ran out.
    """
    path: Path | None = None
    header: dict[str, Any] = {"epoch": 0, "batch": 0, "finished": False}
    preemption = next(c for c in trainer.callbacks if isinstance(c, PreemptionCheckpoint))  # type: ignore[attr-defined]
    steps = data.steps_per_epoch(trainer.world_size, trainer.accumulate_grad_batches)
    if preemption.start is not None:
        path, header = preemption.start
        check_position(path, header, trainer, steps)
    # Runs shorter than log_every_n_steps also have a training loss.
    trainer.log_every_n_steps = min(trainer.log_every_n_steps, steps * (trainer.max_epochs or 1))  # type: ignore[attr-defined]
    data.start = (header["epoch"], header["batch"])
    at_end = header["epoch"] >= (trainer.max_epochs or 0)
    stopped_early = header["finished"] and header.get("stopped_early", not at_end)
    if not stopped_early:
        _run(trainer, module, data, path, preemption)
    enough = any(isinstance(c, EarlyStopping) and c.stopped_epoch for c in trainer.callbacks)  # type: ignore[attr-defined]
    unfinished = trainer.current_epoch < (trainer.max_epochs or 0) and not enough and not stopped_early
    if trainer.interrupted or unfinished:
        raise Interrupted(
            f"stopped after epoch {trainer.current_epoch} of {trainer.max_epochs}; continue with resume=last"
        )
    if not stopped_early:
        preemption.stop_if_signalled("after training", trainer)
    # The module now has the averaged weights. In a later validation, the callback would swap them out again and load
    # the original ones for a test.
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
    if path is None or not (header["finished"] and (stopped_early or at_end)):
        return {name: float(value) for name, value in trainer.callback_metrics.items()}
    saved = torch.load(path, weights_only=True, map_location="cpu")  # of a stage that finished earlier
    if stopped_early or name_of(trainer.strategy) not in SHARDED:  # otherwise Lightning has given each rank its shard
        module.load_state_dict(saved["state_dict"])
    return saved["metrics"] if "metrics" in saved else header["metrics"]


def _of_a_worker(error: BaseException | None) -> str | None:
    """Return PyTorch's message about a dead worker; its handler raises it in whatever code is running."""
    while error is not None:
        if "DataLoader worker" in str(error):
            return str(error).splitlines()[0]
        error = error.__cause__ or error.__context__
    return None


def _run(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: CrystalDataModule,
    path: Path | None,
    preemption: PreemptionCheckpoint,
) -> None:
    """Run the Trainer, and explain failures to connect and dead workers."""
    try:
        with contextlib.suppress(SystemExit):  # Lightning exits by itself on the second Ctrl-C
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    except Exception as error:
        if is_out_of_memory(error):
            watch = next(c for c in trainer.callbacks if isinstance(c, BatchWatch))  # type: ignore[attr-defined]
            raise watch.error(trainer.accumulate_grad_batches) from error
        if trainer.world_size > 1 and of_a_collective(error) and not distributed.is_initialized():
            signals.children[:] = getattr(trainer.strategy.launcher, "procs", [])
            signals.end_children()  # otherwise they would wait and connect to the next run at this address
            raise DeviceError(_no_meeting(error, trainer.num_nodes)) from error
        died = _of_a_worker(error)
        if died is None:
            raise
        preemption.stop_if_signalled("where it can't go on without its workers; the last checkpoint stands")
        raise DataError(
            f"a data loader process died ({died}); if memory ran out, lower "
            "data.num_workers or data.batch_size, and continue with resume=last"
        ) from error
