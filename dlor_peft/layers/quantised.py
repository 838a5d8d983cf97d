"""Weights of quantised layers: what is left to do around PEFT's backends to merge into them and to take it back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

# what writing a weight changes on the layer beside it: bitsandbytes' statistics, the repr that torchao wraps
_BESIDE = ("state", "quant_state", "extra_repr")


def refusal(backend: Any, layer: nn.Module) -> str | None:
    """Why a weight cannot be merged into such a layer; None where it can."""
    if not backend.supports_merge:
        return "PEFT cannot quantise a weight again for it"
    weight: Any = getattr(layer, "weight", None)
    if backend.backend_name == "torchao":
        if type(weight).dequantize == Tensor.dequantize:
            return f"torchao cannot dequantise a {type(weight).__name__}"
        if type(backend.get_apply_tensor_subclass()).__name__ == "FqnToConfig":
            return "PEFT cannot quantise a weight again by a FqnToConfig"
    return None


def dequantised(backend: QuantizationBackend, layer: nn.Module) -> Tensor:
    """The weight, in the floating-point dtype that the backend dequantises to."""
    weight: Any = getattr(layer, "weight", None)
    return _dequantised_repacked(weight) if _is_repacked(weight) else backend.get_base_weight(layer)


class Snapshot:
    """A quantised layer's weight as it is, sharing its memory; `write` and the layer's own calls leave it alone."""

    def __init__(self, owner: BaseTunerLayer) -> None:
        self.layer = owner.get_base_layer()
        attributes = self.layer.__dict__
        # bitsandbytes' 8-bit state is written in place
        self.beside = {
            name: copy.copy(attributes[name]) if name == "state" else attributes[name]
            for name in _BESIDE
            if name in attributes
        }
        self.parameters: dict[str, Any] = dict(self.layer._parameters)
        # bitsandbytes keeps the statistics of the quantisation on the parameter
        self.of_parameters = [(p, dict(p.__dict__)) for p in self.parameters.values() if p is not None]

    def restore(self, owner: BaseTunerLayer) -> None:
        """Put the weight back, bit for bit, and on the device where it was."""
        written, layer = owner.get_base_layer(), self.layer
        if written is not layer:
            layer.train(written.training)
            _holder(owner).base_layer = layer
        for name in _BESIDE:
            layer.__dict__.pop(name, None)
        # quantising may have left a plain tensor where the parameter was
        layer.__dict__.pop("weight", None)
        layer.__dict__.update(self.beside)
        for parameter, attributes in self.of_parameters:
            parameter.__dict__.clear()
            parameter.__dict__.update(attributes)
        layer._parameters.clear()
        layer._parameters.update(self.parameters)


@torch.no_grad()
def write(owner: BaseTunerLayer, backend: QuantizationBackend, W: Tensor) -> None:
    """Quantise W into the layer; where that fails the layer is as it was."""
    snapshot, layer = Snapshot(owner), owner.get_base_layer()
    try:
        backend.set_base_weight(_holder(owner), W)
    except Exception:
        snapshot.restore(owner)
        raise
    written = owner.get_base_layer()
    if written is not layer:
        # PEFT's backend for HQQ builds a new layer from the weight alone
        written.bias = layer.bias
        written.train(layer.training)


def _holder(owner: BaseTunerLayer) -> Any:
    """The innermost of nested adapter layers, which holds the base layer itself."""
    holder: Any = owner
    while hasattr(holder.base_layer, "base_layer"):
        holder = holder.base_layer
    return holder


def _is_repacked(weight: Any) -> bool:
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def _dequantised_repacked(weight: Any) -> Tensor:
    """A 4-bit weight that bitsandbytes has repacked in place, as it does when a CPU first calls it for inference.

    bitsandbytes' own dequantisation takes the repacked bytes for the original ones.
    """
    from bitsandbytes.functional import (  # pyright: ignore[reportMissingImports]
        _convert_weight_packed_for_cpu_inverse,
        dequantize_4bit,
    )

    state = copy.copy(weight.quant_state)
    # else the scales are quantised once more
    state.original_nested = False
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    if state.absmax.ndim == 2:
        # what the inverse of bitsandbytes 0.50 leaves out
        state.absmax = state.absmax.T.reshape(-1)
    state.absmax = state.absmax.float()
    return dequantize_4bit(data, state)
