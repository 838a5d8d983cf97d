"""DLoR on torch.nn.MultiheadAttention, which applies its projections without calling them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..config import DLoRConfig
from .base import DLoRLayer
from .parameter import ParameterLayer


class UncalledLinear(ParameterLayer):
    """DLoR on a linear layer whose weight others read, as attention reads that of its `out_proj`: they read W'."""

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        # other layers do so when they are called
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.adapted_weight()


class MultiheadAttention(ParameterLayer):
    """DLoR on the in-projection, W (3 embed_dim, embed_dim), and on the out-projection of one attention layer.

    The projections to query, key and value have one adapter, as they have one weight. Where they have three, because
    their inputs differ in width, name those in `target_parameters`. Dropout drops features of the input of the update,
    the same ones for all tokens.
    """

    parameter_name = "in_proj_weight"
    mixed_batch_error = TypeError

    def update_layer(
        self, adapter_name: str, r: int, depth: int, config: DLoRConfig, tied_to: DLoRLayer | None = None
    ) -> None:
        super().update_layer(adapter_name, r, depth, config, tied_to)
        attention = self.get_base_layer()
        if isinstance(attention.out_proj, UncalledLinear):
            attention.out_proj.update_layer(adapter_name, r, depth, config)
        else:
            attention.out_proj = UncalledLinear(attention.out_proj, adapter_name, r, depth, config)

    def _features(self) -> tuple[int, int]:
        if not self.get_base_layer()._qkv_same_embed_dim:
            raise ValueError(
                "dlor_peft.layers.attention: Only same embed for query/key/value is supported as of now for "
                'MultiheadAttention. Name "q_proj_weight", "k_proj_weight" and "v_proj_weight" of it in '
                "target_parameters, and its out_proj in target_modules."
            )
        return super()._features()

    @property
    def out_proj(self) -> nn.Module:
        """As the base layer has it, without adapters."""
        return self.get_base_layer().out_proj.get_base_layer()

    @property
    def in_proj_weight(self) -> Tensor:
        """The adapted weight: nn.TransformerEncoderLayer reads it past the attention layer."""
        return self.adapted_weight()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The attention layer with both projections merged, or as it was."""
        attention = self.get_base_layer()
        for layer in (self, attention.out_proj):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        attention.out_proj = attention.out_proj.get_base_layer()
        return attention

    def __getattr__(self, name: str) -> Any:
        # nn.TransformerEncoderLayer asks for batch_first, num_heads and more
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)
