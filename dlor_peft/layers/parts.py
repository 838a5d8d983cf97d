"""What layers are made of and what they put away."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class StackedWeight(nn.Module):
    """One stacked tensor as `.weight`, the leaf module that sharding and hot-swapping look for. Calls return it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self) -> Tensor:
        return self.weight

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.weight.shape))


class Snapshot:
    """A quantised layer as it is: backends replace its parameters, its state, or the layer itself."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.attributes = {
            name: copy.copy(value) if isinstance(value, dict) or name == "state" else value
            for name, value in layer.__dict__.items()
        }
        # bitsandbytes keeps the state of the quantisation on the parameter
        self.of_parameters = [(parameter, dict(parameter.__dict__)) for parameter in layer.parameters(recurse=False)]

    def restore(self) -> nn.Module:
        """The layer, as it was."""
        for target, attributes in [(self.layer, self.attributes), *self.of_parameters]:
            target.__dict__.clear()
            target.__dict__.update(attributes)
        return self.layer
