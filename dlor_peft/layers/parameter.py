"""Adapters that act on a parameter itself: of experts, of attention, of any module that computes in its own way."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from ..config import DLoRConfig
from ..form import Form
from .base import DLoRLayer


class ParameterLayer(DLoRLayer):
    """A layer whose base runs with W' in the place of W. W' is formed anew in every call, and so costs its size."""

    mixed_batch_error: type[Exception] = ValueError

    def _adapted_forward(self, x: Tensor, adapter_names: list[str], args: tuple, kwargs: dict[str, Any]) -> Any:
        base, name, weight = self.get_base_layer(), self.parameter_name, self.adapted_weight()
        if weight.is_meta and not x.is_meta:
            raise ValueError(
                f"dlor_peft.layers.parameter: the parameter {name!r} is offloaded, and an adapter of it needs it in "
                "memory. Give the module that holds it a device in device_map."
            )
        if parametrize.is_parametrized(base, name):
            steps = base.parametrizations[name]  # pyright: ignore[reportIndexIssue, reportArgumentType]
            parametrize.register_parametrization(base, name, _Instead(weight), unsafe=True)
            try:
                return self.base_layer(x, *args, **kwargs)
            finally:
                del steps[-1]  # pyright: ignore
        path, layer = name, self.base_layer
        while isinstance(layer, DLoRLayer):
            path, layer = f"base_layer.{path}", layer.base_layer
        return functional_call(self.base_layer, {path: weight}, (x, *args), kwargs)

    def _check_adapter_names(self, x: Tensor, adapter_names: list[str] | None) -> None:
        if adapter_names is not None:
            raise self.mixed_batch_error(
                f"dlor.{type(self).__name__} does not support mixed adapter batches yet (adapter_names): one "
                "parameter serves all rows. Use one adapter a batch."
            )


class _Instead(nn.Module):
    """The last step of a parametrisation, which puts another tensor in its place."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        # not a parameter of this module, nor a buffer
        self.weight = (weight,)

    def forward(self, _: Tensor) -> Tensor:
        return self.weight[0]


class ParamWrapper(ParameterLayer):
    """DLoR on one parameter of a module, named by `target_parameters`; PEFT knows the class by this name.

    A matrix is (out_features, in_features). A tensor of three dimensions holds experts, each of which has factors of
    its own: (experts, out_features, in_features), or (experts, in_features, out_features) where the module says that
    it `is_transposed`. Several parameters of one module nest.
    """

    def __init__(self, base_layer: nn.Module, *args: Any, parameter_name: str, **kwargs: Any) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer, *args, **kwargs)

    @property
    def fan_in_fan_out(self) -> bool:
        return len(self._shape) == 3 and getattr(self.get_base_layer(), "is_transposed", False)

    @property
    def _shape(self) -> tuple[int, ...]:
        weight = getattr(self.get_base_layer(), self.parameter_name)
        # DeepSpeed ZeRO-3 leaves an empty tensor behind
        return tuple(getattr(weight, "ds_shape", weight.shape))

    def _features(self) -> tuple[int, int]:
        if len(self._shape) not in (2, 3):
            raise ValueError(
                f"dlor_peft.layers.parameter: the parameter {self.parameter_name!r} has the shape {self._shape}; DLoR "
                "adapts matrices and, expert by expert, tensors of three dimensions. Take it out of target_parameters."
            )
        rows, columns = self._shape[-2:]
        return (rows, columns) if self.fan_in_fan_out else (columns, rows)

    def resolve_form(self, config: DLoRConfig, r: int, depth: int) -> Form:
        if config.dlor_dropout:
            raise ValueError(
                f"dlor_peft.layers.parameter: dlor_dropout={config.dlor_dropout} needs the input of the update, which "
                f"an adapter of a parameter ({self.parameter_name!r}) does not see. Set dlor_dropout=0."
            )
        form = super().resolve_form(config, r, depth)
        return form.of_experts(self._shape[0]) if len(self._shape) == 3 else form

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module that holds the parameters, with this and all nested adapters merged or dropped."""
        layer: nn.Module = self
        while isinstance(layer, DLoRLayer):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"
