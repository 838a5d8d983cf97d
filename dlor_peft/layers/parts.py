"""What layers are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .placement import is_fsdp_managed, whole


class StackedWeight(nn.Module):
    """One stacked tensor as `.weight`, the leaf module that sharding and hot-swapping look for. Calls return it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self) -> Tensor:
        # where FSDP shards this module by itself, the memory of the weight is freed when the call returns
        return whole(self.weight).clone() if is_fsdp_managed(self) else self.weight

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.weight.shape))
