"""Adapters that act on a parameter itself: of experts, of attention, of any module that computes in its own way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..config import DLoRConfig
from ..form import Form
from .base import DLoRLayer


class ParameterLayer(DLoRLayer):
    """A layer whose base runs with W' in the place of W. W' is formed anew in every call, and so costs its size."""

    mixed_batch_error: type[Exception] = ValueError

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        if isinstance(base_layer, BaseTunerLayer) and not isinstance(base_layer, DLoRLayer):
            raise ValueError(
                "dlor_peft.layers.parameter: a parameter that has an adapter of another method "
                f"({type(base_layer).__module__}) takes none of DLoR, which reads it past that. Keep it out with "
                "exclude_modules, or merge and unload the other adapter first."
            )
        super().__init__(base_layer, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base layer is called, which may be by keywords, or with nothing."""
        self._check_adapter_names(args, kwargs.pop("adapter_names", None))
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged or not any(name in self.form for name in self.active_adapters):
            return self.base_layer(*args, **kwargs)
        with _instead(self.get_base_layer(), self.parameter_name, self.adapted_weight()):
            return self.base_layer(*args, **kwargs)

    def _check_adapter_names(self, x: Any, adapter_names: list[str] | None) -> None:
        if adapter_names is not None:
            raise self.mixed_batch_error(
                f"dlor.{type(self).__name__} does not support mixed adapter batches yet (adapter_names): one "
                "parameter serves all rows. Use one adapter a batch."
            )


@contextmanager
def _instead(module: nn.Module, name: str, weight: Tensor) -> Iterator[None]:
    """`module.name` is `weight` for the time being."""
    if parametrize.is_parametrized(module, name):
        # a property of the class, which no attribute of the module hides: one more step of the parametrisation does
        parametrize.register_parametrization(module, name, _Constant(weight), unsafe=True)
        steps = cast(Any, module.parametrizations)[name]
        try:
            yield
        finally:
            del steps[-1]
        return
    # an attribute hides the parameter, which FSDP and accelerate write when the module runs; but torch 2.11 traces no
    # deletion of one
    owner = module._parameters if torch.compiler.is_compiling() else module.__dict__
    hidden = owner.get(name)
    owner[name] = weight  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        if hidden is None:
            del owner[name]
        else:
            owner[name] = hidden  # pyright: ignore[reportArgumentType]


class _Constant(nn.Module):
    """A step of a parametrisation that puts another tensor in its place."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        # in a tuple it is no parameter of this module
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

    def named_in_config(self, name: str) -> str:
        return f"{super().named_in_config(name)}.{self.parameter_name}"

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
        return f"parameter_name={self.parameter_name!r}, {super().extra_repr()}"
