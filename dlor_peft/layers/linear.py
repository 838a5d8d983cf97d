"""DLoR on linear layers, quantised ones among them."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..kernels import is_autocast, is_transformed
from .activation import ActivationLayer


class Linear(ActivationLayer):
    """DLoR on torch.nn.Linear, or on transformers' Conv1D, whose weight is stored as (in_features, out_features)."""

    plain_forwards: ClassVar = {kind: kind.forward for kind in (nn.Linear, Conv1D)}

    @property
    def fan_in_fan_out(self) -> bool:
        return isinstance(self.get_base_layer(), Conv1D)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def why_not_fused(self, adapter_names: list[str] | None = None) -> str | None:
        """Why the update and the frozen product are not one operation for these adapters; None where they are."""
        if adapter_names is None:
            adapter_names = [name for name in self.active_adapters if name in self.form]
        if len(adapter_names) != 1:
            return f"{len(adapter_names)} adapters are active"
        (name,) = adapter_names
        if self.form[name].calls_twice(self.scaling[name]):
            return "side 'both' at a scale other than 1 needs the frozen output"
        dropout = self.dlor_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.training:
            return "dropout is on the update's input alone"
        if not self._is_plain():
            kind = type(self.base_layer).__name__
            return f"the base layer, a {kind}, is hooked, sharded, or does more than apply its weight"
        layer = self.get_base_layer()
        if layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad):
            return "the base layer is trained"
        return "torch.func is at work" if is_transformed() else None

    def _explain_adapted(self) -> str:
        reason = self.why_not_fused()
        if reason is None:
            return "update and frozen product are one operation"
        return f"{super()._explain_adapted()}, since {reason}"

    def _adapted_forward(self, x: Tensor, adapter_names: list[str], args: tuple, kwargs: dict[str, Any]) -> Tensor:
        if args or kwargs or x.is_nested or self.why_not_fused(adapter_names) or not self._takes(x):
            return super()._adapted_forward(x, adapter_names, args, kwargs)
        (name,), layer = adapter_names, self.get_base_layer()
        residual, W = self._residual_to_apply(name), self._as_matrix(layer.weight)
        return self.form[name].forward_linear(residual, x, W, layer.bias, self.scaling[name])

    def _takes(self, x: Tensor) -> bool:
        # or else what the base layer does, or its own error
        dtype = self.get_base_layer().weight.dtype
        if is_autocast(x.device.type):
            return all(one.is_floating_point and one.itemsize < 8 for one in (x.dtype, dtype))
        return x.dtype == dtype

    def _without_bias(self, x: Tensor) -> Tensor:
        weight = self.get_base_layer().weight
        return x @ weight if self.fan_in_fan_out else nn.functional.linear(x, weight)
