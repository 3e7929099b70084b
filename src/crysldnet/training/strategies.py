"""Distribution over devices, selected by configuration; modules don't depend on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from crysldnet.encoders.protocol import Encoder, layers_of
from crysldnet.errors import ConfigError
from crysldnet.models.dit import DiT

if TYPE_CHECKING:
    from crysldnet.training.trainer import TrainerSettings as Settings

Name = Literal["auto", "ddp", "ddp_static", "fsdp", "fsdp2", "deepspeed"]
HALF = ("bf16-mixed", "16-mixed")
ALL = ("32-true", *HALF, "64-true")
PRECISIONS: dict[str, tuple[str, ...]] = {
    "auto": ALL,
    "ddp": ALL,
    "ddp_static": ALL,
    "fsdp": ("32-true", *HALF),
    "fsdp2": ("32-true", "bf16-mixed"),
    "deepspeed": ("32-true", *HALF),
}
"""Precisions that Lightning supports with each strategy."""


SHARDED: tuple[Name, ...] = ("fsdp", "fsdp2", "deepspeed")
"""Strategies that shard weights or optimizer state."""
STARTING = timedelta(minutes=10)
"""Minimum timeout while processes start."""


def auto() -> str:
    """Use a single device."""
    return "auto"


def ddp(*, find_unused_parameters: bool = False, static_graph: bool = False, timeout_minutes: float = 30.0) -> Strategy:
    """Use one process per device, each with the whole model (DistributedDataParallel)."""
    return _patient(
        DDPStrategy, timeout_minutes, find_unused_parameters=find_unused_parameters, static_graph=static_graph
    )


def fsdp(
    *,
    sharding: Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD"] = "FULL_SHARD",
    cpu_offload: bool = False,
    timeout_minutes: float = 30.0,
) -> Strategy:
    """Use one process per GPU and shard parameters, gradients and optimizer state as one flat vector."""
    return _patient(
        FullyShardedFlat,
        timeout_minutes,
        sharding_strategy=sharding,
        cpu_offload=cpu_offload,
        use_orig_params=True,
        state_dict_type="full",
    )


def fsdp2(*, timeout_minutes: float = 30.0) -> Strategy:
    """Use one process per device; shard parameters, gradients and optimizer state by layer (``fully_shard``)."""
    return _patient(FullyShardedLayers, timeout_minutes, save_distributed_checkpoint=False)


def deepspeed(*, stage: Literal[1, 2] = 2, offload_optimizer: bool = False, timeout_minutes: float = 30.0) -> Strategy:
    """Use DeepSpeed ZeRO: shard optimizer state over GPUs, in stage 2 also gradients.

    Raises:
        ConfigError: the package isn't installed.
    """
    if find_spec("deepspeed") is None:
        raise ConfigError(
            'strategy=deepspeed: the package deepspeed isn\'t installed; pip install "crysldnet[deepspeed]", or use '
            "strategy=fsdp2, which shards too and needs nothing more",
            "strategy",
        )
    return _patient(
        DeepSpeedStrategy,
        timeout_minutes,
        stage=stage,
        offload_optimizer=offload_optimizer,
        logging_batch_size_per_gpu=1,  # for its log only; otherwise it looks for a number that the loader lacks
    )


def _patient(kind: Callable[..., Strategy], timeout_minutes: float, **settings: Any) -> Strategy:
    """Create a strategy with a startup timeout of at least ``STARTING``."""
    if not timeout_minutes > 0:
        raise ValueError(f"timeout_minutes must be over 0, not {timeout_minutes}")
    timeout = timedelta(minutes=timeout_minutes)
    strategy = kind(timeout=max(timeout, STARTING), **settings)
    strategy.patience = timeout  # type: ignore[attr-defined]
    return strategy


class FullyShardedFlat(FSDPStrategy):
    """FSDP that clips by the norm over all shards and keeps the dimensions of parameters.

    Outside the forward pass, sharded parameters are flat, so an optimizer can't distinguish matrices from biases.
    """

    def _setup_model(self, model: nn.Module) -> nn.Module:
        for parameter in model.parameters():
            parameter.full_ndim = parameter.ndim  # type: ignore[attr-defined]
        wrapped: Any = super()._setup_model(model)
        plugin: Any = self.precision_plugin
        plugin.clip_grad_by_norm = lambda _, clip: wrapped.clip_grad_norm_(clip)  # Lightning's raises an error
        return wrapped

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a verified checkpoint of plain values; Lightning's own method would unpickle it."""
        if self.is_global_zero:
            self.checkpoint_io.load_checkpoint(checkpoint_path)
        self.barrier("checked")
        return super().load_checkpoint(checkpoint_path, weights_only)


