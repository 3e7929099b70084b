"""How a run is spread over devices, chosen by configuration; the modules don't know."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy


def single() -> str:
    """One device."""
    return "auto"


def ddp(*, find_unused_parameters: bool = False, static_graph: bool = False, timeout_minutes: float = 30.0) -> Strategy:
    """Use one process a device, each with the whole model (DistributedDataParallel)."""
    return DDPStrategy(
        find_unused_parameters=find_unused_parameters,
        static_graph=static_graph,
        timeout=timedelta(minutes=timeout_minutes),
    )


def fsdp(
    *,
    sharding: Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD"] = "FULL_SHARD",
    cpu_offload: bool = False,
    timeout_minutes: float = 30.0,
) -> Strategy:
    """Use one process a GPU, parameters, gradients and optimizer state sharded among them."""
    return FSDPStrategy(
        sharding_strategy=sharding,
        cpu_offload=cpu_offload,
        use_orig_params=True,
        state_dict_type="full",
        timeout=timedelta(minutes=timeout_minutes),
    )
