"""DLoR on linear layers, quantised ones among them."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .activation import ActivationLayer


class Linear(ActivationLayer):
    """DLoR on torch.nn.Linear, or on transformers' Conv1D, whose weight is stored as (in_features, out_features)."""

    plain_types = (nn.Linear, Conv1D)

    @property
    def fan_in_fan_out(self) -> bool:
        return isinstance(self.get_base_layer(), Conv1D)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def _without_bias(self, x: Tensor) -> Tensor:
        weight = self.get_base_layer().weight
        return x @ weight if self.fan_in_fan_out else nn.functional.linear(x, weight)
