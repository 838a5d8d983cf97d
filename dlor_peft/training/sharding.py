"""What FSDP 2 needs beyond what Accelerate does for it."""

from __future__ import annotations

import torch
from torch import nn


def shard_on_cpu(mixed_precision: str) -> None:
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
    Accelerator(cpu=True, mixed_precision=mixed_precision, fsdp_plugin=plugin)
    state = AcceleratorState()
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin = plugin
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def join_embeddings(model: nn.Module) -> None:
    """Word embeddings that share one weight become one module, as in T5's encoder and decoder.

    Accelerate shards one of them, and torch refuses a weight of which another module outside of that unit has a part.
    """
    found: dict[torch.Tensor, nn.Embedding] = {}
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Embedding:
                setattr(module, name, found.setdefault(child.weight, child))