class FullyShardedLayers(ModelParallelStrategy):
    """FSDP2: ``fully_shard`` on every layer of encoder and denoiser and on the rest, data parallel only."""

    def setup_environment(self) -> None:
        """Create a mesh of all devices, and set the module's sharding hook."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        assert self.lightning_module is not None
        self.lightning_module.configure_model = self._shard  # type: ignore[method-assign]

    def _shard(self) -> None:
        module = self.lightning_module
        assert module is not None
        if not isinstance(module, FSDPModule):  # testing follows training with the same module
            shard(module, self.device_mesh["data_parallel"])


def shard(module: pl.LightningModule, mesh: Any) -> None:
    """Shard a module over a mesh, layer by layer."""
    for part in list(module.modules()):
        if isinstance(part, Encoder | DiT):
            for layer in layers_of(part):
                fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for step in ("training_step", "validation_step", "test_step"):
        if hasattr(module, step):
            register_fsdp_forward_method(module, step)


class FirstRanksBuffers(pl.Callback):
    """Synchronize buffers such as running statistics from the first rank before each step, as after a resume.

    DistributedDataParallel sends them before a forward pass, but not before the first one after validation; sharding
    strategies never do. A teacher uses them, so different buffers would change the gradient.
    """

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Send the buffers, or have the next forward pass send them."""
        if trainer.world_size == 1 or batch_idx % trainer.accumulate_grad_batches:
            return
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.require_forward_param_sync = True
        else:
            for buffer in pl_module.buffers():
                distributed.broadcast(buffer, 0)


def name_of(strategy: Strategy | str) -> str:
    """Return the name of the base strategy; for a plugin's own strategy, its class name."""
    kinds: tuple[tuple[str, type[Strategy]], ...] = (
        ("fsdp", FSDPStrategy),
        ("fsdp2", ModelParallelStrategy),
        ("deepspeed", DeepSpeedStrategy),
        ("auto", SingleDeviceStrategy),
    )
    if isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy):
        return "ddp_static" if strategy._ddp_kwargs.get("static_graph") else "ddp"
    known = next((name for name, kind in kinds if isinstance(strategy, kind)), type(strategy).__name__)
    return "auto" if isinstance(strategy, str) else known


