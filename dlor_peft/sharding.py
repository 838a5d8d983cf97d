"""How FSDP2 splits an adapter: its tensors (depth, rows, ...) along the rows, not along the depth, which is mostly 1.

By itself FSDP2 splits every parameter along the first dimension. One that is shorter there than there are devices lies
whole on the first of them, and a gather moves it padded to one copy a device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
import torch.distributed.fsdp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


def shard_placement(num_devices: int) -> Callable[[nn.Parameter], Shard | None]:
    """For `fully_shard(shard_placement_fn=...)` over `num_devices`: where each parameter is split.

    One that is at least `num_devices` long in the first dimension stays FSDP2's choice, as does one of which no
    dimension is a multiple of `num_devices`; any other is split along the longest that is.
    """

    def choose(parameter: nn.Parameter) -> Shard | None:
        shape = parameter.shape
        even = [dim for dim, size in enumerate(shape) if size and size % num_devices == 0]
        if not even or shape[0] >= num_devices:
            return None
        return Shard(max(even, key=lambda dim: shape[dim]))

    return choose


@contextmanager
def adapters_sharded_by_rows() -> Iterator[None]:
    """Within it `fully_shard` splits by `shard_placement` what its caller leaves open.

    For Accelerate, which does not pass it on: around `Trainer.train()` or `Accelerator.prepare()`. What is within a
    unit already is left to it: Accelerate makes one of the word embeddings even where a block of the model holds them,
    as BERT's does, and torch refuses to shard twice. So is what has no parameters: Accelerate makes a unit of the last
    normalisation, which a SentenceTransformer's may do without.
    """
    original = torch.distributed.fsdp.fully_shard

    @functools.wraps(original)
    def fully_shard(module: Any, *, mesh: DeviceMesh | None = None, **kwargs: Any) -> Any:
        # of two dimensions FSDP2 replicates over the first
        num_devices = dist.get_world_size() if mesh is None else mesh.size(mesh.ndim - 1)
        kwargs.setdefault("shard_placement_fn", shard_placement(num_devices))
        rest = [one for one in ([module] if isinstance(module, nn.Module) else module) if _is_unit(one)]
        if rest:
            original(rest[0] if len(rest) == 1 else rest, mesh=mesh, **kwargs)
        return module

    torch.distributed.fsdp.fully_shard = fully_shard  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    finally:
        torch.distributed.fsdp.fully_shard = original  # pyright: ignore[reportPrivateImportUsage]


def _is_unit(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    holds_unit = any(isinstance(part, torch.distributed.fsdp.FSDPModule) for part in module.modules())
    return holds_unit or not all(isinstance(parameter, DTensor) for parameter in parameters)
