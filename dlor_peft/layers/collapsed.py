"""Collapsed stacks, kept from call to call of a model that is not trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..form import Form, Residual

# the parameter, its memory (held, so that nothing else can be where it was), its version
State = tuple[Tensor, Tensor, int]


class CollapsedStacks:
    """The residuals of a layer's stacks by adapter name, as long as the parameters are what they were collapsed from.

    Only of parameters that require no gradient, as those of an adapter that is loaded for inference: torch's fused
    optimizers leave no trace of what they write. Others have changed when they are another object, have other memory,
    or count another version: by all that writes to them but through `.data` or a NumPy array. Who writes there calls
    `clear`, as a change between training and evaluation does.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[list[State], Residual]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # neither memory nor versions are those of a copy, or of another process
        return {"_kept": {}}

    def clear(self) -> None:
        self._kept.clear()

    def get(self, adapter_name: str, tensors: dict[str, Tensor], form: Form) -> Residual:
        """The residual of `tensors`: the one that was collapsed from them before, or the stack where they train."""
        is_traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        if is_traced or not all(map(_is_constant, tensors.values())):
            self._kept.pop(adapter_name, None)
            return form.residual(tensors, collapsed=False)
        states = [(tensor, tensor.detach(), tensor._version) for tensor in tensors.values()]
        before, residual = self._kept.get(adapter_name, ([], None))
        if residual is None or len(before) != len(states) or not all(map(_is_same, before, states)):
            # tensors made in inference mode could not be used in a training step
            with torch.inference_mode(False), torch.no_grad():
                residual = form.residual(tensors)
            # a tracer's tensors have no memory
            if all(type(part) is Tensor for part in (residual.U, *(memory for _, memory, _ in states))):
                self._kept[adapter_name] = states, residual
        return residual


def _is_constant(tensor: Tensor) -> bool:
    # what a sharded or parametrised module returns is no parameter, and may be new in the same memory
    return type(tensor) is nn.Parameter and not tensor.is_inference() and not tensor.requires_grad


def _is_same(before: State, now: State) -> bool:
    (parameter, memory, version), (parameter_now, memory_now, version_now) = before, now
    return parameter is parameter_now and memory.data_ptr() == memory_now.data_ptr() and version == version_now
