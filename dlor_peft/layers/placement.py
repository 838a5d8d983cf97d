"""Where the tensors of a layer are: offloaded by accelerate, sharded by FSDP or ZeRO, or by tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from accelerate.utils import named_module_tensors
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook that brings the module's own tensors in for each of its calls and leaves meta tensors in between."""
    hook = getattr(module, "_hf_hook", None)
    for one in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(one, AlignDevicesHook) and one.offload:
            return one
    return None


def execution_device(module: nn.Module) -> torch.device | None:
    """Where an offloaded module runs; None where it is not offloaded."""
    hook = offload_hook(module)
    return None if hook is None or hook.execution_device is None else torch.device(hook.execution_device)


def fetch(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of the module, whole and where the module runs. Not to be written.

    One that is offloaded is read from where it is kept, one that is sharded is gathered, which all processes do.
    """
    tensor, hook = getattr(module, name), offload_hook(module)
    if hasattr(tensor, "ds_numel"):
        # ZeRO-3 gathers it for calls of the module alone, and takes it away after them
        with gather_params_ctx(tensor, modifier_rank=None) if tensor.numel() < tensor.ds_numel else nullcontext():
            return tensor.clone()
    tensor = whole(tensor)
    if hook is None or not tensor.is_meta:
        return tensor
    assert hook.weights_map is not None
    return hook.weights_map[name].to(execution_device(module), tensor.dtype)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered where it is sharded. Differentiable."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def overwrite(parameter: Tensor, value: Tensor) -> None:
    """parameter <- value, in place; of a sharded one each process writes its shard of the value that all have."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def store(module: nn.Module, name: str, value: Tensor) -> None:
    """Overwrite a parameter; of an offloaded module also what is kept, in the memory of the CPU from then on."""
    parameter, hook = getattr(module, name), offload_hook(module)
    if hook is None or not parameter.is_meta:
        parameter.data = value
    if hook is not None:
        assert hook.weights_map is not None
        hook.weights_map = {key: hook.weights_map[key] for key in _offloaded_names(module, hook)} | {name: value.cpu()}


def stay(module: nn.Module) -> None:
    """Bring offloaded tensors of a module and those in it to where it runs, in copies of their own, to be trained."""
    for part in module.modules():
        hook = offload_hook(part)
        if hook is None:
            continue
        for name in _offloaded_names(part, hook):
            value = fetch(part, name).clone()
            if name in part._parameters:
                part._parameters[name] = nn.Parameter(value, getattr(part, name).requires_grad)
            else:
                part._buffers[name] = value
        # in the place of the old one; it moves the inputs
        add_hook_to_module(part, AlignDevicesHook(hook.execution_device, skip_keys=hook.skip_keys))


def _offloaded_names(module: nn.Module, hook: AlignDevicesHook) -> Iterator[str]:
    tensors = named_module_tensors(module, include_buffers=hook.offload_buffers, remove_non_persistent=True)
    return (name for name, _ in tensors)


def is_fsdp_managed(module: nn.Module) -> bool:
    """Whether FSDP shards the module's parameters, or those of a module around it, and gathers them when it runs."""
    return getattr(module, "_is_fsdp_managed_module", False)


def is_tensor_parallel(module: nn.Module, name: str) -> bool:
    """Whether the module computes with a part of its parameter `name`, each device with another."""
    if getattr(module, "_hf_tp_plan", None):
        return True
    parameter = getattr(module, name, None)
    if not isinstance(parameter, DTensor):
        return False
    # FSDP splits along one dimension of the mesh; what is split along another stays so when it has gathered
    num_splits = sum(not placement.is_replicate() for placement in parameter.placements)
    return num_splits > is_fsdp_managed(module)
