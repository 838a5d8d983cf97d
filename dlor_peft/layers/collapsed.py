"""Collapsed stacks, kept from call to call of a model that is evaluated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..form import Form, Residual

# the parameter, its memory (held, so that nothing else can be where it was), its version
State = tuple[Tensor, Tensor, int]


class CollapsedStacks:
    """The residuals of a layer's stacks by adapter name, as long as the parameters are what they were collapsed from.

    A parameter has changed when it is another object, has other memory, or counts another version: that is, by all
    that writes to it but through `.data`. Who writes there calls `clear`, as a change between training and evaluation
    and a switch of adapters do.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[list[State], Residual]] = {}

    def clear(self) -> None:
        self._kept.clear()

    def get(self, adapter_name: str, tensors: dict[str, Tensor], form: Form) -> Residual:
        """The residual of `tensors`: the one that was collapsed from them before, or the stack where they train."""
        if not all(_is_constant(tensor) for tensor in tensors.values()):
            return form.residual(tensors, collapsed=False)
        states = [(tensor, tensor.detach(), tensor._version) for tensor in tensors.values()]
        before, residual = self._kept.get(adapter_name, ([], None))
        if residual is None or len(before) != len(states) or not all(map(_is_same, before, states)):
            # tensors made in inference mode could not be used in a training step
            with torch.inference_mode(False), torch.no_grad():
                residual = form.residual(tensors)
            self._kept[adapter_name] = states, residual
        return residual


def _is_constant(tensor: Tensor) -> bool:
    # what a sharded or parametrised module returns is no parameter, and may be new in the same memory
    return (
        type(tensor) is nn.Parameter
        and not tensor.is_inference()
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )


def _is_same(before: State, now: State) -> bool:
    (parameter, memory, version), (parameter_now, memory_now, version_now) = before, now
    return parameter is parameter_now and memory.data_ptr() == memory_now.data_ptr() and version == version_now