def refusals(name: str, settings: Settings, accelerator: Literal["cpu", "gpu", "mps"]) -> Iterator[ConfigError]:
    """Yield each unsupported combination with the reason, the remedy and the key."""
    processes = settings.devices * settings.num_nodes
    if name == "auto" and processes > 1:
        yield ConfigError(f"{processes} processes need strategy=ddp (or fsdp2), not auto", "strategy")
    if name in ("fsdp", "deepspeed") and accelerator == "cpu":  # torch 2.13 crashes when gathering fsdp's weights there
        yield ConfigError(f"strategy={name} needs GPUs; on CPU use strategy=ddp or strategy=fsdp2", "strategy")
    if name == "ddp_static" and settings.accumulate_grad_batches > 1:
        yield ConfigError(
            "strategy=ddp_static can't accumulate: PyTorch plans its communication on the first batch, which must "
            "communicate. Set trainer.accumulate_grad_batches=1, or use strategy=ddp",
            "trainer.accumulate_grad_batches",
        )
    if settings.precision not in PRECISIONS.get(name, ALL):
        yield ConfigError(
            f"strategy={name} can't compute in trainer.precision={settings.precision}; it can in "
            f"{', '.join(PRECISIONS.get(name, ALL))}",
            "trainer.precision",
        )
    if accelerator == "mps" and (name != "auto" or processes > 1 or settings.precision != "32-true"):
        yield ConfigError(
            "an Apple GPU is one device, without double precision: set trainer.devices=1, trainer.num_nodes=1, "
            "strategy=auto and trainer.precision=32-true, or trainer.accelerator=cpu",
            "trainer.accelerator",
        )
    if settings.precision == "16-mixed" and accelerator == "cpu":
        yield ConfigError("trainer.precision=16-mixed needs a GPU; on CPU use bf16-mixed", "trainer.precision")
    for key in ("ema_decay", "swa_fraction"):
        if name in SHARDED and getattr(settings, key) is not None:
            yield ConfigError(
                f"strategy={name} can't average weights: each process holds a part of them. Set trainer.{key}=null, or "
                "use strategy=ddp",
                f"trainer.{key}",
            )
    if settings.max_nonfinite_steps and name == "deepspeed":
        yield ConfigError(
            "strategy=deepspeed can't skip a step: it keeps gradients of its own. Set "
            "trainer.max_nonfinite_steps=0, or use "
            "strategy=fsdp2",
            "trainer.max_nonfinite_steps",
        )
    if settings.compile and name in SHARDED:
        yield ConfigError(
            f"strategy={name} can't run a compiled encoder; set trainer.compile=false, or use strategy=ddp",
            "trainer.compile",
        )
    if settings.compile and settings.activation_checkpointing:
        yield ConfigError(
            "trainer.compile=true decides itself what to recompute; set trainer.activation_checkpointing=false",
            "trainer.activation_checkpointing",
        )


def started_processes() -> tuple[int, str] | None:
    """Return the number of processes started by srun or torchrun and which of them; None if neither."""
    if TorchElasticEnvironment.detect():
        return int(os.environ["WORLD_SIZE"]), "torchrun"
    if "SLURM_NTASKS" in os.environ and SLURMEnvironment.job_name() not in ("bash", "interactive"):
        return int(os.environ["SLURM_NTASKS"]), "SLURM"
    return None


def environment() -> list[Any]:
    """Return the cluster environment for Lightning: SLURM jobs are requeued by their script, not from inside."""
    started = started_processes()
    return [SLURMEnvironment(auto_requeue=False)] if started is not None and started[1] == "SLURM" else []


def timeout_of(strategy: Strategy | str) -> timedelta:
    """Return the timeout between processes."""
    return getattr(strategy, "patience", STARTING)


def check_combination(strategy: Strategy | str, settings: Settings, accelerator: Literal["cpu", "gpu", "mps"]) -> None:
    """Check that settings are compatible and that the right number of processes was started.

    Raises:
        ConfigError: with the reason and the remedy.
    """
    for refusal in refusals(name_of(strategy), settings, accelerator):
        raise refusal
    started = started_processes()
    asked = settings.devices * settings.num_nodes
    if started is None and settings.num_nodes > 1 and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"trainer.num_nodes={settings.num_nodes}: nothing has started processes on other machines; use srun "
            f"(make … "
            "SLURM=1) or torchrun, or run this on each with MASTER_ADDR, MASTER_PORT and NODE_RANK set",
            "trainer.num_nodes",
        )
    if started is not None and started[0] != asked:
        raise ConfigError(
            f"{started[1]} started {started[0]} process(es), but trainer.devices={settings.devices} × "
            f"trainer.num_nodes={settings.num_nodes} asks for {asked}; start one process a device, or set "
            f"trainer.devices to "
            "those of a node and trainer.num_nodes",
            "trainer.devices",
        )
