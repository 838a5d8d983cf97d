"""How FSDP 2 is made to shard where the processes are of the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import TrainingArguments


def shard_on_cpu(arguments: TrainingArguments) -> None:
    """Accelerate's state shards by FSDP where the processes are of the CPU, which it would silently not do.

    It takes the plugin of the environment for accelerators only: a Trainer would keep whole copies as under DDP.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, DistributedType, PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env

    if not parse_flag_from_env("ACCELERATE_USE_FSDP") or PartialState().distributed_type != DistributedType.MULTI_CPU:
        return
    if torch.accelerator.is_available():
        raise ValueError(
            "training.use_cpu: FSDP shards over the accelerators that torch sees. Hide them (CUDA_VISIBLE_DEVICES=)."
        )
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ValueError("--launch: processes of the CPU are sharded by FSDP 2 only: set fsdp_version: 2.")
    Accelerator(cpu=True, mixed_precision=arguments.mixed_precision, fsdp_plugin=plugin)
    state = AcceleratorState()
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin = plugin
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
