"""The frozen weights that an adapter acts on, read from the base one at a time."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .conversion import Unit, units
from .skeleton import Skeleton


class BaseWeights:
    """The parameters of the model by their names in it. The files are opened when the first is asked for."""

    def __init__(self, base: Checkpoint, skeleton: Skeleton) -> None:
        self._base, self._skeleton = base, skeleton

    @cached_property
    def units(self) -> dict[str, Unit]:
        """Name in the model -> the unit of the checkpoint that it comes from."""
        found, _ = units(self._base.specs, self._base.read_empty, self._skeleton.model)
        return {target: unit for unit in found for target in unit.targets}

    def stored(self, name: str) -> Tensor:
        """The parameter as the model has it. ValueError where the base has none of that name and shape."""
        tied = next((names for names in self._skeleton.ties if name in names), [name])
        unit = next((self.units[other] for other in [name, *tied] if other in self.units), None)
        parameter = self._skeleton.parameters[name]
        if unit is None:
            raise ValueError(
                f"{self._base.folder.source} does not match: the adapter was trained on a "
                f"{type(self._skeleton.model).__name__}, and the base has no {name}."
            )
        tensors = unit.to_model(self._base.read, self._skeleton.model)
        tensor = tensors.get(name, tensors[unit.targets[0]])
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{self._base.folder.source} does not match its own configuration: {name} has the shape "
                f"{tuple(tensor.shape)}, and {type(self._skeleton.model).__name__} needs {tuple(parameter.shape)}."
            )
        return tensor

    def matrix(self, module: str) -> Tensor:
        """The weight (out_features, in_features) of an adapted module, in float32 or wider."""
        layer = self._skeleton.layers[module]
        W = layer._as_matrix(self.stored(f"{module}.{layer.parameter_name}"))
        return W.to(torch.promote_types(W.dtype, torch.float32))
